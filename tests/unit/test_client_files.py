"""client.py: pictures as ComfyUI reads them, the names that files are sent by, and the request that carries them."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client_server import STEADY
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

import client

ROOT = Path(__file__).parents[2]
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ORIENTATION = 0x0112


def picture(mode: str = "RGB", size: tuple[int, int] = (48, 32)) -> Image.Image:
    """A red, a green, a blue and a white quarter: no two turns of it are the same, and JPEG keeps them apart."""
    width, height = size
    image = Image.new("RGB", size, "white")
    for colour, corner in {"red": (0, 0), "green": (width // 2, 0), "blue": (0, height // 2)}.items():
        image.paste(colour, (*corner, corner[0] + width // 2, corner[1] + height // 2))
    return image.convert(mode)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def with_orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return exif


def opened(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def same(first: Image.Image, second: Image.Image) -> bool:
    return first.size == second.size and first.convert("RGBA").tobytes() == second.convert("RGBA").tobytes()


def alike(first: Image.Image, second: Image.Image, tolerance: int = 16) -> bool:
    """The same but for what a lossy format changes: of one size, and of nearly one colour in each quarter's middle."""

    def middles(image: Image.Image) -> bytes:
        columns, rows = ((image.width // 4, image.width * 3 // 4), (image.height // 4, image.height * 3 // 4))
        return bytes(value for x in columns for y in rows for value in image.convert("RGB").getpixel((x, y)))

    near = all(abs(a - b) <= tolerance for a, b in zip(middles(first), middles(second), strict=True))
    return first.size == second.size and near


class Folder:
    """A folder in which pictures are written and read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, content: bytes, name: str = "photo.jpg", max_side: int | None = None) -> client.Picture:
        (self.path / name).write_bytes(content)
        return client.read_picture(self.path / name, max_side)

    def refusal(self, content: bytes, name: str = "photo.jpg", max_side: int | None = None) -> str:
        with pytest.raises(client.InputError) as caught:
            self.read(content, name, max_side)
        assert f"{self.path / name} is not an image that can be read" in str(caught.value)
        assert "object at" not in str(caught.value)
        assert str(caught.value).isprintable()
        return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


# --- what stays as it is ---------------------------------------------------------------------------------------------


def palette_with_transparency() -> Image.Image:
    image = picture("P")
    image.info["transparency"] = image.getpixel((0, 0))
    return image


MOVING = {"save_all": True, "append_images": [picture().rotate(180)], "duration": 50}
AS_IT_IS = {
    "png": encoded(picture(), "PNG"),
    "png with alpha": encoded(picture("RGBA"), "PNG"),
    "grey png": encoded(picture("L"), "PNG"),
    "grey png with alpha": encoded(picture("LA"), "PNG"),
    "black and white png": encoded(picture("1"), "PNG"),
    "palette png": encoded(picture("P"), "PNG"),
    "palette png with transparency": encoded(palette_with_transparency(), "PNG"),
    "png with a profile": encoded(picture(), "PNG", icc_profile=SRGB),
    "jpeg": encoded(picture(), "JPEG"),
    "grey jpeg": encoded(picture("L"), "JPEG"),
    "progressive jpeg with a profile": encoded(picture(), "JPEG", progressive=True, icc_profile=SRGB),
    "jpeg with data behind its end": encoded(picture(), "JPEG") + b"appended by a phone",
    "webp": encoded(picture(), "WEBP"),
    "webp with alpha": encoded(picture("RGBA"), "WEBP", lossless=True),
    "gif": encoded(picture("P"), "GIF"),
    "bmp": encoded(picture(), "BMP"),
    "tiff": encoded(picture(), "TIFF"),
    "moving gif": encoded(picture("P"), "GIF", **MOVING),
    "moving webp": encoded(picture(), "WEBP", **MOVING),
    "moving png": encoded(picture(), "PNG", **MOVING),
    "tiff with two pages": encoded(picture(), "TIFF", **MOVING),
}


@pytest.mark.parametrize("form", AS_IT_IS)
def test_what_comfyui_reads_is_sent_byte_for_byte(folder: Folder, form: str) -> None:
    assert folder.read(AS_IT_IS[form]) == client.Picture(AS_IT_IS[form])
    assert folder.read(AS_IT_IS[form], max_side=48) == client.Picture(AS_IT_IS[form])


@pytest.mark.parametrize("form", ["moving gif", "moving webp", "moving png"])
def test_what_moves_is_not_shrunk_and_that_is_said(folder: Folder, form: str) -> None:
    result = folder.read(AS_IT_IS[form], max_side=10)
    assert result.content == AS_IT_IS[form]
    assert "it moves" in result.remark


@pytest.mark.parametrize("value", [0, 1, 9, 65535])
def test_an_orientation_that_turns_nothing_changes_nothing(folder: Folder, value: int) -> None:
    content = encoded(picture(), "JPEG", exif=with_orientation(value))
    assert folder.read(content) == client.Picture(content)


# --- upright ---------------------------------------------------------------------------------------------------------

# How a camera stores a picture under each orientation of Exif 2.3: the turn that is the reverse of the one to show it.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize(("form", "kept"), [("JPEG", "JPEG"), ("PNG", "PNG"), ("WEBP", "PNG")])
@pytest.mark.parametrize("orientation", STORED)
def test_a_turned_picture_is_sent_upright(folder: Folder, orientation: int, form: str, kept: str) -> None:
    content = encoded(picture().transpose(STORED[orientation]), form, exif=with_orientation(orientation), quality=95)
    result = folder.read(content, "photo.png")
    image = opened(result.content)
    assert image.format == kept
    assert result.suffix == {"JPEG": ".jpg", "PNG": ".png"}[kept]
    assert (same if form == "PNG" else alike)(image, picture())
    assert image.getexif().get(ORIENTATION, 1) == 1  # or ComfyUI would turn it once more
    assert result.remark.startswith("upright;")


def test_a_tiff_is_upright_for_who_opens_it(folder: Folder) -> None:
    content = encoded(picture().transpose(STORED[6]), "TIFF", exif=with_orientation(6))
    image = opened(folder.read(content).content)
    assert same(image, picture())
    assert image.getexif().get(ORIENTATION, 1) == 1


# --- formats and colours ---------------------------------------------------------------------------------------------


def test_the_first_picture_of_a_stereo_photo_becomes_a_jpeg(folder: Folder) -> None:
    content = encoded(picture(), "MPO", save_all=True, append_images=[picture().rotate(180)], quality=95)
    result = folder.read(content)
    image = opened(result.content)
    assert (image.format, getattr(image, "n_frames", 1), result.suffix) == ("JPEG", 1, ".jpg")
    assert alike(image, picture())
    assert "from MPO" in result.remark


def test_a_turned_stereo_photo_is_upright(folder: Folder) -> None:
    stored = picture().transpose(STORED[6])
    content = encoded(stored, "MPO", save_all=True, append_images=[stored], exif=with_orientation(6), quality=95)
    assert alike(opened(folder.read(content).content), picture())


@pytest.mark.parametrize(("form", "kept"), [("JPEG", "JPEG"), ("TIFF", "PNG")])
def test_print_colours_become_rgb(folder: Folder, form: str, kept: str) -> None:
    result = folder.read(encoded(picture("CMYK"), form, quality=95))
    image = opened(result.content)
    assert (image.format, image.mode) == (kept, "RGB")
    assert alike(image, picture())
    assert "RGB instead of CMYK" in result.remark


LEVELS = range(256)
WIDE = struct.pack("<256H", *(level * 257 for level in LEVELS))


def levels_of(result: client.Picture) -> list[int]:
    image = opened(result.content)
    assert (image.format, image.mode, result.suffix) == ("PNG", "L", ".png")
    return list(image.tobytes())


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_to_eight(folder: Folder, form: str) -> None:
    result = folder.read(encoded(Image.frombytes("I;16", (256, 1), WIDE), form), "depth.png")
    assert levels_of(result) == list(LEVELS)
    assert "8 bits instead of I;16" in result.remark


def test_sixteen_bits_in_the_other_byte_order_are_the_same(folder: Folder) -> None:
    swapped = struct.pack(">256H", *(level * 257 for level in LEVELS))
    assert levels_of(folder.read(encoded(Image.frombytes("I;16B", (256, 1), swapped), "TIFF"))) == list(LEVELS)


def test_a_dark_picture_of_sixteen_bits_stays_dark(folder: Folder) -> None:
    content = encoded(Image.new("I;16", (4, 4), 257 * 3), "PNG")
    assert set(levels_of(folder.read(content))) == {3}


def numbers(mode: str, values: list[float]) -> bytes:
    image = Image.new(mode, (len(values), 1))
    for column, value in enumerate(values):
        image.putpixel((column, 0), value)
    return encoded(image, "TIFF")


def test_floats_from_0_to_1_are_scaled_and_larger_ones_by_their_largest(folder: Folder) -> None:
    assert levels_of(folder.read(numbers("F", [level / 255 for level in LEVELS]))) == list(LEVELS)
    assert levels_of(folder.read(numbers("F", [float(level) for level in LEVELS]))) == list(LEVELS)
    assert levels_of(folder.read(numbers("F", [0.0, 0.2]))) == [0, 51]
    assert levels_of(folder.read(numbers("F", [-3.0, 1.0, 0.0]))) == [0, 255, 0]


def test_whole_numbers_of_32_bits_are_scaled_by_their_largest(folder: Folder) -> None:
    assert levels_of(folder.read(numbers("I", [0, 2**31 - 1]))) == [0, 255]
    assert levels_of(folder.read(numbers("I", [0, 257 * 200]))) == [0, 200]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -1e38, 3e38])
def test_odd_floats_are_no_exception(folder: Folder, value: float) -> None:
    assert len(levels_of(folder.read(numbers("F", [value, 0.5])))) == 2


def test_avif_is_written_anew_with_its_transparency(folder: Folder) -> None:
    result = folder.read(encoded(picture(), "AVIF", quality=95), "photo.avif")
    image = opened(result.content)
    assert (image.format, result.suffix) == ("JPEG", ".jpg")
    assert alike(image, picture())
    assert "from AVIF" in result.remark
    clear = picture("RGBA")
    clear.putalpha(0)
    result = folder.read(encoded(clear, "AVIF"), "photo.avif")
    assert (opened(result.content).format, result.suffix) == ("PNG", ".png")
    assert opened(result.content).getextrema()[3] == (0, 0)


@pytest.mark.parametrize("form", ["JPEG2000", "TGA", "PPM", "ICO", "PCX"])
def test_formats_that_not_every_comfyui_reads_become_png(folder: Folder, form: str) -> None:
    result = folder.read(encoded(picture(size=(32, 32)), form))
    assert (opened(result.content).format, result.suffix) == ("PNG", ".png")
    assert same(opened(result.content), picture(size=(32, 32)))
    assert f"from {form}" in result.remark


def test_of_several_pictures_in_a_format_that_does_not_move_the_first_is_taken(folder: Folder) -> None:
    dark = Image.new("I;16", (4, 4), 0)
    pages = encoded(Image.new("I;16", (4, 4), 65535), "TIFF", save_all=True, append_images=[dark])
    result = folder.read(pages, "scan.tif")
    assert set(levels_of(result)) == {255}
    assert "the first of 2 pictures" in result.remark
    burst = encoded(picture(), "AVIF", save_all=True, append_images=[picture().rotate(180)], quality=95)
    result = folder.read(burst, "burst.avif")
    assert alike(opened(result.content), picture())
    assert "the first of 2 pictures" in result.remark


def test_a_colour_profile_stays_where_the_colours_do(folder: Folder) -> None:
    turned = encoded(picture(), "JPEG", exif=with_orientation(3), icc_profile=SRGB)
    assert opened(folder.read(turned).content).info["icc_profile"] == SRGB
    shrunk = folder.read(encoded(picture(), "PNG", icc_profile=SRGB), max_side=16)
    assert opened(shrunk.content).info["icc_profile"] == SRGB
    printed = folder.read(encoded(picture("CMYK"), "JPEG", icc_profile=b"a profile of CMYK"))
    assert "icc_profile" not in opened(printed.content).info


def test_nothing_of_the_camera_is_sent_with_a_picture_that_is_written_anew(folder: Folder) -> None:
    exif = with_orientation(6)
    exif[0x010F] = "maker of the camera"
    assert b"maker" not in folder.read(encoded(picture(), "JPEG", exif=exif)).content


# --- --max-side ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "max_side", "expected"),
    [((48, 32), 24, (24, 16)), ((32, 48), 24, (16, 24)), ((400, 2), 10, (10, 1)), ((48, 32), 1, (1, 1))],
)
def test_a_large_picture_is_shrunk_in_proportion(
    folder: Folder, size: tuple[int, int], max_side: int, expected: tuple[int, int]
) -> None:
    result = folder.read(encoded(picture(size=size), "PNG"), max_side=max_side)
    assert opened(result.content).size == expected
    told = f"{expected[0]} x {expected[1]} instead of {size[0]} x {size[1]}; "
    assert result.remark.startswith(told)
    assert result.remark.endswith(" MB")


@pytest.mark.parametrize("max_side", [48, 49, 100_000])
def test_a_picture_that_is_small_enough_is_not_touched(folder: Folder, max_side: int) -> None:
    content = encoded(picture(), "JPEG")
    assert folder.read(content, max_side=max_side) == client.Picture(content)


@pytest.mark.parametrize(
    ("mode", "form", "kept"),
    [
        *[("RGB", "JPEG", ("JPEG", "RGB")), ("L", "JPEG", ("JPEG", "L")), ("CMYK", "JPEG", ("JPEG", "RGB"))],
        *[("RGBA", "PNG", ("PNG", "RGBA")), ("LA", "PNG", ("PNG", "LA")), ("P", "PNG", ("PNG", "RGBA"))],
        *[("1", "PNG", ("PNG", "L")), ("RGBA", "WEBP", ("PNG", "RGBA")), ("P", "GIF", ("PNG", "RGBA"))],
        *[("I;16", "PNG", ("PNG", "L")), ("F", "TIFF", ("PNG", "L")), ("PA", "TIFF", ("PNG", "RGBA"))],
    ],
)
def test_every_kind_of_picture_can_be_shrunk(folder: Folder, mode: str, form: str, kept: tuple[str, str]) -> None:
    image = Image.new("I;16", (48, 32), 7) if mode == "I;16" else picture("P" if mode == "PA" else mode).convert(mode)
    if mode == "RGBA":
        image.putalpha(128)
    image = opened(folder.read(encoded(image, form), max_side=24).content)
    assert (image.format, image.mode, image.size) == (*kept, (24, 16))


def test_transparent_parts_of_a_palette_stay_transparent(folder: Folder) -> None:
    image = opened(folder.read(AS_IT_IS["palette png with transparency"], max_side=24).content)
    assert image.getpixel((2, 2))[3] == 0
    assert image.getpixel((20, 12)) == (255, 255, 255, 255)


def test_a_turned_picture_is_measured_and_shrunk_upright(folder: Folder) -> None:
    stored = encoded(picture().transpose(STORED[6]), "JPEG", exif=with_orientation(6), quality=95)
    result = folder.read(stored, max_side=24)
    assert alike(opened(result.content), picture(size=(24, 16)))
    assert result.remark.startswith("upright, 24 x 16 instead of 48 x 32;")


# --- what is no picture ----------------------------------------------------------------------------------------------


def cut(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


NOISE = Image.frombytes("RGB", (64, 64), random.Random(7).randbytes(3 * 64 * 64))


def with_bytes(content: bytes, place: int, new: bytes) -> bytes:
    assert 0 <= place < len(content) - len(new)
    return content[:place] + new + content[place + len(new) :]


WHOLE_AVIF = encoded(NOISE, "AVIF")
NO_PICTURES = {
    # Pillow raises RuntimeError for the first and NotImplementedError for the second.
    "an avif of other bytes": with_bytes(WHOLE_AVIF, WHOLE_AVIF.index(b"mdat") + 4, b"\xff" * 40),
    "a dds of an unknown format": with_bytes(encoded(NOISE, "DDS"), 80, bytes(4)),
    "text": b"not a picture",
    "a page": b"<!doctype html><title>404</title>",
    "a video": b"\x00\x00\x00\x18ftypmp42" + bytes(100),
    "only a signature": b"\x89PNG\r\n\x1a\n",
    "zeros": bytes(1000),
    **{f"a cut {form}": cut(encoded(NOISE, form)) for form in ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")},
    "a broken png": encoded(NOISE, "PNG")[:200] + bytes(200) + encoded(NOISE, "PNG")[400:],
}


@pytest.mark.parametrize("name", NO_PICTURES)
def test_what_cannot_be_decoded_to_the_end_is_refused(folder: Folder, name: str) -> None:
    folder.refusal(NO_PICTURES[name])


def test_an_empty_file_is_said_to_be_empty(folder: Folder) -> None:
    assert folder.refusal(b"").endswith("it is empty")


def test_a_file_that_is_not_there_or_is_none_is_named(tmp_path: Path) -> None:
    for path, says in (
        (tmp_path / "missing.png", "there is no image"),
        (tmp_path, "Is a directory"),
        (Path("a\0b.png"), "cannot be read"),
        (Path("\ud800.png"), "cannot be read"),
    ):
        with pytest.raises(client.InputError, match=says):
            client.read_picture(path)


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces this size and has no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_before_it_goes_off(folder: Folder) -> None:
    assert "exceeds limit" in folder.refusal(png_header(50_000, 50_000))


def test_a_very_large_picture_is_no_python_warning(folder: Folder, recwarn: pytest.WarningsRecorder) -> None:
    folder.refusal(png_header(10_000, 9_500))
    assert [str(warning.message) for warning in recwarn] == []


DAMAGED = {
    **AS_IT_IS,
    "turned jpeg": encoded(picture(), "JPEG", exif=with_orientation(6)),
    "turned png": encoded(picture(), "PNG", exif=with_orientation(6)),
    "stereo photo": encoded(picture(), "MPO", save_all=True, append_images=[picture()]),
    "cmyk jpeg": encoded(picture("CMYK"), "JPEG"),
    "wide png": encoded(Image.frombytes("I;16", (256, 1), WIDE), "PNG"),
    "float tiff": encoded(picture("F"), "TIFF"),
    **{form: encoded(picture(size=(32, 32)), form) for form in ("AVIF", "JPEG2000", "ICO", "TGA", "DDS", "PCX", "SGI")},
}


@settings(STEADY, max_examples=400)
@given(st.sampled_from(sorted(DAMAGED)), st.data(), st.sampled_from([None, 8]))
def test_a_damaged_picture_is_a_picture_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, form: str, data: st.DataObject, max_side: int | None
) -> None:
    content = bytearray(DAMAGED[form])
    for place in data.draw(st.lists(st.integers(0, len(content) - 1) | st.integers(0, 60), max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    length = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    path = tmp_path_factory.getbasetemp() / "damaged.bin"
    path.write_bytes(content[:length])
    try:
        result = client.read_picture(path, max_side)
    except client.InputError:
        return
    opened(result.content)


# --- HEIC, with a plug-in that is installed or not -------------------------------------------------------------------

PLUG_IN = '''
"""Stands in for pillow_heif: reads what begins with HEIC, the rest being pictures with the length of each before it."""
import io, struct
from PIL import Image, ImageFile

class Heif(ImageFile.ImageFile):
    format = "HEIF"

    def _open(self):
        content, self.parts = self.fp.read()[4:], []
        while content:
            size, = struct.unpack(">I", content[:4])
            self.parts.append(content[4 : 4 + size])
            content = content[4 + size :]
        self.n_frames = len(self.parts)
        self.inner = Image.open(io.BytesIO(self.parts[0]))
        self._size, self._mode, self.tile = self.inner.size, self.inner.mode, []

    def load(self):
        self.im = self.inner.convert(self._mode).im
        return super().load()

def register_heif_opener():
    Image.register_open("HEIF", Heif, lambda prefix: prefix[:4] == b"HEIC")
'''


def heic(*images: Image.Image) -> bytes:
    parts = [encoded(image, "PNG") for image in images]
    return b"HEIC" + b"".join(struct.pack(">I", len(part)) + part for part in parts)


def test_without_the_plug_in_a_heic_is_refused_with_the_way_to_get_it(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert "pip install pillow-heif" in folder.refusal(heic(picture()), "IMG_0001.HEIC")
    assert "pillow-heif" not in folder.refusal(heic(picture()), "IMG_0001.png")


@pytest.mark.parametrize(("images", "says"), [(1, "from HEIF;"), (2, "from HEIF, the first of 2 pictures;")])
def test_with_the_plug_in_a_heic_becomes_a_jpeg(tmp_path: Path, images: int, says: str) -> None:
    (tmp_path / "pillow_heif.py").write_text(PLUG_IN)
    (tmp_path / "IMG_0001.HEIC").write_bytes(heic(picture(), *[picture().rotate(180)] * (images - 1)))
    program = (
        "import client, pathlib, sys; result = client.read_picture(pathlib.Path('IMG_0001.HEIC')); "
        "pathlib.Path('read' + result.suffix).write_bytes(result.content); print(result.remark)"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", program]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert process.stderr == ""
    assert process.stdout.startswith(says)
    image = Image.open(tmp_path / "read.jpg")
    assert image.format == "JPEG"
    assert alike(image, picture())


# --- names -----------------------------------------------------------------------------------------------------------


class Given:
    """--img and --file with files of a folder; what is in the job then."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.job = client.Job({key: {"class_type": "LoadImage", "inputs": {"image": "x"}} for key in ("4", "57:8")})

    def write(self, name: str, content: bytes | None = None) -> str:
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(picture(), "PNG") if content is None else content)
        return str(path)

    def read(self, *arguments: str) -> list[tuple[str, str, str | None]]:
        options = client.build_parser().parse_args(arguments)
        return [tuple(file) for file in client.read_given(self.job.workflow, options, self.job, client.Console(True))]


@pytest.fixture
def given_files(tmp_path: Path) -> Iterator[Given]:
    yield Given(tmp_path)


def test_two_files_of_one_name_do_not_collide(given_files: Given) -> None:
    first, second = given_files.write("a/in.png"), given_files.write("b/in.png", AS_IT_IS["png with alpha"])
    third, sound = given_files.write("c/IN.png"), given_files.write("d/in.png", b"sound")
    files = given_files.read("--img", first, second, third, "--file", sound)
    assert [file[0] for file in files] == ["in.png", "in_1.png", "IN_2.png", "in_3.png"]
    assert given_files.job.images["in_1.png"] == AS_IT_IS["png with alpha"]
    assert given_files.job.files == {"in_3.png": b"sound"}


def test_the_same_file_twice_is_sent_under_two_names(given_files: Given) -> None:
    path = given_files.write("in.png")
    assert [file[0] for file in given_files.read("--img", path, path)] == ["in.png", "in_1.png"]


def test_the_end_of_a_name_follows_the_new_format(given_files: Given) -> None:
    avif = given_files.write("photo.avif", encoded(picture(), "AVIF"))
    wide = given_files.write("depth.TIF", encoded(Image.frombytes("I;16", (256, 1), WIDE), "TIFF"))
    none = given_files.write("noend", encoded(picture("CMYK"), "JPEG"))
    dots = given_files.write("a.b.webp", encoded(picture(), "WEBP", exif=with_orientation(6)))
    kept = given_files.write("kept.JPEG", encoded(picture(), "JPEG"))
    names = [file[0] for file in given_files.read("--img", avif, wide, none, dots, kept)]
    assert names == ["photo.jpg", "depth.png", "noend.jpg", "a.b.png", "kept.JPEG"]


def test_names_are_plain_whatever_the_file_is_called(given_files: Given) -> None:
    odd = [given_files.write(name) for name in ("con.png", ".hidden.png", "new\nline.png", "a:b*c.png", "猫.png")]
    names = [file[0] for file in given_files.read("--img", *odd)]
    assert names == ["_con.png", "hidden.png", "new_line.png", "a_b_c.png", "猫.png"]


def test_a_node_can_be_named_and_a_file_name_can_have_an_equals_sign(
    given_files: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(given_files.path)
    for name in ("a.png", "6=b.png", "x=c.png"):
        given_files.write(name)
    assert given_files.read("--img", "57:8=a.png", "6=b.png", "x=c.png") == [
        *[("a.png", "image", "57:8"), ("6=b.png", "image", None), ("x=c.png", "image", None)]
    ]
    with pytest.raises(client.InputError, match="there is no node 7"):
        given_files.read("--img", "7=a.png")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[("a.mp4", "video"), ("a.webm", "video"), ("a.wav", "audio"), ("a.MP3", "audio")],
        *[("a.glb", "file"), ("a.gif", "file"), ("a", "file")],
    ],
)
def test_the_kind_of_a_file_is_known_by_its_name_and_its_content_is_not_looked_at(
    given_files: Given, name: str, kind: str
) -> None:
    assert given_files.read("--file", given_files.write(name, b"")) == [(name, kind, None)]
    assert given_files.job.files == {name: b""}


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://host/folder/a.png?size=1#x", "a.png"),
        ("HTTPS://host/a.png", "a.png"),
        ("https://host/", "image"),
        ("https://host", "image"),
        ("https://host/%2e%2e/..", "image"),
        ("https://host/..\\..\\con", "_con"),
    ],
)
def test_an_address_is_sent_as_it_is(given_files: Given, url: str, name: str) -> None:
    assert given_files.read("--img", f"4={url}") == [(name, "image", "4")]
    assert given_files.job.images == {name: url}


