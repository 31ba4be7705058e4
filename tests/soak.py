"""Many jobs of mixed kinds under random faults, through the whole stack with two workers; a table at the end.

    make soak                                    500 jobs
    python -m tests.soak --jobs 100 --seed 7     others; the seed is printed

Every picture is compared with what Pillow makes of the same input, every job must be answered, every failure must be
one of the codes that the job or a fault can give, and there are no more failures than faults. The first worker's
handler lives through all of it: its memory, descriptors, sockets and threads must be flat. Exit code 1 where any of
that fails.
"""

import argparse
import contextlib
import io
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from local.__main__ import Platform
from tests.process.stack import (
    Driver,
    base64_of,
    boot_platform,
    boot_worker,
    invert_workflow,
    inverted,
    is_inverted,
    slow_workflow,
    wait_until,
)

AT_ONCE = 4
DEADLINE_S = 10.0
ANSWER_TIMEOUT_S = 180.0
SETTINGS = {"INTERRUPT_GRACE_S": "1", "COMFYUI_MAX_DEATHS": "1000"}
FAULT_SHARE = 0.4  # of the jobs: so many have a fault armed before them
WORKER_KILLS = 2
MAX_GROWTH_BYTES = 8_000_000  # over the run, after the first fifth of it
MAX_GROWTH = {"descriptors": 2, "sockets": 2, "threads": 1}

Workflow = dict[str, dict[str, Any]]


@dataclass
class Order:
    """A job as it is sent, and what must come of it: pictures by node id (each inverted), a code, or CANCELLED."""

    kind: str
    job_input: dict[str, Any]
    pictures: dict[str, bytes] = field(default_factory=dict)
    code: str | None = None
    cancel_after_s: float | None = None


# --- jobs ---


def random_picture(dice: random.Random) -> bytes:
    width, height = dice.randint(8, 160), dice.randint(8, 160)
    image = Image.frombytes("RGB", (8, 8), dice.randbytes(192)).resize((width, height))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def order(kind: str, dice: random.Random) -> Order:
    """A job of a kind with a picture of its own."""
    content = random_picture(dice)
    workflow, extra, pictures, code, cancel_after_s = KINDS[kind](dice, content)
    job_input = {"workflow": workflow, "images": {"a.png": base64_of(content)}, "timeout_s": DEADLINE_S, **extra}
    return Order(kind, job_input, pictures, code, cancel_after_s)


Parts = tuple[Workflow, dict[str, Any], dict[str, bytes], str | None, float | None]


def plain(dice: random.Random, content: bytes) -> Parts:
    prefix = dice.choice(["picture", "a/b/picture", "ComfyUI"])
    return invert_workflow(prefix=prefix), {"debug": dice.random() < 0.2}, {"3": content}, None, None


def with_saver(class_type: str) -> Callable[[random.Random, bytes], Parts]:
    def make(_: random.Random, content: bytes) -> Parts:
        workflow = invert_workflow()
        workflow["3"]["class_type"] = class_type
        if class_type != "StandinStrict":
            workflow["3"]["inputs"].pop("filename_prefix")
        return workflow, {}, {"3": content}, None, None

    return make


def two_outputs(_: random.Random, content: bytes) -> Parts:
    workflow = invert_workflow()
    workflow["3"]["class_type"] = "StandinTee"
    workflow["4"] = {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "again"}}
    workflow["5"] = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "source"}}
    return workflow, {}, {"3": content, "4": content, "5": inverted(content)}, None, None


def slow(dice: random.Random, content: bytes) -> Parts:
    return slow_workflow(dice.uniform(0.1, 1.5)), {}, {"3": content}, None, None


def cancelled(dice: random.Random, content: bytes) -> Parts:
    return slow_workflow(60), {}, {}, "CANCELLED", dice.uniform(0, 2)


def overdue(_: random.Random, content: bytes) -> Parts:
    return slow_workflow(60), {"timeout_s": 0.5}, {}, "JOB_TIMEOUT", None


def refused(_: random.Random, content: bytes) -> Parts:
    workflow = invert_workflow()
    workflow["2"]["class_type"] = "NoSuchNode"
    return workflow, {}, {}, "PROMPT_REJECTED", None


