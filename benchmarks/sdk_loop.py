"""What the SDK's loop adds to a job: from the request to the platform until its answer, over an empty handler.

    python -m benchmarks.sdk_loop                    the stand-in, a minute
    python -m benchmarks.sdk_loop --runs 40 --jobs 300 --json FILE
    COMFYUI_DIR=... COMFYUI_PYTHON=... python -m benchmarks.sdk_loop        the same with real ComfyUI

Two platform stand-ins, each with one worker: the product, and a handler that returns at once. Both use the SDK's real
loop (runpod 1.12.0). The jobs have no input and a picture of 64x64. A client sends /runsync and waits on the held
connection, to both in turns. What the loop adds is the product's time, less the empty handler's, less the job itself
(`timings_ms` of its result): the thread, the progress, the result's way out.

The SDK looks for a job that it has taken every 0.1 s, and asks for the next one a second after it took the last. Both
are the same for both workers, and far longer than what is measured. So there are two rows: the SDK as it is, and with
these two pauses cut to a millisecond for both, by a sitecustomize.py on their PYTHONPATH. Jobs per second are of jobs
that wait in the queue, from the first request to the last answer.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.common import in_pairs, pair_figures, rounded, which_comfyui, write_json
from benchmarks.memory import empty_handler, product
from local.__main__ import ENDPOINT, Platform, running_platform

LIMIT_MS = 5.0
WAIT_MS = 100_000
WARM_UPS = 2
SDK_PAUSE_S = 1.2  # after a job, so that the SDK asks for the next one before it is sent
SDK_JOBS = 15  # of those that wait, with the SDK as it is: it does one a second
NO_PAUSES = """\
import asyncio, sys
if any(word.endswith(("rp_handler.py", "empty_handler.py")) for word in sys.orig_argv):
    whole_sleep = asyncio.sleep
    asyncio.sleep = lambda delay, *rest: whole_sleep(0.001 if delay in (0.1, 1) else delay, *rest)
"""
SMALL_JOB: dict[str, Any] = {
    "workflow": {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "bench"}},
    }
}
EMPTY_JOB: dict[str, Any] = {"size_bytes": 1}


class Client:
    """One kept connection to a platform."""

    def __init__(self, platform: Platform, job_input: dict[str, Any]) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(platform.url).netloc, timeout=WAIT_MS / 1000)
        self._headers = {"Authorization": f"Bearer {platform.api_key}", "Content-Type": "application/json"}
        self._body = json.dumps({"input": job_input}).encode()
        self.job_ms: list[float] = []

    def put(self) -> None:
        """Queue a job, and do not wait for it."""
        self._ask("run")

    def run(self) -> float:
        """Milliseconds from the request to the answer of a finished job."""
        started = time.perf_counter()
        answer = self._ask(f"runsync?wait={WAIT_MS}")
        took = time.perf_counter() - started
        if answer["status"] != "COMPLETED":
            raise RuntimeError(f"a job is {answer['status']}: {answer.get('error')}")
        if isinstance(answer["output"], dict):
            self.job_ms.append(sum(answer["output"]["timings_ms"].values()))
        return 1000 * took

    def _ask(self, path: str) -> dict[str, Any]:
        self._connection.request("POST", f"/v2/{ENDPOINT}/{path}", self._body, self._headers)
        return dict(json.load(self._connection.getresponse()))

    def jobs_per_s(self, jobs: int) -> float:
        started = time.perf_counter()
        for _ in range(jobs - 1):
            self.put()
        self.run()  # the queue is first come, first served
        return jobs / (time.perf_counter() - started)


@contextlib.contextmanager
def workers(folder: Path, *, pauses: bool) -> Iterator[tuple[Client, Client]]:
    """Clients of an empty handler and of the product, each on a platform of its own."""
    (folder / "sitecustomize.py").write_text(NO_PAUSES)
    before = os.environ.get("PYTHONPATH")
    if not pauses:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *([before] if before else [])])
    try:
        with (
            (folder / "platform-log").open("w") as log_file,
            running_platform(os.environ, log_file=log_file) as first,
            running_platform(os.environ, log_file=log_file) as second,
            empty_handler(first, folder),
            product(second, folder),
        ):
            yield Client(first, EMPTY_JOB), Client(second, SMALL_JOB)
    finally:
        os.environ.pop("PYTHONPATH", None)
        if before is not None:
            os.environ["PYTHONPATH"] = before


def measure(*, pauses: bool, runs: int, jobs: int) -> dict[str, float]:
    def rested(client: Client) -> float:
        if pauses:
            time.sleep(SDK_PAUSE_S)
        return client.run()

    with tempfile.TemporaryDirectory() as name, workers(Path(name), pauses=pauses) as (empty, ours):
        in_pairs(WARM_UPS, empty.run, ours.run)
        ours.job_ms.clear()
        figures = pair_figures(in_pairs(runs, lambda: rested(empty), lambda: rested(ours)))
        figures["job_ms"] = statistics.median(ours.job_ms)
        figures["loop_ms"] = figures["more"] - figures["job_ms"]
        with ThreadPoolExecutor() as pool:  # the pauses of both pass at the same time
            rates = [pool.submit(client.jobs_per_s, jobs) for client in (empty, ours)] if pauses else []
            figures["empty_jobs_per_s"] = rates[0].result() if pauses else empty.jobs_per_s(jobs)
            figures["jobs_per_s"] = rates[1].result() if pauses else ours.jobs_per_s(jobs)
    return figures


def main() -> int:
    """Returns 1 where the loop adds more than LIMIT_MS, the SDK's own pauses aside."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sdk_loop", description="What the SDK's loop adds.")
    parser.add_argument("--runs", type=int, default=10, help="pairs (default: 10; without pauses four times as many)")
    parser.add_argument("--jobs", type=int, default=100, help="that wait, without pauses (default: 100)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures go there")
    options = parser.parse_args()
    print(f"{which_comfyui()}; ms: median, p95")
    print(f"{'':19} | {'empty':>14} | {'worker':>14} | job itself | loop adds | jobs/s: empty, worker")
    measured = {}
    for pauses in (True, False):
        runs, jobs = (options.runs, min(SDK_JOBS, options.jobs)) if pauses else (4 * options.runs, options.jobs)
        figures = measure(pauses=pauses, runs=runs, jobs=jobs)
        name = "the SDK as it is" if pauses else "without its pauses"
        measured[name] = figures
        print(
            f"{name:19} | {figures['floor']:6.1f}, {figures['floor_p95']:6.1f} | {figures['ours']:6.1f}, "
            f"{figures['ours_p95']:6.1f} | {figures['job_ms']:10.1f} | {figures['loop_ms']:9.1f} | "
            f"{figures['empty_jobs_per_s']:13.1f}, {figures['jobs_per_s']:6.1f}",
            flush=True,
        )
    print(f"without the pauses, the loop may add {LIMIT_MS:g} ms")
    write_json(options.json, {"comfyui": which_comfyui(), **dict(rounded(measured))})  # type: ignore[call-overload]
    return 0 if measured["without its pauses"]["loop_ms"] <= LIMIT_MS else 1


if __name__ == "__main__":
    sys.exit(main())
