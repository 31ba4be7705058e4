"""The RunPod handler: one job from input to result, told as seven steps, and the loop that asks for jobs.

This is the composition root and the only file that imports runpod; the steps are made of what is in `worker/`.
Start it with `start.sh`, which makes the RAM disk and supervises ComfyUI.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import runpod.serverless
from runpod.http_client import AsyncClientSession
from runpod.serverless.modules.rp_http import send_result
from runpod.serverless.modules.worker_state import JobsProgress

from worker.bucket import Bucket
from worker.comfyui import ComfyUI
from worker.comfyui_server import ComfyUIServer
from worker.config import Config, ConfigError
from worker.control import JobControl
from worker.delivery import Delivery, fitted_failure, result_limit_bytes
from worker.errors import (
    ComfyUICrashed,
    ComfyUIUnavailable,
    RamDiskError,
    RamDiskFull,
    WorkerError,
    WorkerFault,
    internal_error,
)
from worker.fetch import FetchLimits, fetch_inputs
from worker.follow import Progress, RunOutcome
from worker.models.manifest import read_manifest, sentence_about
from worker.outputs import chosen_outputs, unnamed_files
from worker.payload import JobRequest, json_safe, parse_job_input
from worker.process import ComfyUIProcess, ProcessState
from worker.ramdisk import RamDisk
from worker.reencode import reencoded
from worker.run import run_workflow
from worker.steps import WIDEST_TIMINGS_MS, StepTimer
from worker.workflow_checks import check_before_run

log = logging.getLogger("handler")
current_job_id: contextvars.ContextVar[str] = contextvars.ContextVar("job_id", default="-")

PROGRESS_INTERVAL_S = 1.0
MODELS_POLL_S = 0.05
MAX_LISTED_FILES = 200  # in the result of a job with `debug`
EXIT_POLL_S = 0.02
# The SDK loses a job that its json.loads cannot read: no answer ever comes. Up to here it is read, and refused in a
# sentence (MAX_NESTING in worker/payload.py). Each level takes some 200 bytes of the stack's 8 MB (CPython 3.11).
JSON_NESTING = 10_000


class Worker:
    """What a job needs, made once from the configuration."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.version = Path(__file__).with_name("VERSION").read_text().strip()
        self.ramdisk = RamDisk(config.ramdisk_dir)
        self.fetch_limits = FetchLimits(config.url_input_limit_bytes, config.url_input_timeout_s)
        self.process = ComfyUIProcess(config.ramdisk_dir / "run")
        self.server = ComfyUIServer(config.comfyui_port, self.process)
        self.comfyui = ComfyUI(self.server, self._model_note)
        self.bucket = None if config.bucket is None else Bucket(config.bucket)
        self._kept: ProcessState | None = None  # ComfyUI as a job with `debug` left it, where it is to be restarted

    def run_job(
        self, job_id: str, job_input: object, control: JobControl, on_progress: Callable[[Progress], None]
    ) -> dict[str, Any]:
        """The seven steps. Returns the result; raises WorkerError. Blocks, so it runs in a thread of its own.

        ``job_input`` is emptied once it has been understood.
        """
        steps = StepTimer()
        with steps("parse"):
            request = parse_job_input(job_input, allow_urls=self.config.allow_url_inputs)
            if isinstance(job_input, dict):
                job_input.clear()  # its Base64 texts: the SDK holds on to it until the result is posted
            control.shorten(request.timeout_s or control.timeout_s)
        with self.server.serving(control.check):
            with steps("clear"):
                state = self._clear()
                names = [*(file.name for file in request.files), *(url.name for url in request.urls)]
                warnings = [*request.warnings, *check_before_run(request.workflow, names, self.comfyui)]
            with self._wiped_afterwards(request, steps):
                with steps("write"):
                    self.ramdisk.write_inputs(request.files)
                    fetch_inputs(request.urls, self.ramdisk, control, self.fetch_limits)
                with steps("run"):  # queue the workflow, follow it, read its history
                    outcome = run_workflow(
                        self.comfyui,
                        request.workflow,
                        control=control,
                        on_progress=on_progress,
                        interrupt_grace_s=self.config.interrupt_grace_s,
                        ramdisk=self.ramdisk,
                        api_key=request.comfy_org_api_key,
                    )
                with steps("collect"):
                    warnings += outcome.warnings
                    result = self._collect(job_id, request, outcome, warnings, control)
                self.process.note_success(state)
        result["timings_ms"] = steps.timings_ms
        return result

    def _clear(self) -> ProcessState:
        """Nothing of an earlier job runs or lies about; returns the start of ComfyUI that this one runs on."""
        state = self.server.wait_ready(self.config.boot_timeout_s)
        if not self.comfyui.clear_queue(self.config.interrupt_grace_s):
            state = self.server.wait_ready(self.config.boot_timeout_s)
        self.comfyui.clear_history()
        self.process.scrub_log()
        self.ramdisk.wipe()
        if state == self._kept:
            self.process.retire(state)
            state = self.server.wait_ready(self.config.boot_timeout_s)
        self.process.watch_memory(state)
        return state

    def _collect(
        self, job_id: str, request: JobRequest, outcome: RunOutcome, warnings: list[str], control: JobControl
    ) -> dict[str, Any]:
        outputs, texts = chosen_outputs(outcome, self.ramdisk)
        if wanted := request.output_format:
            outputs = reencoded(outputs, self.ramdisk, wanted, check=control.check, warn=warnings.append)
        rest: dict[str, Any] = {
            "warnings": [*warnings, *unnamed_files(outcome, self.ramdisk)],
            "timings_ms": WIDEST_TIMINGS_MS,
        }
        if request.debug:
            rest["debug"] = {"prompt_id": outcome.prompt_id, **self._diagnostics()}
        limit_bytes = result_limit_bytes(job_id, self.config.result_limit_bytes)
        return Delivery(job_id, limit_bytes, self.ramdisk, self.bucket, control).deliver(outputs, texts, rest)

    def _model_note(self, name: str) -> str | None:
        run_dir = self.config.ramdisk_dir / "run"
        records = read_manifest(run_dir / "models.json")
        return sentence_about(name, records, settled=(run_dir / "models-settled").exists())

    @contextlib.contextmanager
    def _wiped_afterwards(self, request: JobRequest, steps: StepTimer) -> Iterator[None]:
        """The seventh step, also after a failure. With `debug` everything stays until the next job's second step."""
        try:
            yield
        except WorkerError as error:
            if isinstance(error, RamDiskFull):
                self.ramdisk.add_figures(error)
            if request.debug:
                error.details["debug"] = self._diagnostics()
            raise
        finally:
            if not request.debug:
                with steps("wipe"):
                    self._wipe()
            ran = "run" in steps.timings_ms  # what failed before has not been seen by ComfyUI
            if ran and self.config.restart_comfyui_each_job and self.server.state is not None:
                if request.debug:
                    self._kept = self.server.state
                else:
                    self.process.retire(self.server.state)

    def _wipe(self) -> None:
        with self.server.serving(None):  # whatever has ended the job
            for step in (self.ramdisk.wipe, self.process.scrub_log, self.comfyui.clear_history):
                try:
                    step()
                except (RamDiskError, ComfyUIUnavailable, ComfyUICrashed) as error:
                    # The caller still gets the result; the next job's second step tries again and refuses to run.
                    log.error("%s", error)

    def _diagnostics(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "kept_until": "the next job on this worker",
            "files": [str(self.ramdisk.root / path) for path in self.ramdisk.list_files(most=MAX_LISTED_FILES)],
            "free_bytes": self.ramdisk.free_bytes(),
            "comfyui_log": self.process.log_tail(),
            "models": [asdict(record) for record in read_manifest(self.config.ramdisk_dir / "run" / "models.json")],
        }


