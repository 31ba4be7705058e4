"""The whole product as real processes: client.py, the RunPod stand-in, the SDK's loop, start.sh, ComfyUI's stand-in.

With COMFYUI_DIR and COMFYUI_PYTHON in the environment it is that checkout instead of the stand-in, which is given the
stand-in's faults and its sleeping node as a package of custom nodes (tests/comfyui_faults).
"""

import base64
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageDraw, ImageOps

from local.__main__ import ENDPOINT, Platform, Worker, running_platform, running_worker
from tests.contract.comfyui_client import fault_arguments

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60.0  # nothing takes nearly as long, but on a busy machine
BOOT_TIMEOUT_S = 90.0  # of real ComfyUI on a busy machine


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = DEADLINE_S) -> Any:
    """The first true value of ``condition``; fails with ``what`` after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    pytest.fail(f"did not happen within {timeout_s:g} s: {what}")


def processes_with(setting: str) -> list[int]:
    """Every living process whose environment has ``setting``, written NAME=value."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if setting.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def started_at(pid: int) -> int:
    """When a process was started, in clock ticks since the boot (proc(5)); pids begin anew, times do not."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return sys.maxsize


class Api:
    """The endpoint of a running platform, as a client asks it."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """``path`` is one of the endpoint's, or with a leading slash one of the stand-in itself."""
        endpoint = f"{self.platform.api_url}/{ENDPOINT}/"
        request = urllib.request.Request(
            f"{self.platform.url}{path}" if path.startswith("/") else endpoint + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self.platform.api_key}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            return json.load(answer)

    def start_job(self, job_input: Any, **more: Any) -> str:
        """``more`` stands beside the input in the request: ``policy``."""
        return str(self.call("POST", "run", {"input": job_input, **more})["id"])

    def status(self, job_id: str) -> dict[str, Any]:
        return dict(self.call("GET", f"status/{job_id}"))

    def cancel(self, job_id: str) -> dict[str, Any]:
        return dict(self.call("POST", f"cancel/{job_id}"))

    def finish(self, job_id: str, timeout_s: float = DEADLINE_S) -> dict[str, Any]:
        """The job's last status body."""

        def final() -> dict[str, Any] | None:
            body = self.status(job_id)
            return body if body["status"] not in ("IN_QUEUE", "IN_PROGRESS") else None

        return dict(wait_until(final, f"job {job_id} ends", timeout_s))

    def run(self, job_input: Any) -> dict[str, Any]:
        return self.finish(self.start_job(job_input))

    def posted(self, job_id: str) -> list[dict[str, Any]]:
        """What workers posted for a job, in the order of arrival; of a long result only its beginning, as {}."""
        bodies = []
        for text in self.call("GET", f"_posted/{job_id}"):
            try:
                bodies.append(json.loads(text))
            except ValueError:
                bodies.append({})
        return bodies

    def posted_bytes(self, job_id: str) -> list[int]:
        """The lengths of these bodies."""
        return list(self.call("GET", f"_posted_bytes/{job_id}"))

    def platform_fault(self, kind: str, **more: Any) -> None:
        self.call("POST", "/_fault", {"kind": kind, **more})

    def platform_faults(self) -> Counter[str]:
        """How often each kind of fault that was armed has struck."""
        struck: Counter[str] = Counter()
        for fault in self.call("GET", "/_fault")["faults"]:
            struck[fault["kind"]] += int(fault["struck"])
        return struck

    def platform_strikes(self, kind: str) -> int:
        return self.platform_faults()[kind]


