"""One endpoint of the RunPod stand-in over HTTP: the calls of clients and those of the SDK's worker loop.

The worker side answers what runpod 1.12.0 asks (serverless/modules/rp_job.py, rp_http.py, rp_ping.py); the client side
follows RunPod's documentation of the endpoint API.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

from local.serverless_faults import CLIENT_KINDS, Fault, Faults
from local.serverless_jobs import Job, Platform, Policy, Status
from local.serverless_wire import cut, dropped, html_page, read_body, read_object, refusal

RUN_LIMIT_BYTES = 10_000_000
RUNSYNC_LIMIT_BYTES = 20_000_000
"""RunPod documents 10 and 20 MB and refuses in MiB; the smaller reading, so what passes here passes there."""

CHUNK_LIMIT_BYTES = 1_000_000
POSTED_LIMIT_BYTES = 10_000
"""So much of each post is kept for GET /_posted."""

EXPIRE_EVERY_S = 0.1
WEBHOOK_ATTEMPTS = 3
WEBHOOK_TIMEOUT_S = 10.0

DAY_MS = 24 * 3600 * 1000
POLICY_RANGES_MS = {"executionTimeout": (5_000, 7 * DAY_MS), "ttl": (10_000, 7 * DAY_MS)}

Found = TypeVar("Found")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Endpoint:
    """Reads requests, waits where a poll is to be held, and answers. `hold_s` is how long an empty poll is held."""

    def __init__(self, platform: Platform, faults: Faults, *, hold_s: float, webhook_pause_s: float) -> None:
        self._platform = platform
        self._faults = faults
        self._hold_s = hold_s
        self._webhook_pause_s = webhook_pause_s
        self._changed = asyncio.Event()
        self._withheld: dict[str, tuple[Any, Fault]] = {}
        self._webhooks: set[asyncio.Task[None]] = set()

    # --- The calls of clients ---

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

    async def stream(self, request: web.Request) -> web.Response:
        return web.json_response(self._platform.read_stream(self._job(request)))

    async def cancel(self, request: web.Request) -> web.Response:
        job = self._job(request)
        self._platform.cancel(job)
        self._announce()
        return web.json_response({"id": job.id, "status": job.status})

    async def retry(self, request: web.Request) -> web.Response:
        job = self._job(request)
        if not self._platform.retry(job):
            raise refusal(web.HTTPBadRequest, f"a job that is {job.status} cannot be retried")
        self._announce()
        return web.json_response({"id": job.id, "status": Status.IN_QUEUE})

    async def purge_queue(self, _request: web.Request) -> web.Response:
        return web.json_response({"removed": self._platform.purge(), "status": "completed"})

    async def health(self, _request: web.Request) -> web.Response:
        return web.json_response(self._platform.health())

    async def posted(self, request: web.Request) -> web.Response:
        """Only here, not on RunPod: every post of a worker for one job, word for word, for tests."""
        return web.json_response([raw.decode(errors="replace") for raw in self._job(request).posted])

    async def posted_bytes(self, request: web.Request) -> web.Response:
        """Likewise only here: how long each of these posts was, of which `posted` may have only the beginning."""
        return web.json_response(self._job(request).posted_bytes)

    # --- The calls of workers ---

    async def job_take(self, request: web.Request) -> web.Response:
        pod_id = self._saw(request, polled=True)
        if fault := self._faults.strike("job-take-500", "job-take-drop", by=pod_id):
            if fault.kind == "job-take-drop":
                return dropped(request)
            raise refusal(web.HTTPInternalServerError, "no job can be given")
        jobs = await self._take(request, 1)
        return web.json_response(jobs[0]) if jobs else web.Response(status=204)

    async def job_take_batch(self, request: web.Request) -> web.Response:
        """What the SDK asks with two or more free slots."""
        size = request.query.get("batch_size", "")
        if not (size.isascii() and size.isdigit() and 1 <= len(size) <= 4 and int(size)):
            raise refusal(web.HTTPBadRequest, "`batch_size` must be a number from 1 to 9999")
        jobs = await self._take(request, int(size))
        return web.json_response(jobs) if jobs else web.Response(status=204)

    async def job_stop(self, request: web.Request) -> web.Response:
        pod_id = self._saw(request)
        stops = await self._held(lambda: self._platform.stops_for(pod_id) or None, self._hold_s)
        if stops and self._faults.strike("stop-repeated", by=pod_id):
            self._platform.stop_again(pod_id, stops)
        return web.json_response({"jobsToStop": stops}) if stops else web.Response(status=204)

    async def job_done(self, request: web.Request) -> web.Response:
        pod_id, job = self._saw(request), self._job(request)
        limit_bytes = RUNSYNC_LIMIT_BYTES if job.is_sync else RUN_LIMIT_BYTES
        try:
            posted = await self._read_post(request, job, limit_bytes)
        except web.HTTPBadRequest:
            # Seen on RunPod after a refused result: COMPLETED without an output (runpod-python issue 309).
            self._finish(job, pod_id, {})
            raise
        if posted.get("status") == Status.IN_PROGRESS:
            self._progress(job, pod_id, posted.get("output"))
            return web.Response()
        return self._result(request, job, pod_id, posted)

    async def job_stream(self, request: web.Request) -> web.Response:
        pod_id, job = self._saw(request), self._job(request)
        chunk = await self._read_post(request, job, CHUNK_LIMIT_BYTES)
        self._platform.chunk(job, pod_id, chunk.get("output"))
        return web.Response()

    async def ping(self, request: web.Request) -> web.Response:
        pod_id = request.match_info["pod"]
        if not self._faults.strike("ping-lost", by=pod_id):
            self._platform.pinged(pod_id, request.query.get("status"))
        return web.Response()

    # --- Around the calls ---

    def for_clients(self, handler: Handler, call: str) -> Handler:
        """The call with the client side's faults before it."""

        async def faulty(request: web.Request) -> web.StreamResponse:
            fault = self._faults.strike(*CLIENT_KINDS, by=call)
            if fault is None:
                return await handler(request)
            return await _broken(fault.kind, handler, request)

        return faulty

    async def watch(self) -> None:
        """Do what is due by the clock, until cancelled."""
        try:
            while True:
                if self._platform.expire():
                    self._announce()
                await asyncio.sleep(EXPIRE_EVERY_S)
        finally:
            for task in self._webhooks:
                task.cancel()

    async def _take(self, request: web.Request, size: int) -> list[dict[str, Any]]:
        """Hold a poll until there is a job; answer with that one and others that wait, at most `size`."""
        pod_id = self._saw(request, polled=True)
        if fault := self._faults.strike("job-take-held", by=pod_id):
            await fault.taken_back.wait()
        job = await self._held(lambda: self._platform.take(pod_id), self._hold_s)
        taken = []
        while job is not None:
            taken.append({"id": job.id, "input": job.input})
            job = self._platform.take(pod_id) if len(taken) < size else None
        return taken

    async def _submit(self, request: web.Request, limit_bytes: int, *, sync: bool) -> Job:
        posted = read_object(await read_body(request, limit_bytes))
        job_input = posted.get("input")
        if not isinstance(job_input, dict):
            raise refusal(web.HTTPBadRequest, "the request needs an `input`, and it must be a JSON object")
        policy, webhook = _policy(posted.get("policy", {})), _webhook(posted.get("webhook"))
        job = self._platform.submit(job_input, sync=sync, policy=policy, webhook=webhook)
        self._announce()
        return job

    async def _read_post(self, request: web.Request, job: Job, limit_bytes: int) -> dict[str, Any]:
        raw = await read_body(request, limit_bytes)
        job.posted.append(raw[:POSTED_LIMIT_BYTES])
        job.posted_bytes.append(len(raw))
        return read_object(raw)

    def _progress(self, job: Job, pod_id: str, output: Any) -> None:
        fault = self._faults.strike("progress-delayed", "progress-after-result", by=pod_id)
        if fault is not None:
            self._withheld[job.id] = (output, fault)
            return
        self._platform.progress(job, pod_id, output)
        self._deliver_withheld(job, pod_id)

    def _result(self, request: web.Request, job: Job, pod_id: str, posted: dict[str, Any]) -> web.Response:
        """Keep a result and answer, unless a fault is in the way."""
        fault = self._faults.strike("job-done-400", "job-done-500", "job-done-drop", by=pod_id)
        kind = fault.kind if fault else None
        if kind == "job-done-400":
            self._finish(job, pod_id, {})
            raise refusal(web.HTTPBadRequest, "the result is refused")
        if kind == "job-done-500":
            raise refusal(web.HTTPInternalServerError, "the result cannot be kept")
        if kind == "job-done-drop":
            return dropped(request)
        if posted.get("stopPod") and not self._faults.strike("stop-pod-ignored", by=pod_id):
            self._platform.stop_pod(pod_id)
        self._finish(job, pod_id, {key: posted[key] for key in ("output", "error") if key in posted})
        self._deliver_withheld(job, pod_id)
        return web.Response()

    def _deliver_withheld(self, job: Job, pod_id: str) -> None:
        output, fault = self._withheld.get(job.id, (None, None))
        if fault is None or (fault.kind == "progress-after-result" and not job.is_final):
            return
        del self._withheld[job.id]
        if fault.kind == "progress-after-result":
            self._platform.reopen(job, output)
        else:
            self._platform.progress(job, pod_id, output)

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
            raise refusal(web.HTTPNotFound, "there is no such job")
        return job

    def _announce(self) -> None:
        """Let every held request look again, and tell the webhooks of jobs that have ended."""
        self._changed.set()
        self._changed = asyncio.Event()
        for job in self._platform.jobs_to_tell():
            task = asyncio.create_task(self._call_webhook(job.webhook or "", self._platform.describe(job)))
            self._webhooks.add(task)
            task.add_done_callback(self._webhooks.discard)

    async def _call_webhook(self, url: str, body: dict[str, Any]) -> None:
        """Post a job's last status to its webhook until that answers 200: at most WEBHOOK_ATTEMPTS times."""
        timeout = aiohttp.ClientTimeout(total=WEBHOOK_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            for attempt in range(WEBHOOK_ATTEMPTS):
                if attempt:
                    await asyncio.sleep(self._webhook_pause_s)
                with suppress(aiohttp.ClientError, TimeoutError):
                    async with session.post(url, json=body) as answer:
                        if answer.status == 200:
                            return

    async def _held(self, look: Callable[[], Found | None], limit_s: float) -> Found | None:
        """Hold a request until `look` finds something, at most `limit_s`: answered at once, the SDK polls every ms."""
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while (found := look()) is None:
                    await self._changed.wait()
                return found
        return None


async def _broken(kind: str, handler: Handler, request: web.Request) -> web.StreamResponse:
    """Answer a client's call as the fault says."""
    if kind == "client-cut":
        answer = await handler(request)
        assert isinstance(answer, web.Response)
        return await cut(request, answer)
    if kind == "client-drop":
        return dropped(request)
    if kind == "client-html":
        return html_page(200, "Just a moment")
    if kind == "client-502":
        return html_page(502, "Bad gateway")
    return web.json_response({"error": "a fault of the stand-in"}, status=int(kind.removeprefix("client-")))


def _policy(posted: Any) -> Policy:
    """A request's `policy`; refused with 400 where a time is out of the range that RunPod documents."""
    if not isinstance(posted, dict):
        raise refusal(web.HTTPBadRequest, "`policy` must be a JSON object")
    times_s = {}
    for name, (least, most) in POLICY_RANGES_MS.items():
        value = posted.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise refusal(web.HTTPBadRequest, f"`policy.{name}` must be milliseconds from {least} to {most}")
        times_s[name] = value / 1000
    default = Policy()
    return Policy(times_s.get("executionTimeout", default.execution_timeout_s), times_s.get("ttl", default.ttl_s))


def _webhook(url: Any) -> str | None:
    """A request's `webhook`, refused with 400 where it is no address."""
    if url is None:
        return None
    with suppress(ValueError):
        if isinstance(url, str) and (parts := urlsplit(url)).scheme in ("http", "https") and parts.hostname:
            return url
    raise refusal(web.HTTPBadRequest, "`webhook` must be an http or https address")


def _wait_ms(request: web.Request) -> int:
    with suppress(ValueError):
        wait_ms = int(request.query.get("wait", "90000"))
        if 1_000 <= wait_ms <= 300_000:
            return wait_ms
    raise refusal(web.HTTPBadRequest, "`wait` must be a number of milliseconds from 1000 to 300000")
