"""HTTP servers that play RunPod's endpoint API, and a folder that client.py runs in, for the tests of client.py."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from hypothesis import HealthCheck, settings
from PIL import Image

STEADY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a slow machine decides no test
CLIENT = Path(__file__).resolve().parents[2] / "client.py"
LIMIT_S = 30  # for what has to happen at all

Answer = Callable[[BaseHTTPRequestHandler], None]


def answer(code: int, body: object = None, **headers: str) -> Answer:
    """A server's answer; a `str` body is sent as it is (an HTML page), anything else as JSON."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        handler.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)

    return send


def cut(handler: BaseHTTPRequestHandler) -> None:
    """Announces more than it sends, then closes."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"status": "COMP')
    handler.close_connection = True


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


QUEUED = answer(200, {"id": "j1", "status": "IN_QUEUE"})
DONE = {"id": "j1", "status": "COMPLETED", "output": {"images": []}}


class HttpServer:
    """Keeps what was asked, as (method, path, Authorization, body), and answers as `respond` says."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, str | None, bytes]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16  # headers and body in one packet: else each answer waits for the client's delayed ACK

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.requests.append((self.command, self.path, self.headers.get("Authorization"), body))
                with contextlib.suppress(ConnectionError):  # a client that left
                    outer.respond(self, body)

            do_POST = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v2"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def respond(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


class Server(HttpServer):
    """Gives the scripted answers in turn, the last one for ever."""

    def __init__(self) -> None:
        self.script: list[Answer] = []
        super().__init__()

    def respond(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        (self.script.pop(0) if len(self.script) > 1 else self.script[0])(handler)


class Signal:
    """An answer that tells when it is first asked for, and then goes on as `then` says."""

    def __init__(self, then: Answer) -> None:
        self._then = then
        self._asked = threading.Event()

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        self._asked.set()
        self._then(handler)

    def wait(self) -> None:
        assert self._asked.wait(LIMIT_S)


@dataclass
class PlatformJob:
    number: int  # from 1, in the order in which they came
    input: dict[str, Any]
    end: dict[str, Any] | None = None  # the final answer of /status

    def texts(self) -> list[str]:
        return [node["inputs"]["text"] for node in self.input["workflow"].values() if "text" in node["inputs"]]

    def seed(self) -> int:
        return int(self.input["workflow"]["3"]["inputs"]["seed"])


class Platform(HttpServer):
    """Plays an endpoint that keeps its jobs. `ends` says how a job that is asked for has ended; None: it still runs."""

    def __init__(self) -> None:
        self.jobs: list[PlatformJob] = []
        self.ends: Callable[[PlatformJob], dict[str, Any] | None] = made
        self.most_at_once = 0
        self.on_cancel: Answer | None = None
        self._changed = threading.Condition()
        super().__init__()

    def respond(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        call, _, job_id = handler.path.removeprefix("/v2/ep/").partition("/")
        if call == "cancel" and self.on_cancel is not None:
            return self.on_cancel(handler)
        with self._changed:
            reply = self._reply(call, job_id, body)
            self._changed.notify_all()
        return answer(200, reply)(handler)

    def _reply(self, call: str, job_id: str, body: bytes) -> dict[str, Any]:
        if call == "run":
            self.jobs.append(PlatformJob(len(self.jobs) + 1, json.loads(body)["input"]))
            self.most_at_once = max(self.most_at_once, sum(job.end is None for job in self.jobs))
            return {"id": f"j{len(self.jobs)}", "status": "IN_QUEUE"}
        job = self.jobs[int(job_id.removeprefix("j")) - 1]
        if job.end is None:
            job.end = self.ends(job) if call == "status" else {"status": "CANCELLED"}
        return {"id": job_id, **(job.end or {"status": "IN_PROGRESS"})}

    def wait_for(self, what: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(what, LIMIT_S)

    def cancelled(self) -> list[int]:
        return [job.number for job in self.jobs if job.end == {"status": "CANCELLED"}]


def picture(content: bytes, name: str = "a.png") -> dict[str, Any]:
    return {"filename": name, "type": "base64", "data": base64.b64encode(content).decode()}


def made(job: PlatformJob) -> dict[str, Any] | None:
    """A job that saved one picture, always by the same name."""
    return {"status": "COMPLETED", "output": {"images": [picture(f"{job.texts()} {job.seed()}".encode())]}}


WORKFLOW = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "old.png"}, "_meta": {"title": "In"}},
    "3": {"class_type": "KSampler", "inputs": {"seed": 1, "positive": ["6", 0], "negative": ["7", 0]}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "old"}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "bad"}},
}
TEXT_ONLY = {key: WORKFLOW[key] for key in "367"}


