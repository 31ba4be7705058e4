"""Takes prompts from the queue, one at a time, in the worker thread (main.py of ComfyUI 0.18.1, prompt_worker)."""

from __future__ import annotations

import logging
import threading
import time

from .cache import ResultCache
from .faults import Faults
from .folders import Folders
from .node import InterruptedPromptError
from .prompt_queue import Item, Outcome, PromptQueue
from .prompt_run import PromptRun
from .sessions import Sessions
from .versions import Version

log = logging.getLogger(__name__)

_IDLE_WAIT_S = 1000.0


class Executor:
    """Executes workflows and tells the client of each how it goes.

    `interrupt` is set by the HTTP side. It is cleared when a prompt begins and when it has stopped one, so one that
    is set just before a prompt begins is lost: ComfyUI's own race.
    """

    def __init__(
        self, sessions: Sessions, folders: Folders, version: Version, faults: Faults, *, metadata: bool, preview: bool
    ) -> None:
        self.interrupt = threading.Event()
        self._sessions = sessions
        self._folders = folders
        self._version = version
        self._faults = faults
        self._metadata = metadata
        self._preview = preview
        self._cache = ResultCache(folders)

    def work_forever(self, queue: PromptQueue, history_delay_s: float) -> None:
        """Run what the queue gives. `history_delay_s` passes between the last message of a prompt about its nodes
        and its entry in the history, as it does in ComfyUI (1 to 12 ms)."""
        while True:
            item = queue.get(_IDLE_WAIT_S)
            if item is not None:
                started = time.monotonic()
                outcome = self._run(item)
                late = self._faults.strikes("history_late")
                time.sleep(late.seconds if late else history_delay_s)
                self._faults.at_prompt_end()
                queue.finish(item[1], outcome, remembered=not self._faults.strikes("history_missing"))
                if self._sessions.client_id is not None:
                    ended = {"node": None, "prompt_id": item[1]}
                    self._sessions.publish("executing", ended, self._sessions.client_id)
                log.info("Prompt executed in %.2f seconds", time.monotonic() - started)
            if queue.take_flags().get("free_memory"):
                self._cache.clear()

    def _run(self, item: Item) -> Outcome:
        self.interrupt.clear()
        self._sessions.client_id = item[3]["client_id"] if "client_id" in item[3] else None  # noqa: SIM401 - it can be a list
        run = PromptRun(
            item,
            self._sessions,
            self._cache,
            self._folders,
            self._version,
            self._faults,
            self._check_interrupt,
            metadata=self._metadata,
            preview=self._preview,
        )
        run.execute()
        self._sessions.last_node_id = None
        return run.outcome

    def _check_interrupt(self) -> None:
        if self.interrupt.is_set():
            self.interrupt.clear()
            raise InterruptedPromptError
