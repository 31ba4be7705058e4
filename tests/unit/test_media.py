"""Is a picture whole? The structure check must agree with the truth: cut or not cut."""

import io
import random
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from worker.errors import MediaInvalid
from worker.media import MAX_PIXELS, check_image, is_cut_short


def noise(width: int = 61, height: int = 47, mode: str = "RGB") -> Image.Image:
    """A picture that compresses badly, so that every cut removes something."""
    source = Image.frombytes("RGB", (width, height), random.Random(7).randbytes(3 * width * height))
    return source.convert(mode)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def with_thumbnail(jpeg: bytes) -> bytes:
    """A JPEG whose first segment holds a whole JPEG of its own, as cameras write them: it has an end marker too."""
    thumbnail = b"Exif\0\0" + encoded(noise(8, 8), "JPEG")
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail + jpeg[2:]


WHOLE = {
    "png": encoded(noise(), "PNG"),
    "png with 16 bits": encoded(Image.frombytes("I;16", (20, 20), bytes(range(200)) * 4), "PNG"),
    "animated png": encoded(noise(), "PNG", save_all=True, append_images=[noise(61, 47, "L").convert("RGB")]),
    "jpeg": encoded(noise(), "JPEG"),
    "progressive jpeg": encoded(noise(), "JPEG", progressive=True),
    "jpeg with restart markers": encoded(noise(), "JPEG", restart_marker_rows=1),
    "cmyk jpeg": encoded(noise(mode="CMYK"), "JPEG"),
    "jpeg with a thumbnail": with_thumbnail(encoded(noise(), "JPEG")),
    "mpo": encoded(noise(), "MPO", save_all=True, append_images=[noise()]),
    "webp": encoded(noise(), "WEBP"),
    "lossless webp": encoded(noise(), "WEBP", lossless=True),
    "gif": encoded(noise(), "GIF"),
    "animated gif": encoded(noise(), "GIF", save_all=True, append_images=[noise(61, 47, "L"), noise(30, 30)], loop=0),
    "gif with a comment": encoded(noise(5, 5), "GIF", comment=b"c" * 700),
    "bmp": encoded(noise(64), "BMP"),
    "tiff": encoded(noise(), "TIFF"),
    "avif": encoded(noise(), "AVIF"),
    "tga": encoded(noise(), "TGA"),
    "ico": encoded(noise(32, 32), "ICO"),
    "jpeg 2000": encoded(noise(), "JPEG2000"),
}


@pytest.mark.parametrize("form", WHOLE)
def test_a_whole_picture_passes(form: str) -> None:
    check_image(form, WHOLE[form])


@pytest.mark.parametrize("form", ["png", "jpeg", "mpo", "animated gif"])
def test_data_behind_the_end_is_allowed(form: str) -> None:
    check_image(form, WHOLE[form] + b"appended by a phone")


# The first three end in what no pixel of the first picture needs; Pillow takes a JPEG 2000 that is all header.
MAY_LOSE_BYTES = {"ico", "mpo", "tga", "jpeg 2000"}


@pytest.mark.parametrize("form", sorted(WHOLE.keys() - MAY_LOSE_BYTES))
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_every_cut_is_found(form: str, data: st.DataObject) -> None:
    whole = WHOLE[form]
    length = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(MediaInvalid) as caught:
        check_image("photo", whole[:length])
    assert "'photo'" in caught.value.message


@pytest.mark.parametrize("form", WHOLE)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_gives_an_answer_of_ours_and_no_other_exception(form: str, data: st.DataObject) -> None:
    damaged = bytearray(WHOLE[form])
    for position in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=8)):
        damaged[position] ^= data.draw(st.integers(1, 255))
    try:
        check_image("photo", bytes(damaged))
    except MediaInvalid as error:
        assert error.code == "MEDIA_INVALID"


@settings(max_examples=100, deadline=None)
@given(st.integers(8, len(WHOLE["png"]) - 1), st.integers(1, 255))
def test_a_flipped_byte_in_a_png_is_found(position: int, flip: int) -> None:
    damaged = bytearray(WHOLE["png"])
    damaged[position] ^= flip
    with pytest.raises(MediaInvalid):
        check_image("photo", bytes(damaged))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_give_an_answer_of_ours(content: bytes) -> None:
    with pytest.raises(MediaInvalid):
        check_image("photo", content)


