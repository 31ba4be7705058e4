"""How long a cold start takes: from start.sh's first line to the posted result of a job that already waits.

    python -m benchmarks.coldstart                        9 pairs with the ComfyUI stand-in, about a minute
    COMFYUI_DIR=... COMFYUI_PYTHON=... python -m benchmarks.coldstart       real ComfyUI: 4 minutes
    python -m benchmarks.coldstart --pairs 15 --no-bytecode --json FILE

The floor is bare ComfyUI: `python main.py --listen 127.0.0.1 --port N` with the flags that it has by itself, from its
start to the first result of the same workflow, by a client that asks /system_stats every 20 ms, sends one POST /prompt,
waits for the history and reads the file. That is what a person has who starts ComfyUI by hand; a worker can be faster,
because it needs no API nodes. Folders and database of both lie outside of the checkout, whose compiled bytecode is used
and never written. `--no-bytecode` takes a copy of the checkout that has none, as an
image is that was built without compileall; the packages of its Python keep theirs.

The pairs take turns in who comes first, after one pair that does not count. The table of phases has the time from the
first line to each of them, from the lines of the log, the files in the RAM disk's run/ and the result's timings_ms.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from benchmarks.common import (
    PHOTO,
    BareComfyUI,
    booting_comfyui,
    comfyui_dir,
    comfyui_python,
    is_real,
    p95,
    rounded,
    which_comfyui,
    write_json,
)
from benchmarks.memory import call
from local.__main__ import ENDPOINT, ROOT, Platform, running_platform, running_worker

TARGET = 0.92  # of the floor, with real ComfyUI
DEADLINE_S = 300.0
POLL_S = 0.02
WORKFLOW = json.loads((ROOT / "workflows" / "one_image.json").read_text())
# What is in the log when a phase is over; a name: the file in run/ that start.sh has written then.
PHASES: dict[str, re.Pattern[str] | str] = {
    "settings": re.compile(r"start\.sh comfy-endpoint \d"),
    "RAM disk": re.compile(r"start\.sh RAM disk "),
    "models, ComfyUI starts": "comfyui",
    "handler has imported": re.compile(r"ComfyUI answers after (?P<waited_s>[\d.]+) s"),
    "ComfyUI listens": re.compile(r"start\.sh ComfyUI listens"),
    "handler knows it": re.compile(r"ComfyUI answers after"),
    "SDK starts": re.compile(r"Starting Serverless Worker"),
    "job is taken": re.compile(r"Jobs in queue: 1"),
    "job starts": re.compile(r"\bStarted\."),
    "result is made": re.compile(r"\bwipe: [\d.]+ ms"),
}
Figures = dict[str, float]


# --- the product ---


class TimedLog:
    """The lines of a pipe with the time at which each came, read by a thread."""

    def __init__(self) -> None:
        read_end, write_end = os.pipe()
        self.writer: IO[str] = os.fdopen(write_end, "w")
        self._reader = os.fdopen(read_end, errors="replace")
        self._thread = threading.Thread(target=self._read)
        self.lines: list[tuple[float, str]] = []
        self._thread.start()

    def _read(self) -> None:
        for line in self._reader:
            self.lines.append((time.monotonic(), line))

    def close(self) -> None:
        """When all that writes into it has ended."""
        self.writer.close()
        self._thread.join()
        self._reader.close()

    def text(self) -> str:
        return "".join(line for _, line in self.lines)


def measure_product(platform: Platform, environ: Mapping[str, str]) -> Figures:
    """One cold start; the seconds from the first line to each phase, and to the posted result under `total`."""
    answer: dict[str, Any] = {}
    client = threading.Thread(target=lambda: answer.update(asked(platform)), daemon=True)
    client.start()
    wait_for_queued(platform)
    log = TimedLog()
    try:
        started = time.monotonic()
        with running_worker(platform, environ, log.writer) as worker:
            while client.is_alive():
                client.join(POLL_S)
                if worker.process.poll() is not None:
                    raise RuntimeError(f"start.sh ended with {worker.process.returncode}")
            run_dir = Path(worker.settings["RAMDISK_DIR"], "run")
            notes = {name: (run_dir / name).stat().st_mtime for name in PHASES.values() if isinstance(name, str)}
            wall_started = time.time() - (time.monotonic() - started)
    finally:
        log.close()
        if answer.get("status") != "COMPLETED":
            sys.stderr.write(log.text()[-5000:])
    if answer.get("status") != "COMPLETED":
        raise RuntimeError(f"the job is {answer.get('status')}: {answer.get('error')}")
    figures = phase_seconds(log.lines, started)
    figures |= {phase: notes[name] - wall_started for phase, name in PHASES.items() if isinstance(name, str)}
    figures |= {f"{step}_ms": value for step, value in answer["output"]["timings_ms"].items()}
    return figures | {"total": answer["at"] - started}


def asked(platform: Platform) -> dict[str, Any]:
    """The job, sent before there is a worker and answered as soon as its result is posted; with the time, as `at`."""
    photo = base64.b64encode(PHOTO.read_bytes()).decode()
    body = {"input": {"workflow": WORKFLOW, "images": {PHOTO.name: photo}}}
    answer = call(platform, f"runsync?wait={int(DEADLINE_S * 1000)}", body, DEADLINE_S)
    return answer | {"at": time.monotonic()}


def wait_for_queued(platform: Platform) -> None:
    url = f"{platform.api_url}/{ENDPOINT}/health"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {platform.api_key}"})
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
            if json.load(response)["jobs"]["inQueue"]:
                return
        time.sleep(POLL_S)
    raise RuntimeError("the job is not queued")


def phase_seconds(lines: list[tuple[float, str]], started: float) -> Figures:
    """When each phase was over that the log tells of."""
    figures = {}
    for phase, pattern in PHASES.items():
        if isinstance(pattern, str):
            continue
        for at, line in lines:
            if found := pattern.search(line):
                figures[phase] = at - started - float(found.groupdict().get("waited_s", 0))
                break
        else:
            raise RuntimeError(f"the log has no line for {phase!r}")
    return figures


# --- bare ComfyUI ---


def measure_bare(folder: Path, environ: Mapping[str, str]) -> Figures:
    """Bare ComfyUI: the seconds from its start to the first answer, and to the first result under `total`."""
    (folder / "input").mkdir(parents=True)
    shutil.copy(PHOTO, folder / "input")
    with booting_comfyui(folder, "--database-url", f"sqlite:///{folder / 'comfyui.db'}", environ=environ) as comfyui:
        wait_for_answer(comfyui)
        answers_s = time.monotonic() - comfyui.started
        history = first_result(comfyui.port)
        name = next(picture["filename"] for output in history["outputs"].values() for picture in output["images"])
        picture = base64.b64encode((folder / "output" / name).read_bytes())
        total_s = time.monotonic() - comfyui.started
    if history["status"]["status_str"] != "success" or not picture:
        raise RuntimeError(f"bare ComfyUI: {history['status']}")
    return {"ComfyUI answers": answers_s, "total": total_s}


def wait_for_answer(comfyui: BareComfyUI) -> None:
    while not comfyui.answers():
        if time.monotonic() > comfyui.started + DEADLINE_S:
            raise RuntimeError("ComfyUI does not answer")
        time.sleep(POLL_S)


def first_result(port: int) -> dict[str, Any]:
    """The history of one prompt."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/prompt",
        json.dumps({"prompt": WORKFLOW}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
        prompt_id = json.load(response)["prompt_id"]
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/history/{prompt_id}", timeout=DEADLINE_S) as response:
            history = json.load(response)
        if prompt_id in history:
            return dict(history[prompt_id])
        time.sleep(POLL_S)
    raise RuntimeError("the prompt does not end")


# --- the table ---


def measured_pairs(pairs: int, environ: Mapping[str, str]) -> dict[str, list[Figures]]:
    """Both sides of each pair, one after the other; in every second pair the floor comes first."""
    measured: dict[str, list[Figures]] = {"product": [], "bare": []}
    with (
        tempfile.TemporaryDirectory(prefix="comfy-endpoint-bench-") as name,
        Path(name, "platform-log").open("w") as log_file,
        running_platform(environ, log_file=log_file) as platform,
    ):
        for number in range(pairs + 1):
            order = ("product", "bare") if number % 2 else ("bare", "product")
            for side in order:
                if side == "product":
                    figures = measure_product(platform, environ)
                else:
                    figures = measure_bare(Path(name, str(number)), environ)
                if number > 0:  # the first pair only fills the page cache
                    measured[side].append(figures)
    return measured


@contextlib.contextmanager
def checkout(*, bytecode: bool) -> Iterator[dict[str, str]]:
    """The environment of both sides: this one, with ComfyUI's folder and Python named."""
    folder = comfyui_dir()
    environ = {**os.environ, "COMFYUI_PYTHON": comfyui_python(), "PYTHONDONTWRITEBYTECODE": "1"}
    if bytecode:
        yield environ | {"COMFYUI_DIR": str(folder)}
        return
    with tempfile.TemporaryDirectory(prefix="comfy-endpoint-checkout-") as name:
        copy = Path(name, "ComfyUI")
        # Models may be large, and none is needed.
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("__pycache__", ".git", "models", "output"))
        (copy / "models").mkdir()
        yield environ | {"COMFYUI_DIR": str(copy)}


