"""Boots a ComfyUI (stand-in or real), drives it as a client does, and brings what it says into comparable form."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
import websocket

STANDIN = Path(__file__).resolve().parents[2] / "local" / "comfyui"
FAULT_PACKAGE = Path(__file__).resolve().parents[1] / "comfyui_faults"
CAPTURES = Path(__file__).resolve().parent / "captures"
REPLY_TIMEOUT_S = 20.0
BOOT_TIMEOUT_S = 120.0

Workflow = dict[str, dict[str, Any]]
Message = dict[str, Any]


def capture(name: str, version: str = "0.18.1") -> dict[str, Any]:
    """A recording of a ComfyUI version."""
    data: dict[str, Any] = json.loads((CAPTURES / version / f"{name}.json").read_text())
    return data


class Listener:
    """One websocket session."""

    def __init__(self, base_url: str, client_id: str | None, feature_flags: bool = False) -> None:
        query = f"?clientId={client_id}" if client_id else ""
        url = base_url.replace("http://", "ws://") + "/ws" + query
        self._socket = websocket.create_connection(url, timeout=REPLY_TIMEOUT_S)
        self.messages: list[Message] = []
        if feature_flags:
            flags = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
            self._socket.send(json.dumps(flags))
            self.read_until(lambda message: message.get("type") == "feature_flags")

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._socket.close()

    def send(self, text: str) -> None:
        """Send a text message to the server."""
        self._socket.send(text)

    def next(self) -> Message:
        """The next message; a binary one as {"event", "image_format" or "metadata"}."""
        data = self.raw()
        message = json.loads(data) if isinstance(data, str) else _binary(data)
        self.messages.append(message)
        return message

    def raw(self) -> str | bytes:
        """The next message as it comes; garbage can be read only so."""
        data: str | bytes = self._socket.recv()
        return data

    def read_until(self, wanted: Any) -> Message:
        """Read on to the first message for which `wanted(message)` holds."""
        deadline = time.monotonic() + REPLY_TIMEOUT_S
        while time.monotonic() < deadline:
            message = self.next()
            if wanted(message):
                return message
        raise AssertionError(f"not received within {REPLY_TIMEOUT_S} s; got {self.messages}")

    def close_and_drain(self) -> list[Message]:
        """Close the session; all messages that it got before, read or not. Needs no waiting for silence: what was
        sent to it comes before the answer to the close."""
        self._socket.send_close()
        while (frame := self._socket.recv_frame()).opcode != websocket.ABNF.OPCODE_CLOSE:
            if frame.opcode == websocket.ABNF.OPCODE_TEXT:
                self.messages.append(json.loads(frame.data))
        return self.messages

    def read_to_end(self, prompt_id: str) -> list[Message]:
        """All messages so far, up to the `executing` without a node that ends a prompt."""
        self.read_until(lambda message: is_end(message, prompt_id))
        return self.messages


def is_end(message: Message, prompt_id: str) -> bool:
    return message.get("type") == "executing" and message["data"] == {"node": None, "prompt_id": prompt_id}


def _binary(data: bytes) -> Message:
    event = struct.unpack(">I", data[:4])[0]
    if event == 4:
        length = struct.unpack(">I", data[4:8])[0]
        return {"event": event, "metadata": json.loads(data[8 : 8 + length])}
    if event == 3:
        length = struct.unpack(">I", data[4:8])[0]
        return {"event": event, "node_id": data[8 : 8 + length].decode(), "text": data[8 + length :].decode()}
    return {"event": event, "image_format": struct.unpack(">I", data[4:8])[0], "image": data[8:]}


class ComfyUI:
    """A running server and its folders."""

    def __init__(self, base_url: str, root: Path, process: subprocess.Popen[bytes]) -> None:
        self.base_url = base_url
        self.root = root
        self.process = process
        self.input = root / "input"
        self.output = root / "output"
        self.temp = root / "temp"  # ComfyUI makes this one itself, beneath --temp-directory

    def get(self, path: str) -> requests.Response:
        return requests.get(self.base_url + path, timeout=REPLY_TIMEOUT_S)

    def post(self, path: str, body: Any) -> requests.Response:
        """POST a JSON value, or a str as it is."""
        data = body if isinstance(body, str) else json.dumps(body)
        headers = {"Content-Type": "application/json"}
        return requests.post(self.base_url + path, data=data, headers=headers, timeout=REPLY_TIMEOUT_S)

    def delete(self, path: str) -> requests.Response:
        return requests.delete(self.base_url + path, timeout=REPLY_TIMEOUT_S)

    def listen(self, client_id: str | None, feature_flags: bool = False) -> Listener:
        listener = Listener(self.base_url, client_id, feature_flags)
        if not feature_flags:
            listener.next()  # the greeting: the session is registered from here on
        return listener

    def run(self, workflow: Workflow, *, feature_flags: bool = False, **body: Any) -> Run:
        """Run a workflow to its end and return all that was said about it; `client_id=None` posts without one."""
        client_id: str | None = body.pop("client_id", uuid.uuid4().hex)
        if client_id is not None:
            body["client_id"] = client_id
        with self.listen(client_id, feature_flags) as listener:
            answer = self.post("/prompt", {"prompt": workflow, **body})
            assert answer.status_code == 200, answer.text
            prompt_id = answer.json()["prompt_id"]
            if client_id is None:
                listener.read_until(lambda message: _is_idle(message) and len(listener.messages) > 1)
            else:
                listener.read_to_end(prompt_id)
        return Run(prompt_id, answer.json(), listener.messages, self.history(prompt_id))

    def history(self, prompt_id: str) -> dict[str, Any]:
        """The history entry; {} when there is none."""
        entry: dict[str, Any] = self.get(f"/history/{prompt_id}").json().get(prompt_id, {})
        return entry

    def wait_idle(self) -> None:
        """Until nothing runs or waits."""
        deadline = time.monotonic() + REPLY_TIMEOUT_S
        while any(self.get("/queue").json().values()):
            assert time.monotonic() < deadline, "the queue does not get empty"
            time.sleep(0.01)

    def forget_everything(self) -> None:
        """Disarm faults; empty queue, cache, history and folders. Another workflow empties the cache: it keeps one."""
        self.delete("/_fault")
        self.post("/queue", {"clear": True})
        self.wait_idle()
        self.run(empty_and_preview(color=uuid.uuid4().int % 0xFFFFFF))
        self.post("/history", {"clear": True})
        for folder in (self.input, self.output):
            shutil.rmtree(folder)
            folder.mkdir()


def _is_idle(message: Message) -> bool:
    return message.get("type") == "status" and message["data"]["status"]["exec_info"]["queue_remaining"] == 0


class Run:
    """What a finished prompt left."""

    def __init__(
        self, prompt_id: str, answer: dict[str, Any], messages: list[Message], history: dict[str, Any]
    ) -> None:
        self.prompt_id = prompt_id
        self.answer = answer
        self.messages = messages
        self.history = history

    @property
    def types(self) -> list[str]:
        """The types of the text messages."""
        return [message["type"] for message in self.messages if "type" in message]

    def data(self, message_type: str) -> list[dict[str, Any]]:
        """The data of all messages of a type."""
        return [message["data"] for message in self.messages if message.get("type") == message_type]

    @property
    def cached(self) -> list[str]:
        """The nodes that were answered from the cache."""
        nodes: list[str] = self.data("execution_cached")[0]["nodes"]
        return nodes

    @property
    def ran(self) -> list[str]:
        """The nodes that ran, in their order."""
        return [data["node"] for data in self.data("executing") if data["node"] is not None]

    def files(self, node_id: str) -> list[dict[str, str]]:
        files: list[dict[str, str]] = self.history["outputs"][node_id]["images"]
        return files


@contextlib.contextmanager
def boot(root: Path, *flags: str, env: dict[str, str] | None = None) -> Iterator[ComfyUI]:
    """Start a server with its folders below `root`, wait until it answers, and end it afterwards."""
    for name in ("input", "output", "user"):
        (root / name).mkdir(exist_ok=True)
    server = ComfyUI(*_start(root, free_port(), flags, env))
    try:
        _wait_ready(server)
        yield server
    finally:
        server.process.terminate()
        server.process.wait(timeout=30)


def command(root: Path, port: int, *flags: str) -> list[str]:
    """The command line of the server, to be run in `directory()`."""
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    folders = ("--input-directory", root / "input", "--output-directory", root / "output")
    others = ("--temp-directory", root, "--user-directory", root / "user", "--database-url", "sqlite:///:memory:")
    listen = ("--listen", "127.0.0.1", "--port", port, "--cpu", "--disable-api-nodes", "--disable-auto-launch")
    return [str(part) for part in (python, "main.py", *listen, *folders, *others, *fault_arguments(root), *flags)]


def fault_arguments(folder: Path) -> list[str]:
    """More arguments for real ComfyUI: they load tests/comfyui_faults, without touching the checkout.

    `folder` gets a file and a folder for it. The stand-in has its faults built in, and needs no arguments.
    """
    if "COMFYUI_DIR" not in os.environ:
        return []
    # ComfyUI loads everything that lies beside a package, so the package is linked into a folder of its own.
    parent = folder / "fault_nodes"
    parent.mkdir(exist_ok=True)
    link = parent / FAULT_PACKAGE.name
    if not link.is_symlink():
        link.symlink_to(FAULT_PACKAGE, target_is_directory=True)
    config = folder / "fault_nodes.yaml"
    config.write_text(json.dumps({"faults": {"base_path": str(folder), "custom_nodes": parent.name}}))  # YAML, too
    return ["--extra-model-paths-config", str(config)]


def directory() -> Path:
    """The checkout that this run is about."""
    return Path(os.environ.get("COMFYUI_DIR", STANDIN))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _start(
    root: Path, port: int, flags: tuple[str, ...], env: dict[str, str] | None
) -> tuple[str, Path, subprocess.Popen[bytes]]:
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(
            command(root, port, *flags), cwd=directory(), env={**os.environ, **(env or {})}, stdout=log, stderr=log
        )
    return f"http://127.0.0.1:{port}", root, process


def _wait_ready(server: ComfyUI) -> None:
    deadline = time.monotonic() + BOOT_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(requests.ConnectionError):
            if server.get("/system_stats").status_code == 200:
                return
        assert server.process.poll() is None, (server.root / "log").read_text()
        time.sleep(0.02)
    raise AssertionError("ComfyUI did not answer in time:\n" + (server.root / "log").read_text())


def empty(width: int = 8, height: int = 8, color: int = 0, batch_size: int = 1) -> dict[str, Any]:
    """An EmptyImage node."""
    inputs = {"width": width, "height": height, "batch_size": batch_size, "color": color}
    return {"class_type": "EmptyImage", "inputs": inputs}


def save(source: str, prefix: str = "out", **more: Any) -> dict[str, Any]:
    """A SaveImage node that is fed by node `source`."""
    return {"class_type": "SaveImage", "inputs": {"images": [source, 0], "filename_prefix": prefix, **more}}


def empty_and_preview(color: int) -> Workflow:
    preview = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
    return {"1": empty(color=color), "2": preview}


def slow(server: ComfyUI, seconds: float = 0.3, nodes: int = 6) -> Workflow:
    """A chain of slow nodes: about `seconds` each on the stand-in; real ComfyUI blurs instead."""
    is_standin = server.get("/system_stats").json()["system"].get("stand_in", False)
    side = 8 if is_standin else 640
    workflow = {"1": empty(side, side, color=uuid.uuid4().int % 0xFFFFFF)}
    for number in range(2, 2 + nodes):
        if is_standin:
            inputs: dict[str, Any] = {"image": [str(number - 1), 0], "seconds": seconds, "steps": 5}
        else:
            inputs = {"image": [str(number - 1), 0], "blur_radius": 31, "sigma": 5.0}
        workflow[str(number)] = {"class_type": "StandinSleep" if is_standin else "ImageBlur", "inputs": inputs}
    workflow["9"] = save(str(nodes + 1), "slow")
    return workflow


def post(server: ComfyUI, workflow: Workflow, client_id: str, **more: Any) -> str:
    answer = server.post("/prompt", {"prompt": workflow, "client_id": client_id, **more})
    assert answer.status_code == 200, answer.text
    prompt_id: str = answer.json()["prompt_id"]
    return prompt_id


def start_slow(server: ComfyUI, listener: Listener, client_id: str, **how: Any) -> str:
    """Post a slow workflow and return once one of its slow nodes runs."""
    prompt_id = post(server, slow(server, **how), client_id)
    listener.read_until(lambda message: message.get("type") == "executing" and message["data"]["node"] == "2")
    return prompt_id


def quick(color: int = 1) -> Workflow:
    return {"1": empty(color=color), "2": save("1", "quick")}


def tail(messages: list[Message], prompt_id: str) -> Any:
    """The three messages that end an interrupted prompt, without the place where it was caught."""
    last = normal(messages[-3:], {prompt_id: "<prompt>"})
    for key in ("node_id", "node_type", "executed"):
        assert last[0]["data"].pop(key)
    return last


# What differs from run to run, or from machine to machine, and what it is replaced with.
_UNSTABLE_KEYS = {"timestamp", "traceback", "tooltip", "execution_start_time", "execution_end_time", "priority"}
_UNORDERED_KEYS = {"executed", "current_outputs"}


def normal(value: Any, replacements: dict[str, str]) -> Any:
    """A message, body or history without ids, times, file counters, tracebacks and texts for the web interface.

    `replacements` maps the ids and folders of this run to neutral words. Lists that ComfyUI makes from Python sets
    (the executed nodes, the outputs to execute) are sorted.
    """
    if isinstance(value, dict):
        kept = {
            key: "<set>" if key == "create_time" else item for key, item in value.items() if key not in _UNSTABLE_KEYS
        }
        return {
            normal(key, replacements): sorted(item) if key in _UNORDERED_KEYS else normal(item, replacements)
            for key, item in kept.items()
        }
    if isinstance(value, (list, tuple)):
        return [normal(item, replacements) for item in value]
    if isinstance(value, str):
        for text, word in replacements.items():
            value = value.replace(text, word)
        value = re.sub(r"ComfyUI_temp_[a-z]{5}", "ComfyUI_temp_x", value)
        return re.sub(r"_\d{5}_", "_N_", value)
    return value
