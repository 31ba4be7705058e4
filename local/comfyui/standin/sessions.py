"""Websocket sessions and the messages to them (server.py of ComfyUI 0.18.1: sockets, send_sync, publish_loop)."""

from __future__ import annotations

import asyncio
import json
import logging
import struct
import time
import uuid
from typing import Any

from aiohttp import WSMsgType, web

from .fault_sockets import before_message
from .faults import Faults

log = logging.getLogger(__name__)

PREVIEW_IMAGE = 1
TEXT = 3
PREVIEW_IMAGE_WITH_METADATA = 4
_STALL = "stall"  # not a message: the loop stands still for so many seconds


class Sessions:
    """Who listens, and who is served.

    `client_id` and `last_node_id` belong to the prompt that runs: its messages go to that client alone, and a client
    that comes back while it runs is told the node. They are written by the worker thread, as in ComfyUI.
    `features` is what the server says that it can do.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, features: dict[str, Any], faults: Faults) -> None:
        self.features = features
        self._faults = faults
        self.client_id: str | None = None
        self.last_node_id: str | None = None
        self._loop = loop
        self._messages: asyncio.Queue[tuple[str | int, Any, str | None]] = asyncio.Queue()
        self._sockets: dict[str, web.WebSocketResponse] = {}
        self._flags: dict[str, dict[str, Any]] = {}
        self._prompt_id = ""  # that of the newest message that has one

    def publish(self, event: str | int, data: Any, sid: str | None = None) -> None:
        """Send to one session, or to all with sid None; from any thread, in the order of the calls.

        A text message has an event name and JSON data; a binary one an event number and bytes.
        """
        self._loop.call_soon_threadsafe(self._messages.put_nowait, (event, data, sid))

    def stall(self, seconds: float) -> None:
        """Once all is sent that was published before, stop the event loop for a while."""
        self.publish(_STALL, seconds)

    def supports(self, sid: str | None, feature: str) -> bool:
        """Whether the client of this session said that it understands a feature."""
        return sid is not None and self._flags.get(sid, {}).get(feature) is True

    async def deliver_forever(self) -> None:
        """Carry published messages to the sockets, one after the other."""
        while True:
            event, data, sid = await self._messages.get()
            if event == _STALL:
                time.sleep(data)
            else:
                await self._send(event, data, sid)

    async def serve(self, request: web.Request, remaining: int) -> web.WebSocketResponse:
        """GET /ws: one session, until its client goes. The first message tells how many prompts are `remaining`."""
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        sid = request.rel_url.query.get("clientId", "") or uuid.uuid4().hex
        # A second socket of a client takes the place of the first, and the end of either removes the entry: the other
        # one is then silent. ComfyUI does the same.
        self._sockets[sid], self._flags[sid] = socket, {}
        try:
            await self._send("status", {"status": queue_info(remaining), "sid": sid}, sid)
            if self.client_id == sid and self.last_node_id is not None:
                await self._send("executing", {"node": self.last_node_id}, sid)
            await self._listen(socket, sid)
        finally:
            self._sockets.pop(sid, None)
            self._flags.pop(sid, None)
        return socket

    async def _listen(self, socket: web.WebSocketResponse, sid: str) -> None:
        first = True
        async for message in socket:
            if message.type != WSMsgType.TEXT:
                continue
            try:
                data = json.loads(message.data)
            except json.JSONDecodeError:
                log.warning("client %s sent something that is not JSON", sid)
                continue
            if first and isinstance(data, dict) and data.get("type") == "feature_flags":
                self._flags[sid] = data.get("data", {})
                await self._send("feature_flags", self.features, sid)
            first = False

    async def _send(self, event: str | int, data: Any, sid: str | None) -> None:
        if isinstance(data, dict):
            self._prompt_id = data.get("prompt_id", self._prompt_id)
        for name in list(self._sockets) if sid is None else [sid]:
            socket = self._sockets.get(name)
            if socket is None or not await before_message(self._faults, socket, str(event), self._prompt_id):
                continue
            try:
                if isinstance(event, int):
                    await socket.send_bytes(struct.pack(">I", event) + data)
                else:
                    await socket.send_str(json.dumps({"type": event, "data": data}))
            except ConnectionError as failure:
                log.warning("cannot send to a client: %s", failure)


def text_frame(node_id: str, text: str) -> bytes:
    """The body of a TEXT message: the length of the node id, the node id, the text."""
    name = node_id.encode()
    return struct.pack(">I", len(name)) + name + text.encode()


def queue_info(remaining: int) -> dict[str, Any]:
    """The queue's length as GET /prompt and every status message tell it; what runs counts as remaining."""
    return {"exec_info": {"queue_remaining": remaining}}
