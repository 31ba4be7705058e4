"""Pictures in the format that a job asks for: what is kept, what is left alone, and what the caller is told."""

import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops
from PIL.PngImagePlugin import PngInfo

from tests.unit.test_media import encoded
from worker import reencode
from worker.errors import JobTimeout, OutputDamaged
from worker.outputs import Output
from worker.payload import OutputFormat
from worker.ramdisk import RamDisk

GRADIENT = Image.merge("RGB", [Image.linear_gradient(mode).resize((60, 40)) for mode in "LLL"])
NOISE = Image.merge("RGB", [Image.effect_noise((60, 40), 80) for _ in "RGB"])
FADING = GRADIENT.copy()
FADING.putalpha(Image.linear_gradient("L").rotate(90).resize((60, 40)))
SIXTEEN_BIT = Image.frombytes("I;16", (16, 16), b"".join((257 * level).to_bytes(2, "little") for level in range(256)))


class Bench:
    """Outputs on a RAM disk, re-encoded."""

    def __init__(self, path: Path) -> None:
        for name in ("output", "temp"):
            (path / name).mkdir()
        self.ramdisk = RamDisk(path)
        self.warnings: list[str] = []

    def put(self, name: str, content: bytes) -> Output:
        (self.ramdisk.root / "output" / name).write_bytes(content)
        return Output("9", name).seen(self.ramdisk)

    def run(
        self, outputs: list[Output], name: str, quality: int | None = None, check: Any = lambda: None
    ) -> list[Output]:
        wanted = OutputFormat(name, quality)
        return reencode.reencoded(outputs, self.ramdisk, wanted, check=check, warn=self.warnings.append)

    def one(self, name: str, content: bytes, wanted: str, quality: int | None = None) -> Output:
        (output,) = self.run([self.put(name, content)], wanted, quality)
        return output

    def is_unchanged(self, output: Output, name: str, content: bytes) -> bool:
        return output.filename == name and output.read(self.ramdisk) == content


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def picture(output: Output) -> Image.Image:
    assert output.data is not None
    return Image.open(io.BytesIO(output.data))


def difference(left: Image.Image, right: Image.Image) -> int:
    assert (left.mode, left.size) == (right.mode, right.size)
    return max(int(band.getextrema()[1]) for band in ImageChops.difference(left, right).split())


@pytest.mark.parametrize(
    ("wanted", "name", "media_type"),
    [("webp", "a.webp", "image/webp"), ("jpeg", "a.jpg", "image/jpeg"), ("png", "a.png", "image/png")],
)
def test_name_media_type_and_size_follow_the_format(bench: Bench, wanted: str, name: str, media_type: str) -> None:
    source = encoded(GRADIENT, "BMP")
    output = bench.one("a.bmp", source, wanted)
    assert (output.filename, output.media_type, output.category) == (name, media_type, "images")
    assert output.size_bytes(bench.ramdisk) == len(output.read(bench.ramdisk)) < len(source)
    assert difference(picture(output).convert("RGB"), GRADIENT) <= 8
    assert bench.warnings == []


@pytest.mark.parametrize(("wanted", "form"), [("webp", "WEBP"), ("jpeg", "JPEG"), ("png", "PNG")])
def test_a_picture_of_that_format_is_left_byte_for_byte(bench: Bench, wanted: str, form: str) -> None:
    source = encoded(NOISE, form)
    assert bench.is_unchanged(bench.one("a.xyz", source, wanted), "a.xyz", source)
    assert bench.warnings == []


def test_a_quality_is_applied_also_to_a_picture_of_that_format(bench: Bench) -> None:
    for wanted, form in (("webp", "WEBP"), ("jpeg", "JPEG")):
        source = encoded(NOISE, form, quality=95)
        sizes = [bench.one("a.img", source, wanted, quality).size_bytes(bench.ramdisk) for quality in (1, 50, 90)]
        assert sizes == sorted(sizes)
        assert sizes[0] < sizes[2] < len(source)


def test_all_that_is_no_picture_stays(bench: Bench) -> None:
    outputs = [
        bench.put("a.mp4", b"1"),
        bench.put("a.flac", b"fLaC"),
        bench.put("a.glb", b"3"),
        bench.put("a.txt", b""),
    ]
    assert bench.run(outputs, "webp", 50) == outputs
    assert bench.warnings == []


def test_order_and_other_outputs_are_kept(bench: Bench) -> None:
    names = [f"a{number}.png" for number in range(3)]
    outputs = [bench.put(name, encoded(NOISE, "PNG")) for name in names]
    outputs.insert(1, bench.put("b.mp4", b"1"))
    outputs.append(Output("7", "websocket_00001_.png", data=encoded(NOISE, "PNG")))
    done = bench.run(outputs, "webp")
    assert [output.filename for output in done] == ["a0.webp", "b.mp4", "a1.webp", "a2.webp", "websocket_00001_.webp"]
    assert [output.node_id for output in done] == [output.node_id for output in outputs]


