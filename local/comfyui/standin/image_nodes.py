"""Nodes that make and change images, with the inputs and the arithmetic of ComfyUI 0.18.1 (nodes.py)."""

from __future__ import annotations

import hashlib
import mimetypes
import time
from collections.abc import Mapping
from typing import Any

from .folders import Folders
from .images import METHODS, Batch, load_frames, solid
from .node import Context, Inputs, Node, Result

MAX_RESOLUTION = 16384


def _integer(default: int, low: int, high: int = MAX_RESOLUTION, **more: Any) -> tuple[str, dict[str, Any]]:
    return "INT", {"default": default, "min": low, "max": high, **more}


def _required(**inputs: Any) -> Inputs:
    return {"required": inputs}


class LoadImage(Node):
    display_name = "Load Image"
    returns = ("IMAGE", "MASK")
    validates = ("image",)

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        names = (entry.name for entry in folders.input.iterdir() if entry.is_file())
        pictures = [name for name in names if (mimetypes.guess_type(name, strict=False)[0] or "").startswith("image/")]
        return _required(image=(sorted(pictures), {"image_upload": True}))

    @classmethod
    def validate(cls, folders: Folders, values: Mapping[str, Any]) -> str | None:
        if folders.input_file(values["image"]).exists():
            return None
        return f"Invalid image file: {values['image']}"

    @classmethod
    def fingerprint(cls, folders: Folders, values: Mapping[str, Any]) -> Any:
        return hashlib.sha256(folders.input_file(values["image"]).read_bytes()).hexdigest()

    def run(self, context: Context, **inputs: Any) -> Result:
        loaded = list(load_frames(context.folders.input_file(inputs["image"])))
        return Result((Batch(tuple(frame for frame, _ in loaded)), [mask for _, mask in loaded]))


class EmptyImage(Node):
    display_name = "EmptyImage"
    returns = ("IMAGE",)

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        return _required(
            width=_integer(512, 1, step=1),
            height=_integer(512, 1, step=1),
            batch_size=_integer(1, 1, 4096),
            color=_integer(0, 0, 0xFFFFFF, step=1, display="color"),
        )

    def run(self, context: Context, **inputs: Any) -> Result:
        frame = solid(inputs["width"], inputs["height"], inputs["color"], inputs["batch_size"])
        return Result((Batch((frame,) * inputs["batch_size"]),))


class ImageScale(Node):
    display_name = "Upscale Image"
    category = "image/upscaling"
    returns = ("IMAGE",)

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        return _required(
            image=("IMAGE",),
            upscale_method=(list(METHODS),),
            width=_integer(512, 0, step=1),
            height=_integer(512, 0, step=1),
            crop=(["disabled", "center"],),
        )

    def run(self, context: Context, **inputs: Any) -> Result:
        image: Batch = inputs["image"]
        width, height = inputs["width"], inputs["height"]
        old_width, old_height = image.size
        if width == 0 and height == 0:
            return Result((image,))
        # A side of 0 follows from the other one.
        width = width or max(1, round(old_width * height / old_height))
        height = height or max(1, round(old_height * width / old_width))
        return Result((image.scaled(width, height, inputs["upscale_method"], inputs["crop"]),))


class ImageScaleBy(Node):
    display_name = "Upscale Image By"
    category = "image/upscaling"
    returns = ("IMAGE",)

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        return _required(
            image=("IMAGE",),
            upscale_method=(list(METHODS),),
            scale_by=("FLOAT", {"default": 1.0, "min": 0.01, "max": 8.0, "step": 0.01}),
        )

    def run(self, context: Context, **inputs: Any) -> Result:
        image: Batch = inputs["image"]
        width, height = (round(side * inputs["scale_by"]) for side in image.size)
        return Result((image.scaled(width, height, inputs["upscale_method"], "disabled"),))


class ImageInvert(Node):
    display_name = "Invert Image"
    returns = ("IMAGE",)

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        return _required(image=("IMAGE",))

    def run(self, context: Context, **inputs: Any) -> Result:
        image: Batch = inputs["image"]
        return Result((Batch(tuple(frame.inverted() for frame in image.frames)),))


class ImageBatch(Node):
    display_name = "Batch Images"
    returns = ("IMAGE",)
    deprecated = True

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        return _required(image1=("IMAGE",), image2=("IMAGE",))

    def run(self, context: Context, **inputs: Any) -> Result:
        first: Batch = inputs["image1"]
        second: Batch = inputs["image2"]
        if first.size != second.size:
            second = second.scaled(*first.size, "bilinear", "center")
        return Result((Batch(first.frames + second.frames),))


class ImageCrop(Node):
    display_name = "Image Crop (Deprecated)"
    category = "image/transform"
    module = "comfy_extras.nodes_images"
    returns = ("IMAGE",)
    deprecated = True

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        return _required(
            image=("IMAGE", {}),
            width=_integer(512, 1, step=1),
            height=_integer(512, 1, step=1),
            x=_integer(0, 0, step=1),
            y=_integer(0, 0, step=1),
        )

    def run(self, context: Context, **inputs: Any) -> Result:
        image: Batch = inputs["image"]
        old_width, old_height = image.size
        left, top = min(inputs["x"], old_width - 1), min(inputs["y"], old_height - 1)
        right, bottom = left + inputs["width"], top + inputs["height"]
        return Result((Batch(tuple(frame.cropped(left, top, right, bottom) for frame in image.frames)),))


class StandinSleep(Node):
    """Not in ComfyUI: passes an image on after `seconds`, in `steps` of equal length that a sampler would take."""

    display_name = "Sleep (stand-in only)"
    module = "standin"
    returns = ("IMAGE",)

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        return _required(
            image=("IMAGE",),
            seconds=("FLOAT", {"default": 1.0, "min": 0.0, "max": 3600.0, "step": 0.01}),
            steps=_integer(10, 1, 10000, step=1),
        )

    def run(self, context: Context, **inputs: Any) -> Result:
        steps: int = inputs["steps"]
        for step in range(1, steps + 1):
            time.sleep(inputs["seconds"] / steps)
            context.progress(step, steps, None)
        return Result((inputs["image"],))