class End(NamedTuple):
    code: int
    out: str
    err: str

    def told(self) -> dict[str, Any]:
        """The one object that --json prints."""
        lines = self.out.splitlines()
        assert len(lines) == 1, self.out
        told = json.loads(lines[0], parse_constant=lambda name: 1 / 0)
        assert (told["ok"], told["exit_code"]) == (self.code == 0, self.code)
        return dict(told)

    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if "error: " in line]


class Folder:
    """A folder with workflows and a picture, and client.py in it: as a process, or quicker by its `main`."""

    def __init__(self, path: Path, server: HttpServer, main: Callable[[Sequence[str]], int]) -> None:
        self.path = path
        self.server = server
        self._main = main
        (path / "workflow.json").write_text(json.dumps(WORKFLOW))
        (path / "text.json").write_text(json.dumps(TEXT_ONLY))
        Image.new("RGB", (8, 8), "red").save(path / "in.png")

    def _environment(self, given: dict[str, str]) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "RUNPOD_API_KEY": "secret", "RUNPOD_ENDPOINT_ID": "ep", **given}

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(CLIENT), *arguments]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "errors": "replace"}
        return subprocess.Popen(command, cwd=self.path, env=self._environment(environment), **pipes)

    def end_of(self, process: subprocess.Popen[str]) -> End:
        try:
            out, err = process.communicate(timeout=LIMIT_S)
        finally:
            process.kill()
        return self._checked(End(process.returncode, out, err))

    def process(self, *arguments: str, **environment: str) -> End:
        return self.end_of(self.start(*arguments, **environment))

    def run(self, *arguments: str, **environment: str) -> End:
        """As `process`, in this one."""
        out, err = io.StringIO(), io.StringIO()
        before = signal.getsignal(signal.SIGTERM)
        with (
            mock.patch.dict(os.environ, self._environment(environment), clear=True),
            contextlib.chdir(self.path),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                code = self._main(arguments)
            finally:
                signal.signal(signal.SIGTERM, before)
        return self._checked(End(int(code), out.getvalue(), err.getvalue()))

    def job(self, *arguments: str, **environment: str) -> End:
        return self.run(*self.picture_job(), *arguments, **environment)

    def picture_job(self) -> tuple[str, ...]:
        return ("--workflow", "workflow.json", "--img", "in.png", "--url", self.server.url)

    def text_job(self) -> tuple[str, ...]:
        return ("--workflow", "text.json", "--url", self.server.url)

    def _checked(self, end: End) -> End:
        assert "Traceback" not in end.err
        assert "the client has a defect" not in end.err
        assert "secret" not in end.out + end.err
        return end

    def sent(self, number: int = 0) -> dict[str, Any]:
        """The body of a request that started a job."""
        started = [body for _, path, _, body in self.server.requests if path.startswith("/v2/ep/run")]
        return dict(json.loads(started[number]))

    def saved(self, directory: str = "output") -> dict[str, bytes]:
        paths = (self.path / directory).glob("*") if (self.path / directory).exists() else ()
        return {path.name: path.read_bytes() for path in paths}
