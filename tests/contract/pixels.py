"""One workflow for every image node and method, and what real ComfyUI made of it.

`COMFYUI_DIR=... COMFYUI_PYTHON=... python tests/contract/pixels.py` makes the references in captures/pixels/ again;
those that are there come from ComfyUI 0.18.1 on CPU.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfyui_client import CAPTURES, ComfyUI, Workflow, boot, empty
from PIL import Image

REFERENCES = CAPTURES / "pixels"
SAVED = "9"


@dataclass(frozen=True)
class Case:
    """`nodes` between the pictures "photo" and "small" and the saving of `source`; `limit`: the largest difference of
    any of the 256 values between the stand-in and ComfyUI, as measured."""

    nodes: Workflow
    limit: int = 0
    source: tuple[str, int] = ("3", 0)


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def photo() -> Image.Image:
    """40x30: slopes, noise and hard edges, and an alpha channel of all values."""
    width, height = 40, 30
    picture = Image.new("RGBA", (width, height))
    for y in range(height):
        for x in range(width):
            edge = 255 if (x // 8 + y // 6) % 2 else 20
            picture.putpixel((x, y), (x * 255 // 39, (x * x * 7 + y * 31) % 256, edge, (x + y * width) * 53 % 256))
    return picture


def small() -> Image.Image:
    """17x22, for the nodes that take two pictures of different shape."""
    return photo().convert("RGB").crop((5, 3, 22, 25))


def _one(class_type: str, limit: int = 0, **inputs: Any) -> Case:
    return Case({"3": node(class_type, image=["1", 0], **inputs)}, limit)


def _scale(method: str, width: int, height: int, limit: int = 0, crop: str = "disabled") -> Case:
    return _one("ImageScale", limit, upscale_method=method, width=width, height=height, crop=crop)


def _stitch(direction: str, match: bool, limit: int = 0, **spacing: Any) -> Case:
    how = {"spacing_width": 0, "spacing_color": "white", **spacing}
    inputs = {"image1": ["1", 0], "image2": ["2", 0], "direction": direction, "match_image_size": match, **how}
    return Case({"3": node("ImageStitch", **inputs)}, limit)


def _mask(channel: str) -> Case:
    mask = node("LoadImageMask", image="photo.png", channel=channel)
    return Case({"4": mask, "3": node("MaskToImage", mask=["4", 0])})


CASES: dict[str, Case] = {
    "LoadImage": Case({}, source=("1", 0)),
    "LoadImage-16bit": Case({"3": node("LoadImage", image="16bit.png")}),
    "LoadImage-grey": Case({"3": node("LoadImage", image="grey.png")}),
    "LoadImage-palette": Case({"3": node("LoadImage", image="palette.png")}),
    "LoadImage-mask": Case({"3": node("MaskToImage", mask=["1", 1])}),
    "LoadImage-no-mask": Case({"3": node("MaskToImage", mask=["2", 1])}),
    "LoadImageMask-alpha": _mask("alpha"),
    "LoadImageMask-red": _mask("red"),
    "LoadImageMask-green": _mask("green"),
    "LoadImageMask-blue": _mask("blue"),
    "EmptyImage": Case({"3": empty(5, 3, color=0x0A80FE)}),
    "ImageInvert": _one("ImageInvert"),
    "ImageCrop": _one("ImageCrop", x=30, y=4, width=16, height=9),
    "ImageBatch": Case({"3": node("ImageBatch", image1=["1", 0], image2=["2", 0])}, 1),
    "ImageScale-nearest-exact-up": _scale("nearest-exact", 57, 44),
    "ImageScale-nearest-exact-down": _scale("nearest-exact", 32, 24),
    "ImageScale-bilinear-up": _scale("bilinear", 57, 44, 1),
    "ImageScale-bilinear-down": _scale("bilinear", 23, 11, 1),
    "ImageScale-bilinear-center": _scale("bilinear", 21, 33, 1, crop="center"),
    "ImageScale-area-up": _scale("area", 57, 44, 1),
    "ImageScale-area-down": _scale("area", 23, 11, 1),
    "ImageScale-bicubic-up": _scale("bicubic", 57, 44, 18),
    "ImageScale-bicubic-down": _scale("bicubic", 23, 11, 15),
    "ImageScale-lanczos-up": _scale("lanczos", 57, 44),
    "ImageScale-lanczos-down": _scale("lanczos", 23, 11),
    "ImageScale-lanczos-center": _scale("lanczos", 21, 33, crop="center"),
    "ImageScaleBy-nearest-exact": _one("ImageScaleBy", upscale_method="nearest-exact", scale_by=1.37),
    "ImageScaleBy-lanczos": _one("ImageScaleBy", upscale_method="lanczos", scale_by=0.55),
    "ImageScaleBy-bilinear": _one("ImageScaleBy", 1, upscale_method="bilinear", scale_by=0.55),
    "ImageStitch-right": _stitch("right", True),
    "ImageStitch-left": _stitch("left", True, spacing_width=4, spacing_color="red"),
    "ImageStitch-down": _stitch("down", True, spacing_width=2, spacing_color="green"),
    "ImageStitch-up": _stitch("up", True, spacing_width=6, spacing_color="black"),
    "ImageStitch-right-unmatched": _stitch("right", False, spacing_width=3, spacing_color="blue"),
    "ImageStitch-down-unmatched": _stitch("down", False, spacing_width=2, spacing_color="white"),
    "ImageBlur-1": _one("ImageBlur", 1, blur_radius=1, sigma=1.0),
    "ImageBlur-5": _one("ImageBlur", blur_radius=5, sigma=0.4),
    "ImageBlur-14": _one("ImageBlur", blur_radius=14, sigma=10.0),
}


def put_sources(folder: Path) -> None:
    """The pictures that the cases load."""
    photo().save(folder / "photo.png")
    small().save(folder / "small.png")
    photo().convert("L").save(folder / "grey.png")
    photo().convert("RGB").quantize(16).save(folder / "palette.png")
    deep = Image.new("I;16", (40, 30))
    for x in range(40):
        for y in range(30):
            deep.putpixel((x, y), (x * 1640 + y * 17) % 65536)
    deep.save(folder / "16bit.png")


def compute(server: ComfyUI, case: Case) -> Image.Image:
    """The last picture that the server saves for a case; the sources are in its input folder."""
    loaders = {"1": node("LoadImage", image="photo.png"), "2": node("LoadImage", image="small.png")}
    name, output = case.source
    end = node("SaveImage", images=[name, output], filename_prefix="pixels")
    run = server.run({**loaders, **case.nodes, SAVED: end})
    assert run.history["status"]["status_str"] == "success", run.history["status"]
    with Image.open(server.output / run.files(SAVED)[-1]["filename"]) as picture:
        return picture.convert("RGB")


def reference(name: str) -> Image.Image:
    """What ComfyUI 0.18.1 made of the case of that name."""
    with Image.open(REFERENCES / f"{name}.png") as picture:
        return picture.convert("RGB")


def largest_difference(one: Image.Image, other: Image.Image) -> int:
    """Between any two values at the same place; AssertionError where the sizes differ."""
    assert one.size == other.size
    return max(abs(left - right) for left, right in zip(one.tobytes(), other.tobytes(), strict=True))


def main() -> None:
    if "COMFYUI_DIR" not in os.environ:
        sys.exit("COMFYUI_DIR must name a ComfyUI checkout: references of the stand-in would prove nothing")
    REFERENCES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, boot(Path(folder)) as server:
        put_sources(server.input)
        for name, case in CASES.items():
            compute(server, case).save(REFERENCES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
