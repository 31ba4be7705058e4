"""From ComfyUI's history to the items of a result."""

import base64
import contextlib
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.unit.test_media import encoded
from worker.control import JobControl
from worker.delivery import Delivery
from worker.errors import NoOutput, OutputDamaged, OutputMissing
from worker.follow import RunOutcome
from worker.outputs import chosen_outputs, lost_models, named_files, returned_files, unnamed_files
from worker.ramdisk import RamDisk

NO_LIMIT = 10**9


@pytest.fixture
def ramdisk(tmp_path: Path) -> RamDisk:
    for name in ("output/video", "temp"):
        (tmp_path / name).mkdir(parents=True)
    return RamDisk(tmp_path)


def put(ramdisk: RamDisk, name: str, content: bytes = b"content", kind: str = "output") -> dict[str, str]:
    """Write a file as ComfyUI would and return the entry that its history has for it."""
    path = Path(name)
    (ramdisk.root / kind / path).write_bytes(content)
    return {"filename": path.name, "subfolder": str(path.parent).replace(".", ""), "type": kind}


def collect(ramdisk: RamDisk, outputs: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The lists of the result."""
    found, texts = chosen_outputs(RunOutcome("prompt", outputs, **more), ramdisk)
    result = Delivery("job", NO_LIMIT, ramdisk, None, JobControl(60)).deliver(found, texts, {})
    assert result.pop("status") == "success"
    return result


@pytest.mark.parametrize(
    ("key", "name", "category", "media_type"),
    [
        ("images", "a.png", "images", "image/png"),
        ("images", "a.webp", "images", "image/webp"),
        ("images", "video/a.mp4", "videos", "video/mp4"),  # SaveVideo names its file under "images"
        ("gifs", "a.gif", "images", "image/gif"),
        ("gifs", "a.webm", "videos", "video/webm"),
        ("audio", "a.flac", "audio", "audio/flac"),
        ("audio", "a.mp3", "audio", "audio/mpeg"),
        ("audio", "a.opus", "audio", "audio/ogg"),
        ("audio", "A.MID", "audio", "audio/midi"),
        ("latents", "a.latent", "files", "application/octet-stream"),
        ("3d", "a.glb", "files", "model/gltf-binary"),
        ("3d", "a.obj", "files", "model/obj"),
        ("3d", "a.usdz", "files", "model/vnd.usdz+zip"),
        ("3d", "a.ply", "files", "application/octet-stream"),
        ("images", "a.svg", "images", "image/svg+xml"),
        ("a_images", "a.png", "images", "image/png"),
        ("csv_path", "a.csv", "files", "text/csv"),
        ("files", "README", "files", "application/octet-stream"),
    ],
)
def test_every_kind_of_file_becomes_an_item_of_its_list(
    ramdisk: RamDisk, key: str, name: str, category: str, media_type: str
) -> None:
    entry = put(ramdisk, name, b"abcd")
    lists = collect(ramdisk, {"57:9": {key: [entry], "animated": [True]}})
    (item,) = lists[category]
    assert item == {
        "filename": Path(name).name,
        "type": "base64",
        "data": base64.b64encode(b"abcd").decode(),
        "media_type": media_type,
        "size_bytes": 4,
        "node_id": "57:9",
        "subfolder": entry["subfolder"],
    }
    assert set(lists) == {"images", category}


@pytest.mark.parametrize(
    ("name", "content", "category", "media_type"),
    [
        ("a.png", encoded(Image.new("RGB", (4, 4)), "JPEG"), "images", "image/jpeg"),
        ("a.bin", encoded(Image.new("RGB", (4, 4)), "WEBP"), "images", "image/webp"),
        ("a.apng", encoded(Image.new("RGB", (4, 4)), "PNG"), "images", "image/apng"),
        ("a", encoded(Image.new("RGB", (4, 4)), "AVIF"), "images", "image/avif"),
        ("a.tmp", b"fLaC" + bytes(20), "audio", "audio/flac"),
        ("a.mp3", b"RIFF\x0c\0\0\0WAVE" + bytes(8), "audio", "audio/wav"),
    ],
)
def test_a_content_that_disagrees_with_its_suffix_says_the_media_type(
    ramdisk: RamDisk, name: str, content: bytes, category: str, media_type: str
) -> None:
    (item,) = collect(ramdisk, {"1": {"images": [put(ramdisk, name, content)]}})[category]
    assert (item["filename"], item["media_type"]) == (name, media_type)


def test_a_file_is_returned_once_for_the_first_node_that_names_it(ramdisk: RamDisk) -> None:
    first, second = put(ramdisk, "video/a.png"), put(ramdisk, "b.png")
    again = {**first, "subfolder": "video/", "format": "image/png", "fullpath": "/somewhere/else/a.png"}
    outputs = {"7": {"images": [first, second]}, "3": {"gifs": [again], "images": [again, put(ramdisk, "c.png")]}}
    lists = collect(ramdisk, outputs)
    assert [(item["node_id"], item["filename"]) for item in lists["images"]] == [
        ("7", "a.png"),
        ("7", "b.png"),
        ("3", "c.png"),
    ]


def test_every_node_that_names_a_file_is_known(ramdisk: RamDisk) -> None:
    """One of them may be a cached node, whose file this was: it has to run again (`_Plan.improves`)."""
    entry = put(ramdisk, "a.png")
    outcome = RunOutcome("prompt", {"1": {"images": [entry]}, "2": {"images": [entry]}})
    assert [output.node_id for output in named_files(outcome, ramdisk)] == ["1", "2"]
    assert [output.node_id for output in returned_files(outcome, ramdisk)] == ["1"]


def test_a_folder_in_the_file_name_is_a_subfolder(ramdisk: RamDisk) -> None:
    put(ramdisk, "video/a.png")
    (item,) = collect(ramdisk, {"1": {"images": [{"filename": "video/a.png", "type": "output"}]}})["images"]
    assert (item["subfolder"], item["filename"]) == ("video", "a.png")


def test_a_file_that_only_a_path_names_is_returned(ramdisk: RamDisk) -> None:
    put(ramdisk, "video/a.glb")
    put(ramdisk, "b.glb")
    put(ramdisk, "bg.png", kind="temp")
    camera: dict[str, Any] = {"position": [1, 2, 3]}
    outputs = {
        "4": {"result": ["video/a.glb", camera, "temp/bg.png"]},  # as Preview3D has it
        "5": {
            "paths": [f"{ramdisk.root}/output/b.glb", "no/such.glb", "../temp/bg.png", "/etc/passwd", "\0", "x" * 9999]
        },
        "6": {"result": ["video", None, "video/a.glb"]},
    }
    items = collect(ramdisk, outputs)["files"]
    assert [(item["node_id"], item["subfolder"], item["filename"]) for item in items] == [
        ("4", "video", "a.glb"),
        ("5", "", "b.glb"),
    ]
    assert unnamed_files(RunOutcome("prompt", outputs), ramdisk) == []


def test_a_model_that_is_shown_and_not_there_is_a_lost_one(ramdisk: RamDisk) -> None:
    put(ramdisk, "a.glb")
    shown = {"1": "a.glb", "2": "lost.GLB", "3": "a caption.txt", "4": "../a.glb", "5": "x" * 9999 + ".obj"}
    outputs: dict[str, Any] = {node_id: {"result": [path, None, None]} for node_id, path in shown.items()}
    outputs |= {"6": {"result": []}, "7": {"result": [3]}, "8": {"text": ["lost.glb"]}, "9": {"result": "lost.glb"}}
    assert lost_models(RunOutcome("prompt", outputs), ramdisk) == ["2", "4"]


@pytest.mark.parametrize(
    ("output", "texts"),
    [
        ({"text": ["one", "two"]}, ["one", "two"]),
        ({"text": [["one", ["two"]], "three"]}, ["one", "two", "three"]),
        ({"text": [7, 0.5, True, None, {"a": "b"}]}, ["7", "0.5", "true"]),
        ({"tags": ["cat, sofa"], "scores": [[0.9]]}, ["cat, sofa"]),
        ({"string": ["a cat"]}, ["a cat"]),
        ({"text": "no list"}, ["no list"]),
        ({"text": []}, None),
    ],
)
def test_texts_come_in_many_forms(ramdisk: RamDisk, output: dict[str, Any], texts: list[str] | None) -> None:
    lists = collect(ramdisk, {"1": output, "2": {"images": [put(ramdisk, "a.png")]}})
    assert [item["text"] for item in lists.get("texts", [])] == (texts or [])
    assert ("texts" in lists) == (texts is not None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("a.png"),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text() | st.sampled_from(["filename", "subfolder", "type"]), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(outputs=st.dictionaries(st.text(), st.dictionaries(st.text() | st.sampled_from(["text", "images"]), JSON)))
def test_whatever_a_node_puts_into_the_history_gives_a_result_or_a_failure(outputs: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("output", "temp"):
            Path(folder, name).mkdir()
        disk = RamDisk(Path(folder))
        entry = put(disk, "a.png")
        with contextlib.suppress(OutputMissing):
            lists = collect(disk, {**outputs, "last": {"images": [entry]}})
            assert [item["filename"] for item in lists["images"]] == ["a.png"]


@pytest.mark.parametrize("other", [True, 3, None, "words", {"a": 1}, ["words", 5, None, {"no": "filename"}]])
def test_what_names_no_file_is_passed_over(ramdisk: RamDisk, other: object) -> None:
    lists = collect(ramdisk, {"1": {"other": other, "images": [put(ramdisk, "a.png")]}})
    assert [item["filename"] for item in lists["images"]] == ["a.png"]


def test_texts_are_returned_with_their_node(ramdisk: RamDisk) -> None:
    assert collect(ramdisk, {"4": {"text": ["a cat"]}}) == {
        "images": [],
        "texts": [{"node_id": "4", "text": "a cat"}],
    }


def test_previews_are_returned_only_where_nothing_was_saved(ramdisk: RamDisk) -> None:
    preview = put(ramdisk, "p.png", kind="temp")
    saved = put(ramdisk, "s.png")
    both = collect(ramdisk, {"1": {"images": [preview]}, "2": {"images": [saved]}})
    assert [item["filename"] for item in both["images"]] == ["s.png"]
    alone = collect(ramdisk, {"1": {"images": [preview]}})
    assert [item["filename"] for item in alone["images"]] == ["p.png"]


def test_a_loaders_own_input_is_no_output(ramdisk: RamDisk) -> None:
    with pytest.raises(NoOutput):
        collect(ramdisk, {"1": {"images": [{"filename": "a.png", "subfolder": "", "type": "input"}]}})


def test_pictures_that_came_by_websocket_are_items_too(ramdisk: RamDisk) -> None:
    png, jpeg = (encoded(Image.new("RGB", (4, 4)), form) for form in ("PNG", "JPEG"))
    lists = collect(ramdisk, {}, socket_images=[("7", png), ("7", jpeg)])
    assert [(item["filename"], item["media_type"], item["node_id"]) for item in lists["images"]] == [
        ("websocket_00001_.png", "image/png", "7"),
        ("websocket_00002_.jpg", "image/jpeg", "7"),
    ]
    assert base64.b64decode(lists["images"][0]["data"]) == png


def test_a_saved_picture_of_the_same_name_does_not_hide_one_that_came_by_websocket(ramdisk: RamDisk) -> None:
    saved = {"3": {"images": [put(ramdisk, "websocket_00001_.png")]}}
    lists = collect(ramdisk, saved, socket_images=[("7", encoded(Image.new("RGB", (2, 2)), "PNG"))])
    assert [item["node_id"] for item in lists["images"]] == ["3", "7"]


def test_nothing_at_all_is_a_failure(ramdisk: RamDisk) -> None:
    with pytest.raises(NoOutput):
        collect(ramdisk, {})


def test_a_missing_file_is_a_failure(ramdisk: RamDisk) -> None:
    entry = {"filename": "a.png", "subfolder": "", "type": "output"}
    with pytest.raises(OutputMissing):
        collect(ramdisk, {"1": {"images": [entry]}})


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_file_that_is_empty_or_cut_short_is_a_failure(ramdisk: RamDisk, share: float) -> None:
    whole = encoded(Image.effect_noise((40, 40), 60), "PNG")
    entry = put(ramdisk, "a.png", whole[: int(share * len(whole))])
    with pytest.raises(OutputDamaged, match="only in part"):
        collect(ramdisk, {"1": {"images": [entry]}})


# --- files that no node names ---


def test_a_file_that_no_node_names_is_a_warning(ramdisk: RamDisk) -> None:
    outputs = {"3": {"images": [put(ramdisk, "a.png"), {**put(ramdisk, "video/b.mp4"), "subfolder": "video/"}]}}
    outputs["4"] = {"images": [put(ramdisk, f"batch_{number:05}_.png") for number in range(300)]}
    put(ramdisk, "video/b.png")  # beside the video, and of its name
    put(ramdisk, "video/b-audio.mp4")
    put(ramdisk, "preview.png", kind="temp")  # previews are nothing that somebody saved
    assert unnamed_files(RunOutcome("prompt", outputs), ramdisk) == []
    for number in range(13):
        put(ramdisk, f"unnamed{number:02}.png")
    (warning,) = unnamed_files(RunOutcome("prompt", outputs), ramdisk)
    assert "'output/unnamed00.png', 'output/unnamed01.png'" in warning
    assert warning.endswith("and 3 more.")


def test_what_a_run_without_outputs_has_told_is_in_its_failure(ramdisk: RamDisk) -> None:
    with pytest.raises(NoOutput, match=r"gave nothing.*no face found"):
        collect(ramdisk, {}, warnings=["Node 5 (FaceGate): Execution Blocked: no face found."])


def test_an_empty_caption_is_no_damage(ramdisk: RamDisk) -> None:
    (item,) = collect(ramdisk, {"3": {"text_files": [put(ramdisk, "caption.txt", b"")]}})["files"]
    assert (item["size_bytes"], item["data"]) == (0, "")


def test_what_was_saved_without_a_name_is_told_where_nothing_else_was(ramdisk: RamDisk) -> None:
    put(ramdisk, "unnamed.png")
    with pytest.raises(NoOutput, match=r"gave nothing.*'output/unnamed.png'"):
        collect(ramdisk, {})
