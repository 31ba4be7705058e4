"""Nodes that put images together, soften and measure them (comfy_extras of ComfyUI 0.18.1), and those of masks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageMath

from .folders import Folders
from .image_nodes import LoadImage
from .images import Batch, Frame, load_upright
from .node import Context, Inputs, Node, Result

_COLOURS = {
    "white": (1.0, 1.0, 1.0),
    "black": (0.0, 0.0, 0.0),
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
}
_GREY = {"white": 1.0, "black": 0.0, "red": 0.0, "green": 0.0, "blue": 0.0}
Size = tuple[int, int]


class ImageStitch(Node):
    display_name = "Image Stitch"
    category = "image/transform"
    module = "comfy_extras.nodes_images"
    returns = ("IMAGE",)
    v3 = True

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        directions = {"default": "right", "multiselect": False, "options": ["right", "down", "left", "up"]}
        colours = {"advanced": True, "default": "white", "multiselect": False, "options": list(_COLOURS)}
        required = {
            "image1": ("IMAGE", {}),
            "direction": ("COMBO", directions),
            "match_image_size": ("BOOLEAN", {"default": True}),
            "spacing_width": ("INT", {"advanced": True, "default": 0, "min": 0, "max": 1024, "step": 2}),
            "spacing_color": ("COMBO", colours),
        }
        return {"required": required, "optional": {"image2": ("IMAGE", {})}}

    def run(self, context: Context, **inputs: Any) -> Result:
        first: Batch = inputs["image1"]
        second: Batch | None = inputs.get("image2")
        if second is None:
            return Result((first,))
        sideways = inputs["direction"] in ("left", "right")
        if inputs["match_image_size"]:
            second = second.scaled(*_matching(first.size, second.size, sideways), "lanczos", "disabled")
        count = max(len(first.frames), len(second.frames))
        parts = [_repeated(first, count), _repeated(second, count)]
        if inputs["direction"] in ("left", "up"):
            parts.reverse()
        colour, gap = inputs["spacing_color"], _even(inputs["spacing_width"])
        pairs = zip(*parts, strict=True)
        return Result((Batch(tuple(_joined(pair, sideways, gap, colour) for pair in pairs)),))


class ImageBlur(Node):
    display_name = "Image Blur"
    category = "image/postprocessing"
    module = "comfy_extras.nodes_post_processing"
    returns = ("IMAGE",)
    v3 = True

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        radius = {"default": 1, "min": 1, "max": 31, "step": 1}
        sigma = {"default": 1.0, "min": 0.1, "max": 10.0, "step": 0.1}
        return {"required": {"image": ("IMAGE", {}), "blur_radius": ("INT", radius), "sigma": ("FLOAT", sigma)}}

    def run(self, context: Context, **inputs: Any) -> Result:
        image: Batch = inputs["image"]
        radius: int = inputs["blur_radius"]
        if radius >= min(image.size):
            raise RuntimeError(f"a reflected border of {radius} does not fit an image of {image.size}")
        # The kernel's coordinates run from -1 to 1 whatever the radius: sigma counts in radii, not in pixels.
        weights = [
            math.exp(-((step / radius) ** 2) / (2 * inputs["sigma"] ** 2)) for step in range(-radius, radius + 1)
        ]
        weights = [weight / sum(weights) for weight in weights]
        return Result(
            (Batch(tuple(Frame(tuple(_blurred(p, weights) for p in frame.planes)) for frame in image.frames)),)
        )


class GetImageSize(Node):
    display_name = "Get Image Size"
    module = "comfy_extras.nodes_images"
    returns = ("INT", "INT", "INT")
    output_names = ("width", "height", "batch_size")
    v3 = True

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        return {"required": {"image": ("IMAGE", {})}, "hidden": {"unique_id": ("UNIQUE_ID",)}}

    def run(self, context: Context, **inputs: Any) -> Result:
        image: Batch = inputs["image"]
        width, height = image.size
        context.say(f"width: {width}, height: {height}\n batch size: {len(image.frames)}")
        return Result((width, height, len(image.frames)))


class LoadImageMask(Node):
    display_name = "Load Image (as Mask)"
    category = "mask"
    returns = ("MASK",)
    validates = ("image",)

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        names = sorted(entry.name for entry in folders.input.iterdir() if entry.is_file())
        return {"required": {"image": (names, {"image_upload": True}), "channel": (["alpha", "red", "green", "blue"],)}}

    @classmethod
    def validate(cls, folders: Folders, values: Mapping[str, Any]) -> str | None:
        return LoadImage.validate(folders, values)

    @classmethod
    def fingerprint(cls, folders: Folders, values: Mapping[str, Any]) -> Any:
        return hashlib.sha256(folders.input_file(values["image"]).read_bytes()).hexdigest()

    def run(self, context: Context, **inputs: Any) -> Result:
        picture = load_upright(context.folders.input_file(inputs["image"])).convert("RGBA")
        plane = picture.getchannel(inputs["channel"][0].upper()).convert("F")
        mask = plane.point(lambda value: value * (1 / 255) + 0.0)
        if inputs["channel"] == "alpha":
            mask = mask.point(lambda value: value * -1.0 + 1.0)
        return Result(([mask],))


class MaskToImage(Node):
    display_name = "Convert Mask to Image"
    category = "mask"
    module = "comfy_extras.nodes_mask"
    returns = ("IMAGE",)
    v3 = True

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        return {"required": {"mask": ("MASK", {})}}

    def run(self, context: Context, **inputs: Any) -> Result:
        return Result((Batch(tuple(Frame((plane,) * 3) for plane in inputs["mask"])),))


class LoadImageOutput(LoadImage):
    display_name = "Load Image (from Outputs)"
    experimental = True

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        remote = {"route": "/internal/files/output", "refresh_button": True, "control_after_refresh": "first"}
        options = {"image_upload": True, "image_folder": "output", "remote": remote}
        return {"required": {"image": ("COMBO", options)}}


def _matching(first: Size, second: Size, sideways: bool) -> Size:
    """The second image's size once its side at the seam is as long as the first one's."""
    aspect = second[0] / second[1]
    return (int(first[1] * aspect), first[1]) if sideways else (first[0], int(first[0] / aspect))


def _even(width: int) -> int:
    return width + width % 2


def _repeated(batch: Batch, count: int) -> tuple[Frame, ...]:
    return batch.frames + batch.frames[-1:] * (count - len(batch.frames))


def _joined(pair: tuple[Frame, ...], sideways: bool, gap: int, colour: str) -> Frame:
    """The two frames with a coloured gap; the shorter one is centred between borders of grey."""
    first, second = (frame.size for frame in pair)
    across = max(first[1], second[1]) if sideways else max(first[0], second[0])
    along = (first[0] + second[0] if sideways else first[1] + second[1]) + gap
    size = (along, across) if sideways else (across, along)
    planes = []
    for band, value in enumerate(_COLOURS[colour]):
        canvas = Image.new("F", size, _GREY[colour])
        place = 0
        for frame in pair:
            width, height = frame.size
            inset = (across - (height if sideways else width)) // 2
            canvas.paste(frame.planes[band], (place, inset) if sideways else (inset, place))
            place += width if sideways else height
            if gap and frame is pair[0]:
                strip = Image.new("F", (gap, across) if sideways else (across, gap), value)
                canvas.paste(strip, (place, 0) if sideways else (0, place))
                place += gap
        planes.append(canvas)
    return Frame(tuple(planes))


def _blurred(plane: Image.Image, weights: list[float]) -> Image.Image:
    """Both directions one after the other, over a border that reflects the plane without its outermost line."""
    across = _weighted(plane, weights)
    turned = _weighted(across.transpose(Image.Transpose.TRANSPOSE), weights)
    return turned.transpose(Image.Transpose.TRANSPOSE)


def _weighted(plane: Image.Image, weights: list[float]) -> Image.Image:
    width, height = plane.size
    radius = len(weights) // 2
    mirrored = plane.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    wide = Image.new("F", (width + 2 * radius, height))
    wide.paste(plane, (radius, 0))
    wide.paste(mirrored.crop((width - 1 - radius, 0, width - 1, height)), (0, 0))
    wide.paste(mirrored.crop((1, 0, 1 + radius, height)), (radius + width, 0))
    total = Image.new("F", (width, height), 0.0)
    for shift, weight in enumerate(weights):
        part = wide.crop((shift, 0, shift + width, height))
        total = ImageMath.lambda_eval(_add_weighted(weight), total=total, part=part)
    return total


def _add_weighted(weight: float) -> Any:
    return lambda operands: operands["total"] + operands["part"] * weight
