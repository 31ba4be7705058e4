"""/_fault, and the faults of requests. Loaded into real ComfyUI too, as faults.py is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web

from .faults import Faults

PATH = "/_fault"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class FaultRoutes:
    """Handlers for GET, POST and DELETE of PATH, and `answer` for a middleware around all others."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    async def get(self, _request: web.Request) -> web.Response:
        return web.json_response(self._faults.listing())

    async def post(self, request: web.Request) -> web.Response:
        try:
            self._faults.arm(await request.json())
        except (TypeError, ValueError) as refusal:
            return web.json_response({"error": str(refusal)}, status=400)
        return web.json_response(self._faults.listing())

    async def delete(self, _request: web.Request) -> web.Response:
        self._faults.clear()
        return web.Response()

    async def answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """The handler's answer, unless a fault is due; faults see paths without the prefix /api."""
        path = request.path.removeprefix("/api")
        if path == PATH:
            return await handler(request)
        if self._faults.strikes("http_500", path=path):
            raise RuntimeError("a fault was asked for")
        is_socket = path == "/ws"
        if is_socket and self._faults.strikes("ws_refuse"):
            return web.Response(status=403)
        hang = self._faults.strikes("http_hang", path=path)
        if hang and is_socket:
            await asyncio.sleep(hang.seconds)  # its handler returns when the session is over
        try:
            return await handler(request)
        finally:
            if hang and not is_socket:
                await asyncio.sleep(hang.seconds)