def test_an_address_without_encryption_is_refused(given_files: Given) -> None:
    with pytest.raises(client.InputError, match="only https addresses"):
        given_files.read("--img", "4=http://host/a.png")


def test_the_home_folder_is_known_behind_the_name_of_a_node(
    given_files: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(given_files.path))
    given_files.write("a.png")
    assert given_files.read("--img", "4=~/a.png") == [("a.png", "image", "4")]


def test_an_address_that_is_none_is_an_input_error(given_files: Given) -> None:
    with pytest.raises(client.InputError, match="no URL"):
        given_files.read("--img", "https://[::1/a.png")


# --- the request -----------------------------------------------------------------------------------------------------

WORKFLOW: client.Workflow = {"4": {"class_type": "LoadImage", "inputs": {"image": "in.png"}}}


def body(job: client.Job) -> Any:
    return json.loads(client.request_body(job))


def test_a_request_has_the_files_in_base64_and_addresses_as_they_are() -> None:
    job = client.Job(WORKFLOW, {"in.png": b"\x00\xff", "b": "https://host/b"}, {"a.mp4": b"film"}, timeout_s=90)
    job.wishes = {"debug": True, "output_format": "webp", "output_quality": 80}
    assert body(job) == {
        "input": {
            "workflow": WORKFLOW,
            "images": {"in.png": base64.b64encode(b"\x00\xff").decode(), "b": "https://host/b"},
            "files": {"a.mp4": base64.b64encode(b"film").decode()},
            "debug": True,
            "output_format": "webp",
            "output_quality": 80,
        },
        "policy": {"executionTimeout": 90_000},
    }


