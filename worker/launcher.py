"""Runs ComfyUI's main.py, without full garbage collections while it boots, and ends the process when ComfyUI's prompt
worker thread has died.

ComfyUI executes prompts in one thread. When that thread dies (a node raised SystemExit; one prompt id was queued
twice), HTTP goes on and every prompt waits for ever (0.18.1, 0.3.64). Here the whole process ends with it: the job
fails at once instead of at its deadline, and `start.sh` starts another ComfyUI.

A boot makes half a million objects that stay. Python's collector looks at all of them seven times, for a fifth of the
boot, and finds 74 to free (0.18.1). ComfyUI has it look once more at the end of a job, if the last time was 10 s ago,
before its last message is out (main.py, prompt_worker): a quarter of a second. Objects that are frozen are left out.

It runs in ComfyUI's Python, before anything of ComfyUI is imported: standard library only.
"""

from __future__ import annotations

import gc
import os
import runpy
import sys
import threading
import time

EXIT_CODE = 70  # EX_SOFTWARE (sysexits.h)
# Python names a thread after its target; main.py starts `prompt_worker` without a name of its own (0.18.1, 0.3.64).
WORKER_THREAD = "(prompt_worker)"
NEVER = 1_000_000_000
BOOT_POLL_S = 0.02
LONGEST_BOOT_S = 1800.0


def on_thread_death(death: threading.ExceptHookArgs) -> None:
    """What Python calls when an exception, SystemExit among them, has ended a thread."""
    threading.__excepthook__(death)  # the traceback; nothing for SystemExit
    if death.thread is not None and death.thread.name.endswith(WORKER_THREAD):
        os.write(2, f"The prompt worker thread died of {death.exc_type.__name__}; ComfyUI ends.\n".encode())
        os._exit(EXIT_CODE)


def collect_only_young_objects() -> None:
    """Until the boot is over, for which a thread of its own looks."""
    usual = gc.get_threshold()
    quiet = (*usual[:2], NEVER)
    gc.set_threshold(*quiet)
    threading.Thread(target=end_quiet, args=(quiet, usual), name="end of the boot", daemon=True).start()


def end_quiet(quiet: tuple[int, int, int], usual: tuple[int, int, int]) -> None:
    """Collect as ever, and freeze what is there, as soon as ComfyUI has started its prompt worker: all nodes are
    imported then, and its port is opened next."""
    deadline = time.monotonic() + LONGEST_BOOT_S
    while time.monotonic() < deadline and not has_worker():
        time.sleep(BOOT_POLL_S)
    gc.freeze()
    if gc.get_threshold() == quiet:  # else a custom node has set its own
        gc.set_threshold(*usual)


def has_worker() -> bool:
    return any(thread.name.endswith(WORKER_THREAD) for thread in threading.enumerate())


def main() -> None:
    """usage: launcher.py MAIN_PY [ARGUMENT...]; as `python MAIN_PY ARGUMENT...` but for the collector and the watch."""
    script = os.path.abspath(sys.argv[1])  # noqa: PTH100 - no pathlib before ComfyUI's own imports
    sys.argv[:] = sys.argv[1:]
    sys.path[0] = os.path.dirname(script)  # noqa: PTH120
    threading.excepthook = on_thread_death
    collect_only_young_objects()
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
