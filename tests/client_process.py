"""client.py as a process that a test watches, interrupts, and reads the end of."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.process.stack import DEADLINE_S, ROOT, wait_until

CLIENT = str(ROOT / "client.py")
# The program with shorter times, for tests of what it does when they are over.
IMPATIENT = "import sys, client; client.CANCEL_TIMEOUT_S = client.SILENCE_LIMIT_S = 1; sys.exit(client.main())"


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    @property
    def told(self) -> dict[str, Any]:
        """The object of --json."""
        return dict(json.loads(self.out))


class ClientProcess:
    """client.py that is running; what it says goes into files, which can be read meanwhile.

    ``program``: what Python gets before the arguments, client.py itself or a line that imports it.
    """

    def __init__(self, folder: Path, program: Sequence[str], arguments: Sequence[str], env: Mapping[str, str]) -> None:
        self._files = [folder / f"{name}-{len(list(folder.iterdir()))}" for name in ("out", "err")]
        with self._files[0].open("w") as out, self._files[1].open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, *program, *arguments],
                cwd=folder,
                env={**env, "PYTHONPATH": str(ROOT)},
                stdout=out,
                stderr=err,
            )

    def until(self, text: str) -> None:
        """Until it has said this on stderr."""
        wait_until(lambda: text in self._files[1].read_text(), f"the client says: {text}")

    def interrupt(self, number: int = signal.SIGINT) -> None:
        self.process.send_signal(number)

    def end(self) -> Ended:
        try:
            code = self.process.wait(DEADLINE_S)
        finally:
            self.process.kill()
        out, err = (file.read_text() for file in self._files)
        assert "Traceback" not in err
        return Ended(code, out, err)
