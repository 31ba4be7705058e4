"""client.py: reading workflows, and where files, prompt text, seeds and other values go."""

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
HUGE = int("9" * 4000)


def node(class_type: str, title: str | None = None, /, **inputs: Any) -> dict[str, Any]:
    meta = {"_meta": {"title": title}} if title else {}
    return {"class_type": class_type, "inputs": inputs, **meta}


def encoder(text: Any, title: str | None = None) -> dict[str, Any]:
    return node("CLIPTextEncode", title, text=text, clip=["4", 1])


def sampler(positive: str, negative: str, **inputs: Any) -> dict[str, Any]:
    return node("KSampler", positive=[positive, 0], negative=[negative, 0], **inputs)


def planned(changes: list[client.Change]) -> dict[str, Any]:
    return {f"{node_id}.{name}": value for (node_id, name), value in changes}


def texts(workflow: client.Workflow, role: str = "positive", node_id: str | None = None) -> list[str]:
    changes = client.plan_text(workflow, "new", role, node_id)
    assert {change.value for change in changes} == {"new"}
    return list(planned(changes))


def seeds(workflow: client.Workflow) -> dict[str, Any]:
    draws = itertools.count(100)
    return planned(client.plan_seeds(workflow, lambda: next(draws)))


def slots(workflow: client.Workflow) -> dict[str, str]:
    return {f"{place.node_id}.{place.input_name}": kind for place, kind in client.slots_of(workflow)}


def files(workflow: client.Workflow, *given_files: str, kind: str = "image") -> dict[str, Any]:
    """`given_files`: names, or NODE=NAME."""
    split = [client.split_named(workflow, file) for file in given_files]
    return planned(client.plan_files(workflow, [client.GivenFile(name, kind, node_id) for node_id, name in split]))


def changes(workflow: client.Workflow, *arguments: str, given_files: Any = ()) -> dict[str, Any]:
    options = client.build_parser().parse_args(arguments)
    return planned(client.plan_changes(workflow, options, given_files))


def refusal(call: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    with pytest.raises(client.InputError) as caught:
        call(*arguments, **named)
    return str(caught.value)


# --- workflow --------------------------------------------------------------------------------------------------------


def test_node_ids_sort_as_a_person_reads_them() -> None:
    ordered = ["1", "2", "9", "10", "57", "57:8", "57:12", "57:12:1", "58", "a", "a:2", "٣"]
    for _ in range(20):
        shuffled = random.sample(ordered, len(ordered))
        assert sorted(shuffled, key=client.natural_key) == ordered


@STEADY
@given(st.integers(min_value=0), st.integers(min_value=0))
def test_numbers_in_node_ids_compare_as_numbers(a: int, b: int) -> None:
    assert (client.natural_key(str(a)) < client.natural_key(str(b))) == (a < b)


@STEADY
@given(st.lists(st.text(alphabet="0129:aé٣²\ud800", max_size=6) | st.just("9" * 5000)))
def test_any_node_ids_can_be_sorted(node_ids: list[str]) -> None:
    assert sorted(sorted(node_ids, key=client.natural_key)) == sorted(node_ids)


WRAPPINGS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda workflow: workflow,
    "a request to ComfyUI": lambda workflow: {"prompt": workflow, "client_id": "x", "extra_data": {}},
    "workflow": lambda workflow: {"workflow": workflow},
    "a request to RunPod": lambda workflow: {"input": {"workflow": workflow, "images": {}}, "policy": {}},
    "input only": lambda workflow: {"input": workflow},
    "run.json": lambda workflow: {"ok": True, "seeds": {"3.seed": 1}, "workflow": workflow, "sources": {}},
    "words and workflow": lambda workflow: {"prompt": "a cat", "workflow": workflow},
    "with a comment": lambda workflow: {"_comment": "mine", **workflow, "_meta": {"v": 1}},
    "a comment in a wrapping": lambda workflow: {"prompt": {"_note": ["a"], **workflow}},
    "wrapped twice": lambda workflow: {"workflow": {"prompt": workflow}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_workflow_is_found_in_every_wrapping(wrapping: str) -> None:
    workflow = {"1": node("EmptyImage"), "input": node("SaveImage", images=["1", 0]), "prompt": node("X")}
    assert client.parse_workflow(WRAPPINGS[wrapping](workflow)) == workflow


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_file_is_utf_8_with_or_without_a_mark(tmp_path: Path, encoding: str) -> None:
    workflow = {"1": node("CLIPTextEncode", text="猫")}
    (tmp_path / "workflow.json").write_text(json.dumps(workflow, ensure_ascii=False), encoding=encoding)
    assert client.parse_workflow(client.read_document(tmp_path / "workflow.json")) == workflow


UI_EXPORT = {"nodes": [{"id": 1, "type": "LoadImage"}], "links": []}


@pytest.mark.parametrize(
    "document", [UI_EXPORT, {"workflow": UI_EXPORT}, {"input": {"workflow": UI_EXPORT}}, {"nodes": []}]
)
def test_the_ui_format_is_refused_with_the_way_to_export(document: Any) -> None:
    assert "UI format; export it in ComfyUI with Workflow > Export (API)" in refusal(client.parse_workflow, document)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"not json", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"\x00\x01", b"\x89PNG\r\n\x1a\n\xff"),
        *(b"{}", b"[]", b"null", b'"1"', b"NaN", b'{"input": 5}', b'{"workflow": null}', b'{"_comment": "only"}'),
        *(b'{"1": {"class_type": "X"}}', b'{"1": {"class_type": 5, "inputs": {}}}', b'{"prompt": {"prompt": {}}}'),
        b'{"1": {"class_type": "X", "inputs": []}}',
        b'{"1": {"class_type": "X", "inputs": {}}, "2": 7}',
        json.dumps(WORKFLOWS.name).encode("utf-16"),
    ],
    ids=lambda content: repr(content[:24]),
)
def test_a_file_without_a_workflow_is_an_input_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "workflow.json"
    file.write_bytes(content)
    with pytest.raises(client.InputError):
        client.parse_workflow(client.read_document(file))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert "there is no workflow" in refusal(client.read_document, tmp_path / "missing.json")
    assert str(tmp_path) in refusal(client.read_document, tmp_path)
    assert "cannot be read" in refusal(client.read_document, Path("a\0b"))
    assert "cannot be read" in refusal(client.read_document, Path("\ud800"))


def test_a_label_has_what_a_person_sees_in_comfyui_and_no_control_characters() -> None:
    workflow = {"3": node("LoadImage", "The\n\x1b[31mroom"), "4": {**node("X"), "_meta": 7}, "5": node("X" * 200)}
    assert client.label(workflow, "3") == '3 "The ?[31mroom" (LoadImage)'
    assert client.label(workflow, "4") == "4 (X)"
    assert len(client.label(workflow, "5")) < 80


# --- NODE=... --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6=a cat", ("6", "a cat")),
        ("57:8=a = b", ("57:8", "a = b")),
        ("6=", ("6", "")),
        ("a cat", (None, "a cat")),
        ("masterpiece, 1girl=yes", (None, "masterpiece, 1girl=yes")),
        ("e=mc2", (None, "e=mc2")),
        ("style=noir", ("style", "noir")),
        ("https://host/a.png?x=1", (None, "https://host/a.png?x=1")),
        ("", (None, "")),
        ("6", (None, "6")),
    ],
)
def test_a_node_is_named_before_an_equals_sign(text: str, expected: tuple[str | None, str]) -> None:
    workflow = {"6": node("X"), "57:8": node("X"), "style": node("X")}
    assert client.split_named(workflow, text) == expected


@pytest.mark.parametrize("text", ["16=a cat", "57:9=a cat"])
def test_a_number_that_is_no_node_does_not_end_up_in_the_text(text: str) -> None:
    workflow = {"6": node("X"), "57:8": node("X")}
    assert f"there is no node {text.partition('=')[0]}; did you mean" in refusal(client.split_named, workflow, text)


# --- prompt text: where it comes from --------------------------------------------------------------------------------

GOOD_AND_BAD = {"6": encoder("good"), "7": encoder("bad")}


