"""Stand-in for the RunPod Serverless platform on 127.0.0.1, for any client and the SDK's own worker loop.

    python -m local.serverless_api --port 0 --api-key KEY        prints: listening http://127.0.0.1:PORT

For clients, below /v2/{endpoint}, with `Authorization: Bearer KEY`:
    POST /run  POST /runsync?wait=ms  GET /status/{id}  GET /stream/{id}  POST /cancel/{id}  POST /retry/{id}
    POST /purge-queue  GET /health
For workers, in the same place, with `Authorization: KEY` (raw, as the SDK sends it; see `worker_environment`):
    GET /job-take/{pod}  GET /job-take-batch/{pod}?batch_size=N  GET /job-stop/{pod}  GET /ping/{pod}
    POST /job-done/{pod}/{id}  POST /job-stream/{pod}/{id}
For tests, with `Authorization: Bearer KEY`:
    POST /_fault  GET /_fault (serverless_faults.py)  GET /v2/{endpoint}/_posted/{id}: what workers posted for a job

serverless_endpoint.py has the calls, serverless_jobs.py what they change. Jobs live in memory until the program ends.
"""

import argparse
import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence

from aiohttp import web
from aiohttp.typedefs import Middleware

from local.serverless_endpoint import Endpoint, Handler
from local.serverless_faults import Faults
from local.serverless_jobs import Platform, Status, Terms
from local.serverless_wire import read_body, read_object, refusal

KEEPALIVE_S = 75.0
"""Longer than a job: the SDK tries a result once, and on a kept connection that the server has closed it is lost."""

FAULT_LIMIT_BYTES = 10_000
JSON_NESTING = 10_000  # deeper bodies are refused; not known of RunPod
CLIENT_CALLS = ("run", "runsync", "status", "stream", "cancel", "retry", "purge-queue", "health")


def build_app(
    api_key: str,
    *,
    endpoints: Sequence[str] = ("local",),
    terms: Terms | None = None,
    hold_s: float = 2.0,
    latency_s: float = 0.0,
    webhook_pause_s: float = 10.0,
) -> web.Application:
    """The stand-in as an application. A stopping worker waits for its polls to end, at most `hold_s`."""
    app = web.Application(middlewares=[_slow(latency_s)] if latency_s else [])
    faults = Faults()
    for name in endpoints:
        endpoint = Endpoint(Platform(terms), faults, hold_s=hold_s, webhook_pause_s=webhook_pause_s)
        _route(app, f"/v2/{name}", endpoint, api_key)
        app.cleanup_ctx.append(_watching(endpoint))
    _route_faults(app, faults, api_key)
    app.router.add_route("*", "/{path:.*}", _no_such_path)
    return app


def _route(app: web.Application, root: str, endpoint: Endpoint, api_key: str) -> None:
    for method, path, handler in (
        ("POST", "run", endpoint.run),
        ("POST", "runsync", endpoint.runsync),
        ("GET", "status/{id}", endpoint.status),
        ("GET", "stream/{id}", endpoint.stream),
        ("POST", "cancel/{id}", endpoint.cancel),
        ("POST", "retry/{id}", endpoint.retry),
        ("POST", "purge-queue", endpoint.purge_queue),
        ("GET", "health", endpoint.health),
    ):
        faulty = endpoint.for_clients(handler, path.partition("/")[0])
        app.router.add_route(method, f"{root}/{path}", _guarded(faulty, f"Bearer {api_key}"))
    app.router.add_route("GET", f"{root}/_posted/{{id}}", _guarded(endpoint.posted, f"Bearer {api_key}"))
    app.router.add_route("GET", f"{root}/_posted_bytes/{{id}}", _guarded(endpoint.posted_bytes, f"Bearer {api_key}"))
    for method, path, handler in (
        ("GET", "job-take/{pod}", endpoint.job_take),
        ("GET", "job-take-batch/{pod}", endpoint.job_take_batch),
        ("GET", "job-stop/{pod}", endpoint.job_stop),
        ("POST", "job-done/{pod}/{id}", endpoint.job_done),
        ("POST", "job-stream/{pod}/{id}", endpoint.job_stream),
        ("GET", "ping/{pod}", endpoint.ping),
    ):
        app.router.add_route(method, f"{root}/{path}", _guarded(handler, api_key))


