"""What a job costs beyond ComfyUI's own work: the seven steps, over the barest client of the same ComfyUI.

    python -m benchmarks.overhead                    the stand-in, 15 pairs of each case, a minute
    python -m benchmarks.overhead --runs 41 --cases small picture --json FILE
    COMFYUI_DIR=... COMFYUI_PYTHON=... python -m benchmarks.overhead        the same with real ComfyUI

The floor is what no client can do without: decode what came as Base64 and write it, connect the websocket, POST the
workflow, read until ComfyUI says that the prompt has ended, ask for its record, read the files, encode them. It does
not check, sync, wipe, empty a queue or forget a history, and knows no fault. The worker's side is `Worker.run_job`
with all of that. Both run in this process, on one ComfyUI under `start.sh`, and take turns; what the bare client
leaves behind is removed before the worker's turn, and outside of its time. Both have the same pictures, which ComfyUI
has loaded before, and the same changing input at the output nodes, so ComfyUI does the same work for both.

The second table has the worker's own times (`timings_ms`; "run" is ComfyUI's work too), the third what its calls
cost, in further runs: fsync is part of the wipes and the writing. Waiting for ComfyUI's messages is left out there.
The process has the malloc setting that `start.sh` gives the handler.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import contextlib
import http.client
import json
import logging
import os
import secrets
import socket
import statistics
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import websocket

import rp_handler
import worker.outputs
import worker.payload
from benchmarks.common import (
    Pod,
    flat_workflow,
    in_pairs,
    is_real,
    pair_figures,
    photograph,
    rounded,
    running_pod,
    saver,
    which_comfyui,
    write_json,
)
from worker.comfyui_server import ComfyUIServer
from worker.config import Config
from worker.control import JobControl
from worker.feed import Feed
from worker.graph import Workflow
from worker.process import ComfyUIProcess
from worker.ramdisk import RamDisk
from worker.run import NONCE_INPUT
from worker.steps import STEPS

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1048576"}  # as start.sh has it for the handler
TIMEOUT_S = 120.0
WARM_UPS = 2
COST_RUNS = 7
CHECKPOINT = "tiny.safetensors"  # tests/contract/tiny_checkpoint.py makes it
STEPS_OF_SAMPLER = 20


@dataclass(frozen=True)
class Case:
    """One kind of job. ``make`` gives the workflow of a run, by its number; ``limit_ms`` is for real ComfyUI."""

    name: str
    title: str
    make: Callable[[int], Workflow]
    pictures: dict[str, str] = field(default_factory=dict)
    results: int = 1
    limit_ms: float | None = None


def cases() -> list[Case]:
    def load(*names: str) -> Callable[[int], Workflow]:
        return lambda _: {
            node_id: node
            for number, name in enumerate(names)
            for node_id, node in (
                (f"{number}", {"class_type": "LoadImage", "inputs": {"image": name}}),
                (f"{number}:save", saver(f"{number}")),
            )
        }

    def pictures(side: int, count: int) -> dict[str, str]:
        text = base64.b64encode(photograph(side)).decode()
        return {f"{side}-{number}.png": text for number in range(count)}

    one, large, four = pictures(1024, 1), pictures(2048, 1), pictures(1024, 4)
    return [
        Case("small", "64x64, no input", lambda _: flat_workflow(), limit_ms=5),
        Case("picture", "1024x1024 in and out", load(*one), one, limit_ms=10),
        Case("large", "2048x2048 in and out", load(*large), large, limit_ms=25),
        Case("four", "4 of 1024x1024 in and out", load(*four), four, results=4),
        Case("steps", f"{STEPS_OF_SAMPLER} steps, previews", sampled),
    ]


def sampled(number: int) -> Workflow:
    """Another seed each time, or the steps would come from ComfyUI's cache."""
    loader: dict[str, Any] = {"class_type": "StandinCheckpoint", "inputs": {}}
    if is_real():
        loader = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": CHECKPOINT}}
    links = {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]}
    euler = {"sampler_name": "euler", "scheduler": "simple", "cfg": 1.0, "denoise": 1.0}
    sampler = {**links, **euler, "seed": number, "steps": STEPS_OF_SAMPLER}
    return {
        "1": loader,
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cup of coffee", "clip": ["1", 1]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["1", 1]}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "5": {"class_type": "KSampler", "inputs": sampler},
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": saver("6"),
    }


def without_model(case: Case) -> bool:
    checkpoint = Path(os.environ.get("COMFYUI_DIR", ""), "models", "checkpoints", CHECKPOINT)
    return case.name == "steps" and is_real() and not checkpoint.is_file()


# --- both sides ---


