"""Which of the files that ComfyUI's history names are returned, and what their items say.

`worker/delivery.py` makes the posted result of them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from worker.errors import NoOutput, OutputDamaged
from worker.follow import RunOutcome
from worker.media import is_cut_short
from worker.media_types import HEAD_BYTES, category_of, media_type_of
from worker.ramdisk import RamDisk

MAX_NAMED_FILES = 10
MAX_PATH_BYTES = 1024
MODEL_SUFFIXES = (".fbx", ".glb", ".gltf", ".ksplat", ".obj", ".ply", ".splat", ".spz", ".stl", ".usdz")  # Load3D's
# Nodes that show texts: PreviewAny and ShowText, taggers, and the many that follow AlekPet's PreviewTextNode.
_TEXT_KEYS = ("text", "tags", "string")

Text = dict[str, Any]  # {"node_id", "text"}


@dataclass(frozen=True)
class Output:
    """One file that ComfyUI wrote (``kind`` output or temp), or one that only this worker has (``data``): a picture
    that came by websocket (``kind`` websocket) or was re-encoded. ``head`` are the first bytes of the file, once
    somebody has looked."""

    node_id: str
    filename: str
    subfolder: str = ""
    kind: str = "output"
    data: bytes | None = None
    head: bytes = b""

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
        if is_cut_short(data) and (data or self.category != "files"):  # an empty caption is no damage
            raise OutputDamaged(
                f"ComfyUI wrote {self.filename!r} only in part ({len(data)} bytes); send the job again.",
                file=self.filename,
                size_bytes=len(data),
            )
        return data

    def seen(self, ramdisk: RamDisk) -> Output:
        """The same with its ``head``, which its media type depends on. Raises OutputMissing."""
        if self.data is not None:
            return self
        return replace(self, head=ramdisk.read(self.kind, self.subfolder, self.filename, HEAD_BYTES))

    @property
    def media_type(self) -> str:
        return media_type_of(self.filename, self.head if self.data is None else self.data[:HEAD_BYTES])

    @property
    def category(self) -> str:
        """The result's list that this belongs to."""
        return category_of(self.media_type)

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
    """The files and the texts that are returned. Raises NoOutput where there is neither, and OutputMissing."""
    found, texts = returned_files(outcome, ramdisk), _texts(outcome.outputs)
    if not found and not texts:
        told = "The workflow ran and gave nothing; does it end in a SaveImage node or another output node?"
        raise NoOutput(" ".join([told, *outcome.warnings, *unnamed_files(outcome, ramdisk)]))
    return [output.seen(ramdisk) for output in found], texts


def unnamed_files(outcome: RunOutcome, ramdisk: RamDisk) -> list[str]:
    """A sentence for files that a node has saved without a word in the history: they are not returned.

    Not for those beside one that was named and whose name they begin with, such as a video's first picture.
    """
    stems: dict[PurePosixPath, tuple[str, ...]] = {}
    for path in {PurePosixPath(output.path) for output in returned_files(outcome, ramdisk)}:
        stems[path.parent] = (*stems.get(path.parent, ()), path.stem)
    unnamed = [
        str(path)
        for path in map(PurePosixPath, ramdisk.list_files(("output",)))
        if not path.name.startswith(stems.get(path.parent, ()))
    ]
    if not unnamed:
        return []
    more = f" and {len(unnamed) - MAX_NAMED_FILES} more" if len(unnamed) > MAX_NAMED_FILES else ""
    shown = ", ".join(map(repr, unnamed[:MAX_NAMED_FILES]))
    return [f"ComfyUI wrote files that no node names, so they are not returned: {shown}{more}."]


def returned_files(outcome: RunOutcome, ramdisk: RamDisk) -> list[Output]:
    """What is returned: of `named_files` each file once, for the first node that names it."""
    found: dict[str, Output] = {}
    for output in named_files(outcome, ramdisk):
        found.setdefault(output.path, output)
    return list(found.values())


def named_files(outcome: RunOutcome, ramdisk: RamDisk) -> list[Output]:
    """All that was saved, else the previews, as often as nodes name it.

    Every key of ``outputs[node_id]`` can hold files: images, gifs, audio, latents, 3d, a_images, ... SaveVideo and
    SaveWEBM name theirs under ``images`` (0.18.1, 0.3.64). A string that is the path of a file there counts, too.
    """
    named = [
        _output(node_id, PurePosixPath(str(entry.get("subfolder") or ""), name), str(entry.get("type") or "output"))
        for node_id, entry in _entries(outcome.outputs)
        if isinstance(entry, dict) and isinstance(name := entry.get("filename"), str) and name
    ]
    named += [
        Output(node_id, f"websocket_{position:05}_{_extension(data)}", kind="websocket", data=data)
        for position, (node_id, data) in enumerate(outcome.socket_images, start=1)
    ]
    named += _named_by_path(outcome, ramdisk)
    saved = [output for output in named if output.kind in ("output", "websocket")]
    return saved or [output for output in named if output.kind == "temp"]


def _output(node_id: str, path: PurePosixPath, kind: str = "output") -> Output:
    return Output(node_id, path.name, "" if path.parent == PurePosixPath() else str(path.parent), kind)


def _entries(outputs: dict[str, dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Each thing that a node lists under any key, with the node's id."""
    for node_id, output in outputs.items():
        for entries in output.values():
            if isinstance(entries, list):
                yield from ((node_id, entry) for entry in entries)


def _named_by_path(outcome: RunOutcome, ramdisk: RamDisk) -> list[Output]:
    """Strings that are the path of a file that is there, such as Preview3D's ``{"result": ["mesh/a.glb", camera]}``."""
    found = (
        _output_at(node_id, entry, ramdisk) for node_id, entry in _entries(outcome.outputs) if isinstance(entry, str)
    )
    return [output for output in found if output and ramdisk.has(output.kind, output.subfolder, output.filename)]


def lost_models(outcome: RunOutcome, ramdisk: RamDisk) -> list[str]:
    """The nodes that show a 3D model which is not there (any more), as Preview3D names it."""
    shown = [(node_id, output.get("result")) for node_id, output in outcome.outputs.items()]
    paths = [(node_id, result[0]) for node_id, result in shown if isinstance(result, list) and result]
    found = [_output_at(node_id, path, ramdisk) for node_id, path in paths if isinstance(path, str)]
    return [
        output.node_id
        for output in found
        if output
        and PurePosixPath(output.filename).suffix.lower() in MODEL_SUFFIXES
        and not ramdisk.has(output.kind, output.subfolder, output.filename)
    ]


def _output_at(node_id: str, path: str, ramdisk: RamDisk) -> Output | None:
    """What a path in the output directory would be, relative to it or absolute."""
    if len(path.encode(errors="replace")) > MAX_PATH_BYTES:
        return None
    relative = PurePosixPath(path.removeprefix(f"{ramdisk.root}/output/"))
    return None if relative.is_absolute() else _output(node_id, relative)


def _extension(data: bytes) -> str:
    return ".jpg" if data.startswith(b"\xff\xd8") else ".png"


def _texts(outputs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Strings and numbers as PreviewAny and its kind give them, in lists of lists too."""
    return [
        {"node_id": node_id, "text": text if isinstance(text, str) else json.dumps(text)}
        for node_id, output in outputs.items()
        for key in _TEXT_KEYS
        for text in _leaves(output.get(key))
        if isinstance(text, str | int | float)
    ]


def _leaves(value: Any) -> Iterator[Any]:
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += reversed(value)
        else:
            yield value