def test_a_request_without_files_and_wishes_has_only_the_workflow() -> None:
    assert body(client.Job(WORKFLOW))["input"] == {"workflow": WORKFLOW}


@pytest.mark.parametrize(("timeout_s", "sent_ms"), [(1, 5_000), (5, 5_000), (5.0004, 5_000), (1800.5, 1_800_500)])
def test_the_timeout_is_sent_in_milliseconds_and_not_below_what_runpod_takes(timeout_s: float, sent_ms: int) -> None:
    assert body(client.Job(WORKFLOW, timeout_s=timeout_s))["policy"] == {"executionTimeout": sent_ms}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), [float("-inf")], nested(100_000)], ids=["nan", "inf", "in a list", "deep"]
)
def test_what_json_cannot_hold_is_an_input_error(value: Any) -> None:
    with pytest.raises(client.InputError, match="cannot be sent as JSON"):
        client.request_body(client.Job({"4": {"class_type": "X", "inputs": {"a": value}}}))


def test_text_that_is_no_unicode_is_sent_as_it_came() -> None:
    workflow: client.Workflow = {"4": {"class_type": "X", "inputs": {"text": "\ud800 猫 \x00"}}}
    assert body(client.Job(workflow))["input"]["workflow"] == workflow


def large(**sizes: int) -> client.Job:
    return client.Job(WORKFLOW, {f"{name}.png": bytes(size) for name, size in sizes.items()})


