"""client.py: reading workflows, and where images, prompt text and seeds go."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from client_server import STEADY
from hypothesis import given
from hypothesis import strategies as st

import client

WORKFLOWS = Path(__file__).parents[2] / "workflows"


def node(class_type: str, title: str | None = None, **inputs: Any) -> dict[str, Any]:
    meta = {"_meta": {"title": title}} if title else {}
    return {"class_type": class_type, "inputs": inputs, **meta}


def sampler(positive: str, negative: str, **inputs: Any) -> dict[str, Any]:
    return node("KSampler", positive=[positive, 0], negative=[negative, 1], **inputs)


def planned(changes: list[client.Change]) -> dict[str, str | int]:
    return {f"{change.node_id}.{change.input_name}": change.value for change in changes}


# --- workflow --------------------------------------------------------------------------------------------------------


def test_node_ids_sort_as_a_person_reads_them() -> None:
    ordered = ["1", "2", "9", "10", "57", "57:8", "57:12", "57:12:1", "58", "a", "a:2"]
    for _ in range(20):
        shuffled = random.sample(ordered, len(ordered))
        assert sorted(shuffled, key=client.natural_key) == ordered


@STEADY
@given(st.integers(min_value=0), st.integers(min_value=0))
def test_numbers_in_node_ids_compare_as_numbers(a: int, b: int) -> None:
    assert (client.natural_key(str(a)) < client.natural_key(str(b))) == (a < b)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda workflow: workflow,
        lambda workflow: {"prompt": workflow, "client_id": "x"},
        lambda workflow: {"workflow": workflow},
        lambda workflow: {"input": {"workflow": workflow, "images": {}}},
    ],
)
def test_a_workflow_is_found_in_every_wrapping(wrap: Any) -> None:
    workflow = {"1": node("EmptyImage"), "input": node("SaveImage", images=["1", 0])}
    assert client.parse_workflow(wrap(workflow)) == workflow


def test_a_file_is_utf_8_with_or_without_a_mark(tmp_path: Path) -> None:
    workflow = {"1": node("CLIPTextEncode", text="猫")}
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "workflow.json").write_text(json.dumps(workflow, ensure_ascii=False), encoding=encoding)
        assert client.read_workflow(tmp_path / "workflow.json") == workflow


@pytest.mark.parametrize("wrap", [lambda ui: ui, lambda ui: {"workflow": ui}])
def test_the_ui_format_is_refused_with_the_way_to_export(wrap: Any) -> None:
    with pytest.raises(client.InputError, match=r"UI format.*Export \(API\)"):
        client.parse_workflow(wrap({"nodes": [{"id": 1, "type": "LoadImage"}], "links": []}))


@pytest.mark.parametrize(
    "text",
    ["", "not json", "[" * 100_000, "{}", "[]", "null", '{"1": {"class_type": "X"}}', '{"input": 5}', "\x00\x01"],
)
def test_a_file_without_a_workflow_is_an_input_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "workflow.json"
    file.write_text(text)
    with pytest.raises(client.InputError):
        client.read_workflow(file)


def test_a_missing_file_and_a_file_that_is_not_text_are_input_errors(tmp_path: Path) -> None:
    (tmp_path / "picture.json").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    for name in ("missing.json", "picture.json", "."):
        with pytest.raises(client.InputError):
            client.read_workflow(tmp_path / name)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
IDS = st.sampled_from(["1", "2", "10", "57:8", "57:12", "x"])
VALUES = st.tuples(IDS, st.integers(0, 2)).map(list) | JSON
INPUT_NAMES = st.sampled_from(
    ["image", "text", "prompt", "value", "positive", "negative", "conditioning", "clip", "seed", "noise_seed"]
)
CLASSES = st.sampled_from(
    [*client.TEXT_INPUTS, *client.STRING_PRIMITIVES, "LoadImage", "KSampler", "ControlNetApplyAdvanced", "Other"]
)
NODES = st.fixed_dictionaries(
    {"class_type": CLASSES, "inputs": st.dictionaries(INPUT_NAMES, VALUES, max_size=5)}, optional={"_meta": JSON}
)
GRAPHS = st.dictionaries(IDS, NODES, min_size=1, max_size=6)


@STEADY
@given(JSON | GRAPHS | GRAPHS.map(lambda graph: {"input": {"workflow": graph}}))
def test_any_json_gives_a_workflow_or_an_input_error(document: Any) -> None:
    try:
        workflow = client.parse_workflow(document)
    except client.InputError:
        return
    assert workflow
    assert all(client.is_node(node) for node in workflow.values())


@STEADY
@given(GRAPHS, st.lists(st.just("a.png"), max_size=3), st.sampled_from(["positive", "negative"]))
def test_any_graph_gives_changes_to_unlinked_inputs_or_an_input_error(graph: Any, names: list[str], role: str) -> None:
    before = json.dumps(graph)
    plans: tuple[Callable[[], list[client.Change]], ...] = (
        lambda: client.plan_images(graph, names),
        lambda: client.plan_text(graph, "new", role),
        lambda: client.plan_seeds(graph, lambda: 7),
    )
    for plan in plans:
        try:
            changes = plan()
        except client.InputError:
            continue
        for change in changes:
            assert not isinstance(graph[change.node_id]["inputs"].get(change.input_name), list)
        changed = client.apply_changes(graph, changes)
        assert {key: changed[key]["class_type"] for key in changed} == {key: graph[key]["class_type"] for key in graph}
    assert json.dumps(graph) == before


@STEADY
@given(GRAPHS, st.sampled_from(["positive", "negative"]))
def test_in_any_graph_the_other_text_stays(graph: Any, role: str) -> None:
    others = client.encoders_reached(graph, client.OPPOSITE[role])
    try:
        changed = client.apply_changes(graph, client.plan_text(graph, "new", role))
    except client.InputError:
        return
    assert {key: changed[key] for key in others} == {key: graph[key] for key in others}


# --- images ----------------------------------------------------------------------------------------------------------


def test_images_go_to_the_lowest_node_ids_first() -> None:
    workflow = {key: node("LoadImage", image="old.png") for key in ("57:12", "10", "57:8", "9")}
    changes = client.plan_images(workflow, ["a", "b", "c", "d"])
    assert planned(changes) == {"9.image": "a", "10.image": "b", "57:8.image": "c", "57:12.image": "d"}
    changed = client.apply_changes(workflow, changes)
    assert changed["57:8"]["inputs"] == {"image": "c"}
    assert workflow["57:8"]["inputs"] == {"image": "old.png"}


def test_a_linked_image_is_left_alone() -> None:
    workflow = {"1": node("LoadImage", image=["5", 0]), "2": node("LoadImage", image="old.png")}
    assert planned(client.plan_images(workflow, ["a.png"])) == {"2.image": "a.png"}


@pytest.mark.parametrize("names", [[], ["a.png"], ["a.png", "b.png", "c.png"]])
def test_too_few_and_too_many_images_name_the_nodes(names: list[str]) -> None:
    workflow = {"4": node("LoadImage", "The room", image="x"), "57:8": node("LoadImage", image="y")}
    with pytest.raises(client.InputError, match=r'2 images: 4 "The room" \(LoadImage\), 57:8 \(LoadImage\)$'):
        client.plan_images(workflow, names)


def test_an_image_for_a_workflow_without_loader_is_an_error() -> None:
    with pytest.raises(client.InputError, match="no free LoadImage node"):
        client.plan_images({"1": node("EmptyImage")}, ["a.png"])


# --- prompt text -----------------------------------------------------------------------------------------------------

POSITIVE_AND_NEGATIVE = {
    "6": node("CLIPTextEncode", text="old good", clip=["4", 1]),
    "7": node("CLIPTextEncode", text="old bad", clip=["4", 1]),
}


@pytest.mark.parametrize(("positive", "negative"), [("6", "7"), ("7", "6")])
def test_the_prompt_follows_the_sampler_and_not_the_order(positive: str, negative: str) -> None:
    workflow = {**POSITIVE_AND_NEGATIVE, "3": sampler(positive, negative)}
    assert planned(client.plan_text(workflow, "new")) == {f"{positive}.text": "new"}
    assert planned(client.plan_text(workflow, "new", "negative")) == {f"{negative}.text": "new"}


def test_controlnet_and_conditioning_nodes_keep_the_roles_apart() -> None:
    workflow = {
        **POSITIVE_AND_NEGATIVE,
        "8": node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["6", 0]),
        "9": node("ControlNetApplyAdvanced", positive=["8", 0], negative=["7", 0], image=["1", 0]),
        "10": node("Reroute", value=["9", 1]),
        "57:3": sampler("9", "10"),
    }
    assert planned(client.plan_text(workflow, "new")) == {"6.text": "new"}
    assert planned(client.plan_text(workflow, "new", "negative")) == {"7.text": "new"}


def test_the_picture_of_a_controlnet_brings_no_other_words() -> None:
    workflow = {
        **POSITIVE_AND_NEGATIVE,
        "8": node("CLIPTextEncode", text="words of the picture"),
        "9": node("BasicGuider", conditioning=["8", 0]),
        "10": node("SamplerCustomAdvanced", guider=["9", 0]),
        "11": node("ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0], image=["10", 0]),
        "12": node("ControlNetApply", conditioning=["11", 0], image=["10", 0]),
        "3": sampler("12", "7"),
    }
    assert planned(client.plan_text(workflow, "new")) == {"6.text": "new"}
    assert planned(client.plan_text(workflow, "new", "negative")) == {"7.text": "new"}


def test_the_same_encoder_behind_zero_out_is_only_positive() -> None:
    workflow = {
        "6": node("CLIPTextEncode", text="old"),
        "7": node("ConditioningZeroOut", conditioning=["6", 0]),
        "3": sampler("6", "7"),
    }
    assert planned(client.plan_text(workflow, "new")) == {"6.text": "new"}


def test_the_qwen_encoder_keeps_its_words_in_prompt() -> None:
    workflow = client.read_workflow(WORKFLOWS / "qwen_image_edit.json")
    assert planned(client.plan_text(workflow, "new")) == {"7.prompt": "new"}
    assert planned(client.plan_text(workflow, "new", "negative")) == {"8.prompt": "new"}
    assert planned(client.plan_images(workflow, ["a.png", "b.png"])) == {"4.image": "a.png", "5.image": "b.png"}
    assert planned(client.plan_seeds(workflow, lambda: 5)) == {"12.seed": 5}


def test_a_linked_text_goes_to_its_string_node() -> None:
    workflow = {
        "5": node("PrimitiveStringMultiline", value="old"),
        "6": node("CLIPTextEncode", text=["5", 0]),
        "7": node("CLIPTextEncode", text="bad"),
        "3": sampler("6", "7"),
    }
    assert planned(client.plan_text(workflow, "new")) == {"5.value": "new"}


def test_two_samplers_with_one_string_are_one_place() -> None:
    workflow = {
        "5": node("PrimitiveString", value="old"),
        "6": node("CLIPTextEncode", text=["5", 0]),
        "16": node("CLIPTextEncode", text=["5", 0]),
        "7": node("CLIPTextEncode", text="bad"),
        "3": sampler("6", "7"),
        "13": sampler("16", "7"),
    }
    assert planned(client.plan_text(workflow, "new")) == {"5.value": "new"}


def test_words_that_the_negative_also_uses_are_not_touched() -> None:
    workflow = {
        "5": node("PrimitiveString", value="old"),
        "8": node("StringConcatenate", string_a="not ", string_b=["5", 0]),
        "6": node("CLIPTextEncode", text=["5", 0]),
        "7": node("CLIPTextEncode", text=["8", 0]),
        "3": sampler("6", "7"),
    }
    with pytest.raises(client.InputError, match="also the negative one"):
        client.plan_text(workflow, "new")


def test_one_encoder_for_both_roles_is_an_error_that_names_it() -> None:
    workflow = {"6": node("CLIPTextEncode", "Words", text="old"), "3": sampler("6", "6")}
    with pytest.raises(client.InputError, match=r'also the negative one, in 6 "Words" \(CLIPTextEncode\)'):
        client.plan_text(workflow, "new")


def test_several_positives_are_an_error_that_names_them() -> None:
    workflow = {**POSITIVE_AND_NEGATIVE, "3": sampler("6", "9"), "13": sampler("7", "9")}
    with pytest.raises(client.InputError, match=r"6 \(CLIPTextEncode\), 7 \(CLIPTextEncode\)"):
        client.plan_text(workflow, "new")


def test_text_from_an_unknown_node_is_an_error_that_names_both() -> None:
    workflow = {
        "5": node("PromptStyler", text="old"),
        "6": node("CLIPTextEncode", text=["5", 0]),
        "3": sampler("6", "9"),
    }
    with pytest.raises(client.InputError, match=r"6 \(CLIPTextEncode\) comes by link from 5 \(PromptStyler\)"):
        client.plan_text(workflow, "new")


def test_without_a_sampler_a_single_encoder_is_taken_and_two_are_not() -> None:
    guided = {"6": node("CLIPTextEncode", text="old"), "8": node("BasicGuider", conditioning=["6", 0])}
    assert planned(client.plan_text(guided, "new")) == {"6.text": "new"}
    with pytest.raises(client.InputError, match="several"):
        client.plan_text(POSITIVE_AND_NEGATIVE, "new")
    with pytest.raises(client.InputError, match="no text encoder"):
        client.plan_text({"1": node("EmptyImage")}, "new")


def test_a_cycle_ends() -> None:
    workflow = {"1": node("Reroute", value=["2", 0]), "2": node("Reroute", value=["1", 0]), "3": sampler("1", "2")}
    with pytest.raises(client.InputError, match="no text encoder"):
        client.plan_text(workflow, "new")


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_every_unlinked_number_gets_its_own_seed() -> None:
    workflow = {
        "57:12": node("KSamplerAdvanced", noise_seed=1),
        "9": node("KSampler", seed=1),
        "10": node("KSampler", seed=["11", 0]),
        "12": node("Decoy", seed="a string", noise_seed=True),
    }
    draws = itertools.count(100)
    changes = client.plan_seeds(workflow, lambda: next(draws))
    assert planned(changes) == {"9.seed": 100, "57:12.noise_seed": 101}


# --- the examples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(WORKFLOWS.glob("*.json")), ids=lambda file: file.name)
def test_the_examples_are_whole_and_titled(file: Path) -> None:
    workflow = client.read_workflow(file)
    for example in workflow.values():
        assert example["_meta"]["title"]
        for value in example["inputs"].values():
            assert not isinstance(value, list) or client.source_of(workflow, value) is not None
