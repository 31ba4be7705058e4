"""Rows O of FAULTS.md: every kind of output in its list, and pictures in the format that a job asks for."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageStat

from local.comfyui.standin.containers import mp4_of_jpegs
from tests.process.fault_rows import Row
from tests.process.stack import (
    Driver,
    base64_of,
    image_of,
    invert_workflow,
    inverted,
    is_inverted,
    job,
    picture_bytes,
)

GLB = b"glTF\x02\0\0\0\x0c\0\0\0"  # an empty one


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def files_node(files: dict[str, bytes], **said: list[Any]) -> dict[str, Any]:
    """A node that writes these files into the output directory and has ``said`` in the history."""
    coded = {name: base64_of(data) for name, data in files.items()}
    return node("StandinFiles", files=json.dumps(coded), ui=json.dumps(said))


def entry(name: str, **more: Any) -> dict[str, Any]:
    path = Path(name)
    return {"filename": path.name, "subfolder": str(path.parent).replace(".", ""), "type": "output", **more}


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def mean_difference(image: Image.Image, content: bytes) -> float:
    """Of all channels, 0 to 255."""
    other = Image.open(io.BytesIO(content)).convert("RGB")
    return sum(ImageStat.Stat(ImageChops.difference(image, other)).mean) / 3


def content_of(item: dict[str, Any]) -> bytes:
    content = base64.b64decode(item["data"])
    assert item["size_bytes"] == len(content)
    return content


def completed(row: Row, answer: dict[str, Any]) -> dict[str, Any]:
    row.ends(answer, "COMPLETED")
    return dict(answer["output"])


def told(result: dict[str, Any]) -> dict[str, tuple[str, str, str, str]]:
    """By node id: the list, subfolder, file name and media type of its one item."""
    return {
        item["node_id"]: (kind, item["subfolder"], item["filename"], item["media_type"])
        for kind in ("images", "videos", "audio", "files")
        for item in result.get(kind, [])
    }


# --- what comes back ---


def every_kind() -> dict[str, Any]:
    """A saver of every kind that the stand-in and ComfyUI have, and the shapes of others."""
    video = mp4_of_jpegs([encoded(Image.new("RGB", (16, 16), "red"), "JPEG")], (16, 16), 8.0)
    preview = {"format": "video/h264-mp4", "frame_rate": 8.0, "workflow": "vhs_00001.png", "fullpath": "/out/vhs.mp4"}
    saver = {"images": ["film", 0], "filename_prefix": "a/s"}
    sound = {"audio": ["silence", 0], "filename_prefix": "audio/s"}
    return {
        "one": node("LoadImage", image="a.png"),
        "two": node("ImageInvert", image=["one", 0]),
        "film": node("ImageBatch", image1=["one", 0], image2=["two", 0]),
        "silence": node("EmptyAudio", duration=0.5, sample_rate=48000, channels=2),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "clip": node("CreateVideo", images=["film", 0], fps=4.0),
        "webp": node("SaveAnimatedWEBP", **saver, fps=4.0, lossless=True, quality=80, method="fastest"),
        "apng": node("SaveAnimatedPNG", **saver, fps=4.0, compress_level=1),
        "mp4": node("SaveVideo", video=["clip", 0], filename_prefix="video/s", format="auto", codec="auto"),
        "webm": node("SaveWEBM", **saver, codec="vp9", fps=4.0, crf=40.0),
        "flac": node("SaveAudio", **sound),
        "mp3": node("SaveAudioMP3", **sound, quality="128k"),
        "opus": node("SaveAudioOpus", **sound, quality="64k"),
        "lat": node("SaveLatent", samples=["latent", 0], filename_prefix="latents/s"),
        "glb": files_node({"mesh/m.glb": GLB}, **{"3d": [entry("mesh/m.glb")]}),
        "vhs": files_node({"vhs.mp4": video, "vhs_00001.png": b""}, gifs=[entry("vhs.mp4", **preview)]),
        "svg": files_node({"svg/d.svg": b"<svg/>"}, images=[entry("svg/d.svg")]),
        "csv": files_node({"t.csv": b"a,b\n"}, csv_file=[entry("t.csv")], tags=["one, two"]),
        "text": node("PreviewAny", source="a caption"),
    }


EVERY_KIND = {
    "webp": ("images", "a", "s_N_.webp", "image/webp"),
    "apng": ("images", "a", "s_N_.png", "image/png"),
    "mp4": ("videos", "video", "s_N_.mp4", "video/mp4"),
    "webm": ("videos", "a", "s_N_.webm", "video/webm"),
    "flac": ("audio", "audio", "s_N_.flac", "audio/flac"),
    "mp3": ("audio", "audio", "s_N_.mp3", "audio/mpeg"),
    "opus": ("audio", "audio", "s_N_.opus", "audio/ogg"),
    "lat": ("files", "latents", "s_N_.latent", "application/octet-stream"),
    "glb": ("files", "mesh", "m.glb", "model/gltf-binary"),
    "vhs": ("videos", "", "vhs.mp4", "video/mp4"),
    "svg": ("images", "svg", "d.svg", "image/svg+xml"),
    "csv": ("files", "", "t.csv", "text/csv"),
}


@pytest.mark.fault("O1")
def test_every_kind_of_output_comes_back_in_its_list(row: Row, worker: Driver) -> None:
    for _ in range(2):  # the second time ComfyUI has it all in its cache
        result = completed(row, worker.run(job(every_kind())))
        seen = told(result)
        # Savers that share a prefix count on from one another, in an order that is ComfyUI's affair.
        names = {key: (*place, re.sub(r"_0000\d_", "_N_", name), kind) for key, (*place, name, kind) in seen.items()}
        assert names == EVERY_KIND
        assert len({(subfolder, name) for _, subfolder, name, _ in seen.values()}) == len(EVERY_KIND)
        texts = {item["node_id"]: item["text"] for item in result["texts"]}
        assert texts == {"text": "a caption", "csv": "one, two"}
        (glb,) = [item for item in result["files"] if item["node_id"] == "glb"]
        assert content_of(glb) == GLB
        assert result["warnings"] == []
    row.next_job_runs(worker)


@pytest.mark.fault("O2")
def test_previews_of_every_kind_are_returned_where_nothing_is_saved(row: Row, worker: Driver) -> None:
    previews = {
        "in": node("LoadImage", image="a.png"),
        "silence": node("EmptyAudio", duration=0.1, sample_rate=48000, channels=1),
        "heard": node("PreviewAudio", audio=["silence", 0]),
        "seen": node("ImageCompare", image_a=["in", 0], image_b=["in", 0], compare_view=""),
    }
    result = completed(row, worker.run(job(previews)))
    assert [item["filename"][:15] for item in result["images"]] == ["comfy.compare.a", "comfy.compare.b"]
    assert [(item["node_id"], item["media_type"]) for item in result["audio"]] == [("heard", "audio/flac")]
    result = completed(row, worker.run(job({**previews, **invert_workflow()})))
    assert [item["node_id"] for item in result["images"]] == ["3"]
    assert "audio" not in result
    row.next_job_runs(worker)


@pytest.mark.fault("O3")
def test_a_model_that_only_a_path_names_comes_back_every_time(row: Row, worker: Driver) -> None:
    workflow = {
        "maker": files_node({"3D/m.glb": GLB}),
        "shown": node("Preview3D", model_file=["maker", 0], bg_image=["in", 0]),
        "in": node("LoadImage", image="a.png"),
    }
    for _ in range(2):
        result = completed(row, worker.run(job(workflow)))
        assert told(result) == {"shown": ("files", "3D", "m.glb", "model/gltf-binary")}
        assert content_of(result["files"][0]) == GLB
        assert result["warnings"] == []
    row.next_job_runs(worker)


@pytest.mark.fault("O4")
def test_pictures_of_one_node_come_in_their_order(row: Row, worker: Driver) -> None:
    contents = [picture_bytes(color=color) for color in ("red", "green", "blue")]
    workflow: dict[str, Any] = {str(number): node("LoadImage", image=f"{number}.png") for number in range(3)}
    workflow["3"] = node("ImageBatch", image1=["0", 0], image2=["1", 0])
    workflow["4"] = node("ImageBatch", image1=["3", 0], image2=["2", 0])
    workflow["5"] = node("ImageInvert", image=["4", 0])
    workflow["saved"] = node("SaveImage", images=["5", 0], filename_prefix="a/b/n")
    workflow["sent"] = node("SaveImageWebsocket", images=["5", 0])
    images = {f"{number}.png": base64_of(content) for number, content in enumerate(contents)}
    result = completed(row, worker.run({"workflow": workflow, "images": images}))
    by_node = {
        node_id: [item for item in result["images"] if item["node_id"] == node_id] for node_id in ("saved", "sent")
    }
    for items in by_node.values():
        assert [is_inverted(item, content) for item, content in zip(items, contents, strict=True)] == [True] * 3
    assert [item["filename"] for item in by_node["saved"]] == [f"n_{number:05}_.png" for number in (1, 2, 3)]
    assert {item["subfolder"] for item in by_node["saved"]} == {"a/b"}
    row.next_job_runs(worker)


@pytest.mark.fault("O5")
def test_a_file_that_several_nodes_name_comes_back_once(row: Row, worker: Driver) -> None:
    workflow = {**invert_workflow(), "again": node("SaveImage", images=["2", 0], filename_prefix="inverted")}
    again = entry("m.png")
    workflow["4"] = files_node({"m.png": picture_bytes()}, images=[again], gifs=[again, again])
    items = completed(row, worker.run(job(workflow)))["images"]
    # Two nodes with equal inputs are one execution to ComfyUI, and their entries in the history name one file.
    assert sorted(item["filename"] for item in items) == ["inverted_00001_.png", "m.png"]
    row.next_job_runs(worker)


@pytest.mark.fault("O6")
def test_the_media_type_is_that_of_the_content(row: Row, worker: Driver) -> None:
    image = Image.new("RGB", (8, 8), "red")
    files = {"a.png": encoded(image, "JPEG"), "b.mp4": encoded(image, "WEBP", lossless=True), "c": picture_bytes()}
    saver = files_node(files, images=[entry(name) for name in files])
    result = completed(row, worker.run(job({"1": saver})))
    media_types = ["image/jpeg", "image/webp", "image/png"]
    assert [item["media_type"] for item in result["images"]] == media_types
    assert [content_of(item) for item in result["images"]] == list(files.values())
    row.next_job_runs(worker)


@pytest.mark.fault("O7")
def test_a_model_or_latent_that_is_not_whole_is_a_failure(row: Row, worker: Driver) -> None:
    header = b'{"latent_tensor":{"dtype":"F32","shape":[25],"data_offsets":[0,100]}}'
    latent = len(header).to_bytes(8, "little") + header + bytes(100)
    for name, whole in (("m.glb", GLB), ("m.latent", latent)):
        saver = files_node({name: whole[:-1]}, latents=[entry(name)])
        row.fails(worker.run(job({"1": saver})), "OUTPUT_DAMAGED", "only in part", name)
    row.next_job_runs(worker)


# --- output_format ---


@pytest.mark.fault("O8")
def test_pictures_come_in_the_format_that_is_asked_for(row: Row, worker: Driver) -> None:
    workflow = {**invert_workflow(prefix="s"), "glb": files_node({"m.glb": GLB}, **{"3d": [entry("m.glb")]})}
    workflow["sent"] = node("SaveImageWebsocket", images=["2", 0])
    for wanted, suffix in (("webp", "webp"), ("jpeg", "jpg"), ("png", "png")):
        result = completed(row, worker.run(job(workflow, output_format=wanted)))
        for item, name in zip(result["images"], ("s_00001_", "websocket_00001_"), strict=True):
            assert (item["filename"], item["media_type"]) == (f"{name}.{suffix}", f"image/{wanted}")
            assert mean_difference(image_of(item), inverted(picture_bytes())) < 4
            # The workflow, which ComfyUI writes into its PNG, is not in a picture that is written anew.
            assert (b"filename_prefix" in content_of(item)) == (wanted == "png" and item["node_id"] == "3")
        assert content_of(result["files"][0]) == GLB
        assert result["warnings"] == []
    row.next_job_runs(worker)


@pytest.mark.fault("O9")
def test_alpha_and_animation_are_kept_or_told_of(row: Row, worker: Driver) -> None:
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 128))
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "lime", "blue")]
    film = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:], duration=250)
    files = {"clear.png": encoded(clear, "PNG"), "film.png": film}
    workflow = {"1": files_node(files, images=[entry(name) for name in files])}
    result = completed(row, worker.run(job(workflow, output_format="webp", output_quality=95)))
    kept, animation = (Image.open(io.BytesIO(content_of(item))) for item in result["images"])
    assert (kept.mode, kept.getchannel("A").getextrema()) == ("RGBA", (128, 128))
    assert (animation.format, animation.n_frames) == ("WEBP", 3)  # type: ignore[attr-defined]
    assert result["warnings"] == []
    result = completed(row, worker.run(job(workflow, output_format="jpeg")))
    flat, left = result["images"]
    assert flat["filename"] == "clear.jpg"
    assert mean_difference(image_of(flat), encoded(Image.new("RGB", (16, 16), (255, 127, 127)), "PNG")) < 2
    assert (left["filename"], left["media_type"], content_of(left)) == ("film.png", "image/png", film)
    assert [warning.split(" ", 3)[2] for warning in result["warnings"]] == ["'clear.png'", "'film.png'"]
    row.next_job_runs(worker)


@pytest.mark.fault("O10")
def test_a_picture_that_cannot_be_re_encoded_is_returned_as_it_is(row: Row, worker: Driver) -> None:
    files = {
        "wide.png": encoded(Image.new("L", (16_384, 1)), "PNG"),
        "d.svg": b"<svg/>",
        "odd.bmp": b"BM and nothing more",
        "deep.tif": encoded(Image.new("F", (4, 4), 0.5), "TIFF"),
        "fine.png": picture_bytes(),
    }
    workflow = {"1": files_node(files, images=[entry(name) for name in files])}
    result = completed(row, worker.run(job(workflow, output_format="webp")))
    names = ["wide.png", "d.svg", "odd.bmp", "deep.tif", "fine.webp"]
    assert [item["filename"] for item in result["images"]] == names
    assert [content_of(item) for item in result["images"][:4]] == list(files.values())[:4]
    assert [warning.split(" ", 3)[2] for warning in result["warnings"]] == [repr(name) for name in names[:4]]
    assert "webp has at most 16383 pixels a side" in result["warnings"][0]
    row.next_job_runs(worker)


@pytest.mark.fault("O11")
def test_a_format_that_cannot_be_is_refused(row: Row, worker: Driver) -> None:
    for wish in ({"output_format": "gif"}, {"output_format": "png", "output_quality": 90}):
        row.fails(worker.run(job(invert_workflow(), **wish)), "INPUT_INVALID", "output_", "webp")
    row.next_job_runs(worker)


@pytest.mark.fault("O12")
def test_re_encoding_ends_at_the_deadline(row: Row, worker: Driver) -> None:
    """Sixty pictures of 4 million pixels take many seconds; the run itself takes none."""
    files = {"0.png": encoded(Image.new("L", (2000, 2000)), "PNG")}
    files |= {f"{number}.png": files["0.png"] for number in range(60)}
    workflow = {"1": files_node(files, images=[entry(name) for name in files])}
    row.fails(worker.run(job(workflow, output_format="webp", timeout_s=1.5)), "JOB_TIMEOUT")
    row.next_job_runs(worker)
