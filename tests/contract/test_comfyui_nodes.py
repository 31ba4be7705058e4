"""The nodes: pixels against real ComfyUI's, what the savers of animations, video and audio leave, and text."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import wave
from pathlib import Path
from typing import Any

import pixels
import pytest
from comfyui_client import ComfyUI, Run, Workflow, empty, save
from conftest import is_real
from PIL import Image
from pixels import node

FRAMES = ("red", "lime", "blue")


@pytest.fixture(scope="module")
def sources(comfyui: ComfyUI) -> ComfyUI:
    """The module's server, with the pictures in its input folder that the pixel cases load."""
    pixels.put_sources(comfyui.input)
    return comfyui


@pytest.mark.parametrize("name", pixels.CASES)
def test_pixels_are_those_of_comfyui_0_18_1(sources: ComfyUI, name: str) -> None:
    case = pixels.CASES[name]
    # ComfyUI itself is allowed the last bit, by which torch may differ from processor to processor.
    limit = min(case.limit, 1) if is_real() else case.limit
    assert pixels.largest_difference(pixels.compute(sources, case), pixels.reference(name)) <= limit


def test_every_reference_has_a_case_and_shows_something() -> None:
    assert {path.stem for path in pixels.REFERENCES.iterdir()} == set(pixels.CASES)
    plain = [name for name in pixels.CASES if len(set(pixels.reference(name).tobytes())) == 1]
    assert plain == ["LoadImage-no-mask"]


def film(server: ComfyUI, frames: int = len(FRAMES)) -> Workflow:
    """Node "1" loads an animation of plain frames of 16x8 in FRAMES' colours."""
    pictures = [Image.new("RGB", (16, 8), color) for color in FRAMES[:frames]]
    pictures[0].save(server.input / "film.png", save_all=True, append_images=pictures[1:])
    return {"1": node("LoadImage", image="film.png")}


def saved(run: Run, server: ComfyUI, key: str, node_id: str = "9") -> tuple[Path, dict[str, str]]:
    """The one file of an output node: its path and how the history names it."""
    (item,) = run.history["outputs"][node_id][key]
    assert set(item) == {"filename", "subfolder", "type"}
    assert run.data("executed")[-1]["output"] == run.history["outputs"][node_id]
    return server.output / item["subfolder"] / item["filename"], item


def frames_of(path: Path) -> tuple[list[Any], list[float]]:
    """The colour in the middle of every frame of an animation, and how long each is shown in ms."""
    colors, durations_ms = [], []
    with Image.open(path) as animation:
        for number in range(getattr(animation, "n_frames", 1)):
            animation.seek(number)
            animation.load()
            colors.append(animation.convert("RGB").getpixel((8, 4)))
            durations_ms.append(animation.info.get("duration", 0))
    return colors, durations_ms


@pytest.mark.parametrize(
    ("class_type", "suffix", "inputs"),
    [
        ("SaveAnimatedPNG", "png", {"compress_level": 4}),
        ("SaveAnimatedWEBP", "webp", {"lossless": True, "quality": 80, "method": "default"}),
    ],
)
def test_an_animation_holds_every_frame_as_long_as_asked(
    fresh: ComfyUI, class_type: str, suffix: str, inputs: dict[str, Any]
) -> None:
    end = node(class_type, images=["1", 0], filename_prefix="anim/film", fps=4.0, **inputs)
    run = fresh.run({**film(fresh), "9": end})
    path, item = saved(run, fresh, "images")
    assert item == {"filename": f"film_00001_.{suffix}", "subfolder": "anim", "type": "output"}
    assert run.history["outputs"]["9"]["animated"] == [True]
    assert frames_of(path) == ([(255, 0, 0), (0, 255, 0), (0, 0, 255)], [250] * 3)


