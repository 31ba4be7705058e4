"""ComfyUI over HTTP: one method a question. What follows one prompt over the websocket is in `follow.py`.

Facts about ComfyUI's answers were measured on 0.18.1, 0.3.75 and 0.3.64.
"""

from __future__ import annotations

import json
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

import urllib3

from worker.errors import ComfyUICrashed, ComfyUIUnavailable, PromptRejected
from worker.payload import Workflow
from worker.process import ComfyUIProcess, ProcessState

HTTP_TIMEOUT_S = 5.0  # ComfyUI's event loop can stall for seconds while a node holds the GIL
SUBMIT_TIMEOUT_S = 60.0  # validation hashes the input files and lists the model folders, on a network volume too
READY_POLL_S = 0.05
HUNG_S = 30.0  # a ComfyUI that has answered before and then does not for so long, with nothing to do, is killed
QUEUE_POLL_S = 0.02
MAX_SHOWN_CHARS = 500


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
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.port = port
        self.process = process
        self.clock = clock
        self.sleep = sleep
        # Keep-alive to loopback only; urllib3 opens a new connection by itself where the server closed an idle one.
        self._pool = urllib3.HTTPConnectionPool("127.0.0.1", port, maxsize=1, retries=False)
        self._generation: ProcessState | None = None
        self._is_output_class: dict[str, bool] = {}

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
                    self._generation, self._is_output_class = state, {}
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
        if self._generation is not None and not self.process.is_alive(self._generation):
            raise ComfyUICrashed("ComfyUI ended in the middle of the job.", log=self.process.log_tail())

    def kill(self) -> None:
        """End the process that this job runs on; `start.sh` starts the next one."""
        if self._generation is not None:
            self.process.kill(self._generation)

    # --- the queue ---

    def queued_ids(self) -> tuple[list[str], list[str]]:
        """The prompt ids that run and those that wait."""
        queue = self._get_json("/queue")
        return [item[1] for item in queue["queue_running"]], [item[1] for item in queue["queue_pending"]]

    def has_queued(self, prompt_id: str) -> bool:
        """True while ``prompt_id`` runs or waits."""
        return any(prompt_id in ids for ids in self.queued_ids())

    def stop(self, prompt_ids: list[str], grace_s: float) -> bool:
        """Take prompts out of the queue and interrupt those that run, until none of them is in either list.

        Delete first, then interrupt again and again: an interrupt on its own got lost in 42 to 53 of 120 tries, since
        ComfyUI clears its flag just after the queue has handed a prompt out. Returns False after ``grace_s``.
        """
        deadline = self.clock() + grace_s
        self._post("/queue", {"delete": prompt_ids})
        while True:
            running, pending = self.queued_ids()
            left = [prompt_id for prompt_id in prompt_ids if prompt_id in running or prompt_id in pending]
            if not left:
                return True
            if self.clock() >= deadline:
                return False
            for prompt_id in left:
                self._post("/interrupt", {"prompt_id": prompt_id})
            self.sleep(QUEUE_POLL_S)

    def clear_queue(self, grace_s: float) -> bool:
        """Make sure that nothing of an earlier job runs or waits. False if a ComfyUI that did not let go had to be
        killed for it: then the next start has to be waited for."""
        running, pending = self.queued_ids()
        if (running or pending) and not self.stop(running + pending, grace_s):
            self.kill()
            return False
        return True

    def submit(self, workflow: Workflow, prompt_id: str, client_id: str, api_key: str | None) -> list[str]:
        """POST /prompt, once. Returns warnings: nodes that ComfyUI refused while other branches run.

        Raises PromptRejected with a sentence for each refused node.
        """
        body: dict[str, Any] = {"prompt": workflow, "prompt_id": prompt_id, "client_id": client_id}
        if api_key:
            body["extra_data"] = {"api_key_comfy_org": api_key}
        try:
            status, answer = self._call("POST", "/prompt", body, timeout_s=SUBMIT_TIMEOUT_S)
        except ComfyUIUnavailable:
            # It may have been taken all the same; the same id queued twice would kill ComfyUI's worker thread.
            if self.has_queued(prompt_id) or self.history(prompt_id) is not None:
                return []
            raise
        content = _as_json(answer)
        if status == 200 and isinstance(content, dict):
            return _node_sentences(content.get("node_errors"))
        raise _rejection(status, content)

    # --- the history ---

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """ComfyUI's record of a finished prompt; None while it is queued, running or unknown."""
        return self._get_json(f"/history/{prompt_id}").get(prompt_id)

    def clear_history(self) -> None:
        """Forget every finished prompt: each record holds a whole workflow. ComfyUI serves one job at a time here."""
        self._post("/history", {"clear": True})

    def free_cache(self) -> None:
        """Drop ComfyUI's result cache. It always unloads the models too."""
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

    # --- HTTP ---

    def _answers(self) -> bool:
        try:
            return self._pool.request("GET", "/system_stats", timeout=2.0).status == 200
        except urllib3.exceptions.HTTPError:
            return False

    def _get_json(self, path: str) -> dict[str, Any]:
        status, answer = self._call("GET", path)
        content = _as_json(answer)
        if status != 200 or not isinstance(content, dict):
            raise ComfyUIUnavailable(f"ComfyUI answered GET {path.split('/')[1]} with status {status}.")
        return content

    def _post(self, path: str, body: dict[str, Any]) -> None:
        status, _ = self._call("POST", path, body)
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
        return answer.status, answer.data


