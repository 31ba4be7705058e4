"""Faults on request: `POST /_fault {"kind", "after", "times"}`. Not in ComfyUI; what each kind does stands in KINDS."""

from __future__ import annotations

import json
import os
import signal
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# kind: (the occasions that are counted, what happens on one)
KINDS = {
    "history_late": ("a prompt ends", "its history entry, and the end of its run, come `seconds` later"),
    "history_missing": ("a prompt ends", "it leaves the queue and never gets a history entry"),
    "ws_cut": ("a message to a websocket", "the connection is cut instead, without a close frame"),
    "ws_silent": ("a message to a websocket", "the message is not sent"),
    "crash": ("a node begins", "the process kills itself with SIGKILL"),
    "crash_boot": ("the process starts", "it kills itself before it listens; outlives the process"),
    "hang": ("a node begins", "it hangs for `seconds`, deaf to interrupts"),
    "dead_worker": ("a node begins", "the worker thread ends; HTTP goes on"),
    "http_500": ("a request for `path`", "it is answered 500 as text"),
    "out_of_memory": ("a node begins", "it fails with torch.OutOfMemoryError"),
    "file_missing": ("an output file is saved", "it is removed, though the history names it"),
    "file_half": ("an output file is saved", "its second half is cut off"),
    "flood": ("a node begins", "`count` progress_state messages are sent"),
}
_BOOT_FILE = "standin_boot_crashes.json"


class OutOfMemoryError(RuntimeError):
    """Named on the wire as torch names its own."""


OutOfMemoryError.__module__ = "torch"


@dataclass
class Fault:
    """Lets `after` occasions pass, then strikes `times` times. `fired` counts the strikes."""

    kind: str
    after: int = 0
    times: int = 1
    seconds: float = 3600.0
    path: str = "/prompt"
    count: int = 1000
    fired: int = 0


class Faults:
    """The faults that are armed. All methods may be called from any thread.

    `STANDIN_FAULTS` in the environment is a JSON list of faults that are armed from the start.
    """

    def __init__(self, user_directory: str | None, environment: dict[str, str]) -> None:
        self._mutex = threading.Lock()
        self._boot_file = Path(user_directory) / _BOOT_FILE if user_directory else None
        self._armed: list[Fault] = []
        for wish in json.loads(environment.get("STANDIN_FAULTS", "[]")):
            self.arm(wish)

    def arm(self, wish: dict[str, Any]) -> Fault:
        """Arm a fault. Raises ValueError or TypeError, naming what is wrong with the wish."""
        fault = Fault(**wish)
        if fault.kind not in KINDS:
            raise ValueError(f"kind is one of {', '.join(KINDS)}")
        for name, kind in Fault.__annotations__.items():
            if kind != "str" and not isinstance(getattr(fault, name), (int, float)):
                raise ValueError(f"{name} must be a number")
        if fault.kind == "crash_boot":
            if self._boot_file is None:
                raise ValueError("crash_boot needs --user-directory, where it is kept over the restart")
            self._boot_file.write_text(json.dumps(asdict(fault)))
        with self._mutex:
            self._armed.append(fault)
        return fault

    def clear(self) -> None:
        """Disarm all."""
        with self._mutex:
            self._armed = []
        if self._boot_file:
            self._boot_file.unlink(missing_ok=True)

    def listing(self) -> dict[str, Any]:
        """The answer to GET /_fault: what is armed or has struck, and all kinds with their meaning."""
        kinds = {name: {"occasion": occasion, "effect": effect} for name, (occasion, effect) in KINDS.items()}
        with self._mutex:
            return {"armed": [asdict(fault) for fault in self._armed], "kinds": kinds}

    def strikes(self, kind: str, path: str | None = None) -> Fault | None:
        """Count one occasion; the fault that strikes on it, if any. `path` is that of the request, for http_500."""
        with self._mutex:
            for fault in self._armed:
                if fault.kind != kind or path not in (None, fault.path) or fault.fired >= fault.times:
                    continue
                if fault.after > 0:
                    fault.after -= 1
                    continue
                fault.fired += 1
                return fault
        return None

    def at_boot(self) -> None:
        """End this start of the process, if a crash_boot is left."""
        if self._boot_file is None or not self._boot_file.exists():
            return
        fault = Fault(**json.loads(self._boot_file.read_text()))
        if fault.after > 0:
            fault.after -= 1
        elif fault.fired < fault.times:
            fault.fired += 1
            self._boot_file.write_text(json.dumps(asdict(fault)))
            die()
        self._boot_file.write_text(json.dumps(asdict(fault)))

    def at_saved_file(self, path: Path) -> None:
        """Spoil an output file, if that is due."""
        if self.strikes("file_missing"):
            path.unlink()
        elif self.strikes("file_half"):
            os.truncate(path, path.stat().st_size // 2)


def die() -> None:
    """End this process as the kernel's out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)