@pytest.mark.parametrize(("positive", "negative"), [("6", "7"), ("7", "6")])
def test_the_prompt_follows_the_sampler_and_not_the_order(positive: str, negative: str) -> None:
    workflow = {**GOOD_AND_BAD, "3": sampler(positive, negative)}
    assert texts(workflow) == [f"{positive}.text"]
    assert texts(workflow, "negative") == [f"{negative}.text"]


ROLES_BY_NAME = [
    ("positive", "negative"),
    ("positive_prompt", "negative_prompt"),
    ("text_positive", "text_negative"),
    ("prompt_pos", "prompt_neg"),
    ("Positive", "Negative"),
    ("cond_positive", "cond_negative"),
    ("pos", "neg"),
    ("positive_1", "negative_1"),
    ("positive_conditioning", "negative_conditioning"),
    ("opt_positive", "opt_negative"),
]


@pytest.mark.parametrize(("positive", "negative"), ROLES_BY_NAME)
def test_inputs_with_a_role_in_their_name_are_kept_apart(positive: str, negative: str) -> None:
    linked = {**GOOD_AND_BAD, "3": node("KSampler", **{positive: ["6", 0], negative: ["7", 0]})}
    assert (texts(linked), texts(linked, "negative")) == (["6.text"], ["7.text"])
    held = {"2": node("BothEncode", **{negative: "bad", positive: "good", "clip": ["4", 1]})}
    held["3"] = sampler("2", "2")
    assert (texts(held), texts(held, "negative")) == ([f"2.{positive}"], [f"2.{negative}"])


@pytest.mark.parametrize(
    "name", ["position", "negate", "possible_text", "positively", "composition", "negatives_of_it"]
)
def test_a_name_that_only_begins_like_a_role_is_none(name: str) -> None:
    workflow = {**GOOD_AND_BAD, "8": encoder("decoy"), "3": sampler("6", "7", **{name: ["8", 0]})}
    assert (texts(workflow), texts(workflow, "negative")) == (["6.text"], ["7.text"])


@pytest.mark.parametrize(
    ("class_type", "fields"),
    [
        ("CLIPTextEncode", ["text"]),
        ("TextEncodeQwenImageEdit", ["prompt"]),
        ("TextEncodeQwenImageEditPlus", ["prompt"]),
        ("CLIPTextEncodeFlux", ["clip_l", "t5xxl"]),
        ("CLIPTextEncodeSDXL", ["text_g", "text_l"]),
        ("CLIPTextEncodeSDXLRefiner", ["text"]),
        ("CLIPTextEncodeSD3", ["clip_g", "clip_l", "t5xxl"]),
        ("CLIPTextEncodeHunyuanDiT", ["bert", "mt5xl"]),
        ("CLIPTextEncodeHiDream", ["clip_g", "clip_l", "llama", "t5xxl"]),
        ("CLIPTextEncodeLumina2", ["user_prompt"]),
        ("CLIPTextEncodeControlnet", ["text"]),
        ("CLIPTextEncodePixArtAlpha", ["text"]),
        ("TextEncodeAceStepAudio", ["tags"]),
        ("MZ_ChatGLM3", ["text"]),
        ("SomeNewTextEncoder", ["prompt"]),
    ],
)
def test_every_field_of_an_encoder_gets_the_words_and_nothing_else_of_it(class_type: str, fields: list[str]) -> None:
    words = {name: f"old {name}" for name in fields}
    others = {"system_prompt": "be good", "lyrics": "la", "weight": "mean", "filename_prefix": "x", "width": 1024}
    workflow = {
        "6": node(class_type, **words, **others, clip=["4", 1], image=["1", 0]),
        "7": node(class_type, **words, **others, clip=["4", 1]),
        "3": sampler("6", "7"),
    }
    assert texts(workflow) == [f"6.{name}" for name in fields]
    assert texts(workflow, "negative") == [f"7.{name}" for name in fields]


def test_an_encoder_with_one_field_linked_and_one_typed_gets_both() -> None:
    workflow = {
        "5": node("PrimitiveString", value="good"),
        "6": node("CLIPTextEncodeFlux", clip_l="short", t5xxl=["5", 0], clip=["4", 0]),
        "8": node("BasicGuider", conditioning=["6", 0]),
    }
    assert texts(workflow) == ["5.value", "6.clip_l"]


CONDITIONING_NODES = {
    "ConditioningCombine": ["conditioning_1", "conditioning_2"],
    "ConditioningConcat": ["conditioning_to", "conditioning_from"],
    "ConditioningAverage": ["conditioning_to", "conditioning_from"],
    "ConditioningSetArea": ["conditioning"],
    "ConditioningSetTimestepRange": ["conditioning"],
    "FluxGuidance": ["conditioning"],
    "ReferenceLatent": ["conditioning"],
    "unCLIPConditioning": ["conditioning"],
    "Reroute": [""],
    "Any Switch (rgthree)": ["any_01"],
    "FreeMemory": ["anything"],
    "SomethingNew": ["whatever"],
}


@pytest.mark.parametrize("class_type", CONDITIONING_NODES)
def test_conditioning_nodes_are_passed_through(class_type: str) -> None:
    inputs = CONDITIONING_NODES[class_type]
    workflow = {
        **GOOD_AND_BAD,
        "8": node(class_type, **{key: ["6", 0] for key in inputs}),
        "9": node(class_type, **{key: ["7", 0] for key in inputs}),
        "3": sampler("8", "9"),
    }
    assert (texts(workflow), texts(workflow, "negative")) == (["6.text"], ["7.text"])


