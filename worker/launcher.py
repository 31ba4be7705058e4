"""Runs ComfyUI's main.py and ends the process when ComfyUI's prompt worker thread has died.

ComfyUI executes prompts in one thread. When that thread dies (a node raised SystemExit; one prompt id was queued
twice), HTTP goes on and every prompt waits for ever (0.18.1, 0.3.64). Here the whole process ends with it: the job
fails at once instead of at its deadline, and `start.sh` starts another ComfyUI.

It runs in ComfyUI's Python, before anything of ComfyUI is imported: standard library only.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading

EXIT_CODE = 70  # EX_SOFTWARE (sysexits.h)
# Python names a thread after its target; main.py starts `prompt_worker` without a name of its own (0.18.1, 0.3.64).
WORKER_THREAD = "(prompt_worker)"


def on_thread_death(death: threading.ExceptHookArgs) -> None:
    """What Python calls when an exception, SystemExit among them, has ended a thread."""
    threading.__excepthook__(death)  # the traceback; nothing for SystemExit
    if death.thread is not None and death.thread.name.endswith(WORKER_THREAD):
        os.write(2, f"The prompt worker thread died of {death.exc_type.__name__}; ComfyUI ends.\n".encode())
        os._exit(EXIT_CODE)


def main() -> None:
    """usage: launcher.py MAIN_PY [ARGUMENT...]; as `python MAIN_PY ARGUMENT...` but for the watch."""
    script = os.path.abspath(sys.argv[1])  # noqa: PTH100 - no pathlib before ComfyUI's own imports
    sys.argv[:] = sys.argv[1:]
    sys.path[0] = os.path.dirname(script)  # noqa: PTH120
    threading.excepthook = on_thread_death
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