class ProgressSender:
    """Posts a job's progress: at most one update a second, the newest one, in order, none after the result.

    The SDK's own `progress_update` is one thread a call: a burst of 200 gave 45 inversions and a post after the final
    result (runpod 1.12.0), and a late one has left a finished job at IN_PROGRESS.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self._job = job
        self._newest: Progress | None = None
        self._closed = asyncio.Event()
        self._task = asyncio.create_task(self._send())

    def offer(self, progress: Progress) -> None:
        """Called from the job's thread with each step of the run; only remembers it."""
        self._newest = progress

    async def _send(self) -> None:
        while not await self._is_closed_within(PROGRESS_INTERVAL_S):
            if self._newest is not None:
                progress, self._newest = self._newest, None
                async with AsyncClientSession() as session:
                    await send_result(session, {"status": "IN_PROGRESS", "output": json_safe(progress)}, self._job)

    async def _is_closed_within(self, timeout_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closed.wait(), timeout_s)
        return self._closed.is_set()

    async def close(self) -> None:
        """Returns when no update is on its way any more, after at most a second."""
        self._closed.set()
        await asyncio.wait([self._task], timeout=PROGRESS_INTERVAL_S)
        self._task.cancel()


class Endpoint:
    """The worker as the SDK sees it: an async handler, and a clean way out."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._stop_taking_jobs: Callable[[int, Any], Any] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self.exit_code = 0

    async def handle(self, job: dict[str, Any]) -> dict[str, Any]:
        """The handler. The blocking work runs in one thread, shielded: a cancellation stops ComfyUI and waits for the
        thread's end, so two jobs never overlap."""
        current_job_id.set(job["id"])
        control = JobControl(self._worker.config.job_timeout_s)
        sender = ProgressSender(job)
        work = asyncio.create_task(asyncio.to_thread(self._run, job, control, sender.offer))
        try:
            result = await asyncio.shield(work)
        except asyncio.CancelledError:
            log.info("cancelled by RunPod")
            control.cancel()
            while not work.done():  # a second cancellation must not leave the thread behind
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([work])
            raise
        finally:
            await sender.close()
            if work.done() and work.result().get("refresh_worker"):
                self.leave()
        return result

    def _run(self, job: dict[str, Any], control: JobControl, on_progress: Callable[[Progress], None]) -> dict[str, Any]:
        """The one place where exceptions become an answer."""
        try:
            result = self._worker.run_job(job["id"], job.get("input"), control, on_progress)
        except WorkerError as error:
            # What ComfyUI or a caller said may hold prompt text: only our own sentences go into the log.
            own_words = error.message if isinstance(error, WorkerFault) else error.details.get("exception_type", "")
            log.warning("%s %s", error.code, own_words)
            limit_bytes = result_limit_bytes(job["id"], self._worker.config.result_limit_bytes)
            result = fitted_failure(error.as_result(), limit_bytes)
            if error.replace_worker:
                result["refresh_worker"] = True
                self.exit_code = 1
        except Exception as error:  # noqa: BLE001 - the outermost function of a job; a bug must not end the worker
            log.error("INTERNAL %s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
            result = internal_error()
        return json_safe(result)  # type: ignore[no-any-return]

    def before_job_take(self, concurrency: int) -> int:
        """The SDK calls its ``concurrency_modifier`` in the event loop before each job-take: the place to take over
        SIGTERM, to which the SDK's answer is to finish its pending poll; a job that arrives in it is never run."""
        if self._stop_taking_jobs is None:
            sdk_handler = signal.getsignal(signal.SIGTERM)  # JobScaler.handle_shutdown (rp_scale.py, runpod 1.12.0)
            assert callable(sdk_handler)
            self._stop_taking_jobs = sdk_handler
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, self.leave)
        return concurrency

    def leave(self) -> None:
        """End the worker: at once when idle, else when the running job's result has been posted."""
        if self._leaving is None and self._stop_taking_jobs is not None:
            self._stop_taking_jobs(signal.SIGTERM, None)
            self._leaving = asyncio.create_task(self._leave_when_idle())

    async def _leave_when_idle(self) -> None:
        while JobsProgress().get_job_count():  # the SDK removes a job after its result has been posted
            await asyncio.sleep(EXIT_POLL_S)
        for task in asyncio.all_tasks():
            if task is not asyncio.current_task():
                task.cancel()  # among them the pending polls, which the platform may hold for 90 s


