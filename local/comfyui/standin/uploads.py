"""POST /upload/image: a file into the input, temp or output folder (server.py of ComfyUI 0.18.1, image_upload)."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from aiohttp import web

from .folders import Folders


async def upload(request: web.Request, folders: Folders) -> web.Response:
    """Fields: image (the file), overwrite, subfolder, type. The answer names the file, which may have got a number.

    400 without a file, and for a name or subfolder that leads out of the folder. Equal content under the same name is
    stored once.
    """
    form = await request.post()
    image = form.get("image")
    if not isinstance(image, web.FileField) or not image.filename:
        return web.Response(status=400)
    kind = str(form.get("type") or "input")
    folder = folders.of_type(kind)
    if folder is None:
        kind, folder = "input", folders.input
    subfolder = str(form.get("subfolder", ""))
    target = Path(os.path.normpath(folder / subfolder / image.filename))
    if not target.is_relative_to(folder):
        return web.Response(status=400)
    content = image.file.read()
    target.parent.mkdir(parents=True, exist_ok=True)
    if form.get("overwrite") not in ("true", "1"):
        target = _free_name(target, content)
    if not _holds(target, content):
        target.write_bytes(content)
    answer: dict[str, Any] = {"name": target.name, "subfolder": subfolder, "type": kind}
    return web.json_response(answer)


def _free_name(wanted: Path, content: bytes) -> Path:
    """`a.png`, or `a (1).png`, ... where another file has the name; a file of equal content is taken as it is."""
    candidate, number = wanted, 0
    while candidate.exists() and not _holds(candidate, content):
        number += 1
        candidate = wanted.with_name(f"{wanted.stem} ({number}){wanted.suffix}")
    return candidate


def _holds(path: Path, content: bytes) -> bool:
    if not path.is_file():
        return False
    return hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(content).digest()
