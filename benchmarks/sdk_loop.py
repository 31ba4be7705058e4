"""What the SDK's loop adds to a job: from the request to the platform until its answer, over an empty handler.

    python -m benchmarks.sdk_loop                    the stand-in, a minute
    python -m benchmarks.sdk_loop --runs 40 --jobs 300 --json FILE
    COMFYUI_DIR=... COMFYUI_PYTHON=... python -m benchmarks.sdk_loop        the same with real ComfyUI

Two platform stand-ins, each with one worker: the product, and a handler that returns at once. Both use the SDK's real
loop (runpod 1.12.0). The jobs have no input and a picture of 64x64, or a photograph of 2048x2048 in and out, and the
empty handler returns as many characters. A client sends /runsync and waits on the held connection, to both in turns.
What the loop adds is the product's time, less the empty handler's, less the job itself (`timings_ms` of its result):
the thread, the progress, the result's way out.

The SDK looks for a job that it has taken every 0.1 s, and asks for the next one a second after it took the last. Both
are far longer than what is measured. So the first row has the SDK as it is, and the others these two pauses cut to a
millisecond for both workers, by a sitecustomize.py on their PYTHONPATH. Jobs per second are of small jobs that wait in
the queue, from the first request to the last answer.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
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

from benchmarks.common import (
    Connection,
    flat_workflow,
    in_pairs,
    pair_figures,
    photograph,
    rounded,
    saver,
    which_comfyui,
    write_json,
)
from benchmarks.memory import empty_handler, product
from local.__main__ import Platform, running_platform

LIMIT_MS = 5.0
WAIT_MS = 100_000
LARGE_SIDE = 2048
AS_IT_IS, NO_PAUSE, LARGE = "64x64, the SDK as it is", "64x64, without its pauses", "2048x2048, without its pauses"
WARM_UPS = 2
SDK_PAUSE_S = 1.2  # after a job, so that the SDK asks for the next one before it is sent
SDK_JOBS = 15  # of those that wait, with the SDK as it is: it does one a second
NO_PAUSES = """\
import asyncio, sys
if any(word.endswith(("rp_handler.py", "empty_handler.py")) for word in sys.orig_argv):
    whole_sleep = asyncio.sleep
    asyncio.sleep = lambda delay, *rest: whole_sleep(0.001 if delay in (0.1, 1) else delay, *rest)
