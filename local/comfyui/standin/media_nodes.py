"""Nodes that save animations and video (comfy_extras of ComfyUI 0.18.1)."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .containers import mp4_of_jpegs, vp8_of_webp, webm_of_vp8
from .folders import Folders
from .images import Batch
from .node import Context, Inputs, Node, Result
from .saving import HIDDEN, SaveNode, write_output

_METHODS = {"default": 4, "fastest": 0, "slowest": 6}
_EXIF_MODEL, _EXIF_MAKE = 0x0110, 0x010F


@dataclass(frozen=True)
class Video:
    """What travels along a VIDEO link."""

    images: Batch
    fps: float


class SaveAnimatedWEBP(SaveNode):
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
        return {"required": required, "hidden": dict(HIDDEN)}

    def run(self, context: Context, **inputs: Any) -> Result:
        pictures = _pictures(inputs["images"])
        exif = pictures[0].getexif()
        for place, (name, text) in enumerate(self.metadata(context, inputs).items()):
            exif[_EXIF_MODEL if name == "prompt" else _EXIF_MAKE + 1 - place] = f"{name}:{text}"
        how = {key: inputs[key] for key in ("lossless", "quality")}
        return _save_animation(context, inputs, pictures, "webp", exif=exif, method=_METHODS[inputs["method"]], **how)


class SaveAnimatedPNG(SaveNode):
    display_name = None
    category = "image/animation"
    module = "comfy_extras.nodes_images"

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        level = ("INT", {"advanced": True, "default": 4, "min": 0, "max": 9})
        return {"required": {**_images_and_prefix(), "compress_level": level}, "hidden": dict(HIDDEN)}

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


class SaveVideo(SaveNode):
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
        return {"required": required, "hidden": dict(HIDDEN)}

    def run(self, context: Context, **inputs: Any) -> Result:
        video: Video = inputs["video"]
        content = mp4_of_jpegs(
            [_encoded(picture, "JPEG") for picture in _pictures(video.images)], video.images.size, video.fps
        )
        item = write_output(context.folders, inputs["filename_prefix"], "mp4", content, video.images.size)
        return Result(ui={"images": [item], "animated": [True]})


class SaveWEBM(SaveNode):
    """Writes VP8 pictures, each a key frame, where ComfyUI writes VP9 or AV1."""

    display_name = None
    category = "image/video"
    module = "comfy_extras.nodes_video"
    experimental = True

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        required = {
            "images": ("IMAGE", {}),
            "filename_prefix": ("STRING", {"default": "ComfyUI", "multiline": False}),
            "codec": ("COMBO", {"multiselect": False, "options": ["vp9", "av1"]}),
            "fps": ("FLOAT", {"default": 24.0, "min": 0.01, "max": 1000.0, "step": 0.01}),
            "crf": ("FLOAT", {"default": 32.0, "min": 0, "max": 63.0, "step": 1}),
        }
        return {"required": required, "hidden": dict(HIDDEN)}

    def run(self, context: Context, **inputs: Any) -> Result:
        images: Batch = inputs["images"]
        frames = [vp8_of_webp(_encoded(picture, "WEBP")) for picture in _pictures(images)]
        content = webm_of_vp8(frames, images.size, inputs["fps"])
        item = write_output(context.folders, inputs["filename_prefix"], "webm", content, images.size)
        return Result(ui={"images": [item], "animated": [True]})


def _images_and_prefix() -> dict[str, Any]:
    return {
        "images": ("IMAGE", {}),
        "filename_prefix": ("STRING", {"default": "ComfyUI", "multiline": False}),
        "fps": ("FLOAT", {"default": 6.0, "min": 0.01, "max": 1000.0, "step": 0.01}),
    }


def _pictures(images: Batch) -> list[Image.Image]:
    return [frame.to_pixels() for frame in images.frames]


def _encoded(picture: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=90)
    return buffer.getvalue()


def _save_animation(
    context: Context, inputs: Mapping[str, Any], pictures: list[Image.Image], kind: str, **how: Any
) -> Result:
    buffer = io.BytesIO()
    duration_ms = int(1000.0 / inputs["fps"])
    pictures[0].save(buffer, kind.upper(), save_all=True, append_images=pictures[1:], duration=duration_ms, **how)
    item = write_output(context.folders, inputs["filename_prefix"], kind, buffer.getvalue(), pictures[0].size)
    # One frame is no animation, and then ComfyUI leaves the key out.
    return Result(ui={"images": [item], **({"animated": [True]} if len(pictures) > 1 else {})})
