"""One prompt from POST /prompt to its record in the history, whatever the websocket does meanwhile.

The history is the truth; the websocket tells when to look at it, how far the run is, and carries the pictures that
are sent nowhere else. A quiet or broken socket is bridged by /queue and /history, so a lost last message never hangs
a job. ComfyUI's message order is the same in 0.18.1, 0.3.75 and 0.3.64: ``executing{node: null}`` is always last.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from worker.comfyui import ComfyUI
from worker.control import JobControl
from worker.errors import (
    ComfyUICrashed,
    ComfyUIUnavailable,
    ExecutionFailed,
    GpuBroken,
    HistoryMissing,
    JobCancelled,
    JobTimeout,
    OutOfGpuMemory,
)
from worker.feed import Feed
from worker.payload import Workflow

log = logging.getLogger(__name__)

NONCE_INPUT = "__job_nonce"
TICK_S = 0.1  # how soon a cancellation, a deadline or a dead process is seen
DRAIN_S = 1.0  # how long messages are still read after the end was found without them
QUIET_S = 2.0  # without a message for so long, /queue and /history are asked
HISTORY_WAITS_S = (0.010, 0.050, 0.250, 1.250, 6.250)
MAX_TRACEBACK_LINES = 8
MAX_LINE_CHARS = 500
MAX_MESSAGE_CHARS = 4000  # a failure has RunPod's size limit too
_PREVIEW_EVENT = 1  # binary frame: u32 event, u32 format, image (ComfyUI's protocol.py)

Progress = dict[str, Any]


@dataclass
class RunOutcome:
    """What a finished prompt left: ComfyUI's ``outputs`` by node id, and the pictures that came by websocket only."""

    prompt_id: str
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    socket_images: list[tuple[str, bytes]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def run_workflow(
    comfyui: ComfyUI,
    workflow: Workflow,
    *,
    control: JobControl,
    on_progress: Callable[[Progress], None],
    interrupt_grace_s: float,
    api_key: str | None = None,
) -> RunOutcome:
    """Queue ``workflow``, follow it to its end and read its history.

    Raises PromptRejected, ExecutionFailed, OutOfGpuMemory, JobTimeout, JobCancelled, HistoryMissing, and what ComfyUI's
    methods raise. On a deadline or a cancellation the prompt is out of ComfyUI, or ComfyUI is killed, before it raises.
    """
    run = _Run(comfyui, workflow, control, on_progress, interrupt_grace_s)
    try:
        return run.complete(with_nonce(comfyui, workflow), api_key)
    except ExecutionFailed as error:
        # A node with a strict signature behind "takes any input" passes the nonce on and raises TypeError.
        if NONCE_INPUT not in error.message:
            raise
    log.warning("a node does not take the extra input; dropping ComfyUI's cache instead")
    comfyui.free_cache()
    run = _Run(comfyui, workflow, control, on_progress, interrupt_grace_s)
    return run.complete(workflow, api_key)


def with_nonce(comfyui: ComfyUI, workflow: Workflow) -> Workflow:
    """A copy in which every output node that nothing links from has one input that no other job has.

    Without it ComfyUI answers a repeated workflow from its cache: "success", naming a file that the wipe removed. It
    must be a string (a list would be a link), and one value a job, so that equal output nodes stay one execution.
    """
    nonce = secrets.token_hex(4)
    linked = {
        value[0]
        for node in workflow.values()
        for value in node["inputs"].values()
        if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
    }
    return {
        node_id: {**node, "inputs": {**node["inputs"], NONCE_INPUT: nonce}}
        if node_id not in linked and comfyui.is_output_class(node["class_type"])
        else node
        for node_id, node in workflow.items()
    }


class _Run:
    """One prompt in ComfyUI. ``complete`` is called once."""

    def __init__(
        self,
        comfyui: ComfyUI,
        workflow: Workflow,
        control: JobControl,
        on_progress: Callable[[Progress], None],
        interrupt_grace_s: float,
    ) -> None:
        self._comfyui = comfyui
        self._workflow = workflow
        self._control = control
        self._on_progress = on_progress
        self._interrupt_grace_s = interrupt_grace_s
        self._outcome = RunOutcome(prompt_id=str(uuid.uuid4()))
        self._node_id: str | None = None
        self._finished_nodes: set[str] = set()
        self._terminal_seen = False

    def complete(self, workflow: Workflow, api_key: str | None) -> RunOutcome:
        prompt_id = self._outcome.prompt_id
        feed = Feed(self._comfyui.port, client_id=uuid.uuid4().hex, clock=self._comfyui.clock)
        try:
            # Socket first: messages can arrive before the POST is answered, and what is sent to nobody is lost.
            feed.open()
            self._control.check()
            self._outcome.warnings = self._comfyui.submit(workflow, prompt_id, feed.client_id, api_key)
            self._follow(feed)
            record = self._read_history()
        except (JobTimeout, JobCancelled):
            self._stop()
            raise
        finally:
            feed.close()
        _raise_if_failed(record.get("status") or {})
        self._outcome.outputs = record.get("outputs") or {}
        return self._outcome

    def _follow(self, feed: Feed) -> None:
        """Return when the prompt has ended, in whatever way, and what it had sent by then has been read."""
        quiet_since = self._comfyui.clock()
        ended_at: float | None = None  # when the queue and the history said so, not the websocket
        while True:
            self._control.check()
            message = feed.receive(TICK_S)
            now = self._comfyui.clock()
            if isinstance(message, bytes):
                self._take_binary(message)
            elif message is not None and self._is_ours(message):
                quiet_since = now  # nodes of others may chatter on: that says nothing about this prompt
                if self._is_last(message):
                    return
            if ended_at is not None:
                if message is None or now - ended_at >= DRAIN_S:
                    return
                continue
            ended_unheard = self._terminal_seen and message is None
            if not feed.is_open or ended_unheard or now - quiet_since >= QUIET_S:
                ended_at = now if self._has_ended() else None
                quiet_since = now
                feed.reopen_if_due()

    def _has_ended(self) -> bool:
        """Ask ComfyUI itself. The queue first: a prompt enters the history in the same step in which it leaves it."""
        self._comfyui.raise_if_dead()  # the one that answers may be its successor
        try:
            if self._comfyui.has_queued(self._outcome.prompt_id):
                return False
            if self._comfyui.history(self._outcome.prompt_id) is not None:
                return True
        except ComfyUIUnavailable:
            return False  # slow, not dead: the next look, the deadline or the process will tell
        if self._terminal_seen:
            return True
        raise ComfyUICrashed("ComfyUI no longer knows the prompt: it was restarted, or somebody deleted it.")

    def _stop(self) -> None:
        """Make ComfyUI let go of the prompt, so that it computes for nobody."""
        try:
            stopped = self._comfyui.stop([self._outcome.prompt_id], self._interrupt_grace_s)
        except ComfyUIUnavailable:
            stopped = False
        except ComfyUICrashed:
            return
        if not stopped:
            log.warning("ComfyUI did not stop within %g s; killing it", self._interrupt_grace_s)
            self._comfyui.kill()

    def _read_history(self) -> dict[str, Any]:
        """The history race: just after ``execution_success`` the record is not there in a third of all looks, for up
        to 12 ms (0.18.1: sent in execution.py, stored in main.py); after ``executing{node: null}`` it always was."""
        for wait_s in HISTORY_WAITS_S:
            with contextlib.suppress(ComfyUIUnavailable):  # a stall is no reason to lose a finished run
                record = self._comfyui.history(self._outcome.prompt_id)
                if record is not None:
                    return record
            self._control.check()
            self._comfyui.sleep(wait_s)
        record = self._comfyui.history(self._outcome.prompt_id)
        if record is not None:
            return record
        raise HistoryMissing(
            f"ComfyUI ran the workflow but has no history of it after {sum(HISTORY_WAITS_S):.1f} s; send the job again."
        )

    # --- messages ---

    def _is_ours(self, message: dict[str, Any]) -> bool:
        data = message.get("data")
        return isinstance(data, dict) and data.get("prompt_id") == self._outcome.prompt_id

    def _is_last(self, message: dict[str, Any]) -> bool:
        kind, data = message.get("type"), message["data"]
        if kind == "executing":
            if data.get("node") is None:
                return True
            self._enter(str(data["node"]))
        elif kind == "execution_cached":
            self._finished_nodes.update(map(str, data.get("nodes") or ()))
        elif kind == "progress":
            self._report(data.get("value"), data.get("max"))
        elif kind in ("execution_success", "execution_error", "execution_interrupted"):
            self._terminal_seen = True
        return False

    def _enter(self, node_id: str) -> None:
        if self._node_id is not None:
            self._finished_nodes.add(self._node_id)
        self._node_id = node_id
        self._report(None, None)

    def _report(self, value: Any, maximum: Any) -> None:
        progress: Progress = {"stage": "running", "node": self._node_id, "node_class": self._class_type()}
        within = 0.0
        if isinstance(value, int | float) and isinstance(maximum, int | float) and maximum > 0:
            progress |= {"value": value, "max": maximum}
            within = min(1.0, value / maximum)
        finished = len(self._finished_nodes & self._workflow.keys())
        progress["percent"] = min(99, int(100 * (finished + within) / len(self._workflow)))
        self._on_progress(progress)

    def _class_type(self) -> str | None:
        node = self._workflow.get(self._node_id or "")
        return node["class_type"] if node else None

    def _take_binary(self, message: bytes) -> None:
        """SaveImageWebsocket writes no file: its pictures are full-size "previews" sent while it is executing."""
        is_picture = int.from_bytes(message[:4], "big") == _PREVIEW_EVENT and len(message) > 8
        if is_picture and self._node_id is not None and self._class_type() == "SaveImageWebsocket":
            self._outcome.socket_images.append((self._node_id, message[8:]))


def _raise_if_failed(status: dict[str, Any]) -> None:
    """Read the record's ``status`` before its outputs: those of branches that finished before an error are kept."""
    if status.get("status_str") != "error":
        return
    messages = {kind: data for kind, data in status.get("messages", [])}
    if "execution_error" not in messages:
        raise JobCancelled("The workflow was interrupted in ComfyUI.")
    error = messages["execution_error"]
    kind = str(error.get("exception_type"))
    message = str(error.get("exception_message")).strip()[:MAX_MESSAGE_CHARS]
    where = f"Node {error.get('node_id')} ({error.get('node_type')})"
    lines = "".join(error.get("traceback") or []).splitlines()
    details = {
        "node_id": error.get("node_id"),
        "node_type": error.get("node_type"),
        "exception_type": kind,
        "exception_message": message,
        "traceback": [line[:MAX_LINE_CHARS] for line in lines[-MAX_TRACEBACK_LINES:]],
    }
    if kind.endswith("OutOfMemoryError") or "CUDA error: out of memory" in message:
        raise OutOfGpuMemory(
            f"{where} ran out of GPU memory; use a smaller picture or batch, or a larger GPU.", **details
        )
    if "CUDA error:" in message:  # sticky: every later CUDA call of the process fails too (CUDA runtime documentation)
        raise GpuBroken(f"{where} met a GPU fault; this worker is being replaced, send the job again.", **details)
    first_line = message.partition("\n")[0][:MAX_LINE_CHARS]
    raise ExecutionFailed(f"{where} failed: {kind}: {first_line}", **details)