def test_nodes_with_both_roles_keep_them_apart_whatever_their_outputs() -> None:
    workflow = {
        **GOOD_AND_BAD,
        "9": node("ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0], image=["1", 0]),
        "10": node("InpaintModelConditioning", positive=["9", 0], negative=["9", 1], vae=["4", 2]),
        "11": node("Reroute", **{"": ["10", 1]}),
        "57:3": sampler("10", "11"),
    }
    assert (texts(workflow), texts(workflow, "negative")) == (["6.text"], ["7.text"])


def test_an_input_for_the_other_role_is_never_followed() -> None:
    wrapper = node("Wrapper", negative=["7", 0], whatever=["6", 0])
    zeroed = node("ConditioningZeroOut", conditioning=["6", 0])
    workflow = {**GOOD_AND_BAD, "8": wrapper, "9": zeroed, "3": sampler("8", "9")}
    assert texts(workflow) == ["6.text"]
    assert texts(workflow, node_id="8") == ["6.text"]
    workflow["8"] = node("Wrapper", negative=["7", 0], model=["4", 0])
    assert "no text encoder feeds a positive input" in refusal(texts, workflow)


def test_the_picture_of_a_controlnet_brings_no_other_words() -> None:
    workflow = {
        **GOOD_AND_BAD,
        "8": encoder("words of the picture"),
        "9": node("DetailerForEach", positive=["8", 0], negative=["8", 0]),
        "11": node("ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0], image=["9", 0]),
        "12": node("ControlNetApply", conditioning=["11", 0], image=["9", 0]),
        "3": sampler("12", "7"),
    }
    assert (texts(workflow), texts(workflow, "negative")) == (["6.text"], ["7.text"])


def test_the_same_encoder_behind_zero_out_is_only_positive() -> None:
    workflow = {"6": encoder("old"), "7": node("ConditioningZeroOut", conditioning=["6", 0]), "3": sampler("6", "7")}
    assert texts(workflow) == ["6.text"]
    assert "no text encoder feeds a negative input" in refusal(texts, workflow, "negative")


def test_one_conditioning_without_a_role_is_positive_and_never_negative() -> None:
    workflow = {
        "6": encoder("old"),
        "8": node("BasicGuider", conditioning=["6", 0]),
        "9": node("SamplerCustomAdvanced", guider=["8", 0]),
    }
    assert texts(workflow) == ["6.text"]
    assert '6 (CLIPTextEncode).text = "old"' in refusal(texts, workflow, "negative")


# --- prompt text: which nodes it is traced from ----------------------------------------------------------------------

DETAILER = node("FaceDetailer", positive=["16", 0], negative=["17", 0])
TIERS = {"16": encoder("face"), "17": encoder("no face"), "30": DETAILER}


def test_a_sampler_goes_before_other_nodes_with_roles() -> None:
    workflow = {**GOOD_AND_BAD, **TIERS, "3": sampler("6", "7")}
    assert (texts(workflow), texts(workflow, "negative")) == (["6.text"], ["7.text"])


def test_without_a_sampler_other_nodes_with_roles_are_taken() -> None:
    workflow = {**GOOD_AND_BAD, **TIERS}
    assert (texts(workflow), texts(workflow, "negative")) == (["16.text"], ["17.text"])


def test_a_sampler_without_text_leaves_it_to_other_nodes_with_roles() -> None:
    workflow = {**TIERS, "3": node("KSampler", model=["4", 0]), "5": node("KSamplerSelect", sampler_name="euler")}
    assert (texts(workflow), texts(workflow, "negative")) == (["16.text"], ["17.text"])


def test_a_node_that_only_shows_roles_takes_none() -> None:
    shows = node("Show positive and negative", positive=["7", 0], negative=["6", 0])
    assert "several places" in refusal(texts, {**GOOD_AND_BAD, "20": shows})


def test_without_roles_the_one_encoder_is_taken_and_two_are_not() -> None:
    assert texts({"6": encoder("old"), "9": node("SomeRender", embeds=["6", 0])}) == ["6.text"]
    assert "several places" in refusal(texts, GOOD_AND_BAD)
    assert "no text encoder feeds a negative input" in refusal(texts, {"6": encoder("old")}, "negative")


def test_without_encoders_the_one_prompt_input_is_taken() -> None:
    workflow = {
        "1": node("OpenAIGPTImage1", prompt="old", seed=1),
        "2": node("GroundingDinoSAMSegment", prompt="face"),
        "5": node("ShowText|pysssss", prompt="shown"),
        "6": node("SaveImage", filename_prefix="prompt"),
    }
    assert texts(workflow) == ["1.prompt"]
    workflow["8"] = node("KlingTextToVideo", prompt="other")
    assert "1 (OpenAIGPTImage1).prompt" in refusal(texts, workflow)


def test_a_linked_prompt_input_is_followed_to_its_string() -> None:
    workflow = {"1": node("GeminiImage", prompt=["2", 0]), "2": node("PrimitiveString", value="old")}
    assert texts(workflow) == ["2.value"]


def test_a_workflow_without_text_says_so() -> None:
    assert refusal(texts, {"1": node("EmptyImage")}) == (
        "no text encoder feeds a positive input; the workflow holds no text"
    )


# --- prompt text: several of them ------------------------------------------------------------------------------------


def two_samplers(first: Any, second: Any) -> client.Workflow:
    workflow = {"6": encoder(first), "16": encoder(second, "Second"), "7": encoder("bad")}
    return workflow | {"3": sampler("6", "7"), "13": sampler("16", "7")}


def test_two_samplers_with_the_same_words_get_the_same_new_ones() -> None:
    assert texts(two_samplers("good", "good")) == ["6.text", "16.text"]
    assert texts(two_samplers("", "")) == ["6.text", "16.text"]


def test_two_samplers_with_different_words_are_an_error_that_names_them() -> None:
    message = refusal(texts, two_samplers("good", "fine"))
    assert '6 (CLIPTextEncode).text = "good", 16 "Second" (CLIPTextEncode).text = "fine"' in message
    assert "--prompt 6=TEXT" in message
    assert "--set 6.text=TEXT" in message


def test_an_encoder_without_words_does_not_count_beside_one_with() -> None:
    assert texts(two_samplers("good", "")) == ["6.text"]
    assert texts(two_samplers("", "good")) == ["16.text"]


def test_a_string_node_that_is_empty_now_is_not_passed_over_for_a_fixed_text() -> None:
    workflow = {
        "2": node("String Literal", "Negative prompt", string=""),
        "10": encoder(["2", 0]),
        "13": encoder("a fixed text that keeps it decent"),
        "14": node("ConditioningCombine", conditioning_1=["10", 0], conditioning_2=["13", 0]),
        "6": encoder("good"),
        "3": sampler("6", "14"),
    }
    message = refusal(texts, workflow, "negative")
    assert "--negative 2=TEXT" in message
    assert "13 (CLIPTextEncode).text" in message


def test_of_two_string_nodes_the_one_with_words_is_taken() -> None:
    workflow = string_graph(
        n1=node("Text Concatenate", text_a=["n2", 0], text_b=["n3", 0]),
        n2=node("String", "Before", String=""),
        n3=node("String", String="good"),
    )
    assert texts(workflow) == ["n3.String"]


def test_an_empty_field_of_another_sampler_does_not_count_beside_words() -> None:
    sound = node("MMAudioSampler", prompt="", negative_prompt="", mmaudio_model=["9", 0], images=["3", 0])
    workflow = {**GOOD_AND_BAD, "3": sampler("6", "7"), "17": sound}
    assert texts(workflow, "negative") == ["7.text"]


def test_words_that_both_roles_use_are_not_touched() -> None:
    workflow = {
        "5": node("PrimitiveString", value="old"),
        "8": node("StringConcatenate", string_a="not ", string_b=["5", 0]),
        "6": encoder(["5", 0]),
        "7": encoder(["8", 0]),
        "3": sampler("6", "7"),
    }
    for role, other in client.OPPOSITE.items():
        message = refusal(texts, workflow, role)
        assert f"the {role} text is also the {other} one: 5 (PrimitiveString).value" in message
        assert "--set 5.value=TEXT" in message


def test_one_encoder_for_both_roles_is_an_error_that_names_it() -> None:
    workflow = {"6": encoder("old", "Words"), "3": sampler("6", "6")}
    assert '6 "Words" (CLIPTextEncode).text = "old"' in refusal(texts, workflow)
    assert "--set 6.text=TEXT" in refusal(texts, workflow, "negative")


def test_a_second_sampler_that_uses_the_words_the_other_way_round_is_an_error() -> None:
    workflow = {**GOOD_AND_BAD, "3": sampler("6", "7"), "13": sampler("7", "6")}
    assert "also the negative one" in refusal(texts, workflow)


def test_the_own_words_are_changed_where_others_are_shared() -> None:
    workflow = {
        "5": node("PrimitiveString", value="style"),
        "6": encoder("own"),
        "8": encoder(["5", 0]),
        "9": node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["8", 0]),
        "7": encoder(["5", 0]),
        "3": sampler("9", "7"),
    }
    assert texts(workflow) == ["6.text"]


# --- prompt text: strings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_type", "name"),
    [
        ("PrimitiveString", "value"),
        ("PrimitiveStringMultiline", "value"),
        ("PrimitiveNode", "value"),
        ("Primitive string multiline [Crystools]", "string"),
        ("String Literal", "string"),
        ("CR Text", "text"),
        ("Text Multiline", "text"),
        ("ttN text", "text"),
        ("easy positive", "positive"),
        ("CR Prompt Text", "prompt"),
        ("Text _O", "text"),
        ("String", "String"),
        ("TextInput_", "text"),
    ],
)
def test_a_linked_text_goes_to_its_string_node(class_type: str, name: str) -> None:
    workflow = {"5": node(class_type, **{name: "old"}), "6": encoder(["5", 0]), "7": encoder("bad")}
    assert texts(workflow | {"3": sampler("6", "7")}) == [f"5.{name}"]


def string_graph(**nodes: Any) -> client.Workflow:
    """Nodes under the ids n1, n2 ...; n1 is the positive text."""
    return {**nodes, "6": encoder(["n1", 0]), "7": encoder("bad"), "3": sampler("6", "7")}


def test_a_concatenation_has_one_free_end() -> None:
    subject = node("PrimitiveString", value="a cat")
    joined = node("StringConcatenate", string_a=["n2", 0], string_b=", best quality", delimiter=", ")
    assert texts(string_graph(n1=joined, n2=subject)) == ["n2.value"]
    swapped = node("Text Concatenate", text_a="best quality", text_b=["n2", 0], delimiter=", ", clean_whitespace="true")
    assert texts(string_graph(n1=swapped, n2=subject)) == ["n2.value"]


