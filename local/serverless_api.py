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
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from aiohttp import web

from local.serverless_jobs import SYNC_PREFIX, Job, Platform, Status, parse_object

RUN_LIMIT_BYTES = 10_000_000
RUNSYNC_LIMIT_BYTES = 20_000_000
"""RunPod documents 10 and 20 MB and refuses in MiB; the smaller reading, so what passes here passes there."""

KEEPALIVE_S = 75.0
"""Longer than a job: the SDK tries a result once, and on a kept connection that the server has closed it is lost."""

READ_BYTES = 64 * 1024

Found = TypeVar("Found")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


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
