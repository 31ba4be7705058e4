"""Which files a workflow names, where they lie, and how long its chains are."""

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.comfyui import ComfyUI
from worker.errors import WorkflowInvalid
from worker.graph import longest_chain, upstream_of
from worker.workflow_checks import check_before_run, check_chain, check_save_paths, file_inputs

OBJECT_INFO = json.loads((Path(__file__).parents[1] / "contract" / "object_info_nodes.json").read_text())
# Nodes that ComfyUI 0.18.1 or a package of custom nodes has, in the forms in which /object_info describes them.
OTHERS: dict[str, Any] = {
    "Load3D": {"model_file": ["COMBO", {"options": [], "file_upload": True}], "image": ["LOAD_3D", {}]},
    "LoadLatent": {"latent": [[]]},
    "Painter": {"mask": ["STRING", {"image_upload": True, "default": ""}], "width": ["INT", {}]},
    "RecordAudio": {"audio": ["AUDIO_RECORD", {}]},
    "VHS_LoadVideo": {"video": [["none"], {"video_upload": True}], "force_rate": ["FLOAT", {}]},
    "WebcamCapture": {"image": ["WEBCAM", {}]},
    "CheckpointLoaderSimple": {"ckpt_name": [["x.safetensors"], {"image_upload": False}]},
}
DESCRIPTIONS = OBJECT_INFO | {name: {"input": {"required": inputs}} for name, inputs in OTHERS.items()}


class Classes:
    """What a ComfyUI says of its classes."""

    def file_inputs(self, class_type: str) -> frozenset[str]:
        return file_inputs(class_type, DESCRIPTIONS.get(class_type, {}))

    def is_output_class(self, class_type: str) -> bool:
        return bool(DESCRIPTIONS.get(class_type, {}).get("output_node"))

    def choices(self, class_type: str, input_name: str) -> list[str] | None:
        kind = DESCRIPTIONS[class_type]["input"]["required"][input_name][0]
        return kind if isinstance(kind, list) else None


def check(workflow: dict[str, Any], *sent: str) -> list[str]:
    return check_before_run(workflow, sent, cast(ComfyUI, Classes()))


def loading(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {
        "1": {"class_type": class_type, "inputs": inputs},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }


@pytest.mark.parametrize(
    ("class_type", "expected"),
    [
        ("LoadImage", {"image"}),
        ("LoadImageMask", {"image"}),
        ("LoadImageOutput", {"image"}),
        ("LoadAudio", {"audio"}),
        ("LoadVideo", {"file"}),
        ("Load3D", {"model_file", "image"}),
        ("LoadLatent", {"latent"}),
        ("Painter", {"mask"}),
        ("RecordAudio", {"audio"}),
        ("VHS_LoadVideo", {"video"}),
        ("WebcamCapture", {"image"}),
        ("CheckpointLoaderSimple", set()),
        ("SaveImage", set()),
        ("KSampler", set()),
    ],
)
def test_inputs_that_take_a_file_are_known_by_their_description(class_type: str, expected: set[str]) -> None:
    assert file_inputs(class_type, DESCRIPTIONS[class_type]) == expected


@given(
    st.recursive(
        st.none() | st.booleans() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["input", "required", "a_upload"]), inner, max_size=3)
        ),
    )
)
def test_any_description_is_read(description: Any) -> None:
    file_inputs("X", description if isinstance(description, Mapping) else {"input": {"required": description}})


@pytest.mark.parametrize(
    "name", ["a.png", "./a.png", "a.png [input]", "sub/../a.png", "sub//b.png", ["3", "0"], "", 5, None]
)
def test_what_was_sent_or_is_no_name_passes(name: Any) -> None:
    assert (
        check(
            {**loading("LoadImage", image=name), "3": {"class_type": "LoadImage", "inputs": {}}}, "a.png", "sub/b.png"
        )
        == []
    )