def test_a_concatenation_of_one_typed_text_and_nothing_is_that_text() -> None:
    assert texts(string_graph(n1=node("StringConcatenate", string_a="old", string_b="", delimiter=", "))) == [
        "n1.string_a"
    ]


def test_a_concatenation_with_two_free_ends_is_an_error_that_names_both() -> None:
    typed = string_graph(n1=node("StringConcatenate", string_a="a cat", string_b="best quality", delimiter=""))
    message = refusal(texts, typed)
    assert "n1 (StringConcatenate).string_a" in message
    assert "n1 (StringConcatenate).string_b" in message
    assert "--set n1.string_a=TEXT" in message
    linked = string_graph(
        n1=node("Text Concatenate", text_a=["n2", 0], text_b=["n3", 0]),
        n2=node("CR Text", text="a cat"),
        n3=node("CR Text", text="best quality"),
    )
    assert "--prompt n2=TEXT" in refusal(texts, linked)
    assert texts(linked, node_id="n3") == ["n3.text"]


def test_a_concatenation_of_the_same_empty_text_twice_is_not_filled_twice() -> None:
    joined = string_graph(
        n1=node("Text Concatenate", text_a=["n2", 0], text_b=["n3", 0]),
        n2=node("CR Text", text=""),
        n3=node("CR Text", text=""),
    )
    assert "several places" in refusal(texts, joined)


def test_the_text_that_a_node_showed_last_time_is_not_the_prompt() -> None:
    shows = node("ShowText|pysssss", text=["n2", 0], text_0="shown last time", text2="too")
    assert texts(string_graph(n1=shows, n2=node("PrimitiveString", value="old"))) == ["n2.value"]
    assert "no text encoder" in refusal(texts, string_graph(n1=node("ShowText|pysssss", text_0="shown last time")))


def test_a_replacement_keeps_what_it_finds_and_puts() -> None:
    replaced = node("StringReplace", string=["n2", 0], find="cat", replace="dog")
    assert texts(string_graph(n1=replaced, n2=node("PrimitiveString", value="a cat"))) == ["n2.value"]


def test_a_setting_of_a_node_that_is_not_for_strings_is_no_text() -> None:
    lookup = node("Lookup", source="the web", value="everything", any="all")
    assert "no text encoder feeds a positive input" in refusal(texts, string_graph(n1=lookup))


@pytest.mark.parametrize("class_type", ["Any Switch (rgthree)", "ComfySwitchNode", "CR Text Input Switch"])
def test_a_switch_offers_alternatives(class_type: str) -> None:
    names = {"ComfySwitchNode": ("on_false", "on_true")}.get(class_type, ("any_01", "any_02"))
    names = ("text1", "text2") if class_type.startswith("CR") else names
    switch = node(class_type, **{names[0]: ["n2", 0], names[1]: ["n3", 0]}, switch=["n4", 0], select=1)
    flag = node("PrimitiveBoolean", value=True)
    first, same, other = (node("CR Text", text=text) for text in ("a cat", "a cat", "a dog"))
    assert "several places" in refusal(texts, string_graph(n1=switch, n2=first, n3=other, n4=flag))
    assert texts(string_graph(n1=switch, n2=first, n3=same, n4=flag)) == ["n2.text", "n3.text"]


def test_a_switch_of_one_text_is_that_text_and_not_what_chooses_it() -> None:
    switch = node("UniversalSwitch", input1=["n2", 0], selection_in=["n3", 0], mode="SWITCH")
    chooser = node("PrimitiveString", value="the first one")
    assert texts(string_graph(n1=switch, n2=node("CR Text", text="a cat"), n3=chooser)) == ["n2.text"]


@pytest.mark.parametrize(
    ("class_type", "inputs"),
    [
        ("OllamaGenerate", {"prompt": "write a prompt"}),
        ("Groq LLM API", {"user_input": "write a prompt", "system_message": "you are"}),
        ("Florence2Run", {"image": ["1", 0], "text_input": "", "task": "caption"}),
        ("WD14Tagger|pysssss", {"image": ["1", 0], "tags": "1girl, solo"}),
        ("BLIPCaption", {"image": ["1", 0], "prefix": ""}),
        ("Qwen2.5VL", {"image": ["1", 0], "text": "describe it"}),
        ("ImageDescriptionNode", {"image": ["1", 0], "prompt": "describe it"}),
    ],
)
def test_words_that_a_model_makes_up_are_not_changed(class_type: str, inputs: dict[str, Any]) -> None:
    workflow = string_graph(n1=node(class_type, "Writer", **inputs)) | {"1": node("LoadImage", image="a.png")}
    message = refusal(texts, workflow)
    assert f'the positive text is made up by n1 "Writer" ({class_type})' in message
    assert texts(workflow, "negative") == ["7.text"]


def test_a_node_that_enhances_words_takes_them() -> None:
    enhancer = node("LTXVPromptEnhancer", prompt=["n2", 0], image_prompt=["1", 0], image=["1", 0])
    workflow = string_graph(n1=enhancer, n2=node("PrimitiveString", value="old"))
    assert texts(workflow | {"1": node("LoadImage", image="a.png")}) == ["n2.value"]


def test_typed_words_beside_made_up_ones_can_be_changed() -> None:
    joined = node("StringConcatenate", string_a="a photo of ", string_b=["n2", 0])
    tagger = node("WD14Tagger|pysssss", image=["1", 0])
    workflow = string_graph(n1=joined, n2=tagger) | {"1": node("LoadImage", image="a.png")}
    assert texts(workflow) == ["n1.string_a"]


def test_both_texts_of_a_wildcard_node_are_set() -> None:
    wildcard = node("ImpactWildcardProcessor", wildcard_text="{a|b}", populated_text="a", mode="populate", seed=1)
    assert texts(string_graph(n1=wildcard)) == ["n1.populated_text", "n1.wildcard_text"]


def test_a_loader_of_models_in_between_brings_no_words() -> None:
    workflow = {
        "2": node("LoraLoaderFromText", text=["5", 0], lora_name="a", model=["4", 0]),
        "5": node("CR Text", text="good"),
        "6": node("CLIPTextEncode", text=["2", 4], clip=["2", 1]),
        "7": encoder("bad"),
        "3": sampler("6", "7"),
    }
    assert texts(workflow) == ["5.text"]


# --- prompt text: named nodes ----------------------------------------------------------------------------------------


def test_a_named_encoder_is_changed_whatever_its_role() -> None:
    workflow = two_samplers("good", "fine")
    assert texts(workflow, node_id="16") == ["16.text"]
    assert texts(workflow, node_id="7") == ["7.text"]
    assert texts(workflow, "negative", "6") == ["6.text"]


def test_a_named_sampler_stands_for_its_own_text_of_the_role() -> None:
    workflow = two_samplers("good", "fine")
    assert texts(workflow, node_id="3") == ["6.text"]
    assert texts(workflow, node_id="13") == ["16.text"]
    assert texts(workflow, "negative", "13") == ["7.text"]


def test_a_named_node_with_a_linked_text_stands_for_its_string() -> None:
    workflow = {"5": node("PrimitiveString", value="old"), "6": encoder(["5", 0]), "16": encoder(["5", 0])}
    assert texts(workflow, node_id="6") == ["5.value"]


def test_a_named_node_of_both_texts_keeps_the_other() -> None:
    workflow = {"2": node("WanVideoTextEncode", positive_prompt="good", negative_prompt="bad", t5=["1", 0])}
    assert texts(workflow, node_id="2") == ["2.positive_prompt"]
    assert texts(workflow, "negative", "2") == ["2.negative_prompt"]