def print_tables(measured: dict[str, list[Figures]]) -> float:
    """Returns the ratio: the median of the pairs' ratios."""
    totals = {side: [run["total"] for run in runs] for side, runs in measured.items()}
    ratios = [ours / bare for ours, bare in zip(totals["product"], totals["bare"], strict=True)]
    ratio = statistics.median(ratios)
    print("first line to first result | median, s | p95, s | of the floor (lowest, highest)")
    for side, label in (("bare", "bare ComfyUI, the floor"), ("product", "start.sh to posted result")):
        tail = f"{ratio:.3f} ({min(ratios):.3f}, {max(ratios):.3f})" if side == "product" else ""
        print(f"{label:26} | {statistics.median(totals[side]):9.2f} | {p95(totals[side]):6.2f} | {tail}")
    answers = statistics.median(run["ComfyUI answers"] for run in measured["bare"])
    print(f"\nphase ends (median)        | s after the start\nbare: ComfyUI answers      | {answers:.2f}")
    for phase in PHASES:
        print(f"{phase:26} | {statistics.median(run[phase] for run in measured['product']):.2f}")
    print(f"{'result is posted':26} | {statistics.median(totals['product']):.2f}")
    steps = [key for key in measured["product"][0] if key.endswith("_ms")]
    of_steps = (f"{step[:-3]} {statistics.median(run[step] for run in measured['product']):.0f}" for step in steps)
    print(f"steps of the first job, ms | {', '.join(of_steps)}\n", flush=True)
    return ratio


def main() -> int:
    """Returns 1 where the ratio misses TARGET with real ComfyUI."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coldstart", description="How long a cold start takes.")
    parser.add_argument("--pairs", type=int, default=9, help="default: 9")
    parser.add_argument("--no-bytecode", action="store_true", help="a copy of the checkout without compiled bytecode")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every run goes there")
    options = parser.parse_args()
    print(f"{which_comfyui()}; {options.pairs} pairs")
    with checkout(bytecode=not options.no_bytecode) as environ:
        measured = measured_pairs(options.pairs, environ)
    ratio = print_tables(measured)
    write_json(options.json, {"comfyui": which_comfyui(), "ratio": round(ratio, 3), "runs": rounded(measured)})
    if not is_real() or options.no_bytecode:
        return 0
    print(f"the ratio is {ratio:.3f}; the target is at most {TARGET}")
    return 0 if ratio <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
