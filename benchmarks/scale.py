"""1, 2 and 4 workers on one endpoint with a queue: jobs per second, how evenly they are shared, and none lost.

    python -m benchmarks.scale                       the stand-in, a minute and a half
    python -m benchmarks.scale --jobs 200 --workers 4 --json FILE
    COMFYUI_DIR=... COMFYUI_PYTHON=... python -m benchmarks.scale           real ComfyUI, which needs memory for four

The jobs are put in at once when all workers ask for some. Each makes a picture of 64x64 in a colour of its own, which
its result has to have: a job that got another's picture is as good as lost. The floor is as many workers of the SDK
alone, whose handler returns at once, with as many jobs on a platform of their own.

The SDK asks for the next job a second after it took the last (runpod 1.12.0), so a worker does one job a second at
most, however short it is: 10 jobs for each worker show it, at the same time as the floor. The 200 jobs run without the
SDK's pauses, as in benchmarks/sdk_loop.py: a load on every part of it that no endpoint has. All of it runs on this
machine: where its processors are in full use, more workers do not do more.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.common import Connection, flat_workflow, rounded, which_comfyui, write_json
from benchmarks.memory import empty_handler
from benchmarks.sdk_loop import sdk
from local.__main__ import Platform, running_platform, running_worker

WORKERS = (1, 2, 4)
JOBS, JOBS_PER_WORKER = 200, 10  # without the SDK's pauses, and with them
LEAST_OF_FLOOR = 0.95  # of the floor's jobs per second, with the SDK as it is
LEAST_SHARE = 0.5  # what the worker with the fewest jobs has, of an even share
POLL_S = 0.02
DEADLINE_S = 600.0
EMPTY_JOB: dict[str, Any] = {"size_bytes": 1}
Figures = dict[str, Any]


def wait_for(connection: Connection, kind: str, states: tuple[str, ...], number: int) -> None:
    """Until /health counts so many of these. Raises RuntimeError."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        health = connection.call("GET", "health")
        if sum(health[kind][state] for state in states) >= number:
            return
        time.sleep(POLL_S)
    raise RuntimeError(f"not {number} {kind} {' or '.join(states)}: {health}")


def has_its_colour(number: int, output: Any) -> bool:
    with Image.open(io.BytesIO(base64.b64decode(output["images"][0]["data"]))) as picture:
        return picture.convert("RGB").getpixel((0, 0)) == (number >> 16, number >> 8 & 255, number & 255)


def run_jobs(platform: Platform, workers: int, job_inputs: list[dict[str, Any]]) -> tuple[float, list[dict[str, Any]]]:
    """Jobs per second from the first request to the last result, and each job's /status in the order of the inputs."""
    connection = Connection(platform, DEADLINE_S)
    wait_for(connection, "workers", ("idle",), workers)
    started = time.monotonic()
    bodies = (json.dumps({"input": job_input}).encode() for job_input in job_inputs)
    ids = [connection.call("POST", "run", body)["id"] for body in bodies]
    wait_for(connection, "jobs", ("completed", "failed"), len(ids))
    took_s = time.monotonic() - started
    return len(ids) / took_s, [connection.call("GET", f"status/{job_id}") for job_id in ids]


def measure_floor(workers: int, jobs: int) -> float:
    """Jobs per second of empty handlers."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        log_file = stack.enter_context(Path(name, "platform-log").open("w"))
        platform = stack.enter_context(running_platform(os.environ, log_file=log_file))
        for number in range(workers):
            folder = Path(name, str(number))
            folder.mkdir()
            stack.enter_context(empty_handler(platform, folder))
        return run_jobs(platform, workers, [EMPTY_JOB] * jobs)[0]


def measure_workers(workers: int, jobs: int) -> Figures:
    """The product: jobs per second, how many jobs each worker did, and the jobs that are lost or not their own."""
    numbers = [997 * number % (1 << 24) for number in range(1, jobs + 1)]
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        log_file = stack.enter_context(Path(name, "log").open("w"))
        platform = stack.enter_context(running_platform(os.environ, log_file=log_file))
        for _ in range(workers):
            stack.enter_context(running_worker(platform, os.environ, log_file))
        rate, ends = run_jobs(platform, workers, [{"workflow": flat_workflow(number)} for number in numbers])
    good = [
        end["status"] == "COMPLETED" and "retries" not in end and has_its_colour(number, end["output"])
        for number, end in zip(numbers, ends, strict=True)
    ]
    done = Counter(end.get("workerId") for end in ends)
    shares = sorted(done.values()) + [0] * (workers - len(done))
    return {
        "jobs_per_s": rate,
        "fewest": min(shares),
        "most": max(shares),
        "lost": good.count(False),
        "job_ms": statistics.median(end["executionTime"] for end in ends),
    }


def measure(workers: int, jobs: int, *, pauses: bool) -> Figures:
    with sdk(pauses=pauses), ThreadPoolExecutor(2 if pauses else 1) as pool:  # both sleep most of the time, or none
        floor = pool.submit(measure_floor, workers, jobs)
        ours = pool.submit(measure_workers, workers, jobs)
        figures = {"workers": workers, "jobs": jobs, "pauses": pauses, "floor_per_s": floor.result(), **ours.result()}
    return figures | {"of_floor": figures["jobs_per_s"] / figures["floor_per_s"]}


def print_row(figures: Figures) -> None:
    print(
        f"{'as it is' if figures['pauses'] else 'no pauses':9} | {figures['workers']:7} | {figures['jobs']:4} | "
        f"{figures['floor_per_s']:13.2f} | {figures['jobs_per_s']:6.2f} | {figures['of_floor']:12.2f} | "
        f"{figures['job_ms']:6.0f} | {figures['fewest']:6}, {figures['most']:4} | {figures['lost']:4}",
        flush=True,
    )


def is_good(figures: Figures) -> bool:
    is_shared = figures["fewest"] >= LEAST_SHARE * figures["jobs"] / figures["workers"]
    is_quick = not figures["pauses"] or figures["of_floor"] >= LEAST_OF_FLOOR
    return figures["lost"] == 0 and is_shared and is_quick


def main() -> int:
    """Returns 1 where a job is lost, a worker has less than LEAST_SHARE, or jobs take longer than LEAST_OF_FLOOR."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description="Workers that share a queue.")
    parser.add_argument("--workers", type=int, nargs="+", default=list(WORKERS), help="default: 1 2 4")
    parser.add_argument(
        "--jobs", type=int, help=f"of every row (default: {JOBS}, or {JOBS_PER_WORKER} for each worker)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures go there")
    options = parser.parse_args()
    print(f"{which_comfyui()}; {os.cpu_count()} processors")
    print("the SDK   | workers | jobs | floor, jobs/s | jobs/s | of the floor | job ms | fewest, most | lost")
    measured = []
    for pauses in (True, False):
        for workers in options.workers:
            jobs = options.jobs or (JOBS_PER_WORKER * workers if pauses else JOBS)
            measured.append(measure(workers, jobs, pauses=pauses))
            print_row(measured[-1])
    write_json(options.json, {"comfyui": which_comfyui(), "rows": rounded(measured)})
    all_good = all(map(is_good, measured))
    print(f"none lost, an even share at least by half, {LEAST_OF_FLOOR:g} of the floor: {'yes' if all_good else 'no'}")
    return 0 if all_good else 1


if __name__ == "__main__":
    sys.exit(main())