def _as_json(answer: bytes) -> Any:
    try:
        return json.loads(answer)
    except ValueError:
        return None


def _rejection(status: int, content: Any) -> PromptRejected:
    """ComfyUI's refusal as sentences; the bodies are in the recordings `invalid_prompts.json`."""
    error = content.get("error") if isinstance(content, dict) else None
    if not isinstance(error, dict):
        return PromptRejected(f"ComfyUI refused the workflow with status {status}; is it in API format?", status=status)
    node_errors = content.get("node_errors")
    # For a fault of an upstream node, error.details is empty and only node_errors tell what is wrong.
    sentences = _node_sentences(node_errors) or [_whole_sentence(error)]
    return PromptRejected(
        "ComfyUI refused the workflow: " + " ".join(sentences),
        type=error.get("type"),
        node_errors=_trimmed(node_errors),
    )


def _node_sentences(node_errors: Any) -> list[str]:
    if not isinstance(node_errors, dict):
        return []
    return [
        f"Node {node_id} ({node.get('class_type')}): {_joined(error.get('message'), error.get('details'))}"
        for node_id, node in node_errors.items()
        for error in node.get("errors", [])
    ]


def _whole_sentence(error: dict[str, Any]) -> str:
    """For a refusal that names no node of its own."""
    if error.get("type") == "prompt_outputs_failed_validation":  # not a word more for a cycle (0.18.1, 0.3.64)
        return "None of its outputs is valid; do its links form a cycle?"
    message, details = str(error.get("message")), error.get("details")
    class_type = (error.get("extra_info") or {}).get("class_type")
    if class_type and class_type not in message:  # 0.18.1 names an unknown node by its title
        details = f"{details}, class {class_type}"
    return _joined(message, details)


def _joined(message: Any, details: Any) -> str:
    text = f"{str(message).rstrip('.')}: {details}" if details else str(message)
    return text[:MAX_SHOWN_CHARS].rstrip(".") + "."


def _trimmed(node_errors: Any) -> dict[str, Any]:
    """``node_errors`` without ``extra_info``, which repeats every choice of an input (hundreds of model names)."""
    if not isinstance(node_errors, dict):
        return {}
    return {
        node_id: {
            "class_type": node.get("class_type"),
            "errors": [
                {key: error.get(key) for key in ("type", "message", "details")} for error in node.get("errors", [])
            ],
        }
        for node_id, node in node_errors.items()
    }
