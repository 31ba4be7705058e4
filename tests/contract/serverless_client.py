"""The platform stand-in as a process, SDK workers as processes, and the calls that tests make on both."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import requests

from local.serverless_api import worker_environment

REPOSITORY = Path(__file__).parents[2]
SDK_WORKER = Path(__file__).with_name("sdk_worker.py")
KEY = "test-key"
TIMEOUT_S = 20.0
HOLD_S = 0.3


def wait_until(look: Callable[[], Any], what: str) -> Any:
    """Return what `look` finds as soon as that is true; fails after TIMEOUT_S."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := look()):
        assert time.monotonic() < deadline, f"waited {TIMEOUT_S} s for: {what}"
        time.sleep(0.02)
    return found


@dataclass(frozen=True)
class Endpoint:
    """One endpoint of a running stand-in, seen by a client."""

    base_url: str
    name: str = "local"

    def at(self, name: str) -> "Endpoint":
        """Another endpoint of the same stand-in."""
        return replace(self, name=name)

    def call(self, method: str, path: str, *, key: str = f"Bearer {KEY}", **kwargs: Any) -> requests.Response:
        headers = {"Authorization": key} if key else {}
        return requests.request(
            method, f"{self.base_url}/v2/{self.name}/{path}", headers=headers, timeout=TIMEOUT_S, **kwargs
        )

    def run(self, **job_input: Any) -> str:
        return self.post({"input": job_input})

    def post(self, body: dict[str, Any]) -> str:
        """POST /run with a whole body."""
        response = self.call("POST", "run", json=body)
        assert (response.status_code, response.json()["status"]) == (200, "IN_QUEUE"), response.text
        return str(response.json()["id"])

    def status(self, job_id: str) -> dict[str, Any]:
        response = self.call("GET", f"status/{job_id}")
        assert response.status_code == 200, response.text
        return dict(response.json())

    def until(self, job_id: str, status: str) -> dict[str, Any]:
        return dict(
            wait_until(lambda: (body := self.status(job_id))["status"] == status and body, f"{job_id} {status}")
        )

    def health(self) -> dict[str, dict[str, int]]:
        return dict(self.call("GET", "health").json())

    def until_idle(self, workers: int) -> None:
        wait_until(lambda: self.health()["workers"]["idle"] == workers, f"{workers} workers ask for jobs")

    def posted(self, job_id: str) -> list[str]:
        """What workers posted for a job, word for word."""
        return list(self.call("GET", f"_posted/{job_id}").json())

    def take(self, pod_id: str) -> requests.Response:
        return self.call("GET", f"job-take/{pod_id}", key=KEY)

    def done(self, pod_id: str, job_id: str, body: str) -> requests.Response:
        return self.call("POST", f"job-done/{pod_id}/{job_id}", key=KEY, data=body)

    def fault(self, kind: str, **order: Any) -> None:
        response = self.call("POST", "../../_fault", json={"kind": kind, **order})
        assert response.status_code == 200, response.text

    def struck(self, kind: str) -> int:
        """How often the faults of a kind have struck."""
        faults = self.call("GET", "../../_fault").json()["faults"]
        return sum(fault["struck"] for fault in faults if fault["kind"] == kind)


@dataclass(frozen=True)
class Workers:
    """SDK workers at one stand-in, and the folder through which a test talks with their handlers."""

    endpoint: Endpoint
    folder: Path

    def release(self, *job_ids: str) -> None:
        for job_id in job_ids:
            (self.folder / f"release-{job_id}").touch()

    def ran(self) -> list[str]:
        """The ids of the jobs that handlers have begun, in their order."""
        return [line.split()[0] for line in self.begun()]

    def begun(self) -> list[str]:
        """The same with the worker of each: lines of job id and pod id."""
        log = self.folder / "ran"
        return log.read_text().splitlines() if log.exists() else []


def start_server(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "local.serverless_api", "--api-key", KEY, *arguments]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stop(process: subprocess.Popen[Any]) -> None:
    """End a process by SIGTERM, and fail after TIMEOUT_S."""
    process.terminate()
    try:
        process.wait(TIMEOUT_S)
    finally:
        process.kill()


@contextmanager
def serve(*arguments: str) -> Iterator[Endpoint]:
    """Run a stand-in; it must end at SIGTERM, with nothing on stderr.

    A worker is never lost unless `arguments` say so: those of plain HTTP do not ping.
    """
    server = start_server("--port", "0", "--hold-s", str(HOLD_S), "--lost-s", "600", *arguments)
    assert server.stdout is not None
    try:
        word, url = server.stdout.readline().split()
        assert word == "listening"
        yield Endpoint(url)
    finally:
        stop(server)
    assert server.stderr is not None
    assert (server.returncode, server.stderr.read()) == (0, "")


def start_worker(endpoint: Endpoint, pod_id: str, folder: Path, handler: str = "handler") -> subprocess.Popen[bytes]:
    """An SDK worker around one of the handlers of sdk_worker.py, with its ping process in a group of their own."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "SDK_WORKER_DIR": str(folder),
        "RUNPOD_LOG_LEVEL": "INFO",
        **worker_environment(endpoint.base_url, endpoint.name, KEY, pod_id),
    }
    command = [sys.executable, str(SDK_WORKER), handler]
    with (folder / f"{pod_id}.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a worker and its ping process at once, as the end of a container does."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(TIMEOUT_S)