def test_a_named_node_without_text_is_named_in_the_error() -> None:
    workflow = {**GOOD_AND_BAD, "1": node("LoadImage", "In", image="a.png"), "3": sampler("6", "7")}
    message = refusal(texts, workflow, node_id="1")
    assert '1 "In" (LoadImage)' in message
    assert '6 (CLIPTextEncode).text = "good"' in message


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_every_seed_is_drawn_once_for_each_node_in_order() -> None:
    workflow = {
        "57:12": node("KSamplerAdvanced", noise_seed=1),
        "9": node("KSampler", seed=1, noise_seed=2, rand_seed=3),
        "10": node("RandomNoise", noise_seed=2**64 - 1),
        "11": node("Shuffle", rand_seed=-1),
        "12": node("KSampler", seed=0.5),
        "13": node("Other", seed_value=4, batch_seed="fixed", seeds=5, Seed=6),
    }
    assert seeds(workflow) == {
        "9.noise_seed": 100,
        "9.rand_seed": 100,
        "9.seed": 100,
        "10.noise_seed": 101,
        "11.rand_seed": 102,
        "12.seed": 103,
        "57:12.noise_seed": 104,
    }


@pytest.mark.parametrize("value", [True, False, None, {"a": 1}, ["gone", 0], ["1", 0, 0], [], ["6"], [6, 0]])
def test_what_is_no_seed_is_left_alone(value: Any) -> None:
    assert seeds({"1": node("KSampler", seed=value), "6": node("Primitive", value=5)}) == {}


def test_a_string_of_a_template_is_replaced() -> None:
    assert seeds({"1": node("KSampler", seed="{{seed}}")}) == {"1.seed": 100}
    linked = {"1": node("Seed", seed="{{seed}}"), "2": node("KSampler", seed=["1", 0])}
    assert seeds(linked) == {"1.seed": 100}
    assert client.seeds_left(linked, client.plan_seeds(linked, lambda: 7)) == []


@pytest.mark.parametrize(
    "between",
    [
        {},
        {"5": node("Reroute", **{"": ["6", 0]})},
        {"5": node("Int to Int", value=["4", 0]), "4": node("Reroute", **{"": ["6", 0]})},
        {"5": node("MathExpression|pysssss", expression="a + 1", a=["6", 0])},
        {"5": node("SimpleMath+", a=["6", 0], b=7, value="a+b")},
    ],
)
def test_a_linked_seed_is_drawn_where_its_number_is(between: client.Workflow) -> None:
    workflow = {
        "3": node("KSampler", seed=["5" if between else "6", 0]),
        "13": node("KSampler", noise_seed=["6", 0]),
        "6": node("PrimitiveInt", value=5, title="not a number"),
        **between,
    }
    assert seeds(workflow) == {"6.value": 100}


def test_a_seed_node_of_a_package_is_drawn_by_its_own_seed() -> None:
    workflow = {"3": node("KSampler", seed=["6", 3]), "6": node("easy seed", seed=5, width=512, step=1)}
    assert seeds(workflow) == {"6.seed": 100}


def test_a_number_that_is_linked_to_a_seed_node_is_not_the_seed() -> None:
    workflow = {"3": node("KSampler", seed=["6", 0]), "6": node("easy seed", seed=5, offset=["7", 0])}
    assert seeds(workflow | {"7": node("PrimitiveInt", value=3)}) == {"6.seed": 100}


def test_a_number_that_is_also_a_width_stays() -> None:
    number = {"6": node("PrimitiveInt", value=512), "3": node("KSampler", seed=["6", 0])}
    assert seeds(number) == {"6.value": 100}
    assert seeds(number | {"5": node("EmptyLatentImage", width=["6", 0])}) == {}
    behind = {"7": node("Reroute", **{"": ["6", 0]}), "5": node("EmptyLatentImage", width=["7", 0])}
    assert seeds(number | behind) == {}


def test_a_seed_by_name_is_drawn_whatever_else_reads_it() -> None:
    workflow = {
        "1": node("Seed (rgthree)", seed=5),
        "2": node("KSampler", seed=["1", 0]),
        "3": node("Image Saver", seed_value=["1", 0]),
        "4": node("Math", a=["1", 0], b=["1", 0]),
        "5": node("KSampler", seed=["4", 0]),
    }
    assert seeds(workflow) == {"1.seed": 100}


def test_a_primitive_that_also_names_the_seed_for_a_saver_is_drawn() -> None:
    workflow = {
        "1": node("PrimitiveInt", value=5),
        "2": node("KSampler", seed=["1", 0]),
        "3": node("Image Saver", seed_value=["1", 0]),
    }
    assert seeds(workflow) == {"1.value": 100}


def test_two_numbers_cannot_be_told_apart() -> None:
    workflow = {"3": node("KSampler", seed=["6", 0]), "6": node("RandomRange", minimum=1, maximum=9)}
    assert seeds(workflow) == {}
    assert client.seeds_left(workflow, []) == [client.Place("3", "seed")]


def test_a_seed_in_a_cycle_is_left_alone() -> None:
    workflow = {"1": node("Reroute", **{"": ["2", 0]}), "2": node("Reroute", **{"": ["1", 0]})}
    assert seeds(workflow | {"3": node("KSampler", seed=["1", 0])}) == {}


# --- --set -----------------------------------------------------------------------------------------------------------

SETTABLE = {
    "3": node("KSampler", "Sampler", steps=20, denoise=0.5, model=["4", 0], seed=7, sampler_name="euler"),
    "57:8": node("Switch", on=True, extra=None, text="old"),
    "a": node("X", b=1),
    "a.b": node("X", **{"num.strength": 1.0, "sub:name": "x"}),
    "5": node("X", linked=["gone", 0], odd=[]),
}


@pytest.mark.parametrize(
    ("assignment", "place", "value"),
    [
        ("3.steps=8", "3.steps", 8),
        ("3.steps=-1", "3.steps", -1),
        ("3.denoise=1e-2", "3.denoise", 0.01),
        ("3.steps=", "3.steps", ""),
        ("3.steps=NaN", "3.steps", "NaN"),
        ("3.steps=Infinity", "3.steps", "Infinity"),
        ("3.steps=-Infinity", "3.steps", "-Infinity"),
        ('3.steps={"a": [1]}', "3.steps", {"a": [1]}),
        ("3.sampler_name=heun", "3.sampler_name", "heun"),
        ('3.sampler_name="heun"', "3.sampler_name", "heun"),
        ("57:8.text=a = b", "57:8.text", "a = b"),
        ("57:8.text=7", "57:8.text", "7"),
        ("57:8.text=true", "57:8.text", "true"),
        ("57:8.text=[red, green]", "57:8.text", "[red, green]"),
        ("57:8.text=null", "57:8.text", "null"),
        ("57:8.on=false", "57:8.on", False),
        ("57:8.on=False", "57:8.on", False),
        ("57:8.extra=5", "57:8.extra", 5),
        ("57:8.extra=words", "57:8.extra", "words"),
        ("a.b.num.strength=2", "a.b.num.strength", 2),
        ("a.b.sub:name=y", "a.b.sub:name", "y"),
    ],
)
def test_set_takes_json_or_a_string(assignment: str, place: str, value: Any) -> None:
    change = client.plan_set(SETTABLE, assignment)
    assert planned([change]) == {place: value}
    assert type(change.value) is type(value)


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("", "NODE.INPUT=VALUE"),
        ("3.steps", "NODE.INPUT=VALUE"),
        ("steps=8", "NODE.INPUT=VALUE"),
        ("=", "NODE.INPUT=VALUE"),
        ("3.step=8", '3 "Sampler" (KSampler) has no input step; did you mean steps?'),
        ("3.zzz=8", "there are steps, denoise"),
        ("3.=8", "has no input"),
        ("57:9.on=1", "no node 57:9; did you mean 57:8?"),
        ("zzz.on=1", "no node zzz; there are 3, 5, 57:8, a, a.b"),
        ("3.model=x", "comes by link from a node that is not there"),
        ("5.linked=x", "comes by link"),
        ("5.odd=x", "comes by link"),
        ('3.steps=["4", 0]', "take a list for a link"),
        ("3.steps=[]", "take a list for a link"),
        ("57:8.on=maybe", "true or false"),
    ],
)
def test_set_refuses_what_is_not_there_and_links(assignment: str, says: str) -> None:
    assert says in refusal(client.plan_set, SETTABLE, assignment)


