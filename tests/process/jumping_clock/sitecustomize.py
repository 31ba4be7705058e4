"""A wall clock that jumps by CLOCK_JUMP_S seconds five times a second; Python loads this from PYTHONPATH.

It changes `time.time` and `time.time_ns` in every Python process of a worker; the machine's clock stays as it is.
"""

import os
import time

_JUMP_S = float(os.environ["CLOCK_JUMP_S"])
_real_time = time.time
_started = time.monotonic()


def _jumping_time() -> float:
    return _real_time() + _JUMP_S * int(5 * (time.monotonic() - _started))


time.time = _jumping_time
time.time_ns = lambda: int(1e9 * _jumping_time())
