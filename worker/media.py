"""Is this image whole? Answered from its structure, which costs a few ms where a full decode costs a hundred.

ComfyUI takes a truncated PNG or JPEG without a word and computes on grey (measured on 0.3.64 and 0.18.1), so a
transfer that was cut has to be found before the job runs.

A decode says the same of every cut (tests/unit/test_truncation.py), but for two: it gives an animated GIF that was cut
between two pictures without the rest, and it needs no byte behind the last pixel (up to 22 of a PNG, 6 of a GIF, 2 of a
JPEG). Both are refused: the sender had more than arrived, and without the end mark nobody can tell what that was.
"""

from __future__ import annotations

import io
import json
import re
import struct
import warnings
import zlib

from PIL import Image, UnidentifiedImageError

from worker.errors import MediaInvalid

# Pillow's own limit, twice its MAX_IMAGE_PIXELS; a 4-channel float32 tensor of that size takes 2.8 GB in ComfyUI.
MAX_PIXELS = 178_956_970
# What people send to LoadImage. Pillow knows more: obscure parsers, and EPS, whose decoding starts Ghostscript.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
# What Pillow's plug-ins raise on damaged files, beyond the OSError and SyntaxError that they promise (13.0, fuzzed).
DAMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, RuntimeError, LookupError, TypeError, ArithmeticError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
_SAFETENSORS_MAX_HEADER = 100_000_000  # bytes; its own limit, and text at that place would be a larger number
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# A marker inside JPEG entropy-coded data: not a stuffed 00, a restart D0..D7 or a fill byte (ITU-T T.81, B.1.1).
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def check_image(name: str, data: bytes) -> None:
    """Raise MediaInvalid unless ``data`` is a complete image in one of FORMATS, of at most MAX_PIXELS.

    PNG: every chunk and CRC up to IEND. JPEG: every marker up to EOI (data behind it is allowed). WebP: the RIFF
    size. GIF: every block up to the trailer. Other formats are decoded in full. ``name`` is only used in the message.
    """
    if not data:
        raise MediaInvalid(f"Image {name!r} is empty.", name=name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd files; what matters is raised
        _check_header(name, data)
        whole = _is_whole(data)
    if not whole:
        raise _damaged(name, data)


def is_cut_short(data: bytes) -> bool:
    """True where the structure of a file that ComfyUI wrote says that its end is missing, or the file is empty.

    Known are PNG, JPEG, WebP, GIF, AVIF, the MP4 family, GLB and safetensors (latents); of every other format nothing
    is said.
    """
    if data[4:8] == b"ftyp":
        return not _mp4_is_whole(data)
    if data.startswith(b"glTF"):  # the third number of the header is the length of the file
        return len(data) < max(12, int.from_bytes(data[8:12], "little"))
    if data[8:10] == b'{"' and int.from_bytes(data[:8], "little") <= _SAFETENSORS_MAX_HEADER:
        return not _safetensors_is_whole(data)
    structured = data.startswith((_PNG_SIGNATURE, b"\xff\xd8", b"GIF8")) or data[8:12] == b"WEBP"
    return not data or (structured and not _is_whole(data))


def _check_header(name: str, data: bytes) -> None:
    try:
        Image.open(io.BytesIO(data), formats=FORMATS).close()
    except UnidentifiedImageError:
        sentence = f"{name!r} is not an image of a known format; video, audio and the rest go under 'files'."
        raise MediaInvalid(sentence, name=name) from None
    except Image.DecompressionBombError:
        raise MediaInvalid(f"Image {name!r} has more than {MAX_PIXELS} pixels; shrink it.", name=name) from None
    except DAMAGE:
        raise _damaged(name, data) from None


def _damaged(name: str, data: bytes) -> MediaInvalid:
    sentence = f"Image {name!r} is damaged or cut short ({len(data)} bytes arrived); send the file again."
    return MediaInvalid(sentence, name=name, size_bytes=len(data))


def _is_whole(data: bytes) -> bool:
    if data.startswith(_PNG_SIGNATURE):
        return _png_is_whole(data)
    if data.startswith(b"\xff\xd8"):
        return _jpeg_is_whole(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return len(data) >= 8 + int.from_bytes(data[4:8], "little")
    if data.startswith(b"GIF8"):
        return len(data) > 13 and _gif_is_whole(data)
    return _decodes(data)


def _png_is_whole(data: bytes) -> bool:
    view = memoryview(data)
    position = len(_PNG_SIGNATURE)
    while position + 12 <= len(data):
        length = int.from_bytes(view[position : position + 4], "big")
        kind = bytes(view[position + 4 : position + 8])
        body_end = position + 8 + length
        if body_end + 4 > len(data):
            return False
        if zlib.crc32(view[position + 4 : body_end]) != int.from_bytes(view[body_end : body_end + 4], "big"):
            return False
        if kind == b"IEND":
            return True
        position = body_end + 4
    return False


def _jpeg_is_whole(data: bytes) -> bool:
    position = 2
    while position + 2 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xD9:  # EOI
            return True
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xDA:  # SOS: entropy-coded data follows the header, up to the next real marker
            found = _JPEG_MARKER.search(data, position)
            if found is None:
                return False
            position = found.start()
    return False


def _mp4_is_whole(data: bytes) -> bool:
    """Boxes, each led by its size and type, fill the file; an index is among them (ISO/IEC 14496-12)."""
    position, has_index = 0, False
    while position + 8 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        has_index |= data[position + 4 : position + 8] in (b"moov", b"moof", b"meta")
        if size == 1:  # a 64-bit size follows
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        elif size == 0:  # the last box, as long as the file
            size = len(data) - position
        if size < 8:
            return False
        position += size
    return has_index and position <= len(data)


def _safetensors_is_whole(data: bytes) -> bool:
    """The header, whose length leads the file, says where the bytes of each tensor end."""
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        ends = [value["data_offsets"][1] for name, value in json.loads(data[8:start]).items() if name != "__metadata__"]
        return start + max(ends, default=0) <= len(data)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False


def _gif_is_whole(data: bytes) -> bool:
    """A full decode is no answer here: it ends with the first frame."""
    position = 13 + _color_table_bytes(data[10])
    while position < len(data):
        block = data[position]
        if block == 0x3B:  # the trailer
            return True
        if block == 0x2C and position + 10 <= len(data):  # an image: descriptor, colour table, code size
            position += 11 + _color_table_bytes(data[position + 9])
        elif block == 0x21:  # an extension: its label
            position += 2
        else:  # Pillow steps over stray bytes between blocks, too
            position += 1
            continue
        while position < len(data) and data[position] != 0:  # sub-blocks, each led by its length
            position += 1 + data[position]
        position += 1
    return False


def _color_table_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _decodes(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
    except DAMAGE:
        return False
    return True
