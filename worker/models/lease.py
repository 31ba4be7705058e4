"""Who downloads a file on a network volume: one worker, though many see the volume.

flock does not reach across hosts, and their clocks do not agree. So a lease is a file that its holder touches every
HEARTBEAT_S, and its age is measured by the file server's clock alone: against a file that was touched just now.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HEARTBEAT_S = 5.0
STALE_S = 30.0
POLL_S = 1.0
CLOCK_PREFIX = ".clock-"
GRAVE_PREFIX = ".lease-"


def age_s(path: Path) -> float:
    """Seconds since a file was touched, by the clock of its own file system. Raises FileNotFoundError."""
    probe = path.with_name(f"{CLOCK_PREFIX}{secrets.token_hex(8)}")
    try:
        probe.touch(exist_ok=False)
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


@contextlib.contextmanager
def every(interval_s: float, work: Callable[[], None]) -> Iterator[None]:
    """Does the work again and again, in a thread, for as long as the block runs."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(interval_s):
            work()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def heartbeat(path: Path, interval_s: float = HEARTBEAT_S) -> Iterator[None]:
    """A file that is touched for as long as the block runs, and removed with it."""
    path.touch()

    def beat() -> None:
        with contextlib.suppress(OSError):  # a volume that does not answer for a moment
            os.utime(path)

    try:
        with every(interval_s, beat):
            yield
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def lease(
    path: Path,
    *,
    is_done: Callable[[], bool],
    stale_s: float = STALE_S,
    poll_s: float = POLL_S,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[bool]:
    """Waits until this process alone holds the lease `path` (True), or another has done the work (False).

    The lease of one that was killed is taken over after `stale_s`. In the worst case, two that find it stale in the
    same moment, both do the work: the result must be put in place in one step all the same. Raises OSError.
    """
    while not _taken(path):
        if is_done():
            yield False
            return
        with contextlib.suppress(FileNotFoundError):  # released meanwhile
            if age_s(path) > stale_s:
                grave = path.with_name(f"{GRAVE_PREFIX}{secrets.token_hex(8)}")
                path.rename(grave)  # of several, one succeeds
                grave.unlink()
                continue
        sleep(poll_s)
    with heartbeat(path):
        yield not is_done()


def _taken(path: Path) -> bool:
    try:
        path.open("x").close()
    except FileExistsError:
        return False
    return True