@pytest.mark.parametrize(
    ("class_type", "inputs"),
    [
        ("SaveAnimatedPNG", {"compress_level": 0}),
        ("SaveAnimatedWEBP", {"lossless": False, "quality": 50, "method": "fastest"}),
    ],
)
def test_an_animation_of_one_frame_is_no_animation(fresh: ComfyUI, class_type: str, inputs: dict[str, Any]) -> None:
    end = node(class_type, images=["1", 0], filename_prefix="one", fps=6.0, **inputs)
    run = fresh.run({**film(fresh, frames=1), "9": end})
    path, item = saved(run, fresh, "images")
    assert item["subfolder"] == ""
    assert set(run.history["outputs"]["9"]) == {"images"}
    assert len(frames_of(path)[0]) == 1


def test_all_savers_hold_the_workflow_with_fingerprints_and_what_the_client_added(fresh: ComfyUI) -> None:
    webp = node(
        "SaveAnimatedWEBP",
        images=["1", 0],
        filename_prefix="meta",
        fps=6.0,
        lossless=True,
        quality=80,
        method="default",
    )
    png = node("SaveAnimatedPNG", images=["1", 0], filename_prefix="meta", fps=6.0, compress_level=4)
    workflow = {**film(fresh), "7": save("1", "still"), "8": webp, "9": png}
    run = fresh.run(workflow, extra_data={"extra_pnginfo": {"workflow": {"hello": 1}}})
    seen = json.loads(json.dumps(workflow))
    seen["1"]["is_changed"] = [hashlib.sha256((fresh.input / "film.png").read_bytes()).hexdigest()]
    with Image.open(fresh.output / run.files("7")[0]["filename"]) as picture:
        assert json.loads(picture.info["prompt"]) == seen
    with Image.open(fresh.output / run.files("8")[0]["filename"]) as picture:
        tags = {str(value).split(":", 1)[0]: str(value).split(":", 1)[1] for value in picture.getexif().values()}
    assert {name: json.loads(text) for name, text in tags.items()} == {"prompt": seen, "workflow": {"hello": 1}}
    content = (fresh.output / run.files("9")[0]["filename"]).read_bytes()
    assert content.index(b"IDAT") < content.index(b"comf" + b"prompt\0" + json.dumps(seen).encode("latin-1"))
    assert b'comfworkflow\0{"hello": 1}' in content
    assert run.history["prompt"][2] == workflow


def test_a_video_is_an_mp4_of_every_frame(fresh: ComfyUI) -> None:
    video = node("CreateVideo", images=["1", 0], fps=4.0)
    end = node("SaveVideo", video=["2", 0], filename_prefix="video/clip", format="auto", codec="auto")
    run = fresh.run({**film(fresh), "2": video, "9": end})
    path, item = saved(run, fresh, "images")
    assert item == {"filename": "clip_00001_.mp4", "subfolder": "video", "type": "output"}
    assert run.history["outputs"]["9"]["animated"] == [True]
    content = path.read_bytes()
    assert content[4:8] == b"ftyp"
    timescale, duration = struct.unpack_from(">II", content, content.index(b"mvhd") + 16)
    assert (frames_of_mp4(content), duration / timescale) == (3, 0.75)
    answer = fresh.get("/view?filename=clip_00001_.mp4&subfolder=video")
    assert (answer.headers["Content-Type"], answer.content) == ("video/mp4", content)


def frames_of_mp4(content: bytes) -> int:
    """The number of samples of the one track, by its table of sample sizes."""
    assert content.count(b"stsz") == 1
    (count,) = struct.unpack_from(">I", content, content.index(b"stsz") + 12)
    return int(count)


