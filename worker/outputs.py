"""From the files that ComfyUI's history names to the items of a result, within RunPod's size limit."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from worker.errors import NoOutput, OutputDamaged, ResultTooLarge
from worker.follow import RunOutcome
from worker.media import is_cut_short
from worker.ramdisk import RamDisk

# The limits count the posted JSON body; RunPod documents 10 MB, and 20 MB for jobs of /runsync, whose ids show it.
ASYNC_LIMIT_BYTES = 10_000_000
SYNC_LIMIT_BYTES = 20_000_000
MARGIN = 0.98
# Not the mimetypes module: its answers for WebP, FLAC and others depend on the machine's /etc/mime.types.
_MEDIA_TYPES = {
    ".avi": "video/x-msvideo",
    ".avif": "image/avif",
    ".bmp": "image/bmp",
    ".exr": "image/x-exr",
    ".flac": "audio/flac",
    ".gif": "image/gif",
    ".glb": "model/gltf-binary",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".json": "application/json",
    ".m4a": "audio/mp4",
    ".mkv": "video/x-matroska",
    ".mov": "video/quicktime",
    ".mp3": "audio/mpeg",
    ".mp4": "video/mp4",
    ".ogg": "audio/ogg",
    ".opus": "audio/ogg",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".tif": "image/tiff",
    ".tiff": "image/tiff",
    ".txt": "text/plain",
    ".wav": "audio/wav",
    ".webm": "video/webm",
    ".webp": "image/webp",
}
MAX_NAMED_FILES = 10
_CATEGORIES = {"image": "images", "video": "videos", "audio": "audio"}


def result_limit_bytes(job_id: str, override: int | None) -> int:
    """How large the posted body may be for this job."""
    if override is not None:
        return override
    return int(MARGIN * (SYNC_LIMIT_BYTES if job_id.startswith("sync-") else ASYNC_LIMIT_BYTES))


@dataclass(frozen=True)
class Output:
    """One file that ComfyUI wrote (``kind`` output or temp), or one picture that came by websocket (``data``)."""

    node_id: str
    filename: str
    subfolder: str = ""
    kind: str = "output"
    data: bytes | None = None

    @property
    def path(self) -> str:
        """Relative to the RAM disk."""
        return str(PurePosixPath(self.kind, self.subfolder, self.filename))

    def size_bytes(self, ramdisk: RamDisk) -> int:
        return ramdisk.size_of(self.kind, self.subfolder, self.filename) if self.data is None else len(self.data)

    def read(self, ramdisk: RamDisk) -> bytes:
        """Raises OutputMissing or OutputDamaged."""
        data = ramdisk.read(self.kind, self.subfolder, self.filename) if self.data is None else self.data
        if self.category != "files" and is_cut_short(data):
            raise OutputDamaged(
                f"ComfyUI wrote {self.filename!r} only in part ({len(data)} bytes); send the job again.",
                file=self.filename,
                size_bytes=len(data),
            )
        return data

    @property
    def media_type(self) -> str:
        return _MEDIA_TYPES.get(PurePosixPath(self.filename).suffix.lower(), "application/octet-stream")

    @property
    def category(self) -> str:
        """The result's list that this belongs to."""
        return _CATEGORIES.get(self.media_type.partition("/")[0], "files")

    def item(self, size_bytes: int) -> dict[str, Any]:
        """Its item in that list, with ``data`` still empty."""
        return {
            "filename": self.filename,
            "type": "base64",
            "data": "",
            "media_type": self.media_type,
            "size_bytes": size_bytes,
            "node_id": self.node_id,
            "subfolder": self.subfolder,
        }


