"""ComfyUI's image arithmetic on Pillow, to the last bit where Pillow allows it.

ComfyUI holds an image as float32 values of 0 to 1 and cuts 255 * value down to a byte when it saves (nodes.py 0.18.1,
SaveImage). Pillow's mode "F" is float32 as well, so a frame here is three such planes and gives the same bytes:
inverting 8-bit pixels, for one, is not 255 - v but 254 - v for 159 of the 256 values.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageFile, ImageOps, ImageSequence, UnidentifiedImageError

Resampling = Image.Resampling
Span = tuple[int, int]  # first index, index behind the last

_INTERPOLATING = {"bilinear": Resampling.BILINEAR, "bicubic": Resampling.BICUBIC}
METHODS = ("nearest-exact", "bilinear", "area", "bicubic", "lanczos")


@dataclass(frozen=True)
class Frame:
    """One RGB picture: three planes of float32 (mode "F"), 0.0 to 1.0, all of one size. Never changed in place."""

    planes: tuple[Image.Image, ...]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.planes[0].size

    @classmethod
    def from_pixels(cls, picture: Image.Image) -> Frame:
        """A frame of an 8-bit picture of any mode."""
        return cls(tuple(_linear(band.convert("F"), 1 / 255, 0.0) for band in picture.convert("RGB").split()))

    def to_pixels(self) -> Image.Image:
        """The 8-bit RGB picture that ComfyUI would save: values are cut off, not rounded (so does "F" to "L")."""
        return Image.merge("RGB", [_linear(plane, 255.0, 0.0).convert("L") for plane in self.planes])

    def inverted(self) -> Frame:
        """1 - value, for every value."""
        return Frame(tuple(_linear(plane, -1.0, 1.0) for plane in self.planes))

    def cropped(self, left: int, top: int, right: int, bottom: int) -> Frame:
        """The part inside the box, which may reach over the right and lower edge (it is cut there)."""
        width, height = self.size
        box = (left, top, min(right, width), min(bottom, height))
        return Frame(tuple(plane.crop(box) for plane in self.planes))

    def scaled(self, width: int, height: int, method: str) -> Frame:
        """The frame at another size, as torch's interpolate does it: `method` is one of METHODS.

        Equal to it for nearest-exact and lanczos (8-bit and Pillow's there, too), up to 1 of 255 for bilinear and area,
        up to about 20 at sharp edges for bicubic: Pillow's kernel has a = -1, torch's a = -0.75.
        """
        if method == "lanczos":
            return Frame.from_pixels(self.to_pixels().resize((width, height), Resampling.LANCZOS))
        if method in _INTERPOLATING:
            return Frame(tuple(_sampled(plane, width, height, _INTERPOLATING[method]) for plane in self.planes))
        spans = _touched if method == "area" else _nearest
        columns, rows = spans(self.size[0], width), spans(self.size[1], height)
        return Frame(tuple(_averaged(plane, columns, rows) for plane in self.planes))


@dataclass(frozen=True)
class Batch:
    """Frames of one size: what travels along an IMAGE link."""

    frames: tuple[Frame, ...]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of every frame."""
        return self.frames[0].size

    def __str__(self) -> str:
        width, height = self.size
        return f"<{len(self.frames)} x RGB {width}x{height}>"

    def scaled(self, width: int, height: int, method: str, crop: str) -> Batch:
        """All frames scaled; `crop` "center" first cuts them to the new proportions (comfy/utils.py)."""
        box = _centre_box(self.size, width, height) if crop == "center" else (0, 0, *self.size)
        return Batch(tuple(frame.cropped(*box).scaled(width, height, method) for frame in self.frames))


def solid(width: int, height: int, colour: int, count: int) -> Frame:
    """A frame of one colour, 0xRRGGBB. Raises RuntimeError where torch could not hold one plane of `count` such."""
    size_bytes = width * height * count * 4
    if size_bytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        problem = f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {size_bytes} bytes."
        fate = "Error code 12 (Cannot allocate memory)"
        raise RuntimeError(f"[enforce fail at alloc_cpu.cpp:127] err == 0. {problem} {fate}")
    values = (colour >> 16 & 0xFF, colour >> 8 & 0xFF, colour & 0xFF)
    return Frame(tuple(Image.new("F", (width, height), value / 255) for value in values))


def load_frames(path: str | os.PathLike[str]) -> Iterator[tuple[Frame, Image.Image]]:
    """The frames of a picture file in upright orientation, each with its mask plane (1 - alpha, or 64x64 zeros).

    Follows LoadImage of nodes.py 0.18.1: frames of another size than the first are left out, of an MPO file only the
    first one counts, and a truncated file loads with what it has. Raises OSError or PIL.UnidentifiedImageError.
    """
    size: tuple[int, int] | None = None
    with Image.open(path) as file:
        for raw in ImageSequence.Iterator(file):
            upright = _upright(raw)
            if upright.mode == "I":
                upright = upright.point(lambda value: value * (1 / 255))
            size = size or upright.size
            if upright.size == size:
                yield Frame.from_pixels(upright), _mask(upright)
            if file.format == "MPO":
                return


def load_upright(path: str | os.PathLike[str]) -> Image.Image:
    """The first picture of a file, turned upright. Raises OSError or PIL.UnidentifiedImageError."""
    with Image.open(path) as file:
        upright = _upright(file)
        return upright.point(lambda value: value * (1 / 255)) if upright.mode == "I" else upright


def _upright(raw: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(raw)
    except (OSError, UnidentifiedImageError, ValueError):
        # node_helpers.py 0.18.1 tries once more with Pillow's leave to fill up what a truncated file lacks.
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
        try:
            return ImageOps.exif_transpose(raw)
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def _mask(picture: Image.Image) -> Image.Image:
    if "A" in picture.getbands():
        alpha = picture.getchannel("A")
    elif picture.mode == "P" and "transparency" in picture.info:
        alpha = picture.convert("RGBA").getchannel("A")
    else:
        return Image.new("F", (64, 64), 0.0)
    return _linear(_linear(alpha.convert("F"), 1 / 255, 0.0), -1.0, 1.0)


def _linear(plane: Image.Image, factor: float, offset: float) -> Image.Image:
    """factor * value + offset, computed in double and rounded once to float32: the result of float32 arithmetic."""
    return plane.point(lambda value: value * factor + offset)


def _sampled(plane: Image.Image, width: int, height: int, resampling: Resampling) -> Image.Image:
    """Every new pixel is read at its centre's place in the old picture; Pillow's resize would average first."""
    old_width, old_height = plane.size
    matrix = (old_width / width, 0, 0, 0, old_height / height, 0)
    return plane.transform((width, height), Image.Transform.AFFINE, matrix, resample=resampling)


def _averaged(plane: Image.Image, columns: list[Span], rows: list[Span]) -> Image.Image:
    """One new pixel for every pair of spans: the plain mean of the old pixels in them."""
    old_height = plane.size[1]
    narrow = Image.new("F", (len(columns), old_height))
    for x, (start, end) in enumerate(columns):
        narrow.paste(plane.resize((1, old_height), Resampling.BOX, (start, 0, end, old_height)), (x, 0))
    result = Image.new("F", (len(columns), len(rows)))
    for y, (start, end) in enumerate(rows):
        result.paste(narrow.resize((len(columns), 1), Resampling.BOX, (0, start, len(columns), end)), (0, y))
    return result


def _touched(old: int, new: int) -> list[Span]:
    """For each of `new` pixels the old ones that it touches (torch's adaptive average pooling)."""
    return [(index * old // new, -(-(index + 1) * old // new)) for index in range(new)]


def _nearest(old: int, new: int) -> list[Span]:
    """For each of `new` pixels the old one at its centre. In float32 as in torch, which decides ties."""
    scale = _float32(old / new)
    starts = [min(int(_float32((index + 0.5) * scale)), old - 1) for index in range(new)]
    return [(start, start + 1) for start in starts]


def _float32(value: float) -> float:
    (rounded,) = struct.unpack("f", struct.pack("f", value))
    return float(rounded)


def _centre_box(size: tuple[int, int], width: int, height: int) -> tuple[int, int, int, int]:
    old_width, old_height = size
    old_aspect, new_aspect = old_width / old_height, width / height
    x = y = 0
    if old_aspect > new_aspect:
        x = round((old_width - old_width * (new_aspect / old_aspect)) / 2)
    elif old_aspect < new_aspect:
        y = round((old_height - old_height * (old_aspect / new_aspect)) / 2)
    return x, y, old_width - x, old_height - y