def failing(_: random.Random, content: bytes) -> Parts:
    return invert_workflow(prefix="x" * 300), {}, {}, "EXECUTION_FAILED", None


def damaged(_: random.Random, content: bytes) -> Parts:
    return invert_workflow(), {"images": {"a.png": base64_of(content[:-20])}}, {}, "MEDIA_INVALID", None


KINDS: dict[str, Callable[[random.Random, bytes], Parts]] = {
    "plain": plain,
    "two outputs": two_outputs,
    "preview": with_saver("PreviewImage"),
    "websocket": with_saver("SaveImageWebsocket"),
    "strict": with_saver("StandinStrict"),
    "slow": slow,
    "cancelled": cancelled,
    "overdue": overdue,
    "refused": refused,
    "failing": failing,
    "damaged": damaged,
}
WEIGHTS = [30, 10, 6, 6, 6, 12, 8, 6, 6, 6, 4]


# --- faults ---

# What a job may fail with because of a fault; () for those that cost nothing.
COMFYUI_FAULTS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"kind": "ws_cut", "after": 2}, ()),
    ({"kind": "ws_silent", "times": 20}, ()),
    ({"kind": "ws_refuse", "times": 3}, ()),
    ({"kind": "ws_garbage", "times": 20}, ()),
    ({"kind": "ws_binary", "times": 20}, ()),
    ({"kind": "flood", "count": 2000}, ()),
    ({"kind": "stall", "seconds": 1}, ()),
    ({"kind": "http_hang", "path": "/queue", "seconds": 1}, ()),
    ({"kind": "http_500", "path": "/history"}, ("COMFYUI_UNAVAILABLE",)),
    ({"kind": "http_500", "path": "/prompt"}, ("PROMPT_REJECTED",)),
    ({"kind": "history_late", "seconds": 0.5}, ()),
    ({"kind": "history_missing"}, ("HISTORY_MISSING", "COMFYUI_CRASHED")),
    ({"kind": "crash"}, ("COMFYUI_CRASHED",)),
    ({"kind": "dead_worker"}, ("COMFYUI_CRASHED",)),
    ({"kind": "hang"}, ("JOB_TIMEOUT",)),
    ({"kind": "out_of_memory"}, ("OUT_OF_GPU_MEMORY",)),
    ({"kind": "exception"}, ("EXECUTION_FAILED",)),
    ({"kind": "file_missing"}, ("OUTPUT_MISSING",)),
    ({"kind": "file_half"}, ("OUTPUT_DAMAGED",)),
    ({"kind": "output_unlisted"}, ("NO_OUTPUT",)),
]
PLATFORM_FAULTS = ["job-done-500", "job-take-500", "job-take-drop", "progress-delayed", "stop-repeated"]
FAULT_CODES = {code for _, codes in COMFYUI_FAULTS for code in codes}


class Site:
    """A platform with two workers, of which the second is killed and replaced now and then."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stack = contextlib.ExitStack()
        self.platform: Platform = self.stack.enter_context(boot_platform(folder / "platform", "--lost-s", "4"))
        self.first = self.stack.enter_context(boot_worker(self.platform, folder / "first", **SETTINGS))
        self.handler_pid = self.first.pid_of("rp_handler.py")
        self._others = 0
        self._boot_second()
        self.faults: Counter[str] = Counter()
        self.costly_faults = 0

    def _boot_second(self) -> None:
        self._others += 1
        log_path = self.folder / f"second-{self._others}"
        self.second = self.stack.enter_context(boot_worker(self.platform, log_path, **SETTINGS))

    def replace_second(self) -> None:
        """As the loss of a machine: everything of the worker is killed, and another one is started."""
        for pid in self.second.own_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.faults["a worker killed"] += 1
        self._boot_second()

    def arm(self, dice: random.Random) -> None:
        """One random fault, somewhere."""
        worker = dice.choice([self.first, self.second])
        chance = dice.random()
        if chance < 0.15:
            kind = dice.choice(PLATFORM_FAULTS)
            worker.platform_fault(kind)
        elif chance < 0.2:
            kind = "ComfyUI killed"
            with contextlib.suppress(OSError):
                os.kill(worker.comfyui_pid(), signal.SIGKILL)
            self.costly_faults += 1
        else:
            fault, codes = dice.choice(COMFYUI_FAULTS)
            kind = str(fault["kind"])
            try:
                worker.fault(**fault)
            except OSError:  # that ComfyUI is down: faults strike where they can
                return
            self.costly_faults += bool(codes)
        self.faults[kind] += 1

    def measure(self) -> dict[str, int]:
        """The first worker's handler, the one that lives from the first job to the last."""
        proc = Path(f"/proc/{self.handler_pid}")
        status = (proc / "status").read_text()
        links = [str(path.readlink()) for path in (proc / "fd").iterdir() if path.is_symlink()]
        return {
            "rss_bytes": 1024 * int(re.findall(r"VmRSS:\s+(\d+)", status)[0]),
            "descriptors": len(links),
            "sockets": sum(link.startswith("socket:") for link in links),
            "threads": int(re.findall(r"Threads:\s+(\d+)", status)[0]),
        }


