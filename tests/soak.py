"""Many jobs of mixed kinds under random faults, through the whole stack with two workers; a table at the end.

    make soak                                    500 jobs
    python -m tests.soak --jobs 100 --seed 7     others; the seed is printed

Every picture is compared with what Pillow makes of the same input; some jobs are repeated word for word. Every job must
be answered; of each code that the job itself does not give, there are no more failures than faults that give it. At the
end nothing of a job is left. The first worker's handler lives through all of it: its memory, descriptors, sockets and
threads must be flat. Exit code 1 where any of that fails.
"""

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from local.__main__ import Platform
from tests.process.stack import Driver, boot_platform, boot_worker, is_inverted, wait_until
from tests.soak_jobs import KINDS, WEIGHTS, Order, order

AT_ONCE = 4
ANSWER_TIMEOUT_S = 180.0
SETTINGS = {"INTERRUPT_GRACE_S": "1", "COMFYUI_MAX_DEATHS": "1000"}
FAULT_SHARE = 0.4  # of the jobs: so many have a fault armed before them
REPEAT_SHARE = 0.2  # so many are an earlier one, word for word
DEBUG_SHARE = 0.1  # so many keep their files; none of the last tenth, after which nothing may be left
WORKER_KILLS = 2
MAX_GROWTH_BYTES = 8_000_000  # over the run, after the first fifth of it
MAX_GROWTH = {"descriptors": 2, "sockets": 2, "threads": 1, "processes": 2}
MAX_RUN_BYTES = 1_000_000  # what stays on the RAM disk beside the jobs' files: logs, and records of processes

# --- faults ---

# What a job may fail with because of a fault; () for those that cost nothing.
COMFYUI_FAULTS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"kind": "ws_cut", "after": 2}, ()),
    ({"kind": "ws_silent", "times": 20}, ("NO_OUTPUT",)),  # of pictures that only the websocket carries
    ({"kind": "ws_refuse", "times": 3}, ("NO_OUTPUT",)),
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
        self.may_fail: Counter[str] = Counter()  # by code: as many faults as can give it

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
            self.may_fail["COMFYUI_CRASHED"] += 1
        else:
            fault, codes = dice.choice(COMFYUI_FAULTS)
            kind = str(fault["kind"])
            try:
                worker.fault(**fault)
            except OSError:  # that ComfyUI is down: faults strike where they can
                return
            self.may_fail.update(codes)
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
            "processes": len(self.first.own_pids()),  # of the whole worker
        }


# --- the run ---