def test_no_two_outputs_get_one_name(bench: Bench) -> None:
    outputs = [bench.put(name, encoded(NOISE, "PNG")) for name in ("a.png", "a.bmp")]
    outputs.append(bench.put("b.png", encoded(NOISE, "PNG")))
    outputs.append(bench.put("b.webp", encoded(NOISE, "WEBP")))
    names = [output.filename for output in bench.run(outputs, "webp")]
    assert names == ["a.webp", "a.bmp.webp", "b.png.webp", "b.webp"]


def test_alpha_is_kept_or_flattened_on_white_with_a_warning(bench: Bench) -> None:
    for source in (encoded(FADING, "PNG"), encoded(FADING, "WEBP", lossless=True)):
        for wanted in ("png", "webp"):
            with Image.open(io.BytesIO(bench.one("a.img", source, wanted).read(bench.ramdisk))) as image:
                assert difference(image.getchannel("A"), FADING.getchannel("A")) == 0
    assert bench.warnings == []
    flat = picture(bench.one("a.png", encoded(FADING, "PNG"), "jpeg"))
    oracle = Image.new("RGB", FADING.size, "white")
    oracle.paste(FADING, mask=FADING.getchannel("A"))
    assert difference(flat, oracle) <= 8
    assert bench.warnings == [
        "The picture 'a.png' has transparent parts, which are white now: JPEG has no transparency."
    ]


def test_an_alpha_without_transparency_is_no_warning(bench: Bench) -> None:
    bench.one("a.png", encoded(GRADIENT.convert("RGBA"), "PNG"), "jpeg")
    assert bench.warnings == []


