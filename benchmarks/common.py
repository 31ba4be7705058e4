"""What the scripts share: a ComfyUI under start.sh, photographs, and figures of runs that take turns."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from local.__main__ import ROOT, free_port, start, stop

PHOTO = ROOT / "workflows" / "photos" / "coffee.jpg"
BOOT_TIMEOUT_S = 180.0
BOOT_POLL_S = 0.05


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