@pytest.mark.parametrize(("rate", "channels", "seconds"), [(44100, 2, 0.5), (8000, 1, 1.25)])
def test_audio_is_a_flac_of_its_length(fresh: ComfyUI, rate: int, channels: int, seconds: float) -> None:
    silence = node("EmptyAudio", duration=seconds, sample_rate=rate, channels=channels)
    end = node("SaveAudio", audio=["1", 0], filename_prefix="audio/quiet")
    run = fresh.run({"1": silence, "9": end})
    path, item = saved(run, fresh, "audio")
    assert item == {"filename": "quiet_00001_.flac", "subfolder": "audio", "type": "output"}
    assert set(run.history["outputs"]["9"]) == {"audio"}
    content = path.read_bytes()
    assert content[:4] == b"fLaC"
    # STREAMINFO: 20 bits sample rate, 3 bits channels - 1, 5 bits sample size - 1, 36 bits number of samples.
    (packed,) = struct.unpack_from(">Q", content, 8 + 10)
    assert (packed >> 44, (packed >> 41 & 7) + 1, packed & (1 << 36) - 1) == (rate, channels, int(rate * seconds))
    answer = fresh.get("/view?filename=quiet_00001_.flac&subfolder=audio")
    assert (answer.status_code, answer.content) == (200, content)


@pytest.mark.parametrize(
    ("class_type", "quality", "suffix", "begins"),
    [("SaveAudioMP3", "128k", "mp3", b"ID3|\xff\xfb"), ("SaveAudioOpus", "64k", "opus", b"OggS")],
)
def test_audio_is_saved_in_other_formats(
    fresh: ComfyUI, class_type: str, quality: str, suffix: str, begins: bytes
) -> None:
    silence = node("EmptyAudio", duration=0.5, sample_rate=48000, channels=2)
    end = node(class_type, audio=["1", 0], filename_prefix="audio/quiet", quality=quality)
    path, item = saved(fresh.run({"1": silence, "9": end}), fresh, "audio")
    assert item == {"filename": f"quiet_00001_.{suffix}", "subfolder": "audio", "type": "output"}
    assert re.match(begins, path.read_bytes())


def test_a_preview_of_audio_is_a_flac_in_temp(fresh: ComfyUI) -> None:
    silence = node("EmptyAudio", duration=0.5, sample_rate=48000, channels=2)
    run = fresh.run({"1": silence, "9": node("PreviewAudio", audio=["1", 0])})
    (item,) = run.history["outputs"]["9"]["audio"]
    assert re.fullmatch(r"ComfyUI_temp_[a-z]{5}_00001_\.flac", item["filename"])
    assert (item["subfolder"], item["type"]) == ("", "temp")
    assert (fresh.temp / item["filename"]).read_bytes()[:4] == b"fLaC"


def test_a_webm_is_named_as_an_animated_image(fresh: ComfyUI) -> None:
    end = node("SaveWEBM", images=["1", 0], filename_prefix="clip", codec="vp9", fps=4.0, crf=32.0)
    run = fresh.run({**film(fresh), "9": end})
    path, item = saved(run, fresh, "images")
    assert item == {"filename": "clip_00001_.webm", "subfolder": "", "type": "output"}
    assert run.history["outputs"]["9"]["animated"] == [True]
    assert path.read_bytes()[:4] == b"\x1a\x45\xdf\xa3"


def test_a_latent_is_a_safetensors_file_with_the_workflow(fresh: ComfyUI) -> None:
    latent = node("EmptyLatentImage", width=64, height=48, batch_size=2)
    workflow = {"1": latent, "9": node("SaveLatent", samples=["1", 0], filename_prefix="latents/l")}
    path, item = saved(fresh.run(workflow), fresh, "latents")
    assert item == {"filename": "l_00001_.latent", "subfolder": "latents", "type": "output"}
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header.pop("__metadata__")["prompt"]) == workflow
    assert header["latent_tensor"] == {"dtype": "F32", "shape": [2, 4, 6, 8], "data_offsets": [0, 1536]}
    assert header["latent_format_version_0"]["shape"] == [0]
    assert len(content) == 8 + int.from_bytes(content[:8], "little") + 1536