def test_set_names_the_node_that_a_link_comes_from() -> None:
    workflow = {"6": encoder(["5", 0]), "5": node("PrimitiveString", "Words", value="old")}
    assert '6.text comes by link from 5 "Words" (PrimitiveString)' in refusal(client.plan_set, workflow, "6.text=x")


def test_a_long_list_of_nodes_is_cut_short() -> None:
    message = refusal(client.plan_set, {str(number): node("X") for number in range(3000)}, "zzz.a=1")
    assert "and 2988 more" in message
    assert len(message) < 300


# --- files -----------------------------------------------------------------------------------------------------------


def loaders(*node_ids: str, class_type: str = "LoadImage", **inputs: Any) -> client.Workflow:
    """Loaders under these ids and one node that uses them all."""
    inputs = inputs or {"image": "old.png"}
    uses = node("Uses", **{f"i{node_id}": [node_id, 0] for node_id in node_ids})
    return {**{node_id: node(class_type, **inputs) for node_id in node_ids}, f"uses {'-'.join(node_ids)}": uses}


def test_images_go_to_the_lowest_node_ids_first() -> None:
    workflow = loaders("57:12", "10", "57:8", "9")
    assert files(workflow, *"abcd") == {"9.image": "a", "10.image": "b", "57:8.image": "c", "57:12.image": "d"}
    assert files(workflow, "a") == {"9.image": "a"}


def test_load_image_comes_before_other_loaders() -> None:
    workflow = loaders("2", class_type="LoadImageMask") | loaders("3", class_type="LoadImageOutput")
    workflow |= loaders("1", class_type="LoadAndResizeImage") | loaders("10")
    assert list(files(workflow, *"abcd")) == ["10.image", "1.image", "2.image", "3.image"]


@pytest.mark.parametrize(
    ("class_type", "inputs", "expected"),
    [
        ("LoadImage", {"image": "a.png", "upload": "image"}, {"1.image": "image"}),
        ("LoadImage", {}, {"1.image": "image"}),
        ("LoadImageMask", {"image": "a.png", "channel": "alpha"}, {"1.image": "image"}),
        ("LoadImageOutput", {"image": "a.png [output]"}, {"1.image": "image"}),
        ("Load image with metadata [Crystools]", {"image": "a.png"}, {"1.image": "image"}),
        ("LoadVideo", {"file": "a.mp4"}, {"1.file": "video"}),
        ("VHS_LoadVideo", {"video": "a.mp4", "force_rate": 0, "format": "None"}, {"1.video": "video"}),
        ("VHS_LoadVideoFFmpeg", {"video": "a.mp4"}, {"1.video": "video"}),
        ("LoadAudio", {"audio": "a.wav"}, {"1.audio": "audio"}),
        ("VHS_LoadAudioUpload", {"audio": "a.wav", "start_time": 0}, {"1.audio": "audio"}),
        ("Load3D", {"model_file": "a.glb", "image": {"image": "x"}}, {"1.model_file": "file"}),
        ("LoadImage", {"image": ["2", 0]}, {}),
        ("VHS_LoadVideo", {"video": ["2", 0]}, {}),
        ("VHS_LoadVideoPath", {"video": "/a.mp4"}, {}),
        ("VHS_LoadImagePath", {"image": "/a.png"}, {}),
        ("LoadImageFromUrl", {"image": "https://host/a.png"}, {}),
        ("ETN_LoadImageBase64", {"image": "iVBO"}, {}),
        ("Load Images From Folder", {"image": "x"}, {}),
        ("LoadImagesFromDir", {"image": "x"}, {}),
        ("LoadImageFromServer", {"image": "x"}, {}),
        ("LoadVideoFromHttp", {"video": "x"}, {}),
        ("LoadAudioFromCache", {"audio": "x"}, {}),
        ("LoadDataset", {"image": "x"}, {}),
        ("UploadToBucket", {"image": "x"}, {}),
        ("DownloadImage", {"image": "x"}, {}),
        ("CheckpointLoaderSimple", {"ckpt_name": "a.safetensors"}, {}),
        ("PreviewImage", {"image": "a.png"}, {}),
    ],
)
def test_the_inputs_that_take_a_file(class_type: str, inputs: dict[str, Any], expected: dict[str, str]) -> None:
    workflow = {"1": node(class_type, **inputs), "3": node("Uses", this=["1", 0]), "2": node("X")}
    assert slots(workflow) == expected


def test_a_loader_that_nothing_uses_is_left_out_unless_there_is_no_other() -> None:
    unused = {"1": node("LoadImage", image="old.png")}
    assert files(unused, "a") == {"1.image": "a"}
    assert files(unused | loaders("5"), "a") == {"5.image": "a"}
    assert client.unfilled(unused | loaders("5"), [client.Change(client.Place("5", "image"), "a")], ["a"]) == []


def test_a_named_node_gets_its_file_and_the_rest_goes_in_order() -> None:
    workflow = loaders("1", "2", "57:3")
    assert files(workflow, "a", "1=b", "c") == {"1.image": "b", "2.image": "a", "57:3.image": "c"}
    assert files(workflow, "57:3=a") == {"57:3.image": "a"}


def test_a_named_loader_gets_its_file_though_nothing_uses_it() -> None:
    assert files({"1": node("LoadImage", image="old.png")} | loaders("5"), "1=a") == {"1.image": "a"}


@pytest.mark.parametrize("given_files", [["7=a"], ["1=a", "1=b"], ["2=a"]])
def test_a_named_node_that_takes_no_file_is_an_error_that_lists_those_that_do(given_files: list[str]) -> None:
    workflow = loaders("1") | {"2": node("LoadImage", image=["7", 0]), "7": node("SaveImage", "Out", images=["2", 0])}
    message = refusal(files, workflow, *given_files)
    assert client.label(workflow, given_files[-1][0]) in message
    assert "the nodes that take one file: 1 (LoadImage)" in message


def test_too_many_images_list_the_nodes_with_id_and_title() -> None:
    workflow = loaders("57:8", "4")
    workflow["4"]["_meta"] = {"title": "The room"}
    assert refusal(files, workflow, "a", "b", "c") == (
        '--img gives 3 images, but the workflow takes 2 images: 4 "The room" (LoadImage), 57:8 (LoadImage)'
    )
    assert "--img gives 1 image, but the workflow has no node" in refusal(files, {"1": node("EmptyImage")}, "a")
    assert "--file gives 1 file, but the workflow has no node" in refusal(files, workflow, "a", kind="video")


def test_too_few_images_list_what_is_missing_and_the_way_to_say_so() -> None:
    workflow = loaders("4", "57:8") | loaders("9", class_type="LoadAudio", audio="old.wav")
    planned_files = client.plan_files(workflow, [client.GivenFile("a.png", "image")])
    missing = client.unfilled(workflow, planned_files, ["a.png"])
    message = client.unfilled_message(workflow, missing)
    assert "2 files that --img or --file does not give" in message
    assert '57:8 (LoadImage).image = "old.png", 9 (LoadAudio).audio = "old.wav"' in message
    assert "--keep-images" in message
    assert "4 (LoadImage)" not in message


def test_a_file_that_is_sent_by_the_name_in_the_workflow_is_not_missing() -> None:
    assert client.unfilled(loaders("4"), [], {"old.png": b""}) == []
    assert len(client.unfilled(loaders("4"), [], {"other.png": b""})) == 1


@pytest.mark.parametrize("value", [None, 5, {"a": 1}, ""])
def test_a_loader_with_an_odd_value_lacks_its_file(value: Any) -> None:
    workflow = loaders("4", image=value)
    assert len(client.unfilled(workflow, [], {"old.png": b""})) == 1


def test_each_kind_of_file_goes_to_its_own_loaders() -> None:
    workflow = loaders("1", class_type="LoadAudio", audio="a.wav") | loaders("2", class_type="LoadVideo", file="a.mp4")
    workflow |= loaders("3") | loaders("4", class_type="Load3D", model_file="a.glb")
    assert files(workflow, "new", kind="audio") == {"1.audio": "new"}
    assert files(workflow, "new", kind="video") == {"2.file": "new"}
    assert files(workflow, "new") == {"3.image": "new"}
    assert files(workflow, *"abc", kind="file") == {"1.audio": "a", "2.file": "b", "4.model_file": "c"}
    assert list(files(workflow, *"ab", kind="video")) == ["2.file", "4.model_file"]
    for kind, number in (("image", 2), ("audio", 3), ("file", 4)):
        refusal(files, workflow, *["new"] * number, kind=kind)


