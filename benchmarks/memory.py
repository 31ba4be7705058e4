"""Peak memory of the handler for a large result, over that of an empty SDK handler that returns a string of that size.

    python -m benchmarks.memory                      1, 5 and 19.5 MB, the last with a large input too, three runs each
    python -m benchmarks.memory --runs 5 --json FILE

Both are workers of the platform stand-in, new processes for each figure, with the SDK's real loop; the product's
has `start.sh` and the ComfyUI stand-in around it, and makes its result from a file on the RAM disk. The peak is the
kernel's VmHWM of the one process that runs the handler. The result's Base64 is as long as the string. 19.5 MB is what
RunPod takes of /runsync, less a margin. The large input is one file that the workflow does not use.
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
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.common import write_json
from local.__main__ import ENDPOINT, Platform, running_platform, running_worker, start, stop, worker_settings

MB = 1_000_000
SIZES_MB = (1.0, 5.0, 19.5)
INPUT_MB = 10.0  # of the large input, before Base64
LIMIT_SHARE = 0.75  # of the Base64 size: so much more than the empty handler the largest result may take
DEADLINE_S = 60.0
PICTURE_SHARE = 8  # the result is this many copies of the picture that is sent, one below the other
EMPTY_HANDLER = """\
import runpod

async def handler(job):
    return "x" * job["input"]["size_bytes"]

if __name__ == "__main__":
    runpod.serverless.start({"handler": handler})
"""


def call(platform: Platform, path: str, body: dict[str, Any], timeout_s: float = DEADLINE_S) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{platform.api_url}/{ENDPOINT}/{path}",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {platform.api_key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        return dict(json.load(answer))


def finished(platform: Platform, job_input: dict[str, Any]) -> Any:
    """The output of one job. Raises RuntimeError where it has none."""
    answer = call(platform, f"runsync?wait={int(DEADLINE_S * 1000)}", {"input": job_input})
    if answer["status"] != "COMPLETED" or "output" not in answer:
        raise RuntimeError(f"the job is {answer['status']}: {answer.get('error', 'without an output')}")
    return answer["output"]


def noise_job(size_bytes: int, input_bytes: int) -> dict[str, Any]:
    """A job whose PNG has about ``size_bytes`` in Base64. Noise does not shrink, and neither do copies of it that stand
    further apart than the 32 KiB that deflate looks back."""
    side = int((size_bytes * 3 / 4 / PICTURE_SHARE / 3) ** 0.5)
    stream = io.BytesIO()
    Image.frombytes("RGB", (side, side), os.urandom(3 * side * side)).save(stream, "PNG")
    workflow: dict[str, Any] = {"1": {"class_type": "LoadImage", "inputs": {"image": "noise.png"}}}
    for number in range(2, 2 + PICTURE_SHARE.bit_length() - 1):  # each doubles the one before
        half = [str(number - 1), 0]
        stitch = {"direction": "down", "match_image_size": True, "spacing_width": 0, "spacing_color": "white"}
        workflow[str(number)] = {"class_type": "ImageStitch", "inputs": {"image1": half, "image2": half, **stitch}}
    last = [str(len(workflow)), 0]
    workflow["save"] = {"class_type": "SaveImage", "inputs": {"images": last, "filename_prefix": "noise"}}
    files = {"unused.bin": base64.b64encode(os.urandom(input_bytes)).decode()} if input_bytes else {}
    return {"workflow": workflow, "images": {"noise.png": base64.b64encode(stream.getvalue()).decode()}, "files": files}


def memory_mb(pid: int, field: str) -> float:
    """VmRSS or VmHWM of a process, which /proc gives in KiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / MB
    raise RuntimeError(f"process {pid} has no {field}")


