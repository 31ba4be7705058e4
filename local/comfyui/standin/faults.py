"""Faults on request: `POST /_fault {"kind", "after", "times"}`. Not in ComfyUI; what each kind does stands in KINDS.

tests/comfyui_faults loads this module into real ComfyUI, so it needs nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# kind: (the occasions that are counted, what happens on one)
KINDS = {
    "history_late": ("a prompt ends", "its history entry, and the end of its run, come `seconds` later"),
    "history_missing": ("a prompt ends", "it leaves the queue and never gets a history entry"),
    "ws_refuse": ("a websocket is asked for", "it is refused with 403"),
    "ws_cut": ("a message to a websocket", "the connection is cut instead, without a close frame"),
    "ws_silent": ("a message to a websocket", "the message is not sent"),
    "ws_garbage": ("a message to a websocket", "garbage comes before it"),
    "ws_binary": ("a message to a websocket", "binary frames of no known kind come before it"),
    "crash": ("a node begins", "the process kills itself with SIGKILL"),
    "crash_boot": ("the process starts", "it kills itself before it listens; outlives the process"),
    "slow_boot": ("the process starts", "it listens only `seconds` later; outlives the process"),
    "hang": ("a node begins", "it hangs for `seconds`, deaf to interrupts"),
    "stall": ("a node begins", "HTTP and websocket stand still for `seconds`; the node goes on"),
    "dead_worker": ("a node begins", "the worker thread ends; HTTP goes on"),
    "exception": ("a node begins", "it fails with a RuntimeError that says `text`"),
    "out_of_memory": ("a node begins", "it fails with torch.OutOfMemoryError"),
    "eat_memory": ("a node begins", "it takes up to `count` MB of memory in steps of 16 MB, and goes on"),
    "flood": ("a node begins", "`count` progress_state messages are sent"),
    "http_500": ("a request for `path`", "it is answered 500 as text"),
    "http_hang": ("a request for `path`", "it is carried out at once, and answered `seconds` later"),
    "file_missing": ("an output file is saved", "it is removed, though the history names it"),
    "file_half": ("an output file is saved", "its second half is cut off"),
    "file_empty": ("an output file is saved", "it is emptied"),
    "file_swapped": (
        "an output file is saved",
        "a `text` (symlink, hardlink to `path`; fifo, folder) is put there",
    ),
    "output_unlisted": ("an output file is saved", "the history does not name it"),
}
_BOOT_KINDS = ("slow_boot", "crash_boot")
_BOOT_FILE = "standin_boot_faults.json"
_MB = 1 << 20
_MEMORY_STEP_MB = 16


class OutOfMemoryError(RuntimeError):
    """Named on the wire as torch names its own."""


OutOfMemoryError.__module__ = "torch"


@dataclass
class Fault:
    """Lets `after` occasions pass, then strikes `times` times. `fired` counts the strikes.

    `path` and `event` narrow the occasions: to requests for that path and all below it, to messages of that name (a
    binary frame's is its number). Occasions of no such kind are not counted.
    """

    kind: str
    after: int = 0
    times: int = 1
    seconds: float = 3600.0
    path: str = "/prompt"
    count: int = 1000
    event: str = ""
    text: str = "a fault was asked for"
    fired: int = 0

    def concerns(self, path: str | None, event: str | None) -> bool:
        """Whether an occasion with this path or event is one of this fault."""
        if path is not None:
            return path == self.path or path.startswith(self.path.rstrip("/") + "/")
        return event is None or self.event in ("", event)


class Faults:
    """The faults that are armed. All methods may be called from any thread.

    `STANDIN_FAULTS` in the environment is a JSON list of faults that are armed anew at each start. Faults of the boot
    that are asked for by HTTP are kept in a file below `user_directory`, with what is left of them.
    """

    def __init__(self, user_directory: str | None, environment: dict[str, str]) -> None:
        self._mutex = threading.Lock()
        self._boot_file = Path(user_directory) / _BOOT_FILE if user_directory else None
        self._kept: list[Fault] = []
        if self._boot_file and self._boot_file.exists():
            self._kept = [Fault(**left) for left in json.loads(self._boot_file.read_text())]
        self._armed = [*self._kept, *(_checked(wish) for wish in json.loads(environment.get("STANDIN_FAULTS", "[]")))]
        self._eaten: list[bytes] = []

    def arm(self, wish: dict[str, Any]) -> Fault:
        """Arm a fault. Raises ValueError or TypeError, naming what is wrong with the wish."""
        fault = _checked(wish)
        if fault.kind in _BOOT_KINDS and self._boot_file is None:
            raise ValueError(f"{fault.kind} needs --user-directory, where it is kept over the restart")
        with self._mutex:
            self._armed.append(fault)
            if fault.kind in _BOOT_KINDS:
                self._kept.append(fault)
                self._save_kept()
        return fault

    def clear(self) -> None:
        """Disarm all."""
        with self._mutex:
            self._armed, self._kept = [], []
        if self._boot_file:
            self._boot_file.unlink(missing_ok=True)

    def listing(self) -> dict[str, Any]:
        """The answer to GET /_fault: what is armed or has struck, all kinds with their meaning, the living threads."""
        kinds = {name: {"occasion": occasion, "effect": effect} for name, (occasion, effect) in KINDS.items()}
        threads = [thread.name for thread in threading.enumerate()]
        with self._mutex:
            return {"armed": [asdict(fault) for fault in self._armed], "kinds": kinds, "threads": threads}

    def strikes(self, kind: str, *, path: str | None = None, event: str | None = None) -> Fault | None:
        """Count one occasion; the fault that strikes on it, if any. `path` is that of a request, `event` the name of
        a message."""
        with self._mutex:
            for fault in self._armed:
                if fault.kind != kind or fault.fired >= fault.times or not fault.concerns(path, event):
                    continue
                if fault.after > 0:
                    fault.after -= 1
                    continue
                fault.fired += 1
                return fault
        return None

    def at_boot(self) -> None:
        """Delay this start of the process, or end it, if that is due."""
        slow, crash = self.strikes("slow_boot"), self.strikes("crash_boot")
        self._save_kept()
        if slow:
            time.sleep(slow.seconds)
        if crash:
            die()

    def at_node(
        self,
        stall: Callable[[float], None],
        flood: Callable[[int], None],
        out_of_memory: type[Exception] = OutOfMemoryError,
    ) -> None:
        """What is due when a node begins, in the thread that runs it.

        `stall(seconds)` makes the event loop stand still, `flood(count)` sends progress_state messages.
        """
        if self.strikes("crash"):
            die()
        if fault := self.strikes("hang"):
            time.sleep(fault.seconds)
        if fault := self.strikes("stall"):
            stall(fault.seconds)
        if fault := self.strikes("flood"):
            flood(fault.count)
        if fault := self.strikes("eat_memory"):
            self._eat(fault.count)
        if self.strikes("out_of_memory"):
            raise out_of_memory("Allocation on device 0 would exceed allowed memory. (out of memory)")
        if fault := self.strikes("exception"):
            raise RuntimeError(fault.text)
        if self.strikes("dead_worker"):
            raise SystemExit

    def at_prompt_end(self) -> None:
        """Give back the memory that eat_memory took."""
        self._eaten = []

    def at_saved_files(self, ui: dict[str, Any], folder_of: Callable[[str], str | Path | None]) -> dict[str, Any]:
        """Spoil the files that a node has saved, if that is due; what the history is to say of the node.

        `ui` is what the node says itself, `folder_of` gives the folder for a file's type.
        """
        return {name: [item for item in items if self._is_listed(item, folder_of)] for name, items in ui.items()}

    def _is_listed(self, item: Any, folder_of: Callable[[str], str | Path | None]) -> bool:
        folder = folder_of(item["type"]) if isinstance(item, dict) and "filename" in item else None
        path = Path(folder, item.get("subfolder", ""), item["filename"]) if folder else None
        if path is None or not path.is_file():
            return True  # a text, or nothing that could be spoilt
        if self.strikes("file_missing"):
            path.unlink()
        elif self.strikes("file_half"):
            os.truncate(path, path.stat().st_size // 2)
        elif self.strikes("file_empty"):
            os.truncate(path, 0)
        elif fault := self.strikes("file_swapped"):
            _swap(path, fault.text, fault.path)
        return not self.strikes("output_unlisted")

    def _eat(self, megabytes: int) -> None:
        """Written to, or the kernel would not give the pages."""
        while megabytes > 0:
            self._eaten.append(b"\x01" * (min(megabytes, _MEMORY_STEP_MB) * _MB))
            megabytes -= _MEMORY_STEP_MB

    def _save_kept(self) -> None:
        if self._boot_file and self._kept:
            self._boot_file.write_text(json.dumps([asdict(fault) for fault in self._kept]))


def _swap(path: Path, kind: str, target: str) -> None:
    """Put something in the place of a file that is none, or a second name of another one."""
    path.unlink()
    match kind:
        case "symlink":
            path.symlink_to(target)
        case "hardlink":
            path.hardlink_to(target)
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()


def die() -> None:
    """End this process as the kernel's out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


def _checked(wish: dict[str, Any]) -> Fault:
    fault = Fault(**wish)
    if fault.kind not in KINDS:
        raise ValueError(f"kind is one of {', '.join(KINDS)}")
    for name, annotation in Fault.__annotations__.items():
        if not isinstance(getattr(fault, name), str if annotation == "str" else (int, float)):
            raise ValueError(f"{name} must be {'a text' if annotation == 'str' else 'a number'}")
    return fault