def test_a_place_that_an_option_has_taken_is_not_free() -> None:
    taken = [client.Place("4", "image")]
    given_files = [client.GivenFile("a.png", "image")]
    assert planned(client.plan_files(loaders("4", "5"), given_files, taken)) == {"5.image": "a.png"}
    refusal(client.plan_files, loaders("4"), given_files, taken)


# --- the options together --------------------------------------------------------------------------------------------

WHOLE = {
    **GOOD_AND_BAD,
    "1": node("LoadImage", image="old.png"),
    "3": sampler("6", "7", seed=1, steps=20),
    "13": node("KSampler", seed=1, latent=["1", 0]),
}


def test_without_options_only_the_seeds_change_and_each_is_new() -> None:
    drawn = [changes(WHOLE) for _ in range(3)]
    assert all(list(one) == ["3.seed", "13.seed"] for one in drawn)
    assert len({value for one in drawn for value in one.values()}) == 6
    assert changes(WHOLE, "--keep-seeds") == {}
    assert changes(WHOLE, "--seed", "5") == {"3.seed": 5, "13.seed": 5}


def test_every_option_changes_its_own() -> None:
    given_files = [client.GivenFile("a.png", "image")]
    arguments = ["--prompt", "a", "--negative", "b", "--set", "3.steps=8", "--seed", "5"]
    assert changes(WHOLE, *arguments, given_files=given_files) == {
        "1.image": "a.png",
        "6.text": "a",
        "7.text": "b",
        "3.steps": 8,
        "3.seed": 5,
        "13.seed": 5,
    }


def test_set_wins_over_seeds() -> None:
    assert changes(WHOLE, "--set", "3.seed=9", "--seed", "5") == {"3.seed": 9, "13.seed": 5}
    assert changes(WHOLE, "--set", "3.seed=9", "--keep-seeds") == {"3.seed": 9}


def test_a_seed_for_a_workflow_without_one_is_an_error() -> None:
    assert "--seed" in refusal(changes, GOOD_AND_BAD, "--seed", "5")
    assert changes(GOOD_AND_BAD) == {}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--set", "6.text=a", "--prompt", "b"],
        ["--prompt", "6=a", "--prompt", "b"],
        ["--prompt", "6=a", "--negative", "6=b"],
        ["--set", "3.steps=1", "--set", "3.steps=2"],
    ],
)
def test_two_options_for_one_place_are_an_error(arguments: list[str]) -> None:
    assert "would be set twice" in refusal(changes, WHOLE, *arguments)


def test_two_texts_without_a_name_are_an_error() -> None:
    assert "--prompt is given more than once" in refusal(changes, WHOLE, "--prompt", "a", "--prompt", "b")
    assert "--negative is given more than once" in refusal(changes, WHOLE, "--negative", "a", "--negative", "b")
    assert changes(WHOLE, "--prompt", "6=a", "--prompt", "7=b", "--keep-seeds") == {"6.text": "a", "7.text": "b"}


def test_an_image_goes_past_the_loader_that_is_set_by_hand() -> None:
    workflow = loaders("4", "5")
    given_files = [client.GivenFile("a.png", "image")]
    assert changes(workflow, "--set", "4.image=kept.png", given_files=given_files) == {
        "4.image": "kept.png",
        "5.image": "a.png",
    }


# --- any JSON, any graph ---------------------------------------------------------------------------------------------

TEXTS = st.text(max_size=8) | st.sampled_from(["\ud800", "\x00", "a=b", "6=a", "old"])
NUMBERS = st.integers() | st.floats() | st.just(HUGE) | st.sampled_from([2**64, -(2**63), 1e308])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
IDS = st.sampled_from(["1", "2", "10", "57:8", "57:12", "x", "a.b", "\ud800", ""])
LINKS = st.tuples(IDS | st.just("gone"), st.integers(0, 2)).map(list)
INPUTS = {
    "image": LINKS | TEXTS | JSON,
    **dict.fromkeys(["text", "prompt", "value", "string_a", "clip_l", "t5xxl", "tags", "video", "file"], LINKS | TEXTS),
    **dict.fromkeys(["positive", "negative", "conditioning", "clip", "any_01", "negative_prompt", "x"], LINKS | TEXTS),
    **dict.fromkeys(["seed", "noise_seed", "width", "a"], LINKS | NUMBERS | JSON),
    "odd": JSON,
}
CLASSES = st.sampled_from(
    [
        *("KSampler", "BasicGuider", "CLIPTextEncode", "ControlNetApplyAdvanced", "ConditioningZeroOut", "Reroute"),
        *("PrimitiveString", "StringConcatenate", "ShowText|pysssss", "OllamaGenerate", "PromptEnhancer", "Other"),
        *("LoadImage", "LoadVideo", "Load3D", "PrimitiveInt", "MathExpression", "ImpactWildcardProcessor", ""),
    ]
)
SOME_INPUTS = st.lists(st.sampled_from(sorted(INPUTS)), max_size=5, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: INPUTS[name] for name in names})
)
NODES = st.fixed_dictionaries({"class_type": CLASSES, "inputs": SOME_INPUTS}, optional={"_meta": JSON})
GRAPHS = st.dictionaries(IDS, NODES, min_size=1, max_size=7)


@STEADY
@given(JSON | GRAPHS | GRAPHS.map(lambda graph: {"input": {"workflow": graph}}))
def test_any_json_gives_a_workflow_or_an_input_error(document: Any) -> None:
    try:
        workflow = client.parse_workflow(document)
    except client.InputError:
        return
    assert workflow
    assert all(client.is_node(node) for node in workflow.values())


def frozen(value: Any) -> str:
    return json.dumps(value)


def assert_sound(workflow: Any, plan: list[client.Change]) -> None:
    """Every change is to an unlinked input that is there (LoadImage's picture may be missing), and applying them
    changes just these."""
    for (node_id, name), _ in plan:
        inputs = workflow[node_id]["inputs"]
        assert not isinstance(inputs.get(name), list)
        assert name in inputs or (workflow[node_id]["class_type"], name) == ("LoadImage", "image")
    assert len({place for place, _ in plan}) == len(plan)
    expected = {key: {**node, "inputs": dict(node["inputs"])} for key, node in workflow.items()}
    for (node_id, name), value in plan:
        expected[node_id]["inputs"][name] = value
    assert frozen(client.apply_changes(workflow, plan)) == frozen(expected)


ROLES = st.sampled_from(["positive", "negative"])
GIVEN_FILES = st.lists(st.tuples(st.sampled_from(["image", "video", "audio", "file"]), st.none() | IDS), max_size=3)
ASSIGNMENTS = st.tuples(IDS, st.sampled_from([".", ""]), st.sampled_from(sorted(INPUTS)), JSON.map(frozen) | TEXTS).map(
    lambda parts: f"{parts[0]}{parts[1]}{parts[2]}={parts[3]}"
)


def assert_planners_hold(graph: Any, role: str, node_id: str | None, given_files: Any, assignment: str) -> None:
    before = frozen(graph)
    list_of_files = [
        client.GivenFile(f"{number}.png", kind, named if named in graph else None)
        for number, (kind, named) in enumerate(given_files)
    ]
    plans: tuple[Callable[[], list[client.Change]], ...] = (
        lambda: client.plan_files(graph, list_of_files),
        lambda: client.plan_text(graph, "new", role, node_id if node_id in graph else None),
        lambda: client.plan_seeds(graph, lambda: 7),
        lambda: [client.plan_set(graph, assignment)],
    )
    for plan in plans:
        try:
            plan_made = plan()
        except client.InputError as error:
            assert str(error).isprintable()
            assert len(str(error)) < 4000
            continue
        assert_sound(graph, plan_made)
    missing = client.unfilled(graph, [], {"old": b""})
    assert client.unfilled_message(graph, missing).isprintable()
    assert all(isinstance(client.value_at(graph, place), list) for place in client.seeds_left(graph, []))
    assert frozen(graph) == before


