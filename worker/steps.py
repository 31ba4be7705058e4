"""How long each step of a job took."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

log = logging.getLogger(__name__)


STEPS = ("parse", "clear", "write", "run", "collect", "wipe")
# A result is measured before its last steps have their times: no time is longer than this one, of 30 years.
WIDEST_TIMINGS_MS = dict.fromkeys(STEPS, 999_999_999_999.9)


class StepTimer:
    """Measures and logs the steps of one job: ``timings_ms`` by name, one of STEPS."""

    def __init__(self) -> None:
        self.timings_ms: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.timings_ms[step] = round(1000 * (time.monotonic() - started), 1)
            log.info("%s: %.1f ms", step, self.timings_ms[step])
