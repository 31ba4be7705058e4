"""Stand-in for the RunPod Serverless platform: one endpoint on 127.0.0.1, for any client and the SDK's own worker loop.

    python -m local.serverless_api --port 0 --api-key KEY        prints: listening http://127.0.0.1:PORT

For clients, below /v2/{endpoint}, with `Authorization: Bearer KEY`:
    POST /run  POST /runsync?wait=ms  GET /status/{id}  POST /cancel/{id}  GET /health
For workers, in the same place, with `Authorization: KEY` (raw, as the SDK sends it; see `worker_environment`):
    GET /job-take/{pod}  GET /job-stop/{pod}  POST /job-done/{pod}/{id}  POST /job-stream/{pod}/{id}  GET /ping/{pod}

The worker side answers what runpod 1.12.0 asks (serverless/modules/rp_job.py, rp_http.py, rp_ping.py); the client side
follows RunPod's documentation of the endpoint API. Jobs live in memory until the program ends.
"""

import argparse
import asyncio
import json
import math
import signal
import sys
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from aiohttp import web

RUN_LIMIT_BYTES = 10_000_000
RUNSYNC_LIMIT_BYTES = 20_000_000
"""RunPod documents 10 and 20 MB and refuses in MiB; the smaller reading, so what passes here passes there."""

SYNC_PREFIX = "sync-"
"""Ids of /runsync jobs start with it; by this a worker knows which limit its result has."""

WORKER_LOST_S = 10.0
"""After so long without poll or ping, /health no longer counts a worker; the SDK is asked for one ping a second."""

KEEPALIVE_S = 75.0
"""Longer than a job: the SDK tries a result once, and on a kept connection that the server has closed it is lost."""

READ_BYTES = 64 * 1024

Found = TypeVar("Found")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Status(StrEnum):
    """Where a job stands, in the words of the endpoint API."""

    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


@dataclass(eq=False)
class Job:
    """One job. Times are seconds of the platform's clock; `answer` is what its worker said: `output`, `error`, both."""

    id: str
    input: dict[str, Any]
    queued_at: float
    status: Status = Status.IN_QUEUE
    pod_id: str | None = None
    started_at: float = math.nan
    finished_at: float = math.nan
    answer: dict[str, Any] = field(default_factory=dict)

    @property
    def is_final(self) -> bool:
        return self.status not in (Status.IN_QUEUE, Status.IN_PROGRESS)

    def body(self, now: float) -> dict[str, Any]:
        """What /status answers; delayTime and executionTime in milliseconds."""
        body: dict[str, Any] = {"id": self.id, "status": self.status}
        if self.status in (Status.IN_QUEUE, Status.CANCELLED):
            return body
        ended_at = self.finished_at if self.is_final else now
        body["delayTime"] = round((self.started_at - self.queued_at) * 1000)
        body["executionTime"] = round((ended_at - self.started_at) * 1000)
        if self.is_final and self.pod_id is not None:
            body["workerId"] = self.pod_id
        return body | self.answer


@dataclass
class Worker:
    """One container, known from its requests."""

    seen_at: float
    has_polled: bool = False
    is_healthy: bool = True
    stops: list[str] = field(default_factory=list)


