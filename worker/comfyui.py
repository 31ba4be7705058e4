"""ComfyUI over HTTP: one method a question. What follows one prompt over the websocket is in `follow.py`.

Facts about ComfyUI's answers were measured on 0.18.1, 0.3.75 and 0.3.64.
"""

from __future__ import annotations

import http.client
import json
import select
import socket
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

import urllib3

from worker.comfyui_errors import ModelNote, node_sentences, rejection
from worker.errors import ComfyUICrashed, ComfyUIUnavailable, JobCancelled, JobTimeout
from worker.payload import Workflow
from worker.process import ComfyUIProcess, ProcessState

HTTP_TIMEOUT_S = 5.0  # ComfyUI's event loop can stall for seconds while a node holds the GIL
LOOK_TIMEOUT_S = 2.0  # where another look follows anyway
SUBMIT_TIMEOUT_S = 60.0  # validation hashes the input files and lists the model folders, on a network volume too
SUBMIT_POLL_S = 0.1
READY_POLL_S = 0.05
HUNG_S = 30.0  # a ComfyUI that has answered before and then neither answers nor computes for so long is killed
IDLE_CPU_S = 0.1  # so little processor time in HUNG_S is none
QUEUE_POLL_S = 0.02


class ComfyUI:
    """The ComfyUI that listens on 127.0.0.1:``port``. Not thread-safe: one job at a time.

    Every method raises ComfyUICrashed when the process has ended, and ComfyUIUnavailable when it lives and does not
    answer within 5 s, unless it says otherwise.
    """

    def __init__(
        self,
        port: int,
        process: ComfyUIProcess,
        *,
        model_note: ModelNote = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.port = port
        self.process = process
        self.clock = clock
        self.sleep = sleep
        self._model_note = model_note
        # Keep-alive to loopback only; urllib3 opens a new connection by itself where the server closed an idle one.
        self._pool = urllib3.HTTPConnectionPool("127.0.0.1", port, maxsize=1, retries=False)
        self._generation: ProcessState | None = None
        self._is_output_class: dict[str, bool] = {}
        self._refusing: set[str] = set()
        self._silent_since: tuple[float, float] | None = None  # the clock, and the process's CPU time, then

    # --- the process ---

    def wait_ready(self, timeout_s: float, check: Callable[[], None] = lambda: None) -> ProcessState:
        """Poll every 50 ms until the current start of ComfyUI answers; returns it. ``check`` may raise to give up.

        Raises ComfyUIUnavailable after ``timeout_s``. A start that dies is replaced by `start.sh`, or the container
        ends with it, so waiting on is right as long as there is time.
        """
        started = self.clock()
        while True:
            check()
            state = self.process.state()
            if state is not None and self.process.has_booted(state) and self._answers():
                if state != self._generation:  # another start may have other nodes
                    self._generation, self._is_output_class, self._refusing = state, {}, set()
                return state
            waited_s = self.clock() - started
            if state is not None and state == self._generation and waited_s >= HUNG_S:
                self.process.kill(state)  # `start.sh` starts the next one
            if waited_s >= timeout_s:
                raise ComfyUIUnavailable(
                    f"ComfyUI did not answer on port {self.port} within {timeout_s:g} s.", log=self.process.log_tail()
                )
            self.sleep(READY_POLL_S)

    def raise_if_dead(self) -> None:
        """Raise ComfyUICrashed, with the end of ComfyUI's log, if the start that this job runs on has ended."""
        if self._generation is None or self.process.is_alive(self._generation):
            return
        death = self.process.death_of(self._generation)
        raise ComfyUICrashed(
            f"ComfyUI ended in the middle of the job: {death.sentence}",
            exit_code=death.exit_code,
            out_of_memory=death.out_of_memory,
            log=self.process.log_tail(),
        )

    def raise_if_hung(self) -> None:
        """To be called after a look that was not answered. Slow is not hung: a ComfyUI that computes, or answers
        anything in between, gets all the time there is. One that does neither for HUNG_S is killed: ComfyUICrashed."""
        if self._generation is None:
            return
        now, cpu_s = self.clock(), self.process.cpu_s(self._generation)
        if self._silent_since is None or cpu_s - self._silent_since[1] > IDLE_CPU_S:
            self._silent_since = now, cpu_s
        elif now - self._silent_since[0] >= HUNG_S:
            self.kill()
            raise ComfyUICrashed(
                f"ComfyUI neither answered nor computed for {HUNG_S:g} s and was ended.", log=self.process.log_tail()
            )

    def kill(self) -> None:
        """End the process that this job runs on; `start.sh` starts the next one."""
        if self._generation is not None:
            self.process.kill(self._generation)

    # --- the queue ---

    def queued_ids(self, timeout_s: float = HTTP_TIMEOUT_S) -> tuple[list[str], list[str]]:
        """The prompt ids that run and those that wait."""
        queue = self._get_json("/queue", timeout_s)
        return [item[1] for item in queue["queue_running"]], [item[1] for item in queue["queue_pending"]]

    def has_queued(self, prompt_id: str, timeout_s: float = HTTP_TIMEOUT_S) -> bool:
        """True while ``prompt_id`` runs or waits."""
        return any(prompt_id in ids for ids in self.queued_ids(timeout_s))

    def stop(self, prompt_ids: list[str], grace_s: float) -> bool:
        """Take prompts out of the queue and interrupt those that run, until none of them is in either list.

        Delete first, then interrupt again and again: an interrupt on its own got lost in 42 to 53 of 120 tries, since
        ComfyUI clears its flag just after the queue has handed a prompt out. Returns False after ``grace_s``.
        """
        deadline = self.clock() + grace_s
        patience_s = min(grace_s, HTTP_TIMEOUT_S)
        self._post("/queue", {"delete": prompt_ids}, patience_s)
        while True:
            running, pending = self.queued_ids(patience_s)
            left = [prompt_id for prompt_id in prompt_ids if prompt_id in running or prompt_id in pending]
            if not left:
                return True
            if self.clock() >= deadline:
                return False
            for prompt_id in left:
                self._post("/interrupt", {"prompt_id": prompt_id}, patience_s)
            self.sleep(QUEUE_POLL_S)

    def clear_queue(self, grace_s: float) -> bool:
        """Make sure that nothing of an earlier job runs or waits. False if a ComfyUI that did not let go had to be
        killed for it: then the next start has to be waited for."""
        running, pending = self.queued_ids()
        if (running or pending) and not self.stop(running + pending, grace_s):
            self.kill()
            return False
        return True

    def submit(
        self,
        workflow: Workflow,
        prompt_id: str,
        client_id: str,
        api_key: str | None,
        *,
        check: Callable[[], None] = lambda: None,
        grace_s: float = HTTP_TIMEOUT_S,
    ) -> list[str]:
        """POST /prompt, once. Returns warnings: nodes that ComfyUI refused while other branches run.

        ``check`` may raise JobTimeout or JobCancelled to give up; the answer is then waited for ``grace_s`` more, else
        ComfyUI is killed: a prompt that it takes after that would run for nobody. Raises PromptRejected with a
        sentence for each refused node.
        """
        body: dict[str, Any] = {"prompt": workflow, "prompt_id": prompt_id, "client_id": client_id}
        if api_key:
            body["extra_data"] = {"api_key_comfy_org": api_key}
        try:
            status, answer = self._post_prompt(json.dumps(body).encode(), check, grace_s)
        except ComfyUIUnavailable:
            # It may have been taken all the same; the same id queued twice would kill ComfyUI's worker thread.
            if self.has_queued(prompt_id) or self.history(prompt_id) is not None:
                return []
            raise
        content = _as_json(answer)
        if status == 200 and isinstance(content, dict):
            return node_sentences(content.get("node_errors"), self._model_note)
        refusal = rejection(status, content, self._model_note)
        if status >= 500:
            refusal.details["log"] = self.process.log_tail()
        raise refusal

    def _post_prompt(self, payload: bytes, check: Callable[[], None], grace_s: float) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SUBMIT_TIMEOUT_S)
        try:
            connection.request("POST", "/prompt", payload, {"Content-Type": "application/json"})
            self._await_answer(connection.sock, check, grace_s)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            self.raise_if_dead()
            raise ComfyUIUnavailable(f"ComfyUI did not answer POST /prompt ({type(error).__name__}).") from error
        finally:
            connection.close()

    def _await_answer(self, connection: socket.socket, check: Callable[[], None], grace_s: float) -> None:
        """Return when there is something to read, be it the end of the connection. Raises TimeoutError."""
        deadline = self.clock() + SUBMIT_TIMEOUT_S
        while not select.select([connection], [], [], SUBMIT_POLL_S)[0]:
            try:
                check()
            except (JobTimeout, JobCancelled):
                if not select.select([connection], [], [], grace_s)[0]:
                    self.kill()
                raise
            if self.clock() >= deadline:
                raise TimeoutError

    # --- the history ---

    def history(self, prompt_id: str, timeout_s: float = HTTP_TIMEOUT_S) -> dict[str, Any] | None:
        """ComfyUI's record of a finished prompt; None while it is queued, running or unknown."""
        return self._get_json(f"/history/{prompt_id}", timeout_s).get(prompt_id)

    def clear_history(self) -> None:
        """Forget every finished prompt: each record holds a whole workflow. ComfyUI serves one job at a time here."""
        self._post("/history", {"clear": True})

    def free_memory(self) -> None:
        """Drop ComfyUI's result cache and unload its models. It does so as soon as no prompt runs or waits."""
        self._post("/free", {"unload_models": True, "free_memory": True})

    # --- nodes ---

    def is_output_class(self, class_type: str) -> bool:
        """True for classes that ComfyUI runs for their own sake (``output_node`` in /object_info).

        False for a name that it cannot look up: the workflow is the caller's, and POST /prompt says what is wrong.
        """
        if class_type not in self._is_output_class:
            quoted = urllib.parse.quote(class_type, safe="", errors="replace")
            status, answer = self._call("GET", f"/object_info/{quoted}")
            info = _as_json(answer) if status == 200 else None
            known = info.get(class_type) if isinstance(info, dict) else None
            self._is_output_class[class_type] = isinstance(known, dict) and bool(known.get("output_node"))
        return self._is_output_class[class_type]

    def takes_nonce(self, class_type: str) -> bool:
        """False for a class that has failed in this start of ComfyUI because of an input that it does not know."""
        return class_type not in self._refusing

    def note_nonce_refusal(self, class_type: str) -> set[str]:
        """A class with a strict signature behind "takes any input". Returns all that are known."""
        self._refusing.add(class_type)
        return self._refusing

    # --- HTTP ---

    def _answers(self) -> bool:
        try:
            return self._pool.request("GET", "/system_stats", timeout=2.0).status == 200
        except urllib3.exceptions.HTTPError:
            return False

    def _get_json(self, path: str, timeout_s: float) -> dict[str, Any]:
        status, answer = self._call("GET", path, timeout_s=timeout_s)
        content = _as_json(answer)
        if status != 200 or not isinstance(content, dict):
            raise ComfyUIUnavailable(f"ComfyUI answered GET {path.split('/')[1]} with status {status}.")
        return content

    def _post(self, path: str, body: dict[str, Any], timeout_s: float = HTTP_TIMEOUT_S) -> None:
        status, _ = self._call("POST", path, body, timeout_s)
        if status != 200:
            raise ComfyUIUnavailable(f"ComfyUI answered POST {path} with status {status}.")

    def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout_s: float = HTTP_TIMEOUT_S
    ) -> tuple[int, bytes]:
        payload = None if body is None else json.dumps(body).encode()
        headers = {} if payload is None else {"Content-Type": "application/json"}
        try:
            answer = self._pool.request(method, path, body=payload, headers=headers, timeout=timeout_s)
        except urllib3.exceptions.HTTPError as error:
            self.raise_if_dead()
            raise ComfyUIUnavailable(f"ComfyUI did not answer {method} {path} ({type(error).__name__}).") from error
        self._silent_since = None
        return answer.status, answer.data


def _as_json(answer: bytes) -> Any:
    try:
        return json.loads(answer)
    except ValueError:
        return None
