"""Faults of websockets: what comes before or instead of a message. Loaded into real ComfyUI too, as faults.py is."""

from __future__ import annotations

import contextlib
import json
import random
import socket as sockets
import struct
from typing import Any

from aiohttp import web

from .faults import Faults

_NESTING = 100_000
_NOISE_BYTES = 1 << 20


async def before_message(faults: Faults, socket: web.WebSocketResponse, event: str, prompt_id: str) -> bool:
    """Do what is due on a message to a socket; whether the message is still to be sent.

    `prompt_id` is the prompt that runs or ran last.
    """
    if faults.strikes("ws_silent", event=event):
        return False
    if faults.strikes("ws_cut", event=event):
        _cut(socket)
        return False
    with contextlib.suppress(ConnectionError):
        if faults.strikes("ws_garbage", event=event):
            for text in garbage(prompt_id):
                await socket.send_str(text)
        if faults.strikes("ws_binary", event=event):
            for frame in unknown_frames():
                await socket.send_bytes(frame)
    return True


def garbage(prompt_id: str) -> list[str]:
    """Texts that no client expects: no JSON, no object, no message, a message whose data is of wrong types.

    None claims that the prompt has ended. One of them holds a number that is too long for Python, one is too deep.
    """
    no_json = ["", "garbage", '{"type": "progress", "data": {"value": 1', '{"type": ' + "9" * 5000 + "}"]
    no_objects = ["[]", "5", '"x"', "null"]
    no_messages = [{}, {"type": "progress"}, {"data": {}}, {"type": 5, "data": {}}, {"type": None, "data": None}]
    wrong: list[tuple[str, Any]] = [
        ("execution_start", []),
        ("execution_cached", {"prompt_id": prompt_id, "nodes": 5}),
        ("execution_cached", {"prompt_id": prompt_id, "nodes": [{}, None]}),
        ("progress", {"prompt_id": prompt_id, "value": "x", "max": None}),
        ("progress", {"prompt_id": prompt_id, "node": [], "value": {}, "max": 0}),
        ("progress_state", {"prompt_id": prompt_id, "nodes": [1]}),
        ("progress_state", {"prompt_id": prompt_id, "nodes": {"1": 3}}),
        ("executing", {"prompt_id": prompt_id, "node": {"a": 1}}),
        ("executing", []),
        ("executed", {"prompt_id": prompt_id, "node": 5, "output": "x"}),
        ("status", {"status": None}),
        ("no_such_event", 5),
    ]
    messages = [*no_messages, *({"type": event, "data": data} for event, data in wrong)]
    return [*no_json, *no_objects, *(json.dumps(message) for message in messages), "[" * _NESTING]


def unknown_frames() -> list[bytes]:
    """Binary frames: too short for an event number or its head, of unknown events, and known ones that are broken."""
    short = [bytes(range(1, length + 1)) for length in range(8)]
    no_image = struct.pack(">II", 1, 1)
    bad_length = struct.pack(">II", 4, 0xFFFFFFFF) + b"{}"
    noise = random.Random(77).randbytes(_NOISE_BYTES)  # the same every time
    return [*short, struct.pack(">I", 99) + b"body", no_image, bad_length, struct.pack(">I", 77) + noise]


def _cut(socket: web.WebSocketResponse) -> None:
    connection = socket.get_extra_info("socket")
    if connection is not None:
        with contextlib.suppress(OSError):
            connection.shutdown(sockets.SHUT_RDWR)