class Platform:
    """Jobs and workers of one endpoint. Each method is one look or one change of state; none of them waits."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._jobs: dict[str, Job] = {}
        self._queue: deque[Job] = deque()
        self._workers: dict[str, Worker] = {}

    def submit(self, job_input: dict[str, Any], *, sync: bool) -> Job:
        """Queue a job. One with an empty input is never given to a worker: RunPod ends it with this error."""
        now = self._clock()
        job = Job(f"{SYNC_PREFIX if sync else ''}{uuid.uuid4()}-u1", job_input, queued_at=now)
        self._jobs[job.id] = job
        if job_input:
            self._queue.append(job)
        else:
            job.status = Status.FAILED
            job.started_at = job.finished_at = now
            job.answer = {"error": "job timed out after 1 retries", "retries": 1}
        return job

    def job(self, job_id: str) -> Job | None:
        return self._jobs.get(job_id)

    def describe(self, job: Job) -> dict[str, Any]:
        """The /status body of a job as of now."""
        return job.body(self._clock())

    def take(self, pod_id: str) -> Job | None:
        """Give the oldest queued job to a worker; each job is given once."""
        if not self._queue:
            return None
        job = self._queue.popleft()
        job.status, job.pod_id, job.started_at = Status.IN_PROGRESS, pod_id, self._clock()
        return job

    def progress(self, job: Job, pod_id: str, output: Any) -> None:
        """Keep a progress update, unless the job is over: the SDK sends each from a thread of its own, in any order."""
        if self._is_running(job, pod_id):
            job.answer = {"output": output}

    def finish(self, job: Job, pod_id: str, answer: dict[str, Any]) -> None:
        """End a job with what its worker posted: FAILED when that names an error. Ignored when the job is over."""
        if self._is_running(job, pod_id):
            job.status = Status.FAILED if answer.get("error") else Status.COMPLETED
            job.finished_at, job.answer = self._clock(), answer

    def cancel(self, job: Job) -> None:
        """Cancel a job that is not over: at once for the client, by job-stop for the worker that runs it."""
        if job.is_final:
            return
        if job.pod_id is None:
            self._queue.remove(job)
        else:
            self._worker(job.pod_id).stops.append(job.id)
        job.status = Status.CANCELLED

    def stops_for(self, pod_id: str) -> list[str]:
        """Ids of cancelled jobs that this worker has not been told of yet."""
        worker = self._worker(pod_id)
        stops, worker.stops = worker.stops, []
        return stops

    def saw(self, pod_id: str, *, polled: bool = False, status: str | None = None) -> None:
        """Note a sign of life; `status` is what a ping says (rp_fitness.py: "unhealthy" before the worker exits)."""
        worker = self._worker(pod_id)
        worker.seen_at = self._clock()
        worker.has_polled |= polled
        worker.is_healthy = status != "unhealthy"

    def health(self) -> dict[str, dict[str, int]]:
        """The /health body. A worker is `ready` when it is idle, as in the example of RunPod's documentation."""
        jobs = [job.status for job in self._jobs.values()]
        workers = [self._state(pod_id) for pod_id in self._workers]
        return {
            "jobs": {
                "completed": jobs.count(Status.COMPLETED),
                "failed": jobs.count(Status.FAILED),
                "inProgress": jobs.count(Status.IN_PROGRESS),
                "inQueue": jobs.count(Status.IN_QUEUE),
                "retried": 0,
            },
            "workers": {
                "idle": workers.count("idle"),
                "initializing": workers.count("initializing"),
                "ready": workers.count("idle"),
                "running": workers.count("running"),
                "throttled": 0,
                "unhealthy": workers.count("unhealthy"),
            },
        }

    def _worker(self, pod_id: str) -> Worker:
        return self._workers.setdefault(pod_id, Worker(seen_at=self._clock()))

    def _is_running(self, job: Job, pod_id: str) -> bool:
        return job.status is Status.IN_PROGRESS and job.pod_id == pod_id

    def _state(self, pod_id: str) -> str:
        worker = self._workers[pod_id]
        if self._clock() - worker.seen_at > WORKER_LOST_S:
            return "lost"
        if not worker.is_healthy:
            return "unhealthy"
        if any(self._is_running(job, pod_id) for job in self._jobs.values()):
            return "running"
        return "idle" if worker.has_polled else "initializing"


