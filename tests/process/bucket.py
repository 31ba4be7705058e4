"""The S3 server of the tests as they drive it: bucket_server.py says what it does."""

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any

from tests.process.bucket_server import ACCESS
from tests.process.stack import DEADLINE_S, ROOT


class BucketServer:
    """A server of its own process, which can be ended and started again at the same address."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self.url = "http://127.0.0.1:0"

    def start(self) -> None:
        port = self.url.rpartition(":")[2]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.process.bucket_server", port],
            cwd=ROOT,
            env={**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": "0"},  # moto checks every signature
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().split()[1]

    def stop(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.communicate()

    def fault(self, kind: str, **more: Any) -> None:
        self._call("POST", "/_fault", {"kind": kind, **more})

    def disarm(self) -> None:
        self._call("DELETE", "/_fault")

    def count(self, method: str = "PUT") -> int:
        """Uploads, or with GET downloads, since `disarm`."""
        return int(self._call("GET", "/_fault")[method])

    def give_access(self, **changed: str) -> None:
        """The server knows ACCESS with these changes, and nothing else."""
        self._call("POST", "/_access", changed)

    def settings(self) -> dict[str, str]:
        """A worker's environment for this bucket."""
        return {
            "BUCKET_ENDPOINT_URL": self.url,
            "BUCKET_ACCESS_KEY_ID": ACCESS["id"],
            "BUCKET_SECRET_ACCESS_KEY": ACCESS["secret"],
            "BUCKET_NAME": ACCESS["bucket"],
        }

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, method=method)
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            return json.loads(answer.read() or "null")


@contextlib.contextmanager
def running_bucket() -> Iterator[BucketServer]:
    server = BucketServer()
    server.start()
    try:
        yield server
    finally:
        server.stop()