def test_two_images_to_compare_are_previews(fresh: ComfyUI) -> None:
    sides = {"image_a": ["1", 0], "image_b": ["2", 0]}
    workflow = {"1": empty(8, 8, 0xFF0000), "2": empty(8, 8, 255), "9": node("ImageCompare", compare_view="", **sides)}
    outputs = fresh.run(workflow).history["outputs"]["9"]
    assert set(outputs) == {"a_images", "b_images"}
    for side in "ab":
        (item,) = outputs[f"{side}_images"]
        assert (item["type"], item["subfolder"]) == ("temp", "")
        assert item["filename"].startswith(f"comfy.compare.{side}")
        assert (fresh.temp / item["filename"]).is_file()


def test_a_preview_of_a_model_names_the_path_it_was_given(fresh: ComfyUI) -> None:
    run = fresh.run({"1": empty(), "9": node("Preview3D", model_file="mesh/a.glb", bg_image=["1", 0])})
    path, camera, background = run.history["outputs"]["9"]["result"]
    assert (path, camera) == ("mesh/a.glb", None)
    assert (fresh.temp / background.removeprefix("temp/")).is_file()


def test_audio_is_loaded_in_its_length(fresh: ComfyUI) -> None:
    with wave.open(str(fresh.input / "quiet.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(2 * 6000))
    end = node("SaveAudio", audio=["1", 0], filename_prefix="again")
    run = fresh.run({"1": node("LoadAudio", audio="quiet.wav"), "9": end})
    path, _ = saved(run, fresh, "audio")
    (packed,) = struct.unpack_from(">Q", path.read_bytes(), 8 + 10)
    assert (packed >> 44, (packed >> 41 & 7) + 1, packed & (1 << 36) - 1) == (8000, 1, 6000)
    path.rename(fresh.input / "quiet.flac")
    run = fresh.run({"1": node("LoadAudio", audio="quiet.flac"), "9": end})
    path, _ = saved(run, fresh, "audio")
    assert struct.unpack_from(">Q", path.read_bytes(), 8 + 10) == (packed,)


def test_a_video_is_loaded_with_all_its_frames(fresh: ComfyUI) -> None:
    end = node("SaveVideo", video=["2", 0], filename_prefix="clip", format="auto", codec="auto")
    run = fresh.run({**film(fresh), "2": node("CreateVideo", images=["1", 0], fps=4.0), "9": end})
    path, _ = saved(run, fresh, "images")
    path.rename(fresh.input / "clip.mp4")
    run = fresh.run({"2": node("LoadVideo", file="clip.mp4"), "9": end})
    path, _ = saved(run, fresh, "images")
    assert frames_of_mp4(path.read_bytes()) == 3


@pytest.mark.parametrize(
    ("class_type", "input_name", "kind"), [("LoadAudio", "audio", "audio"), ("LoadVideo", "file", "video")]
)
def test_a_file_that_is_not_there_is_refused(fresh: ComfyUI, class_type: str, input_name: str, kind: str) -> None:
    end = node("PreviewAny", source=["1", 0])
    answer = fresh.post("/prompt", {"prompt": {"1": node(class_type, **{input_name: "none.mp4"}), "9": end}})
    (problem,) = answer.json()["node_errors"]["1"]["errors"]
    assert problem["details"] == f"{input_name} - Invalid {kind} file: none.mp4"


def test_a_saved_picture_can_be_loaded_from_the_output_folder(fresh: ComfyUI) -> None:
    fresh.run({"1": empty(6, 4, color=0x123456), "9": save("1", "sub/made")})
    load = node("LoadImageOutput", image="sub/made_00001_.png [output]")
    run = fresh.run({"1": load, "9": save("1", "again")})
    with Image.open(fresh.output / run.files("9")[0]["filename"]) as picture:
        assert (picture.size, picture.getpixel((2, 2))) == ((6, 4), (0x12, 0x34, 0x56))
    missing = {"1": node("LoadImageOutput", image="none.png [output]"), "9": save("1")}
    answer = fresh.post("/prompt", {"prompt": missing})
    (problem,) = answer.json()["node_errors"]["1"]["errors"]
    assert (answer.status_code, problem["type"]) == (400, "custom_validation_failed")
    assert problem["details"] == "image - Invalid image file: none.png [output]"


def test_a_mask_of_a_file_that_is_missing_is_refused(fresh: ComfyUI) -> None:
    mask = node("LoadImageMask", image="none.png", channel="alpha")
    end = {"2": node("MaskToImage", mask=["1", 0]), "9": save("2")}
    answer = fresh.post("/prompt", {"prompt": {"1": mask, **end}})
    (problem,) = answer.json()["node_errors"]["1"]["errors"]
    assert (answer.status_code, problem["type"]) == (400, "custom_validation_failed")
    assert problem["details"] == "image - Invalid image file: none.png"


def test_a_mask_knows_the_channels(fresh: ComfyUI) -> None:
    pixels.small().save(fresh.input / "small.png")
    mask = node("LoadImageMask", image="small.png", channel="luma")
    end = {"2": node("MaskToImage", mask=["1", 0]), "9": save("2")}
    answer = fresh.post("/prompt", {"prompt": {"1": mask, **end}})
    (problem,) = answer.json()["node_errors"]["1"]["errors"]
    assert problem["details"] == "channel: 'luma' not in ['alpha', 'red', 'green', 'blue']"


def test_a_blur_wider_than_the_picture_fails_when_it_runs(fresh: ComfyUI) -> None:
    run = fresh.run(
        {"1": empty(8, 8), "2": node("ImageBlur", image=["1", 0], blur_radius=8, sigma=1.0), "9": save("2")}
    )
    kind, data = run.history["status"]["messages"][-1]
    assert (kind, data["node_id"], data["node_type"]) == ("execution_error", "2", "ImageBlur")
    assert data["exception_type"] == "RuntimeError"


@pytest.mark.parametrize(
    ("class_type", "value", "text"),
    [
        ("PrimitiveString", "a ü ☕", "a ü ☕"),
        ("PrimitiveStringMultiline", "one\ntwo", "one\ntwo"),
        ("PrimitiveInt", 2**62, str(2**62)),
        ("PrimitiveInt", "-7", "-7"),
        ("PrimitiveFloat", 0.1, "0.1"),
        ("PrimitiveFloat", 3, "3.0"),
        ("PrimitiveBoolean", True, "True"),
        ("PrimitiveBoolean", "", "False"),
    ],
)
def test_a_primitive_passes_its_value_on(fresh: ComfyUI, class_type: str, value: Any, text: str) -> None:
    run = fresh.run({"1": node(class_type, value=value), "9": node("PreviewAny", source=["1", 0])})
    assert run.history["outputs"] == {"9": {"text": [text]}}
    assert run.data("executed")[-1]["output"] == {"text": [text]}


@pytest.mark.parametrize("value", [[1, {"a": None}], {"b": [True, 0.5]}])
def test_preview_any_writes_other_values_as_json(fresh: ComfyUI, value: Any) -> None:
    run = fresh.run({"9": node("PreviewAny", source={"__value__": value})})
    assert run.history["outputs"]["9"] == {"text": [json.dumps(value, indent=4)]}


def test_an_integer_beyond_64_bits_is_refused(fresh: ComfyUI) -> None:
    workflow = {"1": node("PrimitiveInt", value=2**63), "9": node("PreviewAny", source=["1", 0])}
    answer = fresh.post("/prompt", {"prompt": workflow})
    (problem,) = answer.json()["node_errors"]["1"]["errors"]
    assert (answer.status_code, problem["type"]) == (400, "value_bigger_than_max")


def test_strings_are_joined_by_the_delimiter(fresh: ComfyUI) -> None:
    first = node("PrimitiveString", value="left")
    joined = node("StringConcatenate", string_a=["1", 0], string_b="right\n", delimiter=" | ")
    run = fresh.run({"1": first, "2": joined, "9": node("PreviewAny", source=["2", 0])})
    assert run.history["outputs"]["9"] == {"text": ["left | right\n"]}
