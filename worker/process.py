"""The ComfyUI process as `start.sh` supervises it: is it the one this job started with, does it live, what did it say.

`start.sh` writes ``run/comfyui`` atomically: the line ``PID GENERATION``; the generation grows by one with each start.
When a start has ended, it writes ``run/ended``: ``GENERATION EXIT_CODE``. The handler writes ``run/retired`` before it
ends a start that has done its work: the generation, whose death is then no crash.
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
DEATH_NOTE_S = 0.5
KILLED = 128 + signal.SIGKILL
CGROUPS, PROC = Path("/sys/fs/cgroup"), Path("/proc")


class ProcessState(NamedTuple):
    """One start of ComfyUI."""

    pid: int
    generation: int


class Death(NamedTuple):
    """How a start of ComfyUI ended. ``exit_code`` is the shell's (128 + signal); None: not known yet."""

    exit_code: int | None
    out_of_memory: bool

    @property
    def sentence(self) -> str:
        if self.out_of_memory:
            return (
                "the kernel killed it, because the container's memory was used up;"
                " use smaller pictures or batches, or a machine with more memory."
            )
        if self.exit_code is None:
            return "its exit code is not known."
        with contextlib.suppress(ValueError):
            return f"exit code {self.exit_code}, {signal.Signals(self.exit_code - 128).name}."
        return f"exit code {self.exit_code}."


class ComfyUIProcess:
    """``run_dir`` is shared with `start.sh`; ``comfyui.log`` in it is ComfyUI's stdout and stderr."""

    def __init__(self, run_dir: Path) -> None:
        self._state_path = run_dir / "comfyui"
        self._log_path = run_dir / "comfyui.log"
        self._listened_path = run_dir / "listened"
        self._success_path = run_dir / "last-success"
        self._ended_path = run_dir / "ended"
        self._retired_path = run_dir / "retired"
        self._retired: ProcessState | None = None
        self._oom_watch: tuple[ProcessState, Path, int] | None = None

    def state(self) -> ProcessState | None:
        """The newest start, whether it still lives or not; None before the first."""
        try:
            pid, generation = self._state_path.read_text().split()
            return ProcessState(int(pid), int(generation))
        except (FileNotFoundError, ValueError):
            return None

    def has_booted(self, state: ProcessState) -> bool:
        """True for a living process whose port `start.sh` has seen open; from then on its log is no longer forwarded
        to the container's, so no line about a job gets there. False for a retired one, which may take a while to go.
        """
        if state == self._retired:
            return False
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
            return (PROC / str(state.pid) / "stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
        except (FileNotFoundError, ProcessLookupError):
            return False

    def cpu_s(self, state: ProcessState) -> float:
        """Processor time that the process has used, all threads, in seconds; 0 for one that is gone."""
        try:
            fields = (PROC / str(state.pid) / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime (proc(5))

    def watch_memory(self, state: ProcessState) -> None:
        """Note how often the kernel has killed something in this start's memory group, for `death_of`."""
        counter = _oom_counter(state.pid)
        self._oom_watch = None if counter is None else (state, counter, _oom_kills(counter))

    def death_of(self, state: ProcessState) -> Death:
        """How a start that is no longer alive ended. `start.sh` notes the exit code within milliseconds."""
        deadline = time.monotonic() + DEATH_NOTE_S
        while (exit_code := self._noted_exit_code(state)) is None and time.monotonic() < deadline:
            time.sleep(KILL_POLL_S)
        out_of_memory = False
        if exit_code == KILLED and self._oom_watch is not None and self._oom_watch[0] == state:
            _, counter, before = self._oom_watch
            out_of_memory = _oom_kills(counter) > before
        return Death(exit_code, out_of_memory)

    def _noted_exit_code(self, state: ProcessState) -> int | None:
        try:
            generation, exit_code = map(int, self._ended_path.read_text().split())
        except (FileNotFoundError, ValueError):
            return None
        return exit_code if generation == state.generation else None

    def kill(self, state: ProcessState) -> bool:
        """End a ComfyUI that does not let go of a prompt, and wait until it is gone. `start.sh` starts the next one.

        False where it lives on after KILL_TIMEOUT_S: the kernel does not end a process that hangs in a driver.
        """
        if self.is_alive(state):
            with contextlib.suppress(ProcessLookupError):
                os.kill(state.pid, signal.SIGKILL)
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while self.is_alive(state) and time.monotonic() < deadline:
            time.sleep(KILL_POLL_S)
        return not self.is_alive(state)

    def retire(self, state: ProcessState) -> None:
        """End a start so that nothing of a job stays in its memory, without waiting; `start.sh` starts the next one."""
        if self.is_alive(state):
            _note(self._retired_path, state)
            self._retired = state
            with contextlib.suppress(ProcessLookupError):
                os.kill(state.pid, signal.SIGKILL)

    def note_success(self, state: ProcessState) -> None:
        """Tell `start.sh` that this start finished a job, so its death counts as the first again."""
        _note(self._success_path, state)

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


def _note(path: Path, state: ProcessState) -> None:
    """The generation, in one step; not on a full RAM disk, which is no reason to lose a finished job."""
    partial = path.with_suffix(".part")
    with contextlib.suppress(OSError):
        partial.write_text(f"{state.generation}\n")
        partial.replace(path)


def _oom_counter(pid: int) -> Path | None:
    """The file in which the kernel counts its out-of-memory kills in the memory group of a process.

    Version 2: memory.events; version 1: memory.oom_control (kernel documentation, admin-guide). A container may see
    the path of its group from outside, and have the group itself at the root.
    """
    try:
        groups = (PROC / str(pid) / "cgroup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    for line in groups:  # "hierarchy:controllers:path"
        _, controllers, path = line.split(":", 2)
        root, name = (CGROUPS / "memory", "memory.oom_control") if controllers else (CGROUPS, "memory.events")
        if controllers and "memory" not in controllers.split(","):
            continue
        for folder in (root / path.lstrip("/"), root):
            if (folder / name).is_file():
                return folder / name
    return None


def _oom_kills(counter: Path) -> int:
    try:
        fields = dict(line.split() for line in counter.read_text().splitlines())
        return int(fields.get("oom_kill", 0))
    except (OSError, ValueError):
        return 0
