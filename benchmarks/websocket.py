"""What following a large workflow costs: the messages that ComfyUI sends for 300 nodes, 17 MiB in all.

    python -m benchmarks.websocket                   9 runs of each, taking turns
    python -m benchmarks.websocket --runs 21 --nodes 600 --json FILE

ComfyUI 0.18.1 repeats the state of every node so far in each `progress_state`, so they grow with the square of the
number of nodes (tests/contract/captures has their form). A server of this script, in a process of its own, makes and
sends them as ComfyUI does, by aiohttp from one event loop, and notes how long it was in sending: ComfyUI's loop, which
answers HTTP too, must not wait for its listener. The floor is a client that reads the socket as fast as it can and
looks only for the end. The worker's side is `PromptRun.complete`: connect, POST, follow, history. A client that parses
every message is there for comparison. The processor's time is that of this process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import websocket
from aiohttp import WSMsgType, web

from benchmarks.common import p95, rounded, write_json
from local.__main__ import start, stop
from worker.comfyui import ComfyUI
from worker.comfyui_server import ComfyUIServer
from worker.control import JobControl
from worker.follow import PromptRun
from worker.process import ComfyUIProcess

NODES = 300
LIMIT_CPU_S = 0.3
LIMIT_WAIT_RATIO = 2.0  # of the time in sending: a reader that is no reader at all has 1
TIMEOUT_S = 60.0
READ_BYTES = 1 << 18
_END = b'{"type": "executing", "data": {"node": null'


# --- the sender ---


class Sender:
    """ComfyUI as far as one prompt needs it."""

    def __init__(self, nodes: int) -> None:
        self._nodes = nodes
        self._socket: web.WebSocketResponse | None = None
        self._flood: asyncio.Task[None] | None = None
        self._figures: dict[str, float] = {}

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/ws", self._listen)
        app.router.add_post("/prompt", self._take)
        app.router.add_get("/history/{prompt_id}", self._history)
        app.router.add_get("/_figures", self._tell)
        return app

    async def _listen(self, request: web.Request) -> web.WebSocketResponse:
        self._socket = web.WebSocketResponse()
        await self._socket.prepare(request)
        async for message in self._socket:
            if message.type != WSMsgType.TEXT:
                break
        return self._socket

    async def _take(self, request: web.Request) -> web.Response:
        prompt_id = (await request.json())["prompt_id"]
        self._flood = asyncio.create_task(self._send_all(prompt_id))
        return web.json_response({"prompt_id": prompt_id, "number": 0, "node_errors": {}})

    async def _history(self, request: web.Request) -> web.Response:
        status = {"status_str": "success", "completed": True, "messages": []}
        return web.json_response({request.match_info["prompt_id"]: {"status": status, "outputs": {}}})

    async def _tell(self, _: web.Request) -> web.Response:
        if self._flood is not None:
            await self._flood
        return web.json_response(self._figures)

    async def _send_all(self, prompt_id: str) -> None:
        assert self._socket is not None
        sent_bytes, sending_s = 0, 0.0
        for kind, data in messages(prompt_id, self._nodes):
            text = json.dumps({"type": kind, "data": data})
            started = time.perf_counter()
            with contextlib.suppress(ConnectionError):  # the last one is heard, and the socket closed at once
                await self._socket.send_str(text)
            sending_s += time.perf_counter() - started
            sent_bytes += len(text)
        self._figures = {"sent_bytes": sent_bytes, "sending_s": sending_s}


def messages(prompt_id: str, nodes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the client of a prompt hears (0.18.1): for each node its start, its name, its end."""
    states: dict[str, dict[str, Any]] = {}
    yield "execution_start", {"prompt_id": prompt_id, "timestamp": 1_700_000_000_000}
    yield "execution_cached", {"nodes": [], "prompt_id": prompt_id, "timestamp": 1_700_000_000_000}
    for number in range(1, nodes + 1):
        node_id = str(number)
        names = {"node_id": node_id, "prompt_id": prompt_id, "display_node_id": node_id}
        names |= {"parent_node_id": None, "real_node_id": node_id}  # type: ignore[dict-item]
        states[node_id] = {"value": 0.0, "max": 1.0, "state": "running", **names}
        yield "progress_state", {"prompt_id": prompt_id, "nodes": states}
        yield "executing", {"node": node_id, "display_node": node_id, "prompt_id": prompt_id}
        states[node_id] = {"value": 1.0, "max": 1.0, "state": "finished", **names}
        yield "progress_state", {"prompt_id": prompt_id, "nodes": states}
    yield "execution_success", {"prompt_id": prompt_id, "timestamp": 1_700_000_005_000}
    yield "executing", {"node": None, "prompt_id": prompt_id}


def serve(nodes: int) -> None:
    """Prints the port, then serves until it is ended."""
    listening = socket.create_server(("127.0.0.1", 0))
    print(listening.getsockname()[1], flush=True)
    web.run_app(Sender(nodes).app(), sock=listening, print=lambda *_: None)


