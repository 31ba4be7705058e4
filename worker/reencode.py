"""The pictures of a result in the format that the job asks for, by Pillow.

Only pictures: video, audio and the rest stay as they are, and so does every picture of that format already unless a
quality is asked for. What cannot be done without losing more than detail is left alone, with a warning. Whatever is
written anew has neither ComfyUI's metadata (prompt and workflow) nor EXIF; colour profiles are kept.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from PIL import Image, ImageOps, ImageSequence

from worker.media import DAMAGE, FORMATS
from worker.outputs import Output
from worker.payload import OutputFormat
from worker.ramdisk import RamDisk

DEFAULT_QUALITY = 90
FULL_COLOUR_QUALITY = 90  # from here on a JPEG keeps all of its colour, where one usually has a quarter
_SUFFIXES = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}
_MEDIA_TYPES = {"png": ("image/png", "image/apng"), "webp": ("image/webp",), "jpeg": ("image/jpeg",)}
_MAX_SIDES = {"png": 2**31 - 1, "webp": 16_383, "jpeg": 65_500}  # of libwebp and libjpeg, in pixels
_MODES = {
    "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "webp": ("RGB", "RGBA"),
    "jpeg": ("L", "RGB"),
}


class _Unfit(Exception):
    """A picture that this format cannot hold; the message says why."""


def reencoded(
    outputs: list[Output],
    ramdisk: RamDisk,
    wanted: OutputFormat,
    *,
    check: Callable[[], None],
    warn: Callable[[str], None],
) -> list[Output]:
    """``outputs``, in their order, the pictures in the ``wanted`` format and named for it.

    One picture at a time is in memory beside the results. ``check`` is called before each and may raise, ``warn`` is
    given a sentence for each that was left alone or flattened. Raises OutputMissing or OutputDamaged.
    """
    taken = {output.path for output in outputs}
    results = []
    for output in outputs:
        if output.category == "images" and (wanted.quality or output.media_type not in _MEDIA_TYPES[wanted.name]):
            check()
            content = output.read(ramdisk)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # Pillow's remarks on odd files; what matters is raised
                    content = _encode(content, output.filename, wanted, warn)
                output = _renamed(output, _SUFFIXES[wanted.name], content, taken)
            except _Unfit as reason:
                warn(f"The picture {output.filename!r} is returned as it is: {reason}.")
            except (*DAMAGE, MemoryError) as error:
                warn(f"The picture {output.filename!r} is returned as it is: Pillow says {type(error).__name__}.")
        results.append(output)
    return results


def _renamed(output: Output, suffix: str, content: bytes, taken: set[str]) -> Output:
    """With the suffix of its format in place of its own, or, where an output has that name already, behind it."""
    path = PurePosixPath(output.filename)
    renamed = replace(output, filename=path.with_suffix(suffix).name, data=content)
    if renamed.filename != output.filename and renamed.path in taken:
        renamed = replace(renamed, filename=output.filename + suffix)
    taken.add(renamed.path)
    return renamed


def _encode(content: bytes, filename: str, wanted: OutputFormat, warn: Callable[[str], None]) -> bytes:
    """Raises _Unfit, or what Pillow raises."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        if max(image.size) > _MAX_SIDES[wanted.name]:
            raise _Unfit(f"{wanted.name} has at most {_MAX_SIDES[wanted.name]} pixels a side")
        if getattr(image, "n_frames", 1) > 1:
            return _encode_animation(image, wanted)
        ImageOps.exif_transpose(image, in_place=True)  # else a copy of every picture
        image.info.pop("comment", None)  # the only text that Pillow carries over, from GIF and JPEG to JPEG
        if wanted.name == "jpeg" and _is_transparent(image):
            warn(f"The picture {filename!r} has transparent parts, which are white now: JPEG has no transparency.")
        stream = io.BytesIO()
        _in_mode_of(image, wanted.name).save(stream, wanted.name, **_options(wanted, image))
        return stream.getvalue()


def _encode_animation(image: Image.Image, wanted: OutputFormat) -> bytes:
    if image.format in ("TIFF", "MPO"):
        raise _Unfit("it holds several pictures that are no animation")
    if wanted.name == "jpeg":
        raise _Unfit("it is an animation, and JPEG has none")
    durations_ms = []
    for frame in ImageSequence.Iterator(image):
        frame.load()  # a WebP knows how long a frame is shown only when it has been decoded
        durations_ms.append(round(frame.info.get("duration", 0)))
    image.seek(0)
    stream = io.BytesIO()  # Pillow goes through the frames itself, and makes one mode of theirs
    options = {"save_all": True, "duration": durations_ms, "loop": _plays(image), **_options(wanted, image)}
    image.save(stream, wanted.name, **options)
    return stream.getvalue()


def _plays(image: Image.Image) -> int:
    """How often an animation is played, 0 for ever. A GIF counts what comes after the first time, or says nothing."""
    loop: int | None = image.info.get("loop")
    if image.format != "GIF":
        return loop or 0
    return 1 if loop is None else loop and loop + 1


def _options(wanted: OutputFormat, image: Image.Image) -> dict[str, Any]:
    """For Pillow's ``save``. WebP's method 2 takes half the time of 4, the usual one, for 2 % more bytes (measured)."""
    quality = wanted.quality or DEFAULT_QUALITY
    options: dict[str, Any] = {
        "png": {"compress_level": 4},  # as ComfyUI has it
        "webp": {"quality": quality, "method": 2},
        "jpeg": {"quality": quality, "subsampling": 0 if quality >= FULL_COLOUR_QUALITY else 2},
    }[wanted.name]
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "RGBA", "P"):  # of another mode it would be the wrong one
        options["icc_profile"] = profile
    return options


def _is_transparent(image: Image.Image) -> bool:
    return image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != 255


def _in_mode_of(image: Image.Image, name: str) -> Image.Image:
    """In a mode that the format has: alpha kept, or laid over white for JPEG."""
    if image.mode in _MODES[name] and not image.has_transparency_data:
        return image
    if image.mode in ("I", "F"):
        raise _Unfit("its levels have more than 16 bits")
    if image.mode.startswith("I;16"):
        levels = image.convert("I").point(lambda level: level / 256)
        return levels.convert("L").convert("L" if name == "jpeg" else "RGB")
    if not image.has_transparency_data:
        return image.convert("L" if image.mode == "1" and name == "jpeg" else "RGB")
    with_alpha = image.convert("RGBA")
    if name != "jpeg":
        return with_alpha
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), with_alpha).convert("RGB")
