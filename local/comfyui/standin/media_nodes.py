"""Nodes that save animations, video and audio (comfy_extras of ComfyUI 0.18.1)."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .containers import flac_of_silence, mp4_of_jpegs
from .folders import Folders, save_place
from .images import Batch
from .node import Context, Inputs, Node, Result

_HIDDEN = {"prompt": ("PROMPT",), "extra_pnginfo": ("EXTRA_PNGINFO",)}
_METHODS = {"default": 4, "fastest": 0, "slowest": 6}
_EXIF_MODEL, _EXIF_MAKE = 0x0110, 0x010F


@dataclass(frozen=True)
class Video:
    """What travels along a VIDEO link."""

    images: Batch
    fps: float


@dataclass(frozen=True)
class Audio:
    """What travels along an AUDIO link: silence."""

    sample_rate: int
    channels: int
    samples: int


class _SaveNode(Node):
    v3 = True
    output_node = True

    @staticmethod
    def metadata(context: Context, inputs: Mapping[str, Any]) -> dict[str, str]:
        """Name and JSON text of all that is written into the file beside the pictures."""
        if not context.metadata:
            return {}
        values = {"prompt": inputs["prompt"], **(inputs["extra_pnginfo"] or {})}
        return {name: json.dumps(value) for name, value in values.items()}


class SaveAnimatedWEBP(_SaveNode):
    display_name = None
    category = "image/animation"
    module = "comfy_extras.nodes_images"

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        required = {
            **_images_and_prefix(),
            "lossless": ("BOOLEAN", {"default": True}),
            "quality": ("INT", {"default": 80, "min": 0, "max": 100}),
            "method": ("COMBO", {"multiselect": False, "options": list(_METHODS)}),
        }
        return {"required": required, "hidden": dict(_HIDDEN)}

    def run(self, context: Context, **inputs: Any) -> Result:
        pictures = _pictures(inputs["images"])
        exif = pictures[0].getexif()
        for place, (name, text) in enumerate(self.metadata(context, inputs).items()):
            exif[_EXIF_MODEL if name == "prompt" else _EXIF_MAKE + 1 - place] = f"{name}:{text}"
        how = {key: inputs[key] for key in ("lossless", "quality")}
        return _save_animation(context, inputs, pictures, "webp", exif=exif, method=_METHODS[inputs["method"]], **how)


class SaveAnimatedPNG(_SaveNode):
    display_name = None
    category = "image/animation"
    module = "comfy_extras.nodes_images"

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        level = ("INT", {"advanced": True, "default": 4, "min": 0, "max": 9})
        return {"required": {**_images_and_prefix(), "compress_level": level}, "hidden": dict(_HIDDEN)}

    def run(self, context: Context, **inputs: Any) -> Result:
        info = PngInfo()
        for name, text in self.metadata(context, inputs).items():
            info.add(b"comf", name.encode("latin-1") + b"\0" + text.encode("latin-1"), after_idat=True)
        level: int = inputs["compress_level"]
        return _save_animation(context, inputs, _pictures(inputs["images"]), "png", pnginfo=info, compress_level=level)


class CreateVideo(Node):
    display_name = "Create Video"
    category = "image/video"
    module = "comfy_extras.nodes_video"
    returns = ("VIDEO",)
    v3 = True

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        fps = ("FLOAT", {"default": 30.0, "min": 1.0, "max": 120.0, "step": 1.0})
        return {"required": {"images": ("IMAGE", {}), "fps": fps}, "optional": {"audio": ("AUDIO", {})}}

    def run(self, context: Context, **inputs: Any) -> Result:
        return Result((Video(inputs["images"], inputs["fps"]),))


class SaveVideo(_SaveNode):
    """Writes MP4 files of JPEG pictures, where ComfyUI writes H.264; sound is left out."""

    display_name = "Save Video"
    category = "image/video"
    module = "comfy_extras.nodes_video"

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        combo = {"default": "auto", "multiselect": False}
        required = {
            "video": ("VIDEO", {}),
            "filename_prefix": ("STRING", {"default": "video/ComfyUI", "multiline": False}),
            "format": ("COMBO", {**combo, "options": ["auto", "mp4"]}),
            "codec": ("COMBO", {**combo, "options": ["auto", "h264"]}),
        }
        return {"required": required, "hidden": dict(_HIDDEN)}

    def run(self, context: Context, **inputs: Any) -> Result:
        video: Video = inputs["video"]
        content = mp4_of_jpegs([_jpeg(picture) for picture in _pictures(video.images)], video.images.size, video.fps)
        item = _write(context.folders.output, inputs["filename_prefix"], video.images.size, "mp4", content)
        return Result(ui={"images": [item], "animated": [True]})


class EmptyAudio(Node):
    display_name = "Empty Audio"
    category = "audio"
    module = "comfy_extras.nodes_audio"
    returns = ("AUDIO",)
    v3 = True

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        required = {
            "duration": ("FLOAT", {"default": 60.0, "min": 0.0, "max": 2**64 - 1, "step": 0.01}),
            "sample_rate": ("INT", {"advanced": True, "default": 44100, "min": 1, "max": 192000}),
            "channels": ("INT", {"advanced": True, "default": 2, "min": 1, "max": 2}),
        }
        return {"required": required}

    def run(self, context: Context, **inputs: Any) -> Result:
        rate: int = inputs["sample_rate"]
        return Result((Audio(rate, inputs["channels"], round(inputs["duration"] * rate)),))


class SaveAudio(_SaveNode):
    display_name = "Save Audio (FLAC)"
    category = "audio"
    module = "comfy_extras.nodes_audio"

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        prefix = ("STRING", {"default": "audio/ComfyUI", "multiline": False})
        return {"required": {"audio": ("AUDIO", {}), "filename_prefix": prefix}, "hidden": dict(_HIDDEN)}

    def run(self, context: Context, **inputs: Any) -> Result:
        audio: Audio = inputs["audio"]
        tags = self.metadata(context, inputs)
        content = flac_of_silence(audio.sample_rate, audio.channels, audio.samples, tags)
        return Result(
            ui={"audio": [_write(context.folders.output, inputs["filename_prefix"], (0, 0), "flac", content)]}
        )


def _images_and_prefix() -> dict[str, Any]:
    return {
        "images": ("IMAGE", {}),
        "filename_prefix": ("STRING", {"default": "ComfyUI", "multiline": False}),
        "fps": ("FLOAT", {"default": 6.0, "min": 0.01, "max": 1000.0, "step": 0.01}),
    }


def _pictures(images: Batch) -> list[Image.Image]:
    return [frame.to_pixels() for frame in images.frames]


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _save_animation(
    context: Context, inputs: Mapping[str, Any], pictures: list[Image.Image], kind: str, **how: Any
) -> Result:
    buffer = io.BytesIO()
    duration_ms = int(1000.0 / inputs["fps"])
    pictures[0].save(buffer, kind.upper(), save_all=True, append_images=pictures[1:], duration=duration_ms, **how)
    item = _write(context.folders.output, inputs["filename_prefix"], pictures[0].size, kind, buffer.getvalue())
    # One frame is no animation, and then ComfyUI leaves the key out.
    return Result(ui={"images": [item], **({"animated": [True]} if len(pictures) > 1 else {})})


def _write(folder: Path, prefix: str, size: tuple[int, int], suffix: str, content: bytes) -> dict[str, str]:
    place = save_place(folder, prefix, *size)
    name = f"{place.stem}_{place.counter:05}_.{suffix}"
    (place.folder / name).write_bytes(content)
    return {"filename": name, "subfolder": place.subfolder, "type": "output"}