class Api:
    """The HTTP side of a platform: reads requests, waits where a poll is to be held, and answers."""

    def __init__(self, platform: Platform, hold_s: float) -> None:
        self._platform = platform
        self._hold_s = hold_s
        self._changed = asyncio.Event()

    async def run(self, request: web.Request) -> web.Response:
        job = await self._submit(request, RUN_LIMIT_BYTES, sync=False)
        return web.json_response({"id": job.id, "status": Status.IN_QUEUE})

    async def runsync(self, request: web.Request) -> web.Response:
        wait_s = _wait_ms(request) / 1000
        job = await self._submit(request, RUNSYNC_LIMIT_BYTES, sync=True)
        await self._held(lambda: job.is_final or None, wait_s)
        return web.json_response(self._platform.describe(job))

    async def status(self, request: web.Request) -> web.Response:
        return web.json_response(self._platform.describe(self._job(request)))

    async def cancel(self, request: web.Request) -> web.Response:
        job = self._job(request)
        self._platform.cancel(job)
        self._announce()
        return web.json_response({"id": job.id, "status": job.status})

    async def health(self, _request: web.Request) -> web.Response:
        return web.json_response(self._platform.health())

    async def job_take(self, request: web.Request) -> web.Response:
        pod_id = self._saw(request, polled=True)
        job = await self._held(lambda: self._platform.take(pod_id), self._hold_s)
        return web.json_response({"id": job.id, "input": job.input}) if job else web.Response(status=204)

    async def job_stop(self, request: web.Request) -> web.Response:
        pod_id = self._saw(request)
        stops = await self._held(lambda: self._platform.stops_for(pod_id) or None, self._hold_s)
        return web.json_response({"jobsToStop": stops}) if stops else web.Response(status=204)

    async def job_done(self, request: web.Request) -> web.Response:
        pod_id, job = self._saw(request), self._job(request)
        limit_bytes = RUNSYNC_LIMIT_BYTES if job.id.startswith(SYNC_PREFIX) else RUN_LIMIT_BYTES
        try:
            posted = await _read_object(request, limit_bytes)
        except web.HTTPBadRequest:
            # Seen on RunPod after a refused result: COMPLETED without an output (runpod-python issue 309).
            self._finish(job, pod_id, {})
            raise
        if posted.get("status") == Status.IN_PROGRESS:
            self._platform.progress(job, pod_id, posted.get("output"))
        else:
            self._finish(job, pod_id, {key: posted[key] for key in ("output", "error") if key in posted})
        return web.Response()

    async def job_stream(self, request: web.Request) -> web.Response:
        """Accept a chunk of a generator handler and drop it: clients of this stand-in read results by /status."""
        self._saw(request)
        self._job(request)
        await _read_object(request, RUN_LIMIT_BYTES)
        return web.Response()

    async def ping(self, request: web.Request) -> web.Response:
        self._platform.saw(request.match_info["pod"], status=request.query.get("status"))
        return web.Response()

    async def _submit(self, request: web.Request, limit_bytes: int, *, sync: bool) -> Job:
        posted = await _read_object(request, limit_bytes)
        job_input = posted.get("input")
        if not isinstance(job_input, dict):
            raise _refusal(web.HTTPBadRequest, "the request needs an `input`, and it must be a JSON object")
        job = self._platform.submit(job_input, sync=sync)
        self._announce()
        return job

    def _finish(self, job: Job, pod_id: str, answer: dict[str, Any]) -> None:
        self._platform.finish(job, pod_id, answer)
        self._announce()

    def _saw(self, request: web.Request, *, polled: bool = False) -> str:
        pod_id = request.match_info["pod"]
        self._platform.saw(pod_id, polled=polled)
        return pod_id

    def _job(self, request: web.Request) -> Job:
        job = self._platform.job(request.match_info["id"])
        if job is None:
            raise _refusal(web.HTTPNotFound, "there is no such job")
        return job

    def _announce(self) -> None:
        """Let every held request look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _held(self, look: Callable[[], Found | None], limit_s: float) -> Found | None:
        """Hold a request until `look` finds something, at most `limit_s`: answered at once, the SDK polls every ms."""
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while (found := look()) is None:
                    await self._changed.wait()
                return found
        return None


def build_app(api_key: str, *, endpoint: str = "local", hold_s: float = 2.0) -> web.Application:
    """The stand-in as an application. A stopping worker waits for its polls to end, at most `hold_s`."""
    api = Api(Platform(), hold_s)
    app = web.Application()
    for method, path, handler in (
        ("POST", "run", api.run),
        ("POST", "runsync", api.runsync),
        ("GET", "status/{id}", api.status),
        ("POST", "cancel/{id}", api.cancel),
        ("GET", "health", api.health),
    ):
        app.router.add_route(method, f"/v2/{endpoint}/{path}", _guarded(handler, f"Bearer {api_key}"))
    for method, path, handler in (
        ("GET", "job-take/{pod}", api.job_take),
        ("GET", "job-stop/{pod}", api.job_stop),
        ("POST", "job-done/{pod}/{id}", api.job_done),
        ("POST", "job-stream/{pod}/{id}", api.job_stream),
        ("GET", "ping/{pod}", api.ping),
    ):
        app.router.add_route(method, f"/v2/{endpoint}/{path}", _guarded(handler, api_key))
    app.router.add_route("*", "/{path:.*}", _no_such_path)
    return app


def worker_environment(base_url: str, endpoint: str, api_key: str, pod_id: str) -> dict[str, str]:
    """The variables that lead the SDK of one worker here. A key in `$HOME/.runpod/config.toml` would win over this one.

    `$ID` and `$RUNPOD_POD_ID` stay literal: the SDK fills them in. It also appends `&...` to an address, hence `?gpu=`.
    """
    root = f"{base_url}/v2/{endpoint}"
    return {
        "RUNPOD_WEBHOOK_GET_JOB": f"{root}/job-take/$ID?gpu=none",
        "RUNPOD_WEBHOOK_POST_OUTPUT": f"{root}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
        "RUNPOD_WEBHOOK_POST_STREAM": f"{root}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
        "RUNPOD_WEBHOOK_PING": f"{root}/ping/$RUNPOD_POD_ID?gpu=none",
        "RUNPOD_PING_INTERVAL": "1000",
        "RUNPOD_AI_API_KEY": api_key,
        "RUNPOD_POD_ID": pod_id,
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        "RUNPOD_SKIP_GPU_CHECK": "true",
    }


def parse_object(raw: bytes) -> dict[str, Any]:
    """Read a JSON object that can be sent on as JSON: NaN and infinite numbers are refused. Raises ValueError."""
    try:
        parsed = json.loads(raw, parse_float=_finite, parse_constant=_finite)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(parsed, dict):
        raise ValueError("not a JSON object")
    return parsed


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is no JSON number")
    return value


async def _read_object(request: web.Request, limit_bytes: int) -> dict[str, Any]:
    raw = bytearray()
    async for chunk in request.content.iter_chunked(READ_BYTES):
        raw += chunk
        if len(raw) > limit_bytes:
            raise _refusal(web.HTTPBadRequest, f"exceeded max body size of {limit_bytes // 1_000_000}MiB")
    try:
        return parse_object(bytes(raw))
    except ValueError as error:
        raise _refusal(web.HTTPBadRequest, f"the body cannot be read: {error}") from error


def _wait_ms(request: web.Request) -> int:
    with suppress(ValueError):
        wait_ms = int(request.query.get("wait", "90000"))
        if 1_000 <= wait_ms <= 300_000:
            return wait_ms
    raise _refusal(web.HTTPBadRequest, "`wait` must be a number of milliseconds from 1000 to 300000")


def _guarded(handler: Handler, authorization: str) -> Handler:
    async def guarded(request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != authorization:
            raise _refusal(web.HTTPUnauthorized, "the API key is missing or wrong")
        return await handler(request)

    return guarded


async def _no_such_path(request: web.Request) -> web.StreamResponse:
    raise _refusal(web.HTTPNotFound, f"there is no {request.method} {request.path}")


def _refusal(kind: type[web.HTTPClientError], sentence: str) -> web.HTTPClientError:
    return kind(text=json.dumps({"error": sentence}), content_type="application/json")


async def _serve(app: web.Application, port: int) -> None:
    """Serve on 127.0.0.1 until SIGTERM or SIGINT, and say on stdout where. Raises OSError when the port is taken."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    # handler_cancellation: a worker that dies in a held poll takes no job with it.
    runner = web.AppRunner(
        app, access_log=None, handler_cancellation=True, keepalive_timeout=KEEPALIVE_S, shutdown_timeout=0.1
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        print(f"listening http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
        await stopped.wait()
    finally:
        await runner.cleanup()


def main(arguments: list[str] | None = None) -> int:
    """Run the stand-in. Exit code: 0 after a stop by signal, 1 when the port cannot be had, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(prog="python -m local.serverless_api", description="RunPod Serverless stand-in")
    parser.add_argument("--port", type=int, required=True, help="port on 127.0.0.1; 0 picks a free one")
    parser.add_argument("--api-key", required=True, help="the key that clients and workers must send")
    parser.add_argument("--endpoint", default="local", help="endpoint id in the URLs (default: local)")
    parser.add_argument("--hold-s", type=float, default=2.0, help="how long an empty worker poll is held (default: 2)")
    options = parser.parse_args(arguments)
    app = build_app(options.api_key, endpoint=options.endpoint, hold_s=options.hold_s)
    try:
        asyncio.run(_serve(app, options.port))
    except (OSError, OverflowError) as error:
        print(f"The RunPod stand-in cannot listen on port {options.port}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