def png_without_pixels(width: int, height: int) -> bytes:
    chunks = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


@pytest.mark.parametrize("size", [(60_000, 60_000), (1, MAX_PIXELS + 1)])
def test_a_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    with pytest.raises(MediaInvalid, match="pixels"):
        check_image("bomb.png", png_without_pixels(*size))


def test_the_largest_picture_is_not_called_a_bomb() -> None:
    check_image("large.png", png_without_pixels(1, MAX_PIXELS))


@pytest.mark.parametrize("form", ["EPS", "PDF", "PCX"])
def test_a_format_that_nobody_needs_is_not_even_opened(form: str) -> None:
    """Pillow hands EPS to Ghostscript, and its rarer parsers are a way in for whoever looks for one."""
    with pytest.raises(MediaInvalid, match="under 'files'"):
        check_image("drawing", encoded(noise(), form))


def test_an_empty_file_is_called_empty() -> None:
    with pytest.raises(MediaInvalid, match="is empty"):
        check_image("a.png", b"")


# --- what ComfyUI wrote ---


def box(kind: bytes, body: bytes, *, wide: bool = False) -> bytes:
    """A box of an MP4 file; ``wide``: with a 64-bit size."""
    if wide:
        return struct.pack(">I4sQ", 1, kind, len(body) + 16) + body
    return struct.pack(">I4s", len(body) + 8, kind) + body


MP4 = box(b"ftyp", b"isom") + box(b"mdat", bytes(500), wide=True) + box(b"moov", bytes(40))
FRAGMENTED_MP4 = box(b"ftyp", b"iso5") + box(b"moof", bytes(20)) + struct.pack(">I4s", 0, b"mdat") + bytes(99)


def ends_with_a_box(data: bytes) -> bool:
    """Or with a few bytes more, too few for another one."""
    position = 0
    while position + 8 <= len(data):
        position += int.from_bytes(data[position : position + 4], "big") or len(data)
    return position <= len(data)


GLB = struct.pack("<4sII", b"glTF", 2, 112) + bytes(100)
LATENT_HEADER = b'{"latent_tensor":{"dtype":"F32","shape":[25],"data_offsets":[0,100]},"__metadata__":{"prompt":"{}"}}'
LATENT = struct.pack("<Q", len(LATENT_HEADER)) + LATENT_HEADER + bytes(100)
STRUCTURED = {
    form: data for form, data in WHOLE.items() if form not in ("bmp", "tiff", "tga", "ico", "jpeg 2000", "mpo")
} | {"mp4": MP4, "glb": GLB, "latent": LATENT}


@pytest.mark.parametrize("form", [*WHOLE, "mp4", "fragmented mp4", "glb", "latent", "text", "JSON"])
def test_a_whole_output_is_not_cut_short(form: str) -> None:
    others = {"fragmented mp4": FRAGMENTED_MP4, "text": b"a caption", "JSON": b'[       {"cut": '}
    assert not is_cut_short({**WHOLE, **STRUCTURED, **others}[form])


@pytest.mark.parametrize("form", STRUCTURED)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_an_output_that_lost_its_end_is_cut_short(form: str, data: st.DataObject) -> None:
    whole = STRUCTURED[form]
    kept = data.draw(st.integers(min_value=12, max_value=len(whole) - 2))
    # A box of an MP4 or AVIF file may be its last one: of those, not every cut can be told.
    assert is_cut_short(whole[:kept]) or (whole[4:8] == b"ftyp" and ends_with_a_box(whole[:kept]))


def test_an_empty_output_is_cut_short() -> None:
    assert is_cut_short(b"")


SIGNATURES = [b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"GIF89a", b"RIFF....WEBP", b"....ftyp", b"glTF"]
SIGNATURES.append(b'\x09\0\0\0\0\0\0\0{"')  # safetensors


@given(
    start=st.sampled_from(SIGNATURES),
    rest=st.binary(),
)
def test_any_bytes_are_cut_short_or_not(start: bytes, rest: bytes) -> None:
    assert is_cut_short(start + rest) in (True, False)