class Driver(Api):
    """A platform with one worker, and what a test asks of them."""

    def __init__(self, platform: Platform, worker: Worker, log_path: Path) -> None:
        super().__init__(platform)
        self.worker = worker
        self.log_path = log_path
        self.ramdisk = Path(worker.settings["RAMDISK_DIR"])

    # --- ComfyUI and the RAM disk ---

    def comfyui(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.worker.comfyui_url}{path}", timeout=DEADLINE_S) as answer:
            return json.load(answer)

    def post_comfyui(self, path: str, body: dict[str, Any]) -> None:
        url = f"{self.worker.comfyui_url}{path}"
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            assert answer.status == 200

    def fault(self, kind: str, **more: Any) -> None:
        """Arm a fault of ComfyUI (local/comfyui/standin/faults.py)."""
        self.post_comfyui("/_fault", {"kind": kind, **more})

    def faults(self) -> Counter[str]:
        """How often each kind of fault of this start of ComfyUI has struck."""
        struck: Counter[str] = Counter()
        for fault in self.comfyui("/_fault")["armed"]:
            struck[fault["kind"]] += int(fault["fired"])
        return struck

    def strikes(self, kind: str) -> int:
        return self.faults()[kind]

    def disarm(self) -> None:
        """Every fault of ComfyUI that is armed is taken back."""
        request = urllib.request.Request(f"{self.worker.comfyui_url}/_fault", method="DELETE")
        urllib.request.urlopen(request, timeout=DEADLINE_S).close()

    def comfyui_answers(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(self.comfyui("/system_stats"))
        return False

    def comfyui_runs(self) -> bool:
        return bool(self.comfyui("/queue")["queue_running"])

    def comfyui_is_idle(self) -> bool:
        queue = self.comfyui("/queue")
        return not queue["queue_running"] and not queue["queue_pending"]

    def job_files(self) -> list[Path]:
        """Every file of a job on the RAM disk."""
        folders = [self.ramdisk / name for name in ("input", "output", "temp")]
        return sorted(path for folder in folders for path in folder.rglob("*") if not path.is_dir())

    def own_pids(self) -> list[int]:
        """Every living process that this stack's start.sh has started."""
        return processes_with(f"RAMDISK_DIR={self.ramdisk}")

    def pid_of(self, program: str) -> int:
        """The process of this stack whose command line has ``program``; the oldest, where it has forked."""
        for pid in sorted(self.own_pids(), key=started_at):
            with contextlib.suppress(OSError):  # one that has just ended
                if program.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    return pid
        pytest.fail(f"no process runs {program}")

    def comfyui_pid(self) -> int:
        return int((self.ramdisk / "run" / "comfyui").read_text().split()[0])

    def comfyui_log(self) -> str:
        return (self.ramdisk / "run" / "comfyui.log").read_text(errors="replace")

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    # --- client.py ---

    def client_command(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, str(ROOT / "client.py"), "--url", self.platform.api_url, *map(str, arguments)]

    def client_environ(self) -> dict[str, str]:
        return {**os.environ, "RUNPOD_API_KEY": self.platform.api_key, "RUNPOD_ENDPOINT_ID": ENDPOINT}

    def client(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.client_command(*arguments),
            env=self.client_environ(),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )


def own_environ(**settings: str) -> dict[str, str]:
    """This process's environment without what would lead a worker elsewhere."""
    own = ("RUNPOD_", "PYTHONDONTWRITEBYTECODE")  # the second would hide whether start.sh leaves a checkout alone
    return {key: value for key, value in os.environ.items() if not key.startswith(own)} | settings


@contextlib.contextmanager
def boot_platform(log_path: Path, *options: str) -> Iterator[Platform]:
    with log_path.open("w") as log_file, running_platform(own_environ(), *options, log_file=log_file) as platform:
        yield platform


@contextlib.contextmanager
def start_worker(platform: Platform, log_path: Path, **settings: str) -> Iterator[Driver]:
    """A worker that has just been started: nothing of it is up yet."""
    if more := fault_arguments(log_path.parent):
        settings.setdefault("COMFYUI_ARGS", " ".join(more))
    with log_path.open("w") as log_file, running_worker(platform, own_environ(**settings), log_file) as worker:
        driver = Driver(platform, worker, log_path)
        try:
            yield driver
        finally:
            if worker.process.poll() is not None:  # a killed one has left it
                shutil.rmtree(driver.ramdisk, ignore_errors=True)


@contextlib.contextmanager
def boot_worker(platform: Platform, log_path: Path, **settings: str) -> Iterator[Driver]:
    """A worker that asks for jobs."""
    with start_worker(platform, log_path, **settings) as driver:
        sdk_begins = "--- Starting Serverless Worker"
        wait_until(lambda: sdk_begins in driver.log(), "the worker asks for jobs", BOOT_TIMEOUT_S)
        yield driver


@contextlib.contextmanager
def boot(log_path: Path, **settings: str) -> Iterator[Driver]:
    """A platform and a worker of its own that asks for jobs."""
    with (
        boot_platform(log_path.with_name("platform-log")) as platform,
        boot_worker(platform, log_path, **settings) as driver,
    ):
        yield driver


# --- pictures and workflows ---


def picture_bytes(width: int = 64, height: int = 48, color: str = "orange") -> bytes:
    """A small PNG that is not of one colour."""
    image = Image.new("RGB", (width, height), color)
    ImageDraw.Draw(image).ellipse((4, 4, width // 2, height // 2), fill="navy")
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def inverted(content: bytes) -> bytes:
    stream = io.BytesIO()
    ImageOps.invert(Image.open(io.BytesIO(content)).convert("RGB")).save(stream, "PNG")
    return stream.getvalue()


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def image_of(item: dict[str, Any]) -> Image.Image:
    """The picture in an item of a result, or behind its link."""
    if item.get("type") == "s3_url":
        with urllib.request.urlopen(item["data"], timeout=DEADLINE_S) as answer:
            content = answer.read()
    else:
        content = base64.b64decode(item["data"])
    return Image.open(io.BytesIO(content)).convert("RGB")


def largest_difference(left: Image.Image, right: Image.Image) -> int:
    """Per channel, 0 to 255."""
    assert left.size == right.size
    return max(high for _, high in ImageChops.difference(left, right).getextrema())


def is_inverted(item: dict[str, Any], content: bytes) -> bool:
    """Whether an item of a result is the picture ``content``, inverted.

    ComfyUI truncates 255 * (1 - v / 255) in float32, so a level may be one lower than Pillow's.
    """
    picture, original = image_of(item), Image.open(io.BytesIO(content)).convert("RGB")
    return picture.size == original.size and largest_difference(picture, ImageOps.invert(original)) <= 1


def invert_workflow(image: str = "a.png", prefix: str = "inverted") -> dict[str, Any]:
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": image}},
        "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": prefix}},
    }