def wait_until_ready(worker: Worker) -> None:
    """Return when ComfyUI answers and `start.sh` says that the models are settled, so that no job waits in a worker
    that cannot run it. Raises ComfyUIUnavailable."""
    started = time.monotonic()
    worker.server.wait_ready(worker.config.boot_timeout_s)
    log.info("comfy-endpoint %s: ComfyUI answers after %.1f s", worker.version, time.monotonic() - started)
    if worker.config.require_gpu and not worker.comfyui.sees_gpu():
        raise ComfyUIUnavailable(
            "ComfyUI sees no GPU: choose one for the endpoint, or set REQUIRE_GPU=0 to compute on the processor."
        )
    settled = worker.config.ramdisk_dir / "run" / "models-settled"
    while not settled.exists():
        if time.monotonic() - started > worker.config.boot_timeout_s:
            log.error("models are still loading after %g s; starting without them", worker.config.boot_timeout_s)
            return
        time.sleep(MODELS_POLL_S)


def configure_logging(level: str) -> None:
    """One line a step with the job id, on stderr. ``force``: importing runpod has set up logging already."""

    def add_job_id(record: logging.LogRecord) -> bool:
        record.job_id = current_job_id.get()
        return True

    output = logging.StreamHandler()
    output.addFilter(add_job_id)
    form = "%(asctime)s %(levelname)s %(name)s [%(job_id)s] %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form, datefmt="%H:%M:%S", handlers=[output], force=True)
    for name in ("handler", "worker"):  # ours only: at DEBUG, Pillow logs what it reads in pictures
        logging.getLogger(name).setLevel(level)


def main() -> int:
    """Returns the exit code: 0 after SIGTERM, 1 when the worker has to be replaced, 2 for a bad configuration."""
    try:
        config = Config.from_env(os.environ)
    except ConfigError as error:
        sys.stderr.write(f"ERROR: {error}\n")
        return 2
    configure_logging(config.log_level)
    sys.setrecursionlimit(JSON_NESTING)
    worker = Worker(config)
    try:
        wait_until_ready(worker)
    except WorkerError as error:
        log.error("%s %s", error.code, error.message)
        return 1
    endpoint = Endpoint(worker)
    with contextlib.suppress(asyncio.CancelledError):  # how `leave` ends the SDK's loop
        runpod.serverless.start({"handler": endpoint.handle, "concurrency_modifier": endpoint.before_job_take})
    return endpoint.exit_code


if __name__ == "__main__":
    sys.exit(main())