@STEADY
@given(GRAPHS, ROLES, st.none() | IDS, GIVEN_FILES, ASSIGNMENTS | TEXTS)
def test_any_graph_gives_changes_to_unlinked_inputs_or_an_input_error(
    graph: Any, role: str, node_id: str | None, given_files: Any, assignment: str
) -> None:
    assert_planners_hold(graph, role, node_id, given_files, assignment)


def chain(length: int, class_type: str, name: str, end: Any, /, **others: Any) -> Any:
    """Node 0 is linked to node 1, that to node 2, and so on, by the input `name`."""
    nodes = {str(i): node(class_type, **{name: [str(i + 1), 0]}, **others) for i in range(length)}
    return {**nodes, str(length): end}


def layers(depth: int, width: int, end: Callable[[int], Any]) -> Any:
    """Every node of a layer is linked to every node of the next."""
    return {
        f"{row}:{column}": node("Mix", **{f"any_{i}": [f"{row + 1}:{i}", 0] for i in range(width)})
        if row < depth
        else end(column)
        for row in range(depth + 1)
        for column in range(width)
    }


ENDS = {"s": node("KSampler", positive=["0", 0], negative=["0", 0], seed=["0", 0], image=["0", 0])}
LARGE = {
    "a chain of reroutes": chain(3000, "Reroute", "value", encoder("old")) | ENDS,
    "a chain of conditioning": chain(3000, "Set", "conditioning", encoder("old"), text="t") | ENDS,
    "a chain of encoders": chain(3000, "CLIPTextEncode", "text", node("PrimitiveString", value="old")) | ENDS,
    "a chain of seeds": chain(1000, "KSampler", "seed", node("PrimitiveInt", value=5)) | ENDS,
    "a ring": chain(3000, "Reroute", "value", node("Reroute", value=["0", 0])) | ENDS,
    "a ring of samplers": chain(1000, "KSampler", "positive", sampler("0", "0")) | ENDS,
    "diamonds": layers(60, 2, lambda column: encoder("old")) | ENDS | {"0": node("Mix", value=["0:0", 0])},
    "wide diamonds": layers(12, 40, lambda column: encoder(str(column))) | ENDS | {"0": node("Mix", value=["0:0", 0])},
    "one node with all": {
        **{str(i): encoder(str(i)) for i in range(1, 2000)},
        "0": node("Mix", **{f"any_{i}": [str(i), 0] for i in range(1, 2000)}),
        **ENDS,
    },
    "3000 loaders": {str(i): node("LoadImage", image="old.png") for i in range(3000)} | ENDS,
    "a name with many roles": {
        "0": encoder("old"),
        "s": node("KSampler", **{"positive" + "cond1" * 40 + "!": ["0", 0]}),
    },
    "a long name": {"0": node("CLIPTextEncode", **{"text_" * 2000 + "!": "old", "text": "x" * 100_000}), **ENDS},
    "a deep value": {"0": node("LoadImage", image=json.loads('{"a":' * 900 + "1" + "}" * 900)), **ENDS},
}


@pytest.mark.parametrize("role", ["positive", "negative"])
@pytest.mark.parametrize("name", LARGE)
def test_large_graphs_are_no_exception(name: str, role: str) -> None:
    before = frozen(LARGE[name])
    for node_id in (None, "0"):
        assert_planners_hold(LARGE[name], role, node_id, [("image", None), ("image", "0")], "0.value=x")
    assert frozen(LARGE[name]) == before


# --- the other role's text, by a walk of its own ---------------------------------------------------------------------

CONDITIONING_IDS, STRING_IDS = ["c0", "c1", "c2", "c3", "c4", "c5"], ["t0", "t1", "t2"]


def linked_to(ids: list[str]) -> st.SearchStrategy[Any]:
    return st.tuples(st.sampled_from(ids), st.integers(0, 1)).map(list)


CONDITIONING = linked_to(CONDITIONING_IDS)


STRING_NODES = st.one_of(
    st.builds(lambda text: node("PrimitiveString", value=text), st.sampled_from(["", "one", "two"])),
    st.builds(lambda a, b: node("StringConcatenate", string_a=a, string_b=b), linked_to(STRING_IDS), st.just("end")),
)
CONDITIONING_GRAPH = st.one_of(
    st.builds(encoder, linked_to(STRING_IDS) | st.sampled_from(["", "one", "two"])),
    st.builds(encoder, st.sampled_from(["one", "two", "three"])),
    st.builds(lambda link: node("ConditioningZeroOut", conditioning=link), CONDITIONING),
    st.builds(lambda link: node("FluxGuidance", conditioning=link), CONDITIONING),
    st.builds(
        lambda a, b: node("ConditioningCombine", conditioning_1=a, conditioning_2=b),
        CONDITIONING,
        CONDITIONING,
    ),
    st.builds(
        lambda a, b: node("ControlNetApplyAdvanced", positive=a, negative=b),
        CONDITIONING,
        CONDITIONING,
    ),
)
SAMPLERS = st.builds(lambda a, b: node("KSampler", positive=a, negative=b), CONDITIONING, CONDITIONING)
SAMPLED = st.fixed_dictionaries(
    {**dict.fromkeys(STRING_IDS, STRING_NODES), **dict.fromkeys(CONDITIONING_IDS, CONDITIONING_GRAPH), "1": SAMPLERS},
    optional={"2": SAMPLERS},
)


def reaches(workflow: Any, role: str) -> set[tuple[str, str]]:
    """Every string that can have a part in the text of a role, in graphs of the classes above."""
    found: set[tuple[str, str]] = set()
    seen: set[str] = set()
    to_do = [workflow[key]["inputs"][role][0] for key in workflow if workflow[key]["class_type"] == "KSampler"]
    while to_do:
        node_id = to_do.pop()
        if node_id in seen or node_id not in workflow or workflow[node_id]["class_type"] == "ConditioningZeroOut":
            continue
        seen.add(node_id)
        for name, value in workflow[node_id]["inputs"].items():
            if name == client.OPPOSITE[role] or name == "clip":
                continue
            if isinstance(value, list):
                to_do.append(value[0])
            else:
                found.add((node_id, name))
    return found


@STEADY
@given(SAMPLED, ROLES)
def test_in_any_graph_only_the_own_text_changes(workflow: Any, role: str) -> None:
    own, others = reaches(workflow, role), reaches(workflow, client.OPPOSITE[role])
    try:
        plan = client.plan_text(workflow, "new", role)
    except client.InputError:
        return
    found = {tuple(place) for place, _ in plan}
    assert not found & others
    assert found <= own or not own  # a sampler without a text leaves it to other nodes


@STEADY
@given(SAMPLED, ROLES)
def test_in_any_graph_a_text_that_stands_alone_is_found(workflow: Any, role: str) -> None:
    own = reaches(workflow, role) - reaches(workflow, client.OPPOSITE[role])
    if len(reaches(workflow, role)) == len(own) == 1:
        assert [tuple(place) for place, _ in client.plan_text(workflow, "new", role)] == list(own)


@STEADY
@given(GRAPHS, st.none() | st.integers(0, 2**64 - 1))
def test_seeds_are_whole_numbers_that_every_node_takes(graph: Any, seed: int | None) -> None:
    try:
        drawn = changes(graph, *([] if seed is None else ["--seed", str(seed)]))
    except client.InputError:
        assert seed is not None
        assert client.seed_places(graph) == []
        return
    assert list(drawn) == [f"{node_id}.{name}" for node_id, name in client.seed_places(graph)]
    for value in drawn.values():
        assert type(value) is int
        assert value == seed if seed is not None else 0 <= value < 2**32


# --- the examples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(WORKFLOWS.glob("*.json")), ids=lambda file: file.name)
def test_the_examples_are_whole_and_titled(file: Path) -> None:
    workflow = client.parse_workflow(client.read_document(file))
    for example in workflow.values():
        assert example["_meta"]["title"]
        for value in example["inputs"].values():
            assert not isinstance(value, list) or client.source_of(workflow, value) is not None