class BareClient:
    """No more than it takes to get the pictures."""

    def __init__(self, pod: Pod) -> None:
        self._pod = pod

    def run(self, workflow: Workflow, pictures: dict[str, str]) -> list[str]:
        """The pictures in Base64."""
        for name, text in pictures.items():
            (self._pod.ramdisk_dir / "input" / name).write_bytes(base64.b64decode(text))
        client_id = uuid.uuid4().hex
        listener = websocket.create_connection(
            f"ws://127.0.0.1:{self._pod.port}/ws?clientId={client_id}",
            socket=socket.create_connection(("127.0.0.1", self._pod.port), TIMEOUT_S),
            skip_utf8_validation=True,
            enable_multithread=False,
        )
        connection = http.client.HTTPConnection("127.0.0.1", self._pod.port, timeout=TIMEOUT_S)
        try:
            connection.request("POST", "/prompt", json.dumps({"prompt": workflow, "client_id": client_id}).encode())
            prompt_id = json.load(connection.getresponse())["prompt_id"].encode()
            while True:
                opcode, content = listener.recv_data()
                if opcode == websocket.ABNF.OPCODE_TEXT and b'"node": null' in content and prompt_id in content:
                    break
            connection.request("GET", f"/history/{prompt_id.decode()}")
            outputs = json.load(connection.getresponse())[prompt_id.decode()]["outputs"]
        finally:
            listener.shutdown()
            connection.close()
        folder = self._pod.ramdisk_dir / "output"
        names = [entry["filename"] for output in outputs.values() for entry in output["images"]]
        return [base64.b64encode((folder / name).read_bytes()).decode() for name in names]


class Bench:
    """One case on a running ComfyUI, by either side."""

    def __init__(self, pod: Pod, case: Case) -> None:
        settings = {"RAMDISK_DIR": str(pod.ramdisk_dir), "COMFYUI_PORT": str(pod.port), "RESULT_LIMIT_MB": "50"}
        self._worker = rp_handler.Worker(Config.from_env(settings))
        self._bare = BareClient(pod)
        self._case = case
        self._number = secrets.randbelow(1 << 40)
        self.timings_ms: list[dict[str, float]] = []

    def _next_workflow(self) -> Workflow:
        self._number += 1
        return self._case.make(self._number)

    def bare(self) -> float:
        """Milliseconds of one job by the bare client. The next turn finds what the worker would leave: nothing."""
        workflow = self._next_workflow()
        for node in workflow.values():
            if node["class_type"] == "SaveImage":
                node["inputs"][NONCE_INPUT] = secrets.token_hex(4)
        started = time.perf_counter()
        results = self._bare.run(workflow, self._case.pictures)
        took = time.perf_counter() - started
        self._check(results)
        self._worker.ramdisk.wipe()
        self._worker.process.scrub_log()
        self._worker.comfyui.clear_history()
        return 1000 * took

    def ours(self) -> float:
        """Milliseconds of one job by the worker."""
        job_input = {"workflow": self._next_workflow(), "images": dict(self._case.pictures)}
        control = JobControl(TIMEOUT_S)
        started = time.perf_counter()
        result = self._worker.run_job("bench", job_input, control, lambda _: None)
        took = time.perf_counter() - started
        self._check([item["data"] for item in result["images"]])
        self.timings_ms.append(result["timings_ms"])
        return 1000 * took

    def _check(self, results: list[str]) -> None:
        if len(results) != self._case.results or not all(text.startswith("iVBORw0KGgo") for text in results):
            raise RuntimeError(f"{self._case.title}: {len(results)} results, of which not all are PNGs")


# --- what the calls cost ---


