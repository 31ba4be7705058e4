"""The HTTP side (server.py of ComfyUI 0.18.1). Every path is served with and without the prefix /api."""

from __future__ import annotations

import argparse
import io
import json
import logging
import mimetypes
import os
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiohttp import web
from PIL import Image

from . import jobs
from .catalogue import NODE_CLASSES
from .executor import Executor
from .fault_routes import PATH, FaultRoutes, Handler
from .faults import Faults
from .folders import Folders
from .node import describe
from .prompt_queue import PromptQueue, public
from .sessions import Sessions, queue_info
from .uploads import upload
from .validation import validate
from .versions import Version

log = logging.getLogger(__name__)

_SECRETS = ("auth_token_comfy_org", "api_key_comfy_org")


class Routes:
    """Handlers of all paths. What is no JSON, or not of the expected shape, is answered 500 as text, as there."""

    def __init__(
        self,
        queue: PromptQueue,
        sessions: Sessions,
        executor: Executor,
        folders: Folders,
        version: Version,
        faults: Faults,
    ) -> None:
        self._queue = queue
        self._sessions = sessions
        self._executor = executor
        self._folders = folders
        self._version = version
        self._fault_routes = FaultRoutes(faults)
        self._number = 0

    def application(self, options: argparse.Namespace) -> web.Application:
        """The aiohttp application with all routes."""
        limit_bytes = round(options.max_upload_size * 1024 * 1024)
        app = web.Application(client_max_size=limit_bytes, middlewares=[self._answer])
        app.router.add_get(PATH, self._fault_routes.get)
        app.router.add_post(PATH, self._fault_routes.post)
        app.router.add_delete(PATH, self._fault_routes.delete)
        if self._version.has_jobs:
            app.router.add_get("/api/jobs", self.get_jobs)
            app.router.add_get("/api/jobs/{job_id}", self.get_job)
        for prefix in ("", "/api"):
            for path, get, post in (
                ("/ws", self.get_ws, None),
                ("/prompt", self.get_prompt, self.post_prompt),
                ("/queue", self.get_queue, self.post_queue),
                ("/history", self.get_history, self.post_history),
                ("/history/{prompt_id}", self.get_history_of, None),
                ("/interrupt", None, self.post_interrupt),
                ("/free", None, self.post_free),
                ("/object_info", self.get_object_info, None),
                ("/object_info/{node_class}", self.get_object_info_of, None),
                ("/system_stats", self.get_system_stats, None),
                ("/features", self.get_features, None),
                ("/view", self.get_view, None),
                ("/upload/image", None, self.post_upload),
            ):
                if get:
                    app.router.add_get(prefix + path, get)
                if post:
                    app.router.add_post(prefix + path, post)
        return app

    async def get_ws(self, request: web.Request) -> web.WebSocketResponse:
        return await self._sessions.serve(request, self._queue.remaining())

    async def get_prompt(self, _request: web.Request) -> web.Response:
        return web.json_response(queue_info(self._queue.remaining()))

    async def post_prompt(self, request: web.Request) -> web.Response:
        log.info("got prompt")
        body = await request.json()
        number = self._next_number(body)
        if "prompt" not in body:
            message = "No prompt provided"
            problem = {"type": "no_prompt", "message": message, "details": message, "extra_info": {}}
            return web.json_response({"error": problem, "node_errors": {}}, status=400)
        workflow = body["prompt"]
        prompt_id = str(body.get("prompt_id", uuid.uuid4()))
        verdict = validate(workflow, self._folders, body.get("partial_execution_targets"), self._version)
        extra_data = body.get("extra_data", {})
        if "client_id" in body:
            extra_data["client_id"] = body["client_id"]
        if verdict.error is not None:
            log.warning("invalid prompt: %s", verdict.error)
            return web.json_response({"error": verdict.error, "node_errors": verdict.node_errors}, status=400)
        named = _SECRETS if isinstance(extra_data, dict) or self._version.stamps_prompts else ()
        secrets = {name: extra_data.pop(name) for name in named if name in extra_data}
        if self._version.stamps_prompts:
            extra_data["create_time"] = int(time.time() * 1000)
        self._queue.put((number, prompt_id, workflow, extra_data, verdict.outputs, secrets))
        answer = {"prompt_id": prompt_id, "number": number, "node_errors": verdict.node_errors}
        return web.json_response(answer)

    def _next_number(self, body: Any) -> float:
        """The place in the queue: as given, else counted up; `front` makes it negative."""
        fields = body if isinstance(body, dict) else {}
        if "number" in fields:
            return float(fields["number"])
        number = self._number
        self._number += 1
        return -number if fields.get("front") else number

    async def get_queue(self, _request: web.Request) -> web.Response:
        running, pending = self._queue.current()
        listing = {"queue_running": [public(item) for item in running]}
        return web.json_response({**listing, "queue_pending": [public(item) for item in pending]})

    async def post_queue(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body.get("clear"):
            self._queue.clear_pending()
        for prompt_id in body.get("delete", ()):
            self._queue.delete_pending(prompt_id)
        return web.Response()

    async def get_history(self, request: web.Request) -> web.Response:
        max_items = request.query.get("max_items")
        limit = None if max_items is None else int(max_items)
        return web.json_response(self._queue.history(limit, int(request.query.get("offset", "-1"))))

    async def get_history_of(self, request: web.Request) -> web.Response:
        return web.json_response(self._queue.history_of(request.match_info["prompt_id"]))

    async def post_history(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body.get("clear"):
            self._queue.clear_history()
        for prompt_id in body.get("delete", ()):
            self._queue.delete_history(prompt_id)
        return web.Response()

    async def post_interrupt(self, request: web.Request) -> web.Response:
        """Without a prompt_id it stops whatever runs; with one, only if that prompt runs now."""
        try:
            body = await request.json()
        except json.JSONDecodeError:
            body = {}
        wanted = body.get("prompt_id")
        running = [item[1] for item in self._queue.current()[0]]
        if not wanted or wanted in running:
            self._executor.interrupt.set()
        return web.Response()

    async def post_free(self, request: web.Request) -> web.Response:
        """`free_memory` empties the result cache; `unload_models` changes nothing here: there are none."""
        body = await request.json()
        if body.get("free_memory"):
            self._queue.set_flag("free_memory", True)
        return web.Response()

    async def get_jobs(self, request: web.Request) -> web.Response:
        running, pending = self._queue.current()
        try:
            return web.json_response(jobs.listing(request.query, running, pending, self._queue.history(None, -1)))
        except jobs.BadQueryError as refusal:
            return web.json_response({"error": str(refusal)}, status=400)

    async def get_job(self, request: web.Request) -> web.Response:
        prompt_id = request.match_info["job_id"]
        job = jobs.one(prompt_id, *self._queue.current(), self._queue.history_of(prompt_id))
        return web.json_response(job) if job else web.json_response({"error": "Job not found"}, status=404)

    async def post_upload(self, request: web.Request) -> web.Response:
        return await upload(request, self._folders)

    @web.middleware
    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await self._fault_routes.answer(request, handler)
        except web.HTTPNotFound:
            # ComfyUI looks for the web interface's files last, and answers without a text.
            return web.Response(status=404, headers={"Content-Type": "application/octet-stream"})

    async def get_object_info(self, _request: web.Request) -> web.Response:
        described = {name: describe(node, self._folders, self._version) for name, node in NODE_CLASSES.items()}
        return web.json_response(described)

    async def get_object_info_of(self, request: web.Request) -> web.Response:
        name = request.match_info["node_class"]
        known = {name: describe(NODE_CLASSES[name], self._folders, self._version)} if name in NODE_CLASSES else {}
        return web.json_response(known)

    async def get_system_stats(self, _request: web.Request) -> web.Response:
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        total, free = (os.sysconf(name) * page_bytes for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
        system = {
            "os": self._version.os_name,
            "ram_total": total,
            "ram_free": free,
            "comfyui_version": f"{self._version.name}+standin",
            "stand_in": True,
            "python_version": sys.version,
            "pytorch_version": None,
            "embedded_python": False,
            "argv": sys.argv,
        }
        memory = {"vram_total": total, "vram_free": free, "torch_vram_total": total, "torch_vram_free": free}
        device = {"name": "cpu", "type": "cpu", "index": None, **memory}
        return web.json_response({"system": system, "devices": [device]})

    async def get_features(self, _request: web.Request) -> web.Response:
        return web.json_response(self._sessions.features)

    async def get_view(self, request: web.Request) -> web.StreamResponse:
        """A file of ?filename=&subfolder=&type= (output where no type is given)."""
        if "filename" not in request.query:
            return web.Response(status=404)
        name, folder = self._folders.split_annotation(request.query["filename"])
        folder = folder or self._folders.of_type(request.query.get("type", "output"))
        if not name or name.startswith("/") or ".." in name or folder is None:
            return web.Response(status=400)
        place = Path(os.path.normpath(folder / request.query.get("subfolder", "")))
        if not place.is_relative_to(folder):
            return web.Response(status=403)
        file = place / Path(name).name
        if not file.is_file():
            return web.Response(status=404)
        converted = _converted(file, request.query)
        kind = converted[0] if converted else mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        headers = {"Content-Disposition": f'filename="{file.name}"', "Content-Type": kind}
        if converted:
            return web.Response(body=converted[1], headers=headers)
        return web.FileResponse(file, headers=headers)


def _converted(file: Path, query: Mapping[str, str]) -> tuple[str, bytes] | None:
    """(media type, content) of a picture for ?preview=format;quality or ?channel=rgb|a; None: the file as it is."""
    buffer = io.BytesIO()
    if "preview" in query:
        wanted, _, quality = query["preview"].partition(";")
        wanted = wanted if wanted in ("webp", "jpeg") else "webp"
        with Image.open(file) as picture:
            flat = picture.convert("RGB") if wanted == "jpeg" or query.get("channel") == "rgb" else picture
            flat.save(buffer, wanted, quality=int(quality) if quality.isdigit() else 90)
        return f"image/{wanted}", buffer.getvalue()
    if query.get("channel") not in ("rgb", "a"):
        return None
    with Image.open(file) as picture:
        if query["channel"] == "rgb":
            shown = picture.convert("RGB")
        else:
            shown = Image.new("RGBA", picture.size)
            shown.putalpha(picture.getchannel("A") if picture.mode == "RGBA" else 255)
        shown.save(buffer, "PNG")
    return "image/png", buffer.getvalue()
