"""One prompt from POST /prompt to its record in the history, whatever the websocket does meanwhile.

The history is the truth; the websocket tells when to look at it, how far the run is, and carries the pictures that
are sent nowhere else. A quiet or broken socket is bridged by /queue and /history, so a lost last message never hangs
a job. ComfyUI's message order is the same in 0.18.1, 0.3.75 and 0.3.64: ``executing{node: null}`` is always last.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from worker.comfyui import ComfyUI
from worker.comfyui_errors import failure_of, joined
from worker.control import JobControl
from worker.errors import ComfyUICrashed, ComfyUIUnavailable, HistoryMissing, JobCancelled, JobTimeout
from worker.feed import Feed
from worker.graph import Workflow

log = logging.getLogger(__name__)

TICK_S = 0.1  # how soon a cancellation, a deadline or a dead process is seen
DRAIN_S = 1.0  # how long messages are still read after the end was found without them
QUIET_S = 2.0  # without a message for so long, /queue and /history are asked
HISTORY_WAITS_S = (0.010, 0.050, 0.250, 1.250, 6.250)
MAX_AMOUNT = 1e15  # of steps; JSON has numbers that no float can hold
_PREVIEW_EVENT = 1  # binary frame: u32 event, u32 format, image (ComfyUI's protocol.py)
# A node has stopped the branches behind it, on purpose and with a reason; the run goes on, and the history does not
# have the reason (execution.py, 0.18.1).
_BLOCKED = "ExecutionBlocked"
_PICTURES_BY_SOCKET = "SaveImageWebsocket"

Progress = dict[str, Any]


@dataclass
class RunOutcome:
    """What a finished prompt left: ComfyUI's ``outputs`` by node id, and the pictures that came by websocket only.

    ``cached`` are the nodes that did not run, because ComfyUI had their results; ``pictures_lost`` is True where
    pictures may have been sent while the websocket was down.
    """

    prompt_id: str
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    cached: frozenset[str] = frozenset()
    socket_images: list[tuple[str, bytes]] = field(default_factory=list)
    pictures_lost: bool = False
    warnings: list[str] = field(default_factory=list)


class PromptRun:
    """One prompt in ComfyUI. ``complete`` is called once.

    ``api_key`` is for ComfyUI's API nodes. On a deadline or a cancellation the prompt is out of ComfyUI, or ComfyUI
    is killed, before ``complete`` raises.
    """

    def __init__(
        self,
        comfyui: ComfyUI,
        workflow: Workflow,
        *,
        control: JobControl,
        on_progress: Callable[[Progress], None],
        interrupt_grace_s: float,
        api_key: str | None,
    ) -> None:
        self._comfyui = comfyui
        self._server = comfyui.server
        self._workflow = workflow
        self._control = control
        self._on_progress = on_progress
        self._interrupt_grace_s = interrupt_grace_s
        self._api_key = api_key
        self._outcome = RunOutcome(prompt_id=str(uuid.uuid4()))
        self._node_id: str | None = None
        self._finished_nodes: set[str] = set()
        self._terminal_seen = False

    def complete(self) -> RunOutcome:
        """Queue the workflow, follow it to its end and read its history.

        Raises PromptRejected, ExecutionFailed, OutOfGpuMemory, GpuBroken, JobTimeout, JobCancelled, HistoryMissing, and
        what ComfyUI's methods raise.
        """
        feed = Feed(self._server.port, client_id=uuid.uuid4().hex, clock=self._server.clock)
        try:
            # Socket first: messages can arrive before the POST is answered, and what is sent to nobody is lost.
            feed.open()
            self._control.check()
            self._outcome.warnings += self._comfyui.submit(
                self._workflow,
                self._outcome.prompt_id,
                feed.client_id,
                self._api_key,
                self._interrupt_grace_s,
            )
            self._follow(feed)
            record = self._read_history()
        except (JobTimeout, JobCancelled):
            self._stop()
            raise
        finally:
            feed.close()
        self._take_record(record)
        if feed.was_down or not self._terminal_seen:  # else every message has come, in order
            self._outcome.pictures_lost = any(
                node["class_type"] == _PICTURES_BY_SOCKET for node in self._workflow.values()
            )
        return self._outcome

    def _take_record(self, record: dict[str, Any]) -> None:
        """Read the record's ``status`` before its outputs: those of branches that finished before an error are kept."""
        status = record.get("status") or {}
        self._outcome.cached = frozenset(
            str(node_id)
            for kind, data in status.get("messages", [])
            if kind == "execution_cached"
            for node_id in data.get("nodes") or ()
        )
        failure = failure_of(status, self._workflow, [self._api_key] if self._api_key else [])
        if failure is not None:
            raise failure
        self._outcome.outputs = record.get("outputs") or {}

    @property
    def cached(self) -> frozenset[str]:
        """The nodes that did not run, also of a prompt that failed."""
        return self._outcome.cached

    def _follow(self, feed: Feed) -> None:
        """Return when the prompt has ended, in whatever way, and what it had sent by then has been read."""
        quiet_since = self._server.clock()
        ended_at: float | None = None  # when the queue and the history said so, not the websocket
        while True:
            self._control.check()
            message = feed.receive(TICK_S)
            now = self._server.clock()
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
        self._server.raise_if_dead()  # the one that answers may be its successor
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
        with contextlib.suppress(ComfyUICrashed):
            if not self._comfyui.stop([self._outcome.prompt_id], self._interrupt_grace_s):
                log.warning("ComfyUI did not stop within %g s; ending it", self._interrupt_grace_s)
                self._server.end()

    def _read_history(self) -> dict[str, Any]:
        """The history race: just after ``execution_success`` the record is not there in a third of all looks, for up
        to 12 ms (0.18.1: sent in execution.py, stored in main.py); after ``executing{node: null}`` it always was."""
        for wait_s in (*HISTORY_WAITS_S, 0.0):
            with contextlib.suppress(ComfyUIUnavailable):  # a stall is no reason to lose a finished run
                record = self._comfyui.history(self._outcome.prompt_id)
                if record is not None:
                    return record
            self._wait(wait_s)
        raise HistoryMissing(
            f"ComfyUI ran the workflow but has no history of it after {sum(HISTORY_WAITS_S):.1f} s; send the job again."
        )

    def _wait(self, wait_s: float) -> None:
        """Sleep, unless the job has to end meanwhile."""
        until = self._server.clock() + wait_s
        while (left_s := until - self._server.clock()) > 0:
            self._control.check()
            self._server.sleep(min(left_s, TICK_S))

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
            nodes = data.get("nodes")
            self._finished_nodes.update(map(str, nodes if isinstance(nodes, list) else ()))
        elif kind == "progress":
            self._report(data.get("value"), data.get("max"))
        elif kind == "execution_error" and data.get("exception_type") == _BLOCKED:
            where = f"Node {data.get('node_id')} ({data.get('node_type')})"
            self._outcome.warnings.append(joined(where, data.get("exception_message")))
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
        if _is_amount(value) and _is_amount(maximum) and maximum > 0:
            progress |= {"value": value, "max": maximum}
            within = max(0.0, min(1.0, value / maximum))
        finished = len(self._finished_nodes & self._workflow.keys())
        progress["percent"] = min(99, int(100 * (finished + within) / len(self._workflow)))
        self._on_progress(progress)

    def _class_type(self) -> str | None:
        node = self._workflow.get(self._node_id or "")
        return node["class_type"] if node else None

    def _take_binary(self, message: bytes) -> None:
        """SaveImageWebsocket writes no file: its pictures are full-size "previews" sent while it is executing."""
        is_picture = int.from_bytes(message[:4], "big") == _PREVIEW_EVENT and len(message) > 8
        if is_picture and self._node_id is not None and self._class_type() == _PICTURES_BY_SOCKET:
            self._outcome.socket_images.append((self._node_id, message[8:]))


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and -MAX_AMOUNT < value < MAX_AMOUNT  # also false for NaN