def collect_outputs(outcome: RunOutcome, ramdisk: RamDisk, limit_bytes: int) -> dict[str, list[dict[str, Any]]]:
    """``{"images": [item...]}`` and, where there are any, ``videos``, ``audio``, ``files``, ``texts``.

    Previews (type temp) are returned only where nothing was saved. Raises NoOutput, OutputMissing, OutputDamaged
    or ResultTooLarge, the last before any file is read.
    """
    texts = _texts(outcome.outputs)
    found = returned_files(outcome)
    if not found and not texts:
        told = "The workflow ran and gave nothing; does it end in a SaveImage node or another output node?"
        raise NoOutput(" ".join([told, *outcome.warnings, *unnamed_files(outcome, ramdisk)]))
    lists: dict[str, list[dict[str, Any]]] = {"images": []}
    pairs = []
    for output in found:
        item = output.item(output.size_bytes(ramdisk))
        lists.setdefault(output.category, []).append(item)
        pairs.append((output, item))
    if texts:
        lists["texts"] = texts
    _check_size(lists, limit_bytes)
    for output, item in pairs:
        item["data"] = base64.b64encode(output.read(ramdisk)).decode("ascii")
    return lists


def unnamed_files(outcome: RunOutcome, ramdisk: RamDisk) -> list[str]:
    """A sentence for files that a node has saved without a word in the history: they are not returned.

    Not for those beside one that was named and whose name they begin with, such as a video's first picture.
    """
    named = [PurePosixPath(output.path) for output in returned_files(outcome)]
    places = {(path.parent, path.name) for path in named}
    unnamed = [
        str(path)
        for path in map(PurePosixPath, ramdisk.list_files(("output",)))
        if (path.parent, path.name) not in places
        and not any(path.parent == other.parent and path.name.startswith(other.stem) for other in named)
    ]
    if not unnamed:
        return []
    more = f" and {len(unnamed) - MAX_NAMED_FILES} more" if len(unnamed) > MAX_NAMED_FILES else ""
    shown = ", ".join(map(repr, unnamed[:MAX_NAMED_FILES]))
    return [f"ComfyUI wrote files that no node names, so they are not returned: {shown}{more}."]


def returned_files(outcome: RunOutcome) -> list[Output]:
    """What is returned: all that was saved, else the previews.

    Every key of ``outputs[node_id]`` can hold files: images, gifs, audio, latents, ...

    SaveVideo and SaveWEBM name theirs under ``images`` (0.18.1, 0.3.64).
    """
    found = [
        Output(node_id, str(entry["filename"]), str(entry.get("subfolder") or ""), str(entry.get("type") or "output"))
        for node_id, output in outcome.outputs.items()
        for entries in output.values()
        if isinstance(entries, list)
        for entry in entries
        if isinstance(entry, dict) and "filename" in entry
    ]
    saved = [output for output in found if output.kind == "output"]
    saved += [
        Output(node_id, f"websocket_{position:05}_{_extension(data)}", data=data)
        for position, (node_id, data) in enumerate(outcome.socket_images, start=1)
    ]
    return saved or [output for output in found if output.kind == "temp"]


def _extension(data: bytes) -> str:
    return ".jpg" if data.startswith(b"\xff\xd8") else ".png"


def _texts(outputs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Plain strings, as PreviewAny gives them under ``text``."""
    return [
        {"node_id": node_id, "text": text}
        for node_id, output in outputs.items()
        for text in output.get("text") or ()
        if isinstance(text, str)
    ]


def _check_size(lists: dict[str, list[dict[str, Any]]], limit_bytes: int) -> None:
    items = [item for name, entries in lists.items() if name != "texts" for item in entries]
    encoded_bytes = sum(4 * ((item["size_bytes"] + 2) // 3) for item in items)
    # The SDK posts json.dumps({"output": result}, ensure_ascii=False); Base64 needs no escapes.
    body_bytes = encoded_bytes + len(json.dumps({"output": lists}, ensure_ascii=False).encode(errors="replace"))
    if body_bytes <= limit_bytes:
        return
    files = {item["filename"]: item["size_bytes"] for item in items}
    raise ResultTooLarge(
        f"The result takes {body_bytes / 1e6:.1f} MB and RunPod takes {limit_bytes / 1e6:.1f} MB; "
        "save fewer or smaller pictures, or a format such as WebP.",
        body_bytes=body_bytes,
        limit_bytes=limit_bytes,
        files=files,
    )
