"""A wall clock that jumps two days, forth and back, five times a second; Python loads this from PYTHONPATH.

It changes what `time.time` says in every Python process of a worker; the machine's clock stays as it is. Both times of
day are two hours ahead of it, so that a log shows whether it was at work.
"""

import time

_FORTH_S, _BACK_S = 26 * 3600, -22 * 3600
_real_time = time.time


def _jumping_time() -> float:
    return _real_time() + (_FORTH_S if int(5 * time.monotonic()) % 2 else _BACK_S)


time.time = _jumping_time
