"""Queue and history of prompts, shared by the HTTP side and the worker thread (execution.py 0.18.1, PromptQueue)."""

from __future__ import annotations

import copy
import heapq
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .workflow import Workflow

# (number, prompt id, workflow, extra data, output nodes to run, secrets). ComfyUI's heap compares such tuples too, so
# a second prompt with the same number and id fails with a TypeError (and status 500) there as it does here.
Item = tuple[float, str, Workflow, dict[str, Any], list[str], dict[str, Any]]
MAX_HISTORY = 10000


@dataclass
class Outcome:
    """How a prompt ended: `messages` are the (event, data) pairs for the history's status."""

    success: bool = True
    outputs: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    messages: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


class PromptQueue:
    """All methods may be called from any thread.

    `changed` is called with `remaining()` whenever the queue changes, under the queue's lock: it must not wait.
    """

    def __init__(self, changed: Callable[[int], None]) -> None:
        self._changed = changed
        self._mutex = threading.RLock()
        self._wake = threading.Condition(self._mutex)
        self._pending: list[Item] = []
        self._running: dict[str, Item] = {}
        self._history: dict[str, Any] = {}
        self._flags: dict[str, Any] = {}

    def put(self, item: Item) -> None:
        """Queue a prompt; the lowest number runs first."""
        with self._mutex:
            heapq.heappush(self._pending, item)
            self._changed(self.remaining())
            self._wake.notify()

    def get(self, timeout_s: float) -> Item | None:
        """The next prompt, now counted as running; None after the timeout or when a flag was set."""
        with self._wake:
            if not self._pending:
                self._wake.wait(timeout_s)
            if not self._pending:
                return None
            item = heapq.heappop(self._pending)
            self._running[item[1]] = copy.deepcopy(item)
            self._changed(self.remaining())
            return item

    def finish(self, prompt_id: str, outcome: Outcome, *, remembered: bool = True) -> None:
        """Move a running prompt into the history, without its secrets; not `remembered`: it just ends."""
        with self._mutex:
            item = self._running.pop(prompt_id)
            if len(self._history) > MAX_HISTORY:
                self._history.pop(next(iter(self._history)))
            if remembered:
                self._history[prompt_id] = _entry(item, outcome)
            self._changed(self.remaining())

    def current(self) -> tuple[list[Item], list[Item]]:
        """(running, pending); pending in the heap's order, as ComfyUI lists it."""
        with self._mutex:
            return list(self._running.values()), list(self._pending)

    def remaining(self) -> int:
        """How many prompts run or wait."""
        with self._mutex:
            return len(self._pending) + len(self._running)

    def clear_pending(self) -> None:
        """Drop what waits; what runs goes on."""
        with self._mutex:
            self._pending = []
            self._changed(self.remaining())

    def delete_pending(self, prompt_id: str) -> None:
        """Drop one waiting prompt; an unknown or running one is left alone. It leaves no history."""
        with self._mutex:
            kept = [item for item in self._pending if item[1] != prompt_id]
            if len(kept) < len(self._pending):
                heapq.heapify(kept)
                self._pending = kept
                self._changed(self.remaining())

    def history(self, max_items: int | None, offset: int) -> dict[str, Any]:
        """Entries in the order they were stored, from `offset` on; with a negative offset the newest `max_items`."""
        with self._mutex:
            entries = list(self._history.items())
        if offset < 0:
            offset = 0 if max_items is None else max(0, len(entries) - max_items)
        return dict(entries[offset:][:max_items])

    def history_of(self, prompt_id: str) -> dict[str, Any]:
        """`{prompt_id: entry}`, or `{}` for a prompt that is unknown, deleted or not finished."""
        with self._mutex:
            return {prompt_id: self._history[prompt_id]} if prompt_id in self._history else {}

    def clear_history(self) -> None:
        """Forget all finished prompts."""
        with self._mutex:
            self._history = {}

    def delete_history(self, prompt_id: str) -> None:
        """Forget one finished prompt, if there is such a one."""
        with self._mutex:
            self._history.pop(prompt_id, None)

    def set_flag(self, name: str, value: Any) -> None:
        """Leave a wish for the worker thread and wake it up."""
        with self._mutex:
            self._flags[name] = value
            self._wake.notify()

    def take_flags(self) -> dict[str, Any]:
        """The wishes since the last call."""
        with self._mutex:
            flags, self._flags = self._flags, {}
            return flags


def _entry(item: Item, outcome: Outcome) -> dict[str, Any]:
    status_str = "success" if outcome.success else "error"
    status = {"status_str": status_str, "completed": outcome.success, "messages": outcome.messages}
    return {"prompt": public(item), "outputs": outcome.outputs, "status": status, "meta": outcome.meta}


def public(item: Item) -> list[Any]:
    """An item as /queue and /history show it: without the secrets."""
    return list(item[:5])