@pytest.mark.parametrize(
    "name", ["/a.png", "..", "../a.png", "sub/../../a.png", "../input/a.png [temp]", {"__value__": "../a.png"}]
)
def test_what_lies_outside_is_refused_even_where_nothing_needs_it(name: Any) -> None:
    for workflow in (loading("VHS_LoadVideo", video=name), {"1": loading("LoadImage", image=name)["1"]}):
        with pytest.raises(WorkflowInvalid, match="outside the input directory"):
            check(workflow, "a.png")


TEXT = {"class_type": "PrimitiveString", "inputs": {"value": "../a.png"}}
LINKED_TEXT = {"class_type": "PrimitiveStringMultiline", "inputs": {"value": ["7", 0]}}
COMPUTED = {"class_type": "StringConcatenate", "inputs": {"string_a": "a", "string_b": ".png", "delimiter": ""}}


def test_a_link_to_a_text_is_followed_and_any_other_in_place_of_a_name_is_refused() -> None:
    linked = loading("Painter", mask=["7", 0])
    for texts in ({"7": TEXT}, {"7": LINKED_TEXT | {"inputs": {"value": ["8", 0]}}, "8": TEXT}):
        with pytest.raises(WorkflowInvalid, match=r"'\.\./a\.png', which is outside the input directory"):
            check({**linked, **texts}, "a.png")
    assert check({**linked, "7": {**TEXT, "inputs": {"value": "a.png"}}}, "a.png") == []
    assert check({**linked, "7": LINKED_TEXT}, "a.png") == []  # a cycle, which ComfyUI refuses
    with pytest.raises(WorkflowInvalid, match="'mask' is linked; write the name"):
        check({**linked, "7": COMPUTED}, "a.png")


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"filename_prefix": ["7", 0]}, "filename_prefix is '../a/b', which leaves"),
        ({"folder_name": ["7", 0]}, "folder_name is '../a/b', which leaves"),
        ({"folder_name": ["8", 0]}, "'folder_name' is linked; write the name"),
        ({"folder_name": "a", "filename_prefix": ["8", 0]}, "'filename_prefix' is linked; write the name"),
        ({"folder_name": {"/../../../x": 1}}, "which leaves"),
        ({"filename_prefix": ["8", 0]}, None),  # ComfyUI looks at it when it saves
    ],
)
def test_a_linked_path_is_held_to_the_same_rules(inputs: dict[str, Any], said: str | None) -> None:
    text = {**TEXT, "inputs": {"value": "../a/b"}}
    with contextlib.ExitStack() as stack:
        if said is not None:
            stack.enter_context(pytest.raises(WorkflowInvalid, match=re.escape(said)))
        check_save_paths({"1": {"class_type": "X", "inputs": inputs}, "7": text, "8": COMPUTED})


@pytest.mark.parametrize(
    ("workflow", "said"),
    [
        (loading("LoadImage", image="c.png"), "image names 'c.png', which was not sent; sent were 'b.png', 'a'."),
        (loading("LoadImage", image="b.png [output]"), "but the output directory is empty when a job begins"),
        (loading("LoadImage", image="e\u0301.png"), "which was not sent"),
        (loading("LoadImage", image="\xfc.png"), "was sent in another Unicode form"),
        (loading("Load3D", model_file="a", image={"image": "a", "mask": "m.png", "recording": ""}), "names 'm.png'"),
        (loading("VHS_LoadVideo", video="x" * 300), "'" + "x" * 80 + "...'"),
    ],
)
def test_what_was_not_sent_is_refused(workflow: dict[str, Any], said: str) -> None:
    sent = ("a", "b.png", "u\u0308.png") if "\xfc" in str(workflow) else ("a", "b.png")
    with pytest.raises(WorkflowInvalid) as caught:
        check(workflow, *sent)
    assert said in caught.value.message


def test_a_name_that_the_node_itself_offers_passes() -> None:
    assert check(loading("VHS_LoadVideo", video="none")) == []


