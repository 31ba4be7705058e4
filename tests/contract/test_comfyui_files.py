"""Files: names, folders, PNG metadata, refused prefixes, /view; and the pixels of the image nodes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from comfyui_client import ComfyUI, Workflow, empty, save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, ImageStat

TYPES_OF_REFUSED_VALUES = {"invalid_input_type", "value_smaller_than_min", "value_bigger_than_max"}


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def photograph() -> Image.Image:
    """An uneven picture that holds all 256 values in every channel, of odd size."""
    width, height = 97, 61
    pixels = [((x * 5 + y) % 256, (x * y) % 256, (y * 7 + x // 3) % 256) for y in range(height) for x in range(width)]
    picture = Image.new("RGB", (width, height))
    picture.putdata(pixels)
    return picture


def result(server: ComfyUI, workflow: Workflow, index: int = 0) -> Image.Image:
    """Run a workflow whose node "9" saves; the picture of that index."""
    file = server.run(workflow).files("9")[index]
    with Image.open(server.output / file["subfolder"] / file["filename"]) as picture:
        assert picture.mode == "RGB"
        return picture.copy()


def processed(server: ComfyUI, picture: Image.Image, class_type: str, **inputs: Any) -> Image.Image:
    picture.save(server.input / "photo.png")
    middle = node(class_type, image=["1", 0], **inputs)
    return result(server, {"1": node("LoadImage", image="photo.png"), "2": middle, "9": save("2")})


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


def largest_difference(one: Image.Image, other: Image.Image) -> int:
    assert one.size == other.size
    return max(abs(left - right) for left, right in zip(one.tobytes(), other.tobytes(), strict=True))


def float32(value: float) -> float:
    (rounded,) = struct.unpack("f", struct.pack("f", value))
    return float(rounded)


INVERTED = [int(float32(255 * float32(1 - float32(value / 255)))) for value in range(256)]


def test_a_loaded_picture_is_saved_unchanged(fresh: ComfyUI) -> None:
    photograph().save(fresh.input / "photo.png")
    assert same(result(fresh, {"1": node("LoadImage", image="photo.png"), "9": save("1")}), photograph())


def test_invert_has_the_rounding_of_float32(fresh: ComfyUI) -> None:
    assert same(processed(fresh, photograph(), "ImageInvert"), photograph().point(INVERTED * 3))
    assert any(INVERTED[value] != 255 - value for value in range(256))


def test_lanczos_is_pillows(fresh: ComfyUI) -> None:
    inputs = {"upscale_method": "lanczos", "width": 64, "height": 48, "crop": "disabled"}
    expected = photograph().resize((64, 48), Image.Resampling.LANCZOS)
    assert same(processed(fresh, photograph(), "ImageScale", **inputs), expected)


def test_crop_center_cuts_to_the_new_proportions_first(fresh: ComfyUI) -> None:
    inputs = {"upscale_method": "lanczos", "width": 40, "height": 40, "crop": "center"}
    expected = photograph().crop((18, 0, 79, 61)).resize((40, 40), Image.Resampling.LANCZOS)
    assert same(processed(fresh, photograph(), "ImageScale", **inputs), expected)


@pytest.mark.parametrize(
    ("width", "height", "size"), [(0, 0, (97, 61)), (194, 0, (194, 122)), (0, 30, (round(97 * 30 / 61), 30))]
)
def test_a_side_of_0_follows_from_the_other(fresh: ComfyUI, width: int, height: int, size: tuple[int, int]) -> None:
    inputs = {"upscale_method": "nearest-exact", "width": width, "height": height, "crop": "disabled"}
    assert processed(fresh, photograph(), "ImageScale", **inputs).size == size


def test_scale_by_a_factor(fresh: ComfyUI) -> None:
    scaled = processed(fresh, photograph(), "ImageScaleBy", upscale_method="lanczos", scale_by=0.5)
    assert same(scaled, photograph().resize((48, 30), Image.Resampling.LANCZOS))


@pytest.mark.parametrize("size", [(97 * 3, 61 * 2), (64, 48), (30, 24)])
def test_nearest_takes_the_pixel_at_the_centre_by_float32(fresh: ComfyUI, size: tuple[int, int]) -> None:
    source = photograph().crop((0, 0, 80, 60))  # 80 to 64 and 60 to 48 have centres between two pixels
    expected = Image.new("RGB", size)
    for x in range(size[0]):
        for y in range(size[1]):
            column, row = nearest(x, 80, size[0]), nearest(y, 60, size[1])
            expected.paste(source.crop((column, row, column + 1, row + 1)), (x, y))
    inputs = {"upscale_method": "nearest-exact", "width": size[0], "height": size[1], "crop": "disabled"}
    assert same(processed(fresh, source, "ImageScale", **inputs), expected)


def nearest(index: int, old: int, new: int) -> int:
    return min(int(float32((index + 0.5) * float32(old / new))), old - 1)


def test_area_is_the_mean_of_the_pixels_touched(fresh: ComfyUI) -> None:
    inputs = {"upscale_method": "area", "width": 40, "height": 25, "crop": "disabled"}
    got = processed(fresh, photograph(), "ImageScale", **inputs)
    source = photograph()
    for x, y in ((0, 0), (7, 11), (39, 24)):
        columns = range(x * 97 // 40, -(-(x + 1) * 97 // 40))
        rows = range(y * 61 // 25, -(-(y + 1) * 61 // 25))
        touched = source.crop((columns.start, rows.start, columns.stop, rows.stop))
        mean = ImageStat.Stat(touched).mean
        pixel = ImageStat.Stat(got.crop((x, y, x + 1, y + 1))).mean
        assert all(0 <= wanted - value <= 1.001 for value, wanted in zip(pixel, mean, strict=True))


def test_bilinear_reads_two_by_two_pixels_without_averaging_more(fresh: ComfyUI) -> None:
    stripes = Image.new("RGB", (64, 4))
    stripes.paste((255, 255, 255), (0, 0, 32, 4))
    inputs = {"upscale_method": "bilinear", "width": 8, "height": 4, "crop": "disabled"}
    got = processed(fresh, stripes, "ImageScale", **inputs)
    assert set(got.tobytes()[: 8 * 3]) <= {0, 254, 255}  # Pillow's own resize would blur the edge


def test_crop_is_cut_at_the_edges(fresh: ComfyUI) -> None:
    got = processed(fresh, photograph(), "ImageCrop", width=50, height=50, x=80, y=20)
    assert same(got, photograph().crop((80, 20, 97, 61)))


def test_an_empty_image_has_its_colour(fresh: ComfyUI) -> None:
    got = result(fresh, {"1": empty(5, 3, color=0x0A80FE, batch_size=2), "9": save("1")}, index=1)
    assert same(got, Image.new("RGB", (5, 3), (0x0A, 0x80, 0xFE)))


def test_a_batch_keeps_the_order_and_takes_the_size_of_its_first(fresh: ComfyUI) -> None:
    photograph().save(fresh.input / "photo.png")
    nodes = {"1": empty(20, 10, color=255), "2": node("LoadImage", image="photo.png")}
    batch = node("ImageBatch", image1=["1", 0], image2=["2", 0])
    run = fresh.run({**nodes, "3": batch, "9": save("3")})
    pictures = [Image.open(fresh.output / file["filename"]) for file in run.files("9")]
    assert [picture.size for picture in pictures] == [(20, 10), (20, 10)]
    assert pictures[0].getpixel((3, 3)) == (0, 0, 255) != pictures[1].getpixel((3, 3))


def test_a_picture_is_turned_upright(fresh: ComfyUI) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    photograph().save(fresh.input / "turned.jpg", exif=turned, quality=95)
    with Image.open(fresh.input / "turned.jpg") as file:
        expected = ImageOps.exif_transpose(file)
    got = result(fresh, {"1": node("LoadImage", image="turned.jpg"), "9": save("1")})
    assert got.size == (61, 97)
    assert largest_difference(got, expected) <= 2  # two JPEG decoders


def test_transparency_is_dropped_and_many_frames_are_a_batch(fresh: ComfyUI) -> None:
    clear = Image.new("RGBA", (6, 6), (10, 20, 30, 0))
    clear.save(fresh.input / "clear.png")
    assert result(fresh, {"1": node("LoadImage", image="clear.png"), "9": save("1")}).getpixel((0, 0)) == (10, 20, 30)
    frames = [Image.new("RGB", (6, 6), color) for color in ("red", "lime", "blue")]
    frames[0].save(fresh.input / "film.webp", save_all=True, append_images=frames[1:], lossless=True)
    run = fresh.run({"1": node("LoadImage", image="film.webp"), "9": save("1", "film")})
    assert len(run.files("9")) == 3


def test_names_count_on_from_the_highest_number(fresh: ComfyUI) -> None:
    (fresh.output / "out_00041_.png").touch()
    (fresh.output / "out_x.png").touch()
    (fresh.output / "output_00099_.png").touch()
    run = fresh.run({"1": empty(batch_size=2), "9": save("1")})
    assert [file["filename"] for file in run.files("9")] == ["out_00042_.png", "out_00043_.png"]


def test_a_prefix_may_hold_folders_and_the_size(fresh: ComfyUI) -> None:
    run = fresh.run({"1": empty(7, 5), "9": save("1", "a/b/%width%x%height%")})
    assert run.files("9") == [{"filename": "7x5_00001_.png", "subfolder": "a/b", "type": "output"}]
    assert (fresh.output / "a" / "b" / "7x5_00001_.png").is_file()


@pytest.mark.parametrize("prefix", ["../evil", "/evil", "a/../../evil"])
def test_a_prefix_that_leads_out_is_refused_when_it_runs(fresh: ComfyUI, prefix: str) -> None:
    run = fresh.run({"1": empty(), "9": save("1", prefix)})
    kind, data = run.history["status"]["messages"][-1]
    assert (kind, data["node_id"], data["exception_message"].count("output folder")) == ("execution_error", "9", 1)
    assert run.history["outputs"] == {}
    assert data["current_inputs"]["filename_prefix"] == [prefix]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prefix=st.text(alphabet="ab/.%_ ü", max_size=12))
def test_whatever_the_prefix_all_files_stay_in_the_output_folder(comfyui: ComfyUI, prefix: str) -> None:
    before = files_outside_output(comfyui)
    run = comfyui.run({"1": empty(1, 1), "9": save("1", prefix)})
    assert files_outside_output(comfyui) == before
    for file in run.history["outputs"].get("9", {}).get("images", []):
        assert (comfyui.output / file["subfolder"] / file["filename"]).is_file()


def files_outside_output(server: ComfyUI) -> set[Path]:
    folders = (server.root.parent, server.root)
    return {entry for folder in folders for entry in folder.iterdir() if entry.suffix == ".png"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just({}))
def test_an_integer_is_taken_if_it_converts_and_lies_in_range(comfyui: ComfyUI, value: Any) -> None:
    crop = node("ImageCrop", image=["1", 0], width=1, height=1, x=value, y=0)
    answer = comfyui.post("/prompt", {"prompt": {"1": empty(1, 1), "2": crop, "9": save("2")}})
    try:
        accepted = 0 <= int(value) <= 16384
    except (TypeError, ValueError, OverflowError):
        accepted = False
    assert answer.status_code == (200 if accepted else 400)
    if not accepted:
        (problem,) = answer.json()["node_errors"]["2"]["errors"]
        assert problem["type"] in TYPES_OF_REFUSED_VALUES


def test_a_saved_file_holds_the_workflow_and_what_the_client_added(fresh: ComfyUI) -> None:
    workflow = {"1": empty(), "9": save("1")}
    run = fresh.run(workflow, extra_data={"extra_pnginfo": {"workflow": {"hello": 1}}, "api_key_comfy_org": "SECRET"})
    path = fresh.output / run.files("9")[0]["filename"]
    with Image.open(path) as picture:
        info = {name: json.loads(text) for name, text in picture.info.items() if name in ("prompt", "workflow")}
    assert info == {"prompt": workflow, "workflow": {"hello": 1}}
    assert b"SECRET" not in path.read_bytes()
    assert "SECRET" not in json.dumps(run.history)


def test_view_serves_files_of_all_folders_and_nothing_else(fresh: ComfyUI) -> None:
    preview = node("PreviewImage", images=["1", 0])
    run = fresh.run({"1": empty(), "2": preview, "9": save("1", "sub/out")})
    Image.new("RGB", (2, 2)).save(fresh.input / "in.png")
    temp_name = run.files("2")[0]["filename"]
    for query in (
        "filename=out_00001_.png&subfolder=sub",
        f"filename={temp_name}&type=temp",
        "filename=in.png [input]",
    ):
        answer = fresh.get(f"/view?{query}")
        assert (answer.status_code, answer.headers["Content-Type"]) == (200, "image/png"), query
    for query, status in (
        ("filename=nope.png", 404),
        ("filename=../input/in.png", 400),
        ("filename=/etc/passwd", 400),
        ("filename=in.png&subfolder=../input", 403),
        ("filename=in.png&type=elsewhere", 400),
        ("type=output", 404),
    ):
        assert fresh.get(f"/view?{query}").status_code == status, query