class Costs:
    """Milliseconds and number of calls by kind, while `watched`."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        def request(_: Any, method: str, path: str, *__: Any, **___: Any) -> str:
            return f"{method} /{path.split('/')[1]}"

        places: list[tuple[Any, str, Callable[..., str]]] = [
            (ComfyUIServer, "call", request),
            (ComfyUIServer, "_answers", lambda *_: "GET /system_stats"),
            (Feed, "open", lambda *_: "websocket, connect"),
            (RamDisk, "write_inputs", lambda *_: "write the inputs"),
            (RamDisk, "wipe", lambda *_, **__: "wipe the RAM disk"),
            (ComfyUIProcess, "scrub_log", lambda *_: "wipe ComfyUI's log"),
            (ComfyUIProcess, "note_success", lambda *_: "note for start.sh"),
            (ComfyUIProcess, "watch_memory", lambda *_: "look at memory kills"),
            (os, "fsync", lambda *_: "(fsync)"),
            (binascii, "a2b_base64", lambda *_, **__: "Base64, decode"),
            (base64, "b64encode", lambda *_, **__: "Base64, encode"),
            (worker.payload, "check_image", lambda *_: "check the inputs"),
            (worker.outputs, "is_cut_short", lambda *_: "check the outputs"),
        ]
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
        for owner, name, kind_of in places:
            setattr(owner, name, self._timed(getattr(owner, name), kind_of))
        try:
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)

    def _timed(self, function: Callable[..., Any], kind_of: Callable[..., str]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                kind = kind_of(*arguments, **named)
                self.ms[kind] += 1000 * (time.perf_counter() - started)
                self.calls[kind] += 1

        return timed


def costs_of(bench: Bench) -> dict[str, dict[str, float]]:
    """Medians of COST_RUNS jobs, by kind of call."""
    runs = []
    for _ in range(COST_RUNS):
        costs = Costs()
        with costs.watched():
            bench.ours()
        runs.append(costs)
    return {
        kind: {
            "ms": statistics.median(costs.ms[kind] for costs in runs),
            "calls": statistics.median(costs.calls[kind] for costs in runs),
        }
        for kind in sorted({kind for costs in runs for kind in costs.ms})
    }


# --- tables ---


def measure(pod: Pod, case: Case, runs: int) -> dict[str, Any]:
    bench = Bench(pod, case)
    in_pairs(WARM_UPS, bench.bare, bench.ours)
    bench.timings_ms.clear()
    figures: dict[str, Any] = pair_figures(in_pairs(runs, bench.bare, bench.ours))
    figures["timings_ms"] = {
        step: statistics.median(timings.get(step, 0.0) for timings in bench.timings_ms) for step in STEPS
    }
    figures["calls"] = costs_of(bench)
    figures["limit_ms"] = case.limit_ms
    return figures


def print_row(case: Case, figures: dict[str, Any]) -> None:
    limit = "" if case.limit_ms is None else f"{case.limit_ms:g}"
    print(
        f"{case.title:26} | {figures['floor']:7.1f}, {figures['floor_p95']:7.1f} | "
        f"{figures['ours']:7.1f}, {figures['ours_p95']:7.1f} | {figures['more']:8.1f} | {limit:>5} | "
        f"{figures['ratio']:5.2f}",
        flush=True,
    )


def print_steps(measured: dict[str, dict[str, Any]]) -> None:
    print("\nof which, ms" + " " * 14 + " | " + " | ".join(f"{step:>7}" for step in STEPS))
    for title, figures in measured.items():
        print(f"{title:26} | " + " | ".join(f"{figures['timings_ms'][step]:7.1f}" for step in STEPS))


def print_calls(measured: dict[str, dict[str, Any]]) -> None:
    kinds = sorted({kind for figures in measured.values() for kind in figures["calls"]})
    print("\ncalls of a job, ms (how many) | " + " | ".join(f"{title[:14]:14}" for title in measured))
    for kind in kinds:
        cells = []
        for figures in measured.values():
            call = figures["calls"].get(kind, {"ms": 0.0, "calls": 0})
            cells.append(f"{call['ms']:8.2f} ({call['calls']:.0f})  ")
        print(f"{kind:29} | " + " | ".join(f"{cell:14}" for cell in cells))


@contextlib.contextmanager
def logging_as_the_handler() -> Iterator[None]:
    """Its lines go into a file: in a container, writing them takes no longer."""
    with tempfile.TemporaryFile("w") as log_file:
        with contextlib.redirect_stderr(log_file):
            rp_handler.configure_logging("INFO")
        try:
            yield
        finally:
            logging.getLogger().handlers.clear()


def main() -> int:
    """Returns 1 where a job on real ComfyUI costs more than its limit."""
    every = cases()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description="What a job costs.")
    parser.add_argument("--runs", type=int, default=15, help="pairs of each case (default: 15)")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in every], help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures go there")
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):  # malloc reads it when a process starts
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **MALLOC})
    measured = {}
    with logging_as_the_handler(), running_pod("--preview-method", "latent2rgb") as pod:
        print(f"{which_comfyui()}; {options.runs} pairs of each")
        print(f"{'':26} | bare: median, p95 | worker: median, p95 | more, ms | limit | ratio")
        for case in every:
            if options.cases and case.name not in options.cases:
                continue
            if without_model(case):
                print(f"{case.title:26} | left out: there is no models/checkpoints/{CHECKPOINT}")
                continue
            measured[case.title] = measure(pod, case, options.runs)
            print_row(case, measured[case.title])
    print_steps(measured)
    print_calls(measured)
    write_json(options.json, {"comfyui": which_comfyui(), "cases": rounded(measured)})
    is_over = any(figures["limit_ms"] and figures["more"] > figures["limit_ms"] for figures in measured.values())
    return 1 if is_over and is_real() else 0


if __name__ == "__main__":
    sys.exit(main())
