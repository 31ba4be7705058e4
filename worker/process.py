"""The ComfyUI process as `start.sh` supervises it: is it the one this job started with, does it live, what did it say.

`start.sh` writes ``run/comfyui`` atomically: the line ``PID GENERATION``; the generation grows by one with each start.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

from worker.errors import RamDiskError
from worker.ramdisk import overwrite_with_zeros

LOG_TAIL_BYTES = 16_384
KILL_TIMEOUT_S = 5.0  # a process in the GPU's driver can take its time
KILL_POLL_S = 0.01


class ProcessState(NamedTuple):
    """One start of ComfyUI."""

    pid: int
    generation: int


class ComfyUIProcess:
    """``run_dir`` is shared with `start.sh`; ``comfyui.log`` in it is ComfyUI's stdout and stderr."""

    def __init__(self, run_dir: Path) -> None:
        self._state_path = run_dir / "comfyui"
        self._log_path = run_dir / "comfyui.log"
        self._listened_path = run_dir / "listened"
        self._success_path = run_dir / "last-success"

    def state(self) -> ProcessState | None:
        """The newest start, whether it still lives or not; None before the first."""
        try:
            pid, generation = self._state_path.read_text().split()
            return ProcessState(int(pid), int(generation))
        except (FileNotFoundError, ValueError):
            return None

    def has_booted(self, state: ProcessState) -> bool:
        """True for a living process whose port `start.sh` has seen open; from then on its log is no longer forwarded
        to the container's, so no line about a job gets there."""
        try:
            return int(self._listened_path.read_text()) == state.generation and self.is_alive(state)
        except (FileNotFoundError, ValueError):
            return False

    def is_alive(self, state: ProcessState) -> bool:
        """True while ``state`` is the current start and its process is no zombie."""
        if self.state() != state:
            return False
        try:
            # "pid (comm) S ...": comm may hold anything, also parentheses (proc(5)).
            return Path(f"/proc/{state.pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
        except (FileNotFoundError, ProcessLookupError):
            return False

    def kill(self, state: ProcessState) -> None:
        """End a ComfyUI that does not let go of a prompt, and wait until it is gone, at most KILL_TIMEOUT_S.

        `start.sh` starts the next one.
        """
        if self.is_alive(state):
            with contextlib.suppress(ProcessLookupError):
                os.kill(state.pid, signal.SIGKILL)
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while self.is_alive(state) and time.monotonic() < deadline:
            time.sleep(KILL_POLL_S)

    def note_success(self, state: ProcessState) -> None:
        """Tell `start.sh` that this start finished a job, so its death counts as the first again."""
        partial = self._success_path.with_suffix(".part")
        with contextlib.suppress(OSError):  # a full RAM disk is no reason to lose a finished job
            partial.write_text(f"{state.generation}\n")
            partial.replace(self._success_path)

    def log_tail(self, lines: int = 15) -> list[str]:
        """The last lines of ComfyUI's log."""
        try:
            with self._log_path.open("rb") as stream:
                stream.seek(max(0, self._log_path.stat().st_size - LOG_TAIL_BYTES))
                text = stream.read().decode(errors="replace")
        except FileNotFoundError:
            return []
        # Zeros: `scrub_log` may be at work.
        found = (line.strip("\0").rstrip() for line in text.splitlines())
        return [line for line in found if line][-lines:]

    def scrub_log(self) -> None:
        """Overwrite and empty the log: ComfyUI prints the values of refused workflows (execution.py, 0.18.1).

        ComfyUI has it open with O_APPEND, so it writes on from the new start. Raises RamDiskError.
        """
        try:
            overwrite_with_zeros(self._log_path)
            os.truncate(self._log_path, 0)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise RamDiskError(f"ComfyUI's log cannot be overwritten ({error.strerror}).") from error