def warning(job: client.Job, sync: bool = False) -> str | None:
    return client.size_warning(job, len(client.request_body(job)), sync)


def test_a_request_that_fits_is_no_warning() -> None:
    assert warning(large(a=7_400_000)) is None
    assert warning(large(a=14_900_000), sync=True) is None
    for sync, limit_bytes in ((False, 10_000_000), (True, 20_000_000)):
        assert client.size_warning(client.Job(WORKFLOW), limit_bytes, sync) is None
        assert client.size_warning(client.Job(WORKFLOW), limit_bytes + 1, sync) is not None


def test_a_request_that_does_not_fit_tells_each_size_and_what_helps() -> None:
    said = warning(large(room=6_000_000, chair=3_000_000))
    assert said is not None
    assert "the request has 12.0 MB (room.png 8.0 MB, chair.png 4.0 MB) and RunPod takes 10 MB" in said
    assert "--max-side" in said
    assert "--sync, which takes 20 MB" in said


def test_sync_is_not_advised_where_it_does_not_help() -> None:
    for said in (warning(large(a=16_000_000)), warning(large(a=16_000_000), sync=True)):
        assert said is not None
        assert "--sync" not in said
        assert "--max-side" in said
    assert "takes 20 MB" in str(warning(large(a=16_000_000), sync=True))


def test_files_that_are_no_pictures_are_listed_too() -> None:
    job = client.Job(WORKFLOW, {"a.png": b"1"}, {"clip.mp4": bytes(9_000_000)})
    assert "clip.mp4 12.0 MB" in str(warning(job))
