"""Which of the files that ComfyUI's history names are returned, and what their items say.

`worker/delivery.py` makes the posted result of them.
"""

from __future__ import annotations

import io
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from worker.errors import NoOutput, OutputDamaged
from worker.follow import RunOutcome
from worker.media import is_cut_short
from worker.ramdisk import RamDisk

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

Text = dict[str, Any]  # {"node_id", "text"}


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

    def open(self, ramdisk: RamDisk) -> AbstractContextManager[BinaryIO]:
        """A stream of its bytes. Raises OutputMissing when it is entered."""
        return ramdisk.open(self.kind, self.subfolder, self.filename) if self.data is None else io.BytesIO(self.data)

    def read(self, ramdisk: RamDisk) -> bytes:
        """The whole of it. Raises OutputMissing or OutputDamaged."""
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


def chosen_outputs(outcome: RunOutcome, ramdisk: RamDisk) -> tuple[list[Output], list[Text]]:
    """The files and the texts that are returned. Raises NoOutput where there is neither."""
    found, texts = returned_files(outcome), _texts(outcome.outputs)
    if not found and not texts:
        told = "The workflow ran and gave nothing; does it end in a SaveImage node or another output node?"
        raise NoOutput(" ".join([told, *outcome.warnings, *unnamed_files(outcome, ramdisk)]))
    return found, texts


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


def _texts(outputs: dict[str, dict[str, Any]]) -> list[Text]:
    """Plain strings, as PreviewAny gives them under ``text``."""
    return [
        {"node_id": node_id, "text": text}
        for node_id, output in outputs.items()
        for text in output.get("text") or ()
        if isinstance(text, str)
    ]
