"""What ends a job from outside."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from worker.errors import JobCancelled, JobTimeout


class JobControl:
    """A job's deadline and its cancellation. ``cancel`` may be called from any thread."""

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.timeout_s = timeout_s
        self._clock = clock
        self._deadline = clock() + timeout_s
        self._cancelled = threading.Event()

    def shorten(self, timeout_s: float) -> None:
        """A job's own, shorter timeout, counted from the start of the job."""
        if timeout_s < self.timeout_s:
            self._deadline -= self.timeout_s - timeout_s
            self.timeout_s = timeout_s

    def cancel(self) -> None:
        self._cancelled.set()

    def check(self) -> None:
        """Raise JobCancelled or JobTimeout if the job has to end."""
        if self._cancelled.is_set():
            raise JobCancelled("The job was cancelled.")
        if self._clock() >= self._deadline:
            raise JobTimeout(f"The job did not finish within {self.timeout_s:g} s.", timeout_s=self.timeout_s)
