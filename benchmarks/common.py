"""What the scripts share: a ComfyUI under start.sh, photographs, and figures of runs that take turns."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from local.__main__ import ENDPOINT, ROOT, Platform, free_port, start, stop

PHOTO = ROOT / "workflows" / "photos" / "coffee.jpg"
BOOT_TIMEOUT_S = 180.0
BOOT_POLL_S = 0.05
GPUS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # as has_gpu in start.sh


@dataclass(frozen=True)
class Pod:
    """A running `start.sh` without a handler: ComfyUI on ``port``, its files below ``ramdisk_dir``."""

    port: int
    ramdisk_dir: Path


@contextlib.contextmanager
def running_pod(*comfyui_args: str) -> Iterator[Pod]:
    """`start.sh` in MODE=pod, with the stand-in or the ComfyUI that COMFYUI_DIR names. Raises RuntimeError."""
    port = free_port()
    settings = {
        "COMFYUI_PORT": str(port),
        "RAMDISK_DIR": f"/dev/shm/comfy-endpoint-bench-{port}",
        "WORKER_PYTHON": sys.executable,
        "COMFYUI_ARGS": " ".join(comfyui_args),
        "MODE": "pod",
    }
    if not is_real():
        settings |= {"COMFYUI_DIR": str(ROOT / "local" / "comfyui"), "COMFYUI_PYTHON": sys.executable}
    with tempfile.TemporaryFile("w+") as log:
        # A sampler on all cores would leave none for the client, and wait for that one.
        environ = {"OMP_NUM_THREADS": "1", **os.environ, **settings}
        process = start(["bash", str(ROOT / "start.sh")], environ, log)
        try:
            ramdisk_dir, deadline = Path(settings["RAMDISK_DIR"]), time.monotonic() + BOOT_TIMEOUT_S
            while not (ramdisk_dir / "run" / "listened").exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"start.sh did not get ready: {log.read()[-2000:]}")
                time.sleep(BOOT_POLL_S)
            yield Pod(port, ramdisk_dir)
        finally:
            stop(process)


@dataclass(frozen=True)
class BareComfyUI:
    """ComfyUI without start.sh, from ``started`` (of the monotonic clock) on."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    started: float

    def answers(self) -> bool:
        """Raises RuntimeError where it has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"ComfyUI ended: {self.log.read_text()[-2000:]}")
        url = f"http://127.0.0.1:{self.port}/system_stats"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return True
        return False


@contextlib.contextmanager
def booting_comfyui(folder: Path, *flags: str, environ: Mapping[str, str] = os.environ) -> Iterator[BareComfyUI]:
    """`python main.py` of the checkout that ``environ`` names, or of the stand-in, with its files below ``folder``."""
    port, log_path = free_port(), folder / "comfyui-log"
    folders = {name: folder / name for name in ("input", "output", "user")}
    for place in folders.values():
        place.mkdir(parents=True, exist_ok=True)
    command = [comfyui_python(environ), "main.py", "--listen", "127.0.0.1", "--port", str(port)]
    command += [f"--{name}-directory={place}" for name, place in folders.items()]
    command += ["--temp-directory", str(folder), *flags]
    command += [] if any(map(os.path.exists, GPUS)) else ["--cpu"]
    settings = {**environ, "PYTHONDONTWRITEBYTECODE": "1"}
    with log_path.open("w") as log:
        started = time.monotonic()
        process = subprocess.Popen(
            command, cwd=comfyui_dir(environ), env=settings, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        yield BareComfyUI(process, port, log_path, started)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def comfyui_dir(environ: Mapping[str, str] = os.environ) -> Path:
    return Path(environ.get("COMFYUI_DIR") or ROOT / "local" / "comfyui")


def comfyui_python(environ: Mapping[str, str] = os.environ) -> str:
    return environ.get("COMFYUI_PYTHON") or sys.executable


def is_real() -> bool:
    """Whether the environment names a ComfyUI, which takes the stand-in's place."""
    return "COMFYUI_DIR" in os.environ


def which_comfyui() -> str:
    """For the tables: the stand-in, or real ComfyUI with the version that its checkout states."""
    if not is_real():
        return "the stand-in for ComfyUI"
    with contextlib.suppress(OSError):
        if stated := re.search(r'"([\d.]+)"', Path(os.environ["COMFYUI_DIR"], "comfyui_version.py").read_text()):
            return f"ComfyUI {stated[1]}"
    return "ComfyUI"


def photograph(side: int) -> bytes:
    """A square PNG of the middle of a photograph. A flat colour would take next to nothing to check and to send."""
    with Image.open(PHOTO) as picture:
        height = picture.height
        left = (picture.width - height) // 2
        square = picture.crop((left, 0, left + height, height)).resize((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    square.save(stream, "PNG")
    return stream.getvalue()


def saver(source: str) -> dict[str, Any]:
    return {"class_type": "SaveImage", "inputs": {"images": [source, 0], "filename_prefix": "bench"}}


def flat_workflow(color: int = 0) -> dict[str, Any]:
    """Makes a picture of 64x64 and saves it: next to no work for ComfyUI."""
    size = {"width": 64, "height": 64, "batch_size": 1, "color": color}
    return {"1": {"class_type": "EmptyImage", "inputs": size}, "2": saver("1")}


class Connection:
    """One kept connection to the endpoint of a platform."""

    def __init__(self, platform: Platform, timeout_s: float) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(platform.url).netloc, timeout=timeout_s)
        self._headers = {"Authorization": f"Bearer {platform.api_key}", "Content-Type": "application/json"}

    def call(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        self._connection.request(method, f"/v2/{ENDPOINT}/{path}", body, self._headers)
        return dict(json.load(self._connection.getresponse()))


# --- figures ---


def in_pairs(runs: int, first: Callable[[], float], second: Callable[[], float]) -> list[tuple[float, float]]:
    """What both return, run after run; which of them begins alternates, so that neither gets the better moments."""
    pairs = []
    for number in range(runs):
        if number % 2 == 0:
            one = first()
            pairs.append((one, second()))
        else:
            other = second()
            pairs.append((first(), other))
    return pairs


def p95(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]


def pair_figures(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Of pairs (floor, ours): medians and 95th percentiles, the median of the differences, the ratio of the medians."""
    floors, ours = zip(*pairs, strict=True)
    floor, our = statistics.median(floors), statistics.median(ours)
    return {
        "floor": floor,
        "floor_p95": p95(floors),
        "ours": our,
        "ours_p95": p95(ours),
        "more": statistics.median(second - first for first, second in pairs),
        "ratio": our / floor,
        "runs": len(pairs),
    }


def write_json(path: Path | None, content: object) -> None:
    """What a script's --json asks for."""
    if path is not None:
        path.write_text(json.dumps(content, indent=1) + "\n")


def rounded(value: object, digits: int = 3) -> object:
    """Without the digits that no run repeats."""
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return value