# --- the run ---


@dataclass
class Tally:
    """What came of the jobs. `problems` are sentences; none is how it should be."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    failed_by_fault: int = 0
    pictures: int = 0
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, order: Order, answer: dict[str, Any] | None) -> None:
        outcome, problem = self._judge(order, answer)
        with self.lock:
            self.done += 1
            self.outcomes[order.kind, outcome] += 1
            if problem:
                self.problems.append(f"{order.kind}: {problem}")

    def _judge(self, order: Order, answer: dict[str, Any] | None) -> tuple[str, str | None]:
        if answer is None:
            return "no answer", "was not answered"
        status, output = answer["status"], answer.get("output") or {}
        code = str(output.get("error_code") if status == "FAILED" else status)
        if code == "COMPLETED":
            code = "COMPLETED, warned" if output["warnings"] else code
            if order.code == "CANCELLED":
                return code, "was done in no time"
            return code, f"should have failed with {order.code}" if order.code else self._compare(order, output)
        if code == order.code:
            return code, None
        if code not in FAULT_CODES:
            return code, f"failed with {code}: {answer.get('error')}"
        with self.lock:
            self.failed_by_fault += 1
        return code, None

    def _compare(self, order: Order, output: dict[str, Any]) -> str | None:
        if output["warnings"]:  # a fault has spoilt one of several outputs, and the caller is told
            with self.lock:
                self.failed_by_fault += 1
            return None
        items = {item["node_id"]: item for item in output["images"]}
        if len(output["images"]) != len(order.pictures) or items.keys() != order.pictures.keys():
            return f"has pictures of the nodes {sorted(items)} instead of {sorted(order.pictures)}"
        wrong = [node_id for node_id, item in items.items() if not is_inverted(item, order.pictures[node_id])]
        with self.lock:
            self.pictures += len(items)
        return f"has a wrong picture of the nodes {wrong}" if wrong else None


def run_order(site: Site, order: Order) -> dict[str, Any] | None:
    """The job's last status body; None where there is none within ANSWER_TIMEOUT_S."""
    worker = site.first
    job_id = worker.start_job(order.job_input)
    if order.cancel_after_s is not None:
        time.sleep(order.cancel_after_s)
        worker.cancel(job_id)
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while time.monotonic() < deadline:
        body = worker.status(job_id)
        if body["status"] not in ("IN_QUEUE", "IN_PROGRESS"):
            return body
        time.sleep(0.05)
    return None