@contextlib.contextmanager
def running_sender(nodes: int) -> Iterator[int]:
    """Yields its port."""
    command = [sys.executable, "-m", "benchmarks.websocket", "--serve", "--nodes", str(nodes)]
    process = start(command, os.environ, sys.stderr, subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        stop(process)


# --- those who listen ---


def connected(port: int) -> websocket.WebSocket:
    own = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
    return websocket.create_connection(f"ws://127.0.0.1:{port}/ws?clientId=x", socket=own, skip_utf8_validation=True)


def post_prompt(port: int) -> str:
    """Returns the prompt's id."""
    prompt_id = str(uuid.uuid4())
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    connection.request("POST", "/prompt", json.dumps({"prompt": {}, "prompt_id": prompt_id}).encode())
    connection.getresponse().read()
    connection.close()
    return prompt_id


def read_and_forget(port: int, _: int) -> None:
    listener = connected(port)
    post_prompt(port)
    buffer, tail = bytearray(READ_BYTES), b""
    while _END not in tail:
        length = listener.sock.recv_into(buffer)
        tail = tail[-len(_END) :] + bytes(buffer[:length][-1000:])
    listener.shutdown()


def parse_everything(port: int, _: int) -> None:
    listener = connected(port)
    last = {"type": "executing", "data": {"node": None, "prompt_id": post_prompt(port)}}
    while json.loads(listener.recv()) != last:
        pass
    listener.shutdown()


def follow(port: int, nodes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        PromptRun(
            ComfyUI(ComfyUIServer(port, ComfyUIProcess(Path(folder)))),
            {str(number): {"class_type": "ImageInvert", "inputs": {}} for number in range(1, nodes + 1)},
            control=JobControl(TIMEOUT_S),
            on_progress=lambda _: None,
            interrupt_grace_s=TIMEOUT_S,
            api_key=None,
        ).complete()


LISTENERS: dict[str, Callable[[int, int], None]] = {
    "reads and forgets": read_and_forget,
    "the worker": follow,
    "parses every message": parse_everything,
}


@dataclass(frozen=True)
class Run:
    """One flood. ``sending_s`` is the sender's, ``cpu_s`` ours."""

    cpu_s: float
    whole_s: float
    sending_s: float
    sent_bytes: int


def measure(port: int, nodes: int, listen: Callable[[int, int], None]) -> Run:
    started, cpu_started = time.perf_counter(), time.process_time()
    listen(port, nodes)
    cpu_s, whole_s = time.process_time() - cpu_started, time.perf_counter() - started
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/_figures", timeout=TIMEOUT_S) as answer:
        sender = json.load(answer)
    return Run(cpu_s, whole_s, sender["sending_s"], sender["sent_bytes"])


def figures_of(runs: list[Run]) -> dict[str, float]:
    cpu = [run.cpu_s for run in runs]
    return {
        "cpu_s": statistics.median(cpu),
        "cpu_s_p95": p95(cpu),
        "sending_s": statistics.median(run.sending_s for run in runs),
        "whole_s": statistics.median(run.whole_s for run in runs),
        "sent_mib": runs[0].sent_bytes / 2**20,
        "runs": len(runs),
    }


def main() -> int:
    """Returns 1 where the worker takes more than LIMIT_CPU_S, or keeps the sender waiting."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.websocket", description="A flood of messages.")
    parser.add_argument("--runs", type=int, default=9, help="of each (default: 9)")
    parser.add_argument("--nodes", type=int, default=NODES, help=f"of the workflow (default: {NODES})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures go there")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.nodes)
        return 0
    runs: dict[str, list[Run]] = {name: [] for name in LISTENERS}
    with running_sender(options.nodes) as port:
        names = list(LISTENERS)
        for number in range(options.runs):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                runs[name].append(measure(port, options.nodes, LISTENERS[name]))
    measured = {name: figures_of(of_name) for name, of_name in runs.items()}
    floor, worker = measured["reads and forgets"], measured["the worker"]
    what = f"{options.nodes} nodes, {floor['sent_mib']:.1f} MiB"
    print(f"{what:21} | CPU here: median, p95 s | sender in sending, s | whole, s")
    for name, figures in measured.items():
        print(
            f"{name:21} | {figures['cpu_s']:13.3f}, {figures['cpu_s_p95']:7.3f} | {figures['sending_s']:20.3f} | "
            f"{figures['whole_s']:.2f}"
        )
    waits = worker["sending_s"] / floor["sending_s"]
    print(f"the worker has {LIMIT_CPU_S} s of CPU at most; its sender takes {waits:.2f} of the first row's time")
    write_json(options.json, rounded(measured, 4))
    return 0 if worker["cpu_s"] <= LIMIT_CPU_S and waits <= LIMIT_WAIT_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