@dataclass
class Tally:
    """What came of the jobs. `problems` are sentences; none is how it should be."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    longest_s: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)  # by code, where the job itself is without fault
    pictures: int = 0
    retries: int = 0
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, order: Order, answer: dict[str, Any] | None) -> None:
        with self.lock:
            self.done += 1
            if answer is None:
                self.problems.append(f"{order.kind}: was not answered")
                return
            self.retries += answer.get("retries", 0)
            seconds = answer.get("executionTime", 0) / 1000
            self.longest_s[order.kind] = max(self.longest_s.get(order.kind, 0), seconds)
            outcome, problem = self._judge(order, answer)
            self.outcomes[order.kind, outcome] += 1
            if problem:
                self.problems.append(f"{order.kind}: {problem}")

    def _judge(self, order: Order, answer: dict[str, Any]) -> tuple[str, str | None]:
        status, output = answer["status"], answer.get("output") or {}
        code = str(output.get("error_code") if status == "FAILED" else status)
        if code == "COMPLETED":
            code = "COMPLETED, warned" if output["warnings"] else code
            return code, f"should have ended with {order.code}" if order.code else self._compare(order, output)
        if code != order.code:
            self.failed[code] += 1
        return code, None

    def _compare(self, order: Order, output: dict[str, Any]) -> str | None:
        node_ids = [item["node_id"] for item in output["images"]]
        extra = set(node_ids) - order.pictures.keys() or len(node_ids) > len(set(node_ids))
        missing = order.pictures.keys() - set(node_ids)
        if extra or (missing and not output["warnings"]):
            return f"has pictures of the nodes {node_ids} instead of {sorted(order.pictures)}"
        if missing:  # a fault has spoilt one of several outputs, and the caller is told
            self.failed["NO_OUTPUT"] += 1
        pairs = [(item, order.pictures[item["node_id"]]) for item in output["images"]]
        wrong = [item["node_id"] for item, content in pairs if not is_inverted(item, content)]
        self.pictures += len(pairs)
        return f"has a wrong picture of the nodes {wrong}" if wrong else None

    def excess(self, may_fail: Counter[str]) -> Iterator[str]:
        """What the faults do not account for."""
        for code, times in self.failed.items():
            if times > may_fail[code]:
                yield f"{times} jobs ended with {code}, and {may_fail[code]} faults can do that"
        if self.retries > WORKER_KILLS:
            yield f"{self.retries} jobs were given to a second worker, and {WORKER_KILLS} workers were killed"


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
    repeatable: list[Order] = []
    samples: list[tuple[int, dict[str, int]]] = []
    slots = threading.Semaphore(AT_ONCE)

    def one(order: Order) -> None:
        try:
            tally.take(order, run_order(site, order))
        except Exception as error:  # noqa: BLE001 - of a thread; whatever it is, the soak has failed
            tally.problems.append(f"the soak itself failed: {type(error).__name__}: {error}")
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
            if repeatable and dice.random() < REPEAT_SHARE:
                pool.submit(one, dice.choice(repeatable))
                continue
            (kind,) = dice.choices(list(KINDS), WEIGHTS)
            debug = number < jobs - jobs // 10 and dice.random() < DEBUG_SHARE
            new = order(kind, dice, debug=debug)
            if new.pictures and not debug:
                repeatable.append(new)
            pool.submit(one, new)
    samples.append((tally.done, site.measure()))
    return samples


def leftovers(worker: Driver) -> Iterator[str]:
    """What a worker has kept of its jobs, the last of which failed, without `debug`."""
    wait_until(worker.comfyui_is_idle, "ComfyUI is idle")
    if files := worker.job_files():
        yield f"{worker.worker.id} has kept {len(files)} files"
    if history := worker.comfyui("/history"):
        yield f"{worker.worker.id} has {len(history)} prompts in its history"
    run_bytes = sum(path.stat().st_size for path in (worker.ramdisk / "run").rglob("*") if path.is_file())
    if run_bytes > MAX_RUN_BYTES:
        yield f"{worker.worker.id} has {run_bytes} bytes of records"


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
    print(f"\n| job | longest, s | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    for kind in KINDS:
        counts = " | ".join(str(tally.outcomes[kind, column] or "") for column in columns)
        print(f"| {kind} | {tally.longest_s.get(kind, 0):.1f} | {counts} |")
    print(f"\n| jobs done | RSS, MB | {' | '.join(MAX_GROWTH)} |\n|---|---|{'---|' * len(MAX_GROWTH)}")
    for done, figures in samples:
        rest = " | ".join(str(figures[name]) for name in MAX_GROWTH)
        print(f"| {done} | {figures['rss_bytes'] / 1e6:.1f} | {rest} |")
    print("\nfaults: " + ", ".join(f"{kind} {times}" for kind, times in site.faults.most_common()))
    print(
        f"{tally.done} jobs in {seconds:.0f} s, {tally.pictures} pictures compared, {site.faults.total()} faults, "
        f"{tally.failed.total()} jobs failed by one, {tally.retries} given to a second worker; "
        f"{len(tally.problems)} problems"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        try:
            run(Path(folder), options.jobs, random.Random(options.seed), tally)
        except BaseException:
            tally.problems.append("the soak did not come to its end")
            raise
        finally:
            for problem in tally.problems:
                print(problem, file=sys.stderr)
            if tally.problems:
                print(
                    f"logs: {shutil.copytree(folder, tempfile.mkdtemp('-soak'), dirs_exist_ok=True)}", file=sys.stderr
                )
    return 1 if tally.problems else 0


def run(folder: Path, jobs: int, dice: random.Random, tally: Tally) -> None:
    started = time.monotonic()
    site = Site(folder)
    with site.stack:
        samples = soak(site, jobs, dice, tally)
        for worker in (site.first, site.second):
            wait_until(worker.comfyui_answers, "ComfyUI is up")
            worker.disarm()
        for last in [order("failing", dice) for _ in range(4)]:  # some for each worker
            tally.take(last, run_order(site, last))
        for worker in (site.first, site.second):
            tally.problems += leftovers(worker)
        tally.problems += growth(samples)
        tally.problems += tally.excess(site.may_fail)
        tally.problems += [f"{log.name} has a defect" for log in folder.iterdir() if "INTERNAL" in log.read_text()]
        print_table(tally, site, samples, time.monotonic() - started)


if __name__ == "__main__":
    sys.exit(main())