def _route_faults(app: web.Application, faults: Faults, api_key: str) -> None:
    async def show(_request: web.Request) -> web.Response:
        return web.json_response({"faults": faults.describe()})

    async def arm(request: web.Request) -> web.Response:
        try:
            faults.arm(read_object(await read_body(request, FAULT_LIMIT_BYTES)), CLIENT_CALLS)
        except ValueError as error:
            raise refusal(web.HTTPBadRequest, str(error)) from error
        return await show(request)

    app.router.add_route("GET", "/_fault", _guarded(show, f"Bearer {api_key}"))
    app.router.add_route("POST", "/_fault", _guarded(arm, f"Bearer {api_key}"))


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


def _slow(latency_s: float) -> Middleware:
    """Every answer is that late; what a call does is done at once."""

    @web.middleware
    async def slow(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        finally:
            await asyncio.sleep(latency_s)

    return slow


def _watching(endpoint: Endpoint) -> Callable[[web.Application], AsyncIterator[None]]:
    """The endpoint's clock, running as long as the application does."""

    async def watched(_app: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(endpoint.watch())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    return watched


def _guarded(handler: Handler, authorization: str) -> Handler:
    async def guarded(request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != authorization:
            raise refusal(web.HTTPUnauthorized, "the API key is missing or wrong")
        return await handler(request)

    return guarded


async def _no_such_path(request: web.Request) -> web.StreamResponse:
    raise refusal(web.HTTPNotFound, f"there is no {request.method} {request.path}")


async def _serve(app: web.Application, port: int, keepalive_s: float) -> None:
    """Serve on 127.0.0.1 until SIGTERM or SIGINT, and say on stdout where. Raises OSError when the port is taken."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    # handler_cancellation: a worker that dies in a held poll takes no job with it.
    runner = web.AppRunner(
        app, access_log=None, handler_cancellation=True, keepalive_timeout=keepalive_s, shutdown_timeout=0.1
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        print(f"listening http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
        await stopped.wait()
    finally:
        await runner.cleanup()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m local.serverless_api", description="RunPod Serverless stand-in")
    parser.add_argument("--port", type=int, required=True, help="port on 127.0.0.1; 0 picks a free one")
    parser.add_argument("--api-key", required=True, help="the key that clients and workers must send")
    parser.add_argument("--endpoint", action="append", help="endpoint id in the URLs; repeatable (default: local)")
    seconds = {
        "--hold-s": (2.0, "how long an empty worker poll is held"),
        "--latency-s": (0.0, "how late every answer is"),
        "--keepalive-s": (KEEPALIVE_S, "how long an idle connection is kept; 2 loses the results of blocking handlers"),
        "--lost-s": (Terms.lost_s, "after how long without a ping a worker is lost"),
        "--retention-s": (Terms.retention_s, "how long the end of a /run job is remembered"),
        "--sync-retention-s": (Terms.sync_retention_s, "how long the end of a /runsync job is remembered"),
        "--webhook-pause-s": (10.0, "how long a webhook that did not answer 200 is left alone"),
    }
    for option, (default, sentence) in seconds.items():
        parser.add_argument(option, type=float, default=default, help=f"{sentence} (default: {default:g})")
    parser.add_argument(
        "--timed-out",
        choices=[Status.TIMED_OUT, Status.FAILED],
        default=Status.TIMED_OUT,
        type=Status,
        help="the status after an executionTimeout; RunPod has shown both (default: TIMED_OUT)",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the stand-in. Exit code: 0 after a stop by signal, 1 when the port cannot be had, 2 for wrong arguments."""
    options = _parser().parse_args(arguments)
    sys.setrecursionlimit(JSON_NESTING)
    app = build_app(
        options.api_key,
        endpoints=options.endpoint or ["local"],
        terms=Terms(options.lost_s, options.retention_s, options.sync_retention_s, options.timed_out),
        hold_s=options.hold_s,
        latency_s=options.latency_s,
        webhook_pause_s=options.webhook_pause_s,
    )
    try:
        asyncio.run(_serve(app, options.port, options.keepalive_s))
    except (OSError, OverflowError) as error:
        print(f"The RunPod stand-in cannot listen on port {options.port}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