def within_deadline(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise RuntimeError(f"did not happen within {DEADLINE_S:g} s: {what}")


@contextlib.contextmanager
def product(platform: Platform, folder: Path) -> Iterator[int]:
    """The whole worker; yields the pid of rp_handler.py when it asks for jobs."""
    log_path = folder / "product-log"
    environ = {**os.environ, "RESULT_LIMIT_MB": "20"}
    with log_path.open("w") as log_file, running_worker(platform, environ, log_file) as worker:
        begins = "--- Starting Serverless Worker"
        within_deadline(lambda: begins in log_path.read_text(errors="replace"), "the worker asks for jobs")
        yield handler_pid(worker.settings["RAMDISK_DIR"])


def handler_pid(ramdisk_dir: str) -> int:
    """The oldest process of this worker that runs rp_handler.py; the SDK's ping process is younger."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ours = f"RAMDISK_DIR={ramdisk_dir}".encode() in (entry / "environ").read_bytes().split(b"\0")
            if ours and b"rp_handler.py" in (entry / "cmdline").read_bytes().split(b"\0"):
                started = int((entry / "stat").read_text().rpartition(")")[2].split()[19])
                found.append((started, int(entry.name)))
    return min(found)[1]


@contextlib.contextmanager
def empty_handler(platform: Platform, folder: Path) -> Iterator[int]:
    """A worker of the SDK alone; yields its pid."""
    program = folder / "empty_handler.py"
    program.write_text(EMPTY_HANDLER)
    settings = worker_settings(os.environ, platform.url, platform.api_key)
    environ = {**settings, "RUNPOD_LOG_LEVEL": "INFO", "HOME": str(folder)}
    with (folder / "empty-log").open("w") as log_file:
        process = start([sys.executable, str(program)], environ, log_file)
        try:
            yield process.pid
        finally:
            stop(process)


def measure(size_mb: float, input_mb: float = 0) -> dict[str, float]:
    """One run: both peaks, both before the job, and the length of the Base64 text, in MB."""
    with tempfile.TemporaryDirectory() as name, (Path(name) / "platform-log").open("w") as log_file:
        folder = Path(name)
        with running_platform(os.environ, log_file=log_file) as platform, product(platform, folder) as pid:
            idle_mb = memory_mb(pid, "VmRSS")
            output = finished(platform, noise_job(int(size_mb * MB), int(input_mb * MB)))
            peak_mb = memory_mb(pid, "VmHWM")
        size_bytes = len(output["images"][0]["data"])
        with running_platform(os.environ, log_file=log_file) as platform, empty_handler(platform, folder) as pid:
            finished(platform, {"size_bytes": 1})  # it is up, and has done what it does once
            empty_idle_mb = memory_mb(pid, "VmRSS")
            finished(platform, {"size_bytes": size_bytes})
            empty_peak_mb = memory_mb(pid, "VmHWM")
    return {
        "input_mb": input_mb,
        "base64_mb": size_bytes / MB,
        "empty_idle_mb": empty_idle_mb,
        "empty_peak_mb": empty_peak_mb,
        "idle_mb": idle_mb,
        "peak_mb": peak_mb,
        "more_mb": peak_mb - empty_peak_mb,
        "share": (peak_mb - empty_peak_mb) / (size_bytes / MB),
    }


def main() -> int:
    """Returns 1 where the largest result, in the median, takes more than LIMIT_SHARE of its size."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description="Peak memory of the handler.")
    parser.add_argument("--runs", type=int, default=3, help="runs of each size (default: 3); the table has medians")
    parser.add_argument("--sizes-mb", type=float, nargs="+", default=list(SIZES_MB), help="default: 1 5 19.5")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every run goes there")
    options = parser.parse_args()
    largest_mb = max(options.sizes_mb)
    runs, worst = [], 0.0
    print(
        "input MB | Base64 MB | empty: idle, peak MB | handler: idle, peak MB | more MB | of Base64 (lowest, highest)"
    )
    for size_mb, input_mb in [*((size_mb, 0.0) for size_mb in options.sizes_mb), (largest_mb, INPUT_MB)]:
        of_case = [measure(size_mb, input_mb) for _ in range(options.runs)]
        runs += of_case
        median = {key: statistics.median(run[key] for run in of_case) for key in of_case[0]}
        shares = [run["share"] for run in of_case]
        if size_mb == largest_mb:
            worst = max(worst, median["share"])
        print(
            f"{input_mb:8.1f} | {median['base64_mb']:9.1f} | "
            f"{median['empty_idle_mb']:11.1f}, {median['empty_peak_mb']:7.1f} | "
            f"{median['idle_mb']:13.1f}, {median['peak_mb']:7.1f} | {median['more_mb']:7.1f} | "
            f"{median['share']:.2f} ({min(shares):.2f}, {max(shares):.2f})",
            flush=True,
        )
    write_json(options.json, runs)
    print(f"the largest: {worst:.2f} of its Base64 more than the empty handler; the limit is {LIMIT_SHARE}")
    return 0 if worst <= LIMIT_SHARE else 1


if __name__ == "__main__":
    sys.exit(main())
