"""ComfyUI over HTTP: one method a question. What follows one prompt over the websocket is in `follow.py`.

Facts about ComfyUI's answers were measured on 0.18.1, 0.3.75 and 0.3.64.
"""

from __future__ import annotations

import json
import urllib.parse
from dataclasses import dataclass
from typing import Any

from worker.comfyui_errors import ModelNote, Refusals
from worker.comfyui_server import HTTP_TIMEOUT_S, ComfyUIServer
from worker.errors import ComfyUICrashed, ComfyUIUnavailable
from worker.graph import Workflow
from worker.workflow_checks import file_inputs

QUEUE_POLL_S = 0.02
CLEAN_UP_TIMEOUT_S = 5.0
MAX_KNOWN_CLASSES = 10_000


@dataclass(frozen=True)
class _NodeClass:
    """What /object_info says of a class, as far as it matters here."""

    is_output: bool
    file_inputs: frozenset[str]


class ComfyUI:
    """The questions that a job asks ``server``.

    Every method raises what `ComfyUIServer.call` does, and ComfyUIUnavailable for an answer that makes no sense.
    """

    def __init__(self, server: ComfyUIServer, model_note: ModelNote = lambda _: None) -> None:
        self.server = server
        self._refusals = Refusals(model_note, self.choices)
        # By start of ComfyUI and class: another start may have other nodes.
        self._classes: dict[tuple[int, str], _NodeClass] = {}
        self._refusing: set[tuple[int, str]] = set()

    def sees_gpu(self) -> bool:
        """Whether ComfyUI computes on anything but the processor."""
        return any(device["type"] != "cpu" for device in self._get_json("/system_stats")["devices"])

    # --- the queue ---

    def queued_ids(self, timeout_s: float = HTTP_TIMEOUT_S) -> tuple[list[str], list[str]]:
        """The prompt ids that run and those that wait."""
        queue = self._get_json("/queue", timeout_s)
        return [item[1] for item in queue["queue_running"]], [item[1] for item in queue["queue_pending"]]

    def has_queued(self, prompt_id: str) -> bool:
        """True while ``prompt_id`` runs or waits."""
        return any(prompt_id in ids for ids in self.queued_ids())

    def stop(self, prompt_ids: list[str], grace_s: float) -> bool:
        """Take prompts out of the queue and interrupt those that run, until none of them is in either list.

        Delete first, then interrupt again and again: an interrupt on its own got lost in 42 to 53 of 120 tries, since
        ComfyUI clears its flag just after the queue has handed a prompt out. Returns False after ``grace_s``, also
        where ComfyUI does not answer. No job's end cuts this short.
        """
        clock = self.server.clock
        deadline = clock() + grace_s
        deleted = False
        with self.server.serving(None):
            while True:
                patience_s = max(deadline - clock(), QUEUE_POLL_S)
                try:
                    if not deleted:
                        self._post("/queue", {"delete": prompt_ids}, patience_s)
                        deleted = True
                    running, pending = self.queued_ids(patience_s)
                    left = [prompt_id for prompt_id in prompt_ids if prompt_id in running or prompt_id in pending]
                    if not left:
                        return True
                    for prompt_id in left:
                        self._post("/interrupt", {"prompt_id": prompt_id}, patience_s)
                except ComfyUIUnavailable:
                    pass
                if clock() >= deadline:
                    return False
                self.server.sleep(QUEUE_POLL_S)

    def clear_queue(self, grace_s: float) -> bool:
        """Make sure that nothing of an earlier job runs or waits. False if a ComfyUI that did not let go had to be
        ended for it: then the next start has to be waited for."""
        running, pending = self.queued_ids()
        if (running or pending) and not self.stop(running + pending, grace_s):
            self.server.end()
            return False
        return True

    def submit(
        self, workflow: Workflow, prompt_id: str, client_id: str, api_key: str | None, grace_s: float
    ) -> list[str]:
        """POST /prompt, once. Returns warnings: nodes that ComfyUI refused while other branches run.

        Raises PromptRejected with a sentence for each refused node. ``grace_s`` is that of `ComfyUIServer.call`.
        """
        body: dict[str, Any] = {"prompt": workflow, "prompt_id": prompt_id, "client_id": client_id}
        if api_key:
            body["extra_data"] = {"api_key_comfy_org": api_key}
        try:
            status, answer = self.server.call("POST", "/prompt", body, grace_s=grace_s)
        except ComfyUIUnavailable as error:
            if isinstance(error.__cause__, TimeoutError):
                self.server.end()  # it might take the prompt yet, for nobody
                told = f"ComfyUI did not answer POST /prompt within {HTTP_TIMEOUT_S:g} s and was ended."
                raise ComfyUICrashed(told, log=self.server.process.log_tail()) from error
            # It may have been taken all the same; the same id queued twice would kill ComfyUI's worker thread.
            if self.has_queued(prompt_id) or self.history(prompt_id) is not None:
                return []
            raise
        content = _as_json(answer)
        if status == 200 and isinstance(content, dict):
            return self._refusals.node_sentences(content.get("node_errors"))
        refusal = self._refusals.rejection(status, content)
        if status >= 500:
            refusal.details["log"] = self.server.process.log_tail()
        raise refusal

    # --- the history ---

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """ComfyUI's record of a finished prompt; None while it is queued, running or unknown."""
        return self._get_json(f"/history/{prompt_id}").get(prompt_id)

    def clear_history(self) -> None:
        """Forget every finished prompt: each record holds a whole workflow. ComfyUI serves one job at a time here."""
        self._post("/history", {"clear": True}, CLEAN_UP_TIMEOUT_S)

    def free_memory(self) -> None:
        """Drop ComfyUI's result cache and unload its models, in a moment: a prompt that is queued at once may still be
        run before (0.18.1, main.py: prompt_worker takes a prompt first and looks at the wish after it)."""
        self._post("/free", {"unload_models": True, "free_memory": True}, CLEAN_UP_TIMEOUT_S)

    # --- nodes ---

    def is_output_class(self, class_type: str) -> bool:
        """True for classes that ComfyUI runs for their own sake (``output_node`` in /object_info).

        False for a name that it cannot look up: the workflow is the caller's, and POST /prompt says what is wrong.
        """
        return self._class(class_type).is_output

    def file_inputs(self, class_type: str) -> frozenset[str]:
        """The inputs of a class that take a file of the input directory; none for a name that it cannot look up."""
        return self._class(class_type).file_inputs

    def _class(self, class_type: str) -> _NodeClass:
        key = self._key(class_type)
        if key not in self._classes:
            description = self._look_up(class_type)
            if len(self._classes) >= MAX_KNOWN_CLASSES:  # names that callers made up are kept, too
                self._classes.clear()
            is_output = bool(description.get("output_node"))
            self._classes[key] = _NodeClass(is_output, file_inputs(class_type, description))
        return self._classes[key]

    def choices(self, class_type: str, input_name: str) -> list[str] | None:
        """What an input lets one choose from now; None where that is not known."""
        inputs = self._look_up(class_type).get("input")
        for group in ("required", "optional"):
            named = inputs.get(group) if isinstance(inputs, dict) else None
            match named.get(input_name) if isinstance(named, dict) else None:
                # V1 nodes have [[choice, ...], {...}], V3 nodes ["COMBO", {"options": [choice, ...]}] (0.18.1).
                case [list() as choices, *_] | [str(), {"options": list() as choices}, *_]:
                    return [str(choice) for choice in choices]
        return None

    def _look_up(self, class_type: str) -> dict[str, Any]:
        """A class as /object_info describes it; empty for one that it does not know (200 and {}, 0.18.1).

        Raises ComfyUIUnavailable for a status of 500 or more: taken for an answer, it would switch the checks off.
        """
        quoted = urllib.parse.quote(class_type, safe="", errors="replace")
        status, answer = self.server.call("GET", f"/object_info/{quoted}")
        if status >= 500:
            raise ComfyUIUnavailable(f"ComfyUI answered GET /object_info with status {status}.")
        info = _as_json(answer) if status == 200 else None
        known = info.get(class_type) if isinstance(info, dict) else None
        return known if isinstance(known, dict) else {}

    def takes_nonce(self, class_type: str) -> bool:
        """False for a class that has failed in this start of ComfyUI because of an input that it does not know."""
        return self._key(class_type) not in self._refusing

    def note_nonce_refusal(self, class_type: str) -> None:
        """A class with a strict signature behind "takes any input"."""
        self._refusing.add(self._key(class_type))

    def _key(self, class_type: str) -> tuple[int, str]:
        state = self.server.state
        return (0 if state is None else state.generation), class_type

    # --- HTTP ---

    def _get_json(self, path: str, timeout_s: float = HTTP_TIMEOUT_S) -> dict[str, Any]:
        status, answer = self.server.call("GET", path, timeout_s=timeout_s)
        content = _as_json(answer)
        if status != 200 or not isinstance(content, dict):
            raise ComfyUIUnavailable(f"ComfyUI answered GET /{path.split('/')[1]} with status {status}.")
        return content

    def _post(self, path: str, body: dict[str, Any], timeout_s: float) -> None:
        status, _ = self.server.call("POST", path, body, timeout_s=timeout_s)
        if status != 200:
            raise ComfyUIUnavailable(f"ComfyUI answered POST {path} with status {status}.")


def _as_json(answer: bytes) -> Any:
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):
        return None
