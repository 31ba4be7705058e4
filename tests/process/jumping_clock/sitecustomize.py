"""A wall clock that jumps by a day, forth and back, five times a second; Python loads this from PYTHONPATH.

It changes what `time.time` says in every Python process of a worker; the machine's clock stays as it is.
"""

import time

_DAY_S = 86_400
_real_time = time.time


def _jumping_time() -> float:
    return _real_time() + (_DAY_S + 7200 if int(5 * time.monotonic()) % 2 else -_DAY_S)


time.time = _jumping_time
