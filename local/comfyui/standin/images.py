"""ComfyUI's image arithmetic on Pillow, to the last bit where Pillow allows it.

ComfyUI holds an image as float32 values of 0 to 1 and cuts 255 * value down to a byte when it saves (nodes.py 0.18.1,
SaveImage). Pillow's mode "F" is float32 as well, so a frame here is three such planes and gives the same bytes:
inverting 8-bit pixels, for one, is not 255 - v but 254 - v for 159 of the 256 values.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageFile, ImageOps, ImageSequence, UnidentifiedImageError

Resampling = Image.Resampling
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

        lanczos works on 8-bit pixels in ComfyUI too and is equal; nearest-exact and area are equal but for the last
        bit; bilinear has no antialiasing, as there; bicubic uses Pillow's kernel (a = -1), torch's is a = -0.75.
        """
        if method == "lanczos":
            return Frame.from_pixels(self.to_pixels().resize((width, height), Resampling.LANCZOS))
        scale = _area if method == "area" else _sampled
        return Frame(tuple(scale(plane, width, height, method) for plane in self.planes))


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


def solid(width: int, height: int, colour: int) -> Frame:
    """A frame of one colour, 0xRRGGBB. Raises MemoryError when it would not fit the machine's memory."""
    size_bytes = width * height * 3 * 4
    if size_bytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise MemoryError(f"a frame of {width}x{height} needs {size_bytes} bytes")
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


def _sampled(plane: Image.Image, width: int, height: int, method: str) -> Image.Image:
    """Every new pixel is read at its centre's place in the old picture; Pillow's resize would average first."""
    filters = {"nearest-exact": Resampling.NEAREST, "bilinear": Resampling.BILINEAR, "bicubic": Resampling.BICUBIC}
    old_width, old_height = plane.size
    matrix = (old_width / width, 0, 0, 0, old_height / height, 0)
    return plane.transform((width, height), Image.Transform.AFFINE, matrix, resample=filters[method])


def _area(plane: Image.Image, width: int, height: int, _method: str) -> Image.Image:
    """Adaptive average pooling: a new pixel is the plain mean of every old pixel that it touches."""
    old_width, old_height = plane.size
    narrow = Image.new("F", (width, old_height))
    for x, (start, end) in enumerate(_windows(old_width, width)):
        narrow.paste(plane.resize((1, old_height), Resampling.BOX, (start, 0, end, old_height)), (x, 0))
    result = Image.new("F", (width, height))
    for y, (start, end) in enumerate(_windows(old_height, height)):
        result.paste(narrow.resize((width, 1), Resampling.BOX, (0, start, width, end)), (0, y))
    return result


def _windows(old: int, new: int) -> Iterator[tuple[int, int]]:
    for index in range(new):
        yield index * old // new, -(-(index + 1) * old // new)


def _centre_box(size: tuple[int, int], width: int, height: int) -> tuple[int, int, int, int]:
    old_width, old_height = size
    old_aspect, new_aspect = old_width / old_height, width / height
    x = y = 0
    if old_aspect > new_aspect:
        x = round((old_width - old_width * (new_aspect / old_aspect)) / 2)
    elif old_aspect < new_aspect:
        y = round((old_height - old_height * (old_aspect / new_aspect)) / 2)
    return x, y, old_width - x, old_height - y