def slow_workflow(seconds: float, steps: int = 1000) -> dict[str, Any]:
    """As `invert_workflow`, and takes ``seconds``; it can be interrupted at each of its ``steps``."""
    workflow = invert_workflow()
    sleep = {"image": ["1", 0], "seconds": seconds, "steps": steps}
    workflow["sleep"] = {"class_type": "StandinSleep", "inputs": sleep}
    workflow["2"]["inputs"]["image"] = ["sleep", 0]
    return workflow


def job(workflow: dict[str, Any], content: bytes | None = None, **extra: Any) -> dict[str, Any]:
    """A job's input with the picture that the workflows here load."""
    return {"workflow": workflow, "images": {"a.png": base64_of(content or picture_bytes())}, **extra}


def invert_job(content: bytes | None = None, **extra: Any) -> dict[str, Any]:
    return job(invert_workflow(), content, **extra)


def slow_job(seconds: float, steps: int = 1000, **extra: Any) -> dict[str, Any]:
    return job(slow_workflow(seconds, steps), **extra)


def start_long_job(driver: Driver, seconds: float = 60, *, timeout_s: float | None = None, **more: Any) -> str:
    """A job that runs in ComfyUI when this returns; ``more`` stands beside its input in the request."""
    extra = {} if timeout_s is None else {"timeout_s": timeout_s}
    job_id = driver.start_job(slow_job(seconds, **extra), **more)
    wait_until(driver.comfyui_runs, "the long job runs")
    return job_id