def test_a_loader_that_nothing_needs_is_a_warning() -> None:
    (warning,) = check(
        {**loading("LoadImage", image="a.png"), "9": {"class_type": "LoadImage", "inputs": {"image": "b"}}}, "a.png"
    )
    assert warning.endswith("No output node depends on it, so it was not run.")


def test_of_many_files_some_are_named_and_the_rest_counted() -> None:
    sent = [f"{number:05}.png" for number in range(2000)]
    with pytest.raises(WorkflowInvalid, match=r"sent were '00007.png'.* and 1995 more"):
        check(loading("LoadImage", image="0007.png"), *sent)
    loaders = {str(number): loading("LoadImage", image="b")["1"] for number in range(10, 20)}
    saver = {"class_type": "PreviewAny", "inputs": {number: [number, 0] for number in loaders}}
    with pytest.raises(WorkflowInvalid, match="5 more files are not listed") as caught:
        check({**loaders, "1": saver})
    assert caught.value.details == {"files": ["b"] * 5, "sent_count": 0}


@pytest.mark.parametrize(
    "inputs",
    [
        *({"filename_prefix": prefix} for prefix in ("../x", "/x", "//x", "a/../../x", "../../x/", "%year%/../../x")),
        {"filename_prefix": {"__value__": "../x"}},
        *({"folder_name": folder} for folder in ("..", "../x", "/tmp", "a/../..")),
    ],
)
def test_a_path_that_leaves_the_output_directory_is_refused(inputs: dict[str, Any]) -> None:
    with pytest.raises(WorkflowInvalid, match=r'Node 1 "Out" \(X\): \w+ is .*, which leaves the output directory'):
        check_save_paths({"1": {"class_type": "X", "inputs": inputs, "_meta": {"title": "Out"}}})


@pytest.mark.parametrize(
    "inputs",
    [
        *(
            {"filename_prefix": prefix}
            for prefix in ("x", "a/b/x", "..x", "a/../x", "..", "", ["1", 0], ["2", 0], 5, None)
        ),
        {"folder_name": "a/b"},
        {"text": "../x"},
    ],
)
def test_any_other_path_is_taken(inputs: dict[str, Any]) -> None:
    check_save_paths({"1": {"class_type": "X", "inputs": inputs}})


# --- links ---


def graph(**links: str) -> dict[str, Any]:
    """A node for each name, linked from the nodes whose names are the letters of its value."""
    return {name: {"class_type": "X", "inputs": {end: [end, 0] for end in ends}} for name, ends in links.items()}


@pytest.mark.parametrize(
    ("workflow", "length"),
    [
        ({}, 0),
        (graph(a=""), 1),
        (graph(a="", b="a", c="ab", d="c"), 4),
        (graph(a="", b="a", c="", d="abc"), 3),
        (graph(a="b", b="a"), 2),
        (graph(a="z", b="aa"), 2),
        (graph(a="a", b="a"), 2),
    ],
)
def test_the_longest_chain_is_counted(workflow: dict[str, Any], length: int) -> None:
    assert longest_chain(workflow) == length


def test_a_chain_of_any_length_is_followed_without_recursion() -> None:
    workflow = {str(n): {"class_type": "X", "inputs": {"x": [str(n - 1), 0]}} for n in range(100_000)}
    assert len(upstream_of(workflow, ["99999"])) == 99_999
    with pytest.raises(WorkflowInvalid, match="a chain of 100000 nodes"):
        check_chain(workflow)


def test_a_link_to_nowhere_is_refused_where_an_output_node_depends_on_it() -> None:
    workflow = loading("LoadImage", odd=["7", 0])
    with pytest.raises(WorkflowInvalid, match="'odd' is linked to node '7', which the workflow does not have"):
        check(workflow)
    del workflow["2"]
    assert check(workflow) == []
    assert check(loading("LoadImage", odd=["7", "0"])) == []  # no link to ComfyUI: its second part is no number