"""


def large_job() -> dict[str, Any]:
    loader = {"class_type": "LoadImage", "inputs": {"image": "photo.png"}}
    photo = base64.b64encode(photograph(LARGE_SIDE)).decode()
    return {"workflow": {"1": loader, "2": saver("1")}, "images": {"photo.png": photo}}


class Client:
    """Sends the same job again and again."""

    def __init__(self, platform: Platform) -> None:
        self._connection = Connection(platform, WAIT_MS / 1000)
        self._body = b""
        self.result_bytes = 0
        self.job_ms: list[float] = []

    def use(self, job_input: dict[str, Any]) -> None:
        """From now on, this is the job."""
        self._body = json.dumps({"input": job_input}).encode()

    def put(self) -> None:
        """Queue a job, and do not wait for it."""
        self._connection.call("POST", "run", self._body)

    def run(self) -> float:
        """Milliseconds from the request to the answer of a finished job."""
        started = time.perf_counter()
        answer = self._connection.call("POST", f"runsync?wait={WAIT_MS}", self._body)
        took = time.perf_counter() - started
        if answer["status"] != "COMPLETED":
            raise RuntimeError(f"a job is {answer['status']}: {answer.get('error')}")
        if isinstance(answer["output"], dict):
            self.job_ms.append(sum(answer["output"]["timings_ms"].values()))
            self.result_bytes = len(answer["output"]["images"][0]["data"])
        return 1000 * took

    def jobs_per_s(self, jobs: int) -> float:
        started = time.perf_counter()
        for _ in range(jobs - 1):
            self.put()
        self.run()  # the queue is first come, first served
        return jobs / (time.perf_counter() - started)


@contextlib.contextmanager
def sdk(*, pauses: bool) -> Iterator[None]:
    """For the processes that are started within: the SDK as it is, or without its pauses."""
    before = os.environ.get("PYTHONPATH")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text(NO_PAUSES)
        if not pauses:
            os.environ["PYTHONPATH"] = os.pathsep.join([folder, *([before] if before else [])])
        try:
            yield
        finally:
            os.environ.pop("PYTHONPATH", None)
            if before is not None:
                os.environ["PYTHONPATH"] = before


@contextlib.contextmanager
def workers(*, pauses: bool) -> Iterator[tuple[Client, Client]]:
    """Clients of an empty handler and of the product, each on a platform of its own."""
    with (
        sdk(pauses=pauses),
        tempfile.TemporaryDirectory() as name,
        Path(name, "platform-log").open("w") as log_file,
        running_platform(os.environ, log_file=log_file) as first,
        running_platform(os.environ, log_file=log_file) as second,
        empty_handler(first, Path(name)),
        product(second, Path(name)),
    ):
        yield Client(first), Client(second)


def latencies(empty: Client, ours: Client, job_input: dict[str, Any], runs: int, rest_s: float) -> dict[str, float]:
    def rested(client: Client) -> float:
        time.sleep(rest_s)
        return client.run()

    ours.use(job_input)
    ours.run()
    empty.use({"size_bytes": ours.result_bytes, "images": job_input.get("images")})
    in_pairs(WARM_UPS, empty.run, ours.run)
    ours.job_ms.clear()
    figures = pair_figures(in_pairs(runs, lambda: rested(empty), lambda: rested(ours)))
    figures["job_ms"] = statistics.median(ours.job_ms)
    figures["loop_ms"] = figures["more"] - figures["job_ms"]
    return figures


def rates(empty: Client, ours: Client, jobs: int, *, at_once: bool) -> dict[str, float]:
    """Of small jobs. ``at_once``: the pauses of both pass at the same time."""
    with ThreadPoolExecutor(2 if at_once else 1) as pool:
        first, second = pool.map(lambda client: client.jobs_per_s(jobs), (empty, ours))
    return {"empty_jobs_per_s": first, "jobs_per_s": second}


def print_row(name: str, figures: dict[str, float]) -> None:
    per_s = f"{figures['empty_jobs_per_s']:13.1f}, {figures['jobs_per_s']:6.1f}" if "jobs_per_s" in figures else ""
    print(
        f"{name:29} | {figures['floor']:6.1f}, {figures['floor_p95']:6.1f} | {figures['ours']:6.1f}, "
        f"{figures['ours_p95']:6.1f} | {figures['job_ms']:10.1f} | {figures['loop_ms']:9.1f} | {per_s}",
        flush=True,
    )


def main() -> int:
    """Returns 1 where the loop adds more than LIMIT_MS, the SDK's own pauses aside."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sdk_loop", description="What the SDK's loop adds.")
    parser.add_argument("--runs", type=int, default=10, help="pairs (default: 10; without pauses four times as many)")
    parser.add_argument("--jobs", type=int, default=100, help="that wait, without pauses (default: 100)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures go there")
    options = parser.parse_args()
    print(f"{which_comfyui()}; ms: median, p95")
    print(f"{'':29} | {'empty':>14} | {'worker':>14} | job itself | loop adds | jobs/s: empty, worker")
    measured = {}
    for name, pauses in ((AS_IT_IS, True), (NO_PAUSE, False)):
        with workers(pauses=pauses) as (empty, ours):
            runs, rest_s = (options.runs, SDK_PAUSE_S) if pauses else (4 * options.runs, 0.0)
            measured[name] = latencies(empty, ours, {"workflow": flat_workflow()}, runs, rest_s)
            jobs = min(SDK_JOBS, options.jobs) if pauses else options.jobs
            measured[name] |= rates(empty, ours, jobs, at_once=pauses)
            print_row(name, measured[name])
            if not pauses:
                measured[LARGE] = latencies(empty, ours, large_job(), options.runs, 0.0)
                print_row(LARGE, measured[LARGE])
    print(f"without the pauses, the loop may add {LIMIT_MS:g} ms to a small job")
    write_json(options.json, {"comfyui": which_comfyui(), **dict(rounded(measured))})  # type: ignore[call-overload]
    return 0 if measured[NO_PAUSE]["loop_ms"] <= LIMIT_MS else 1


if __name__ == "__main__":
    sys.exit(main())