def soak(site: Site, jobs: int, dice: random.Random, tally: Tally) -> list[tuple[int, dict[str, int]]]:
    """Run the jobs, AT_ONCE at a time. Returns (jobs done, figures of the first handler) from time to time."""
    kills = set(dice.sample(range(jobs // 5, jobs - jobs // 10), WORKER_KILLS))
    samples: list[tuple[int, dict[str, int]]] = []
    slots = threading.Semaphore(AT_ONCE)

    def one(order: Order) -> None:
        try:
            tally.take(order, run_order(site, order))
        finally:
            slots.release()

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for number in range(jobs):
            slots.acquire()
            if number in kills:
                site.replace_second()
            if dice.random() < FAULT_SHARE:
                site.arm(dice)
            if number % max(1, jobs // 10) == 0:
                samples.append((tally.done, site.measure()))
            (kind,) = dice.choices(list(KINDS), WEIGHTS)
            pool.submit(one, order(kind, dice)).add_done_callback(_raise_later(tally))
    samples.append((tally.done, site.measure()))
    return samples


def _raise_later(tally: Tally) -> Callable[[Any], None]:
    def note(future: Any) -> None:
        if error := future.exception():
            tally.problems.append(f"the soak itself failed: {type(error).__name__}: {error}")

    return note


def leftovers(worker: Driver) -> Iterator[str]:
    """What a worker has kept of its jobs, once it has done a last one."""
    wait_until(worker.comfyui_answers, "ComfyUI is up")
    worker.disarm()
    for _ in range(4):  # with two workers at the queue, each gets one of them
        worker.run({"workflow": invert_workflow(), "images": {"a.png": base64_of(random_picture(random.Random(0)))}})
    wait_until(worker.comfyui_is_idle, "ComfyUI is idle")
    if files := worker.job_files():
        yield f"{worker.worker.id} has kept {len(files)} files"
    if history := worker.comfyui("/history"):
        yield f"{worker.worker.id} has {len(history)} prompts in its history"


def growth(samples: list[tuple[int, dict[str, int]]]) -> Iterator[str]:
    """In what the handler has grown since the first fifth of the run."""
    base, last = samples[len(samples) // 5][1], samples[-1][1]
    if last["rss_bytes"] - base["rss_bytes"] > MAX_GROWTH_BYTES:
        yield f"the handler's memory has grown from {base['rss_bytes']:,} to {last['rss_bytes']:,} bytes"
    for name, limit in MAX_GROWTH.items():
        if last[name] - base[name] > limit:
            yield f"the handler's {name} have grown from {base[name]} to {last[name]}"


def print_table(tally: Tally, site: Site, samples: list[tuple[int, dict[str, int]]], seconds: float) -> None:
    columns = sorted({outcome for _, outcome in tally.outcomes})
    print(f"\n| job | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for kind in KINDS:
        print(f"| {kind} | {' | '.join(str(tally.outcomes[kind, column] or '') for column in columns)} |")
    print("\n| jobs done | RSS, MB | descriptors | sockets | threads |\n|---|---|---|---|---|")
    for done, figures in samples:
        rest = " | ".join(str(figures[name]) for name in MAX_GROWTH)
        print(f"| {done} | {figures['rss_bytes'] / 1e6:.1f} | {rest} |")
    print("\nfaults: " + ", ".join(f"{kind} {times}" for kind, times in site.faults.most_common()))
    print(
        f"{tally.done} jobs in {seconds:.0f} s, {tally.pictures} pictures compared, {site.faults.total()} faults, "
        f"{tally.failed_by_fault} jobs failed by one; {len(tally.problems)} problems"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    tally, started = Tally(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        site = Site(Path(folder))
        with site.stack:
            samples = soak(site, options.jobs, random.Random(options.seed), tally)
            for worker in (site.first, site.second):
                tally.problems += leftovers(worker)
            tally.problems += growth(samples)
            if tally.failed_by_fault > site.costly_faults:
                tally.problems.append(
                    f"{tally.failed_by_fault} jobs failed, and only {site.costly_faults} faults can do that"
                )
            if "INTERNAL" in site.first.log() + site.second.log():
                tally.problems.append("a handler met a defect of its own")
            print_table(tally, site, samples, time.monotonic() - started)
            for problem in tally.problems:
                print(problem, file=sys.stderr)
            if tally.problems:
                kept = Path(tempfile.mkdtemp(prefix="soak-"))
                for path in Path(folder).iterdir():
                    (kept / path.name).write_bytes(path.read_bytes())
                print(f"logs: {kept}", file=sys.stderr)
    return 1 if tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
