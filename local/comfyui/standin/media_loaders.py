"""Nodes that load audio and video from the input folder (comfy_extras of ComfyUI 0.18.1)."""

from __future__ import annotations

import hashlib
import io
import mimetypes
import wave
from collections.abc import Mapping
from typing import Any, ClassVar

from PIL import Image

from .audio_nodes import Audio
from .containers import flac_length, jpegs_of_mp4
from .folders import Folders
from .images import Batch, Frame
from .media_nodes import Video
from .node import Context, Inputs, Node, Result


class _Loader(Node):
    """Loads the file that its one input names; ComfyUI itself opens all that PyAV knows."""

    v3 = True
    kind: ClassVar[str]

    @classmethod
    def validate(cls, folders: Folders, values: Mapping[str, Any]) -> str | None:
        (name,) = values.values()
        return None if folders.input_file(name).exists() else f"Invalid {cls.kind} file: {name}"


class LoadAudio(_Loader):
    """Of WAV and FLAC files the length; what travels on is silence."""

    display_name = "Load Audio"
    category = "audio"
    module = "comfy_extras.nodes_audio"
    returns = ("AUDIO",)
    validates = ("audio",)
    kind = "audio"

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        return _upload_input(folders, "audio", ("audio", "video"), "audio_upload")

    @classmethod
    def fingerprint(cls, folders: Folders, values: Mapping[str, Any]) -> Any:
        return hashlib.sha256(folders.input_file(values["audio"]).read_bytes()).hexdigest()

    def run(self, context: Context, **inputs: Any) -> Result:
        data = context.folders.input_file(inputs["audio"]).read_bytes()
        if data.startswith(b"fLaC"):
            return Result((Audio(*flac_length(data)),))
        with wave.open(io.BytesIO(data)) as sound:
            return Result((Audio(sound.getframerate(), sound.getnchannels(), sound.getnframes()),))


class LoadVideo(_Loader):
    """MP4 files of JPEG pictures, as SaveVideo writes them here."""

    display_name = "Load Video"
    category = "image/video"
    module = "comfy_extras.nodes_video"
    returns = ("VIDEO",)
    validates = ("file",)
    kind = "video"

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        return _upload_input(folders, "file", ("video",), "video_upload")

    @classmethod
    def fingerprint(cls, folders: Folders, values: Mapping[str, Any]) -> Any:
        return folders.input_file(values["file"]).stat().st_mtime

    def run(self, context: Context, **inputs: Any) -> Result:
        pictures, fps = jpegs_of_mp4(context.folders.input_file(inputs["file"]).read_bytes())
        frames = [Frame.from_pixels(Image.open(io.BytesIO(picture))) for picture in pictures]
        return Result((Video(Batch(tuple(frames)), fps),))


def _upload_input(folders: Folders, name: str, kinds: tuple[str, ...], flag: str) -> Inputs:
    found = (entry.name for entry in folders.input.iterdir() if entry.is_file())
    files = [file for file in found if (mimetypes.guess_type(file, strict=False)[0] or "").split("/")[0] in kinds]
    return {"required": {name: ("COMBO", {"multiselect": False, "options": sorted(files), flag: True})}}