def animation(form: str, **options: Any) -> bytes:
    turned = [NOISE.rotate(180), NOISE.transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
    return encoded(NOISE, form, save_all=True, append_images=turned, duration=[100, 250, 40], **options)


@pytest.mark.parametrize("wanted", ["webp", "png"])
@pytest.mark.parametrize(
    ("form", "options", "plays"),
    [
        ("PNG", {"loop": 0}, 0),
        ("PNG", {"loop": 3}, 3),
        ("WEBP", {"loop": 0}, 0),
        ("WEBP", {"loop": 2}, 2),
        ("GIF", {}, 1),
        ("GIF", {"loop": 0}, 0),
        ("GIF", {"loop": 2}, 3),
    ],
)
def test_an_animation_keeps_its_frames_their_times_and_how_often_it_plays(
    bench: Bench, wanted: str, form: str, options: dict[str, int], plays: int
) -> None:
    output = bench.one("a.img", animation(form, **options), wanted, None if wanted == "png" else 80)
    with Image.open(io.BytesIO(output.read(bench.ramdisk))) as image:
        durations = []
        for number in range(image.n_frames):  # type: ignore[attr-defined]
            image.seek(number)
            image.load()
            durations.append(image.info["duration"])
        assert (durations, image.info["loop"]) == ([100, 250, 40], plays)
    assert bench.warnings == []


def test_an_animation_is_left_alone_by_jpeg(bench: Bench) -> None:
    source = animation("WEBP")
    assert bench.is_unchanged(bench.one("a.webp", source, "jpeg"), "a.webp", source)
    (warning,) = bench.warnings
    assert warning == "The picture 'a.webp' is returned as it is: it is an animation, and JPEG has none."


@pytest.mark.parametrize(("form", "name"), [("TIFF", "a.tif"), ("MPO", "a.jpg")])
def test_several_pictures_that_are_no_animation_are_left_alone(bench: Bench, form: str, name: str) -> None:
    source = encoded(NOISE, form, save_all=True, append_images=[GRADIENT])
    assert bench.is_unchanged(bench.one(name, source, "webp"), name, source)
    assert "no animation" in bench.warnings[0]


@pytest.mark.parametrize("wanted", ["png", "webp", "jpeg"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBX", "CMYK", "YCbCr"])
def test_a_picture_of_any_mode_looks_the_same(bench: Bench, wanted: str, mode: str) -> None:
    source = GRADIENT.convert("P").convert("PA") if mode == "PA" else GRADIENT.convert(mode)
    form, name = ("TIFF", "a.tif") if mode in ("PA", "RGBX", "CMYK", "YCbCr") else ("PNG", "a.png")
    output = bench.one(name, encoded(source, form), wanted, None if wanted == "png" else 95)
    assert output.media_type == f"image/{wanted}"
    with Image.open(io.BytesIO(output.read(bench.ramdisk))) as image:
        assert difference(image.convert("RGB"), source.convert("RGB")) <= 40  # "1" is all edges
    assert bench.warnings == []


def test_sixteen_bits_of_grey_become_eight_and_are_not_cut_off(bench: Bench) -> None:
    source = encoded(SIXTEEN_BIT, "TIFF")
    assert picture(bench.one("a.tif", source, "png")).tobytes() == SIXTEEN_BIT.tobytes()
    eight = Image.frombytes("L", (16, 16), bytes(range(256)))
    assert difference(picture(bench.one("a.tif", source, "jpeg", 100)), eight) <= 2
    assert difference(picture(bench.one("a.tif", source, "webp", 100)).convert("L"), eight) <= 4


@pytest.mark.parametrize("mode", ["I", "F"])
def test_levels_that_no_format_holds_are_left_alone(bench: Bench, mode: str) -> None:
    source = encoded(Image.new(mode, (4, 4), 70_000), "TIFF")
    assert bench.is_unchanged(bench.one("a.tif", source, "webp"), "a.tif", source)
    assert "more than 16 bits" in bench.warnings[0]


@pytest.mark.parametrize(("wanted", "side"), [("webp", 16_384), ("jpeg", 65_501)])
def test_a_picture_that_the_format_has_no_room_for_is_left_alone(bench: Bench, wanted: str, side: int) -> None:
    source = encoded(Image.new("L", (side, 1)), "PNG")
    assert bench.is_unchanged(bench.one("a.png", source, wanted), "a.png", source)
    assert f"at most {side - 1} pixels a side" in bench.warnings[0]
    largest = picture(bench.one("b.png", encoded(Image.new("L", (side - 1, 1)), "PNG"), wanted))
    assert largest.size == (side - 1, 1)


@pytest.mark.parametrize(("name", "content"), [("a.svg", b"<svg/>"), ("a.exr", b"v/1\x01"), ("a.bmp", b"BM broken")])
def test_what_pillow_cannot_read_is_left_alone(bench: Bench, name: str, content: bytes) -> None:
    assert bench.is_unchanged(bench.one(name, content, "webp"), name, content)
    (warning,) = bench.warnings
    assert warning.startswith(f"The picture {name!r} is returned as it is: Pillow says ")


def test_a_file_that_is_cut_short_is_a_failure_as_ever(bench: Bench) -> None:
    with pytest.raises(OutputDamaged):
        bench.one("a.png", encoded(NOISE, "PNG")[:-20], "webp")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "TGA", "ICO"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_picture_is_re_encoded_left_alone_or_a_failure(form: str, data: st.DataObject) -> None:
    damaged = bytearray(encoded(NOISE, form))
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(damaged[: data.draw(st.integers(len(damaged) // 2, len(damaged)))])
    wanted = data.draw(st.sampled_from(["webp", "jpeg", "png"]))
    told: list[str] = []
    given_output, disk = Output("1", "a.bmp", data=content), RamDisk(Path("/no/ramdisk"))
    try:
        (done,) = reencode.reencoded([given_output], disk, OutputFormat(wanted), check=lambda: None, warn=told.append)
    except OutputDamaged:
        return
    if done == given_output:
        assert told or given_output.media_type == f"image/{wanted}"
    else:
        picture(done).load()
        assert picture(done).format == wanted.upper()


def test_a_picture_is_turned_upright(bench: Bench) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image = picture(bench.one("a.jpg", encoded(GRADIENT, "JPEG", exif=exif, quality=95), "webp"))
    assert image.size == (40, 60)
    assert not image.getexif()


def test_the_workflow_in_the_file_is_not_carried_over_and_the_colour_profile_is(bench: Bench) -> None:
    info = PngInfo()
    info.add_text("prompt", "MARKER of the workflow")
    source = encoded(GRADIENT, "PNG", pnginfo=info, icc_profile=b"PROFILE of the colours")
    for wanted in ("webp", "jpeg"):
        content = bench.one("a.png", source, wanted).read(bench.ramdisk)
        assert b"MARKER" not in content
        assert b"PROFILE of the colours" in content
    commented = encoded(GRADIENT, "JPEG", comment=b"MARKER", xmp=b"MARKER")
    assert b"MARKER" not in bench.one("a.jpg", commented, "jpeg", 80).read(bench.ramdisk)
    exif = Image.Exif()
    exif[0x0110] = "prompt:MARKER"  # where SaveAnimatedWEBP has it
    assert b"MARKER" not in bench.one("a.webp", encoded(GRADIENT, "WEBP", exif=exif), "png").read(bench.ramdisk)
    assert b"MARKER" not in bench.one("a.webp", animation("WEBP", exif=exif), "png").read(bench.ramdisk)


def test_a_deadline_is_seen_before_each_picture(bench: Bench) -> None:
    def check() -> None:
        raise JobTimeout("over")

    with pytest.raises(JobTimeout):
        bench.run([bench.put("a.png", encoded(NOISE, "PNG"))], "webp", check=check)
