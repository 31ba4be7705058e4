"""Recordings of ComfyUI 0.18.1, replayed: the same requests give the same messages, histories and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from comfyui_client import ComfyUI, Message, capture, empty, is_end, normal, save
from PIL import Image

# Recordings of one request each, that depend on no request before them.
SINGLE = [
    "ok_empty_save",
    "ok_empty_save_batch3",
    "ok_load_scale_invert",
    "ok_batch",
    "ok_preview_image",
    "ok_save_image_websocket",
    "ok_save_image_websocket_featureflags",
    "ok_feature_flags_handshake",
    "ok_extra_data",
    "ok_meta_title",
    "ok_front_and_number",
    "ok_no_client_id",
    "ok_own_prompt_id",
    "err_zero_byte_image",
    "err_text_file_as_image",
    "err_truncated_image",
    "err_two_branches_one_fails",
    "err_no_client_id",
]
WITH_FEATURE_FLAGS = {"ok_save_image_websocket_featureflags", "ok_feature_flags_handshake"}
# Each is the second run of the first one's workflow.
REPEATED = [
    ("ok_load_scale_invert", "ok_load_scale_invert_cached"),
    ("ok_own_prompt_id_again", "ok_own_prompt_id_same_wf"),
]


@pytest.fixture
def inputs(fresh: ComfyUI) -> Iterator[ComfyUI]:
    """The files that the recorded requests name."""
    picture = Image.linear_gradient("L").resize((96, 72)).convert("RGB")
    picture.save(fresh.input / "a.png")
    (fresh.input / "job1" / "x").mkdir(parents=True)
    picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(fresh.input / "job1" / "x" / "b.png")
    (fresh.input / "zero.png").write_bytes(b"")
    (fresh.input / "text.txt").write_text("no picture")
    whole = (fresh.input / "a.png").read_bytes()
    (fresh.input / "trunc.png").write_bytes(whole[: len(whole) // 2])
    yield fresh


def replay(server: ComfyUI, name: str) -> dict[str, Any]:
    """Send the request of a recording; the answer has the recording's form."""
    request = dict(capture(name)["request"])
    run = server.run(
        request.pop("prompt"),
        feature_flags=name in WITH_FEATURE_FLAGS,
        client_id=request.pop("client_id", None),
        **request,
    )
    words = {run.prompt_id: "<prompt>", str(server.input): "<input>"}
    return comparable(run.messages, {run.prompt_id: run.history}, run.answer, words)


def recorded(name: str) -> dict[str, Any]:
    recording = capture(name)
    words = {recording["response"]["body"]["prompt_id"]: "<prompt>", "/ComfyUI/input": "<input>"}
    messages = [item["msg"] if item["kind"] == "text" else item for item in recording["ws"]]
    return comparable(messages, recording["history"], recording["response"]["body"], words)


def comparable(
    messages: list[Message], history: dict[str, Any], answer: dict[str, Any], words: dict[str, str]
) -> dict[str, Any]:
    """All that a prompt gave, in neutral words. The prompt's number depends on the requests before it."""
    client_ids = {message["data"]["sid"]: "<client>" for message in messages if "sid" in message.get("data", {})}
    for entry in history.values():
        entry["prompt"] = [sorted(part) if isinstance(part, list) else part for part in entry["prompt"][1:]]
    form = {
        "messages": [_without_pixels(message) for message in messages],
        "history": history,
        "answer": {key: value for key, value in answer.items() if key != "number"},
    }
    return normal(form, {**words, **client_ids})  # type: ignore[no-any-return]


def _without_pixels(message: Message) -> Message:
    """Of a binary message its kind and what is said about the image."""
    return {key: message[key] for key in ("type", "data", "event", "image_format", "metadata") if key in message}


@pytest.mark.parametrize("name", SINGLE)
def test_a_recorded_request_gives_the_recorded_messages_and_history(inputs: ComfyUI, name: str) -> None:
    assert replay(inputs, name) == recorded(name)


@pytest.mark.parametrize(("first", "second"), REPEATED)
def test_a_repeated_request_is_answered_from_the_cache_as_recorded(inputs: ComfyUI, first: str, second: str) -> None:
    replay(inputs, first)
    assert replay(inputs, second) == recorded(second)


def test_the_number_is_what_the_request_says_or_counts_up(inputs: ComfyUI) -> None:
    request = capture("ok_front_and_number")["request"]
    assert inputs.run(request["prompt"], number=-7, front=True).answer["number"] == -7.0
    first = inputs.run(request["prompt"]).answer["number"]
    assert inputs.run(request["prompt"]).answer["number"] == first + 1
    assert inputs.run(request["prompt"], front=True).answer["number"] == -(first + 2)


# missing_model_file is about checkpoints, which the stand-in does not have.
REFUSALS = {name: case for name, case in capture("invalid_prompts").items() if name != "missing_model_file"}
ANSWERED_200 = {"two_outputs_one_bad"}


@pytest.mark.parametrize("name", [name for name, case in REFUSALS.items() if "request" in case])
def test_a_recorded_invalid_request_is_refused_as_recorded(inputs: ComfyUI, name: str) -> None:
    answer = inputs.post("/prompt", REFUSALS[name]["request"])
    expected = REFUSALS[name]["response"]
    is_json = answer.headers["Content-Type"].startswith("application/json")
    body: Any = answer.json() if is_json else answer.text
    if name in ANSWERED_200:
        for part in (body, expected["body"]):
            assert part.pop("prompt_id")
            assert isinstance(part.pop("number"), int)
    got = {"status": answer.status_code, "content_type": answer.headers["Content-Type"], "body": body}
    assert normal(got, {}) == normal(expected, {})


def test_of_a_partly_valid_workflow_the_good_branch_runs(inputs: ComfyUI) -> None:
    run = inputs.run(REFUSALS["two_outputs_one_bad"]["request"]["prompt"])
    (expected,) = capture("two_outputs_one_bad_history").values()
    assert set(run.answer["node_errors"]) == {"6"}
    for entry in (run.history, expected):
        assert entry["prompt"].pop(1)
        del entry["prompt"][0]
        entry["prompt"][1].pop("client_id", None)
        for _, data in entry["status"]["messages"]:
            assert data.pop("prompt_id")
    assert normal(run.history, {}) == normal(expected, {})


def test_a_chain_of_600_nodes_runs(inputs: ComfyUI) -> None:
    chain = {
        str(number): {"class_type": "ImageInvert", "inputs": {"image": [str(number - 1), 0]}}
        for number in range(2, 600)
    }
    workflow = {"1": empty(1, 1), **chain, "600": save("599")}
    answer = inputs.post("/prompt", {"prompt": workflow, "client_id": "nobody listens"}).json()
    inputs.wait_idle()
    assert inputs.history(answer["prompt_id"])["status"]["status_str"] == "success"


def test_wrong_methods_and_unknown_paths(comfyui: ComfyUI) -> None:
    assert comfyui.get("/interrupt").status_code in (404, 405)
    assert comfyui.get("/no/such/path").status_code == 404
    assert comfyui.post("/system_stats", {}).status_code == 405


def test_the_description_of_a_node_is_the_recorded_one(fresh: ComfyUI) -> None:
    expected = capture("get_at_start")["/object_info/LoadImage"]["body"]["LoadImage"]
    texts_for_the_web_interface = {"search_aliases", "essentials_category"}
    got = fresh.get("/object_info/LoadImage").json()["LoadImage"]
    assert {key: value for key, value in expected.items() if key not in texts_for_the_web_interface} == {
        key: value for key, value in got.items() if key not in texts_for_the_web_interface
    }
    assert fresh.get("/object_info/NoSuchNode").json() == {}


def test_object_info_tells_output_nodes_from_the_others(comfyui: ComfyUI) -> None:
    listing = comfyui.get("/object_info").json()
    names = ("SaveImage", "PreviewImage", "SaveImageWebsocket", "LoadImage", "EmptyImage", "ImageScale", "ImageInvert")
    outputs = [name for name in names if listing[name]["output_node"]]
    assert outputs == ["SaveImage", "PreviewImage", "SaveImageWebsocket"]


def test_the_end_of_a_prompt_is_its_last_message_and_the_history_is_there_by_then(fresh: ComfyUI) -> None:
    request = capture("ok_empty_save")["request"]
    with fresh.listen("me") as listener:
        prompt_id = fresh.post("/prompt", {"prompt": request["prompt"], "client_id": "me"}).json()["prompt_id"]
        listener.read_until(lambda message: is_end(message, prompt_id))
        assert fresh.history(prompt_id)["status"]["completed"] is True


def test_paths_work_with_the_prefix_api(comfyui: ComfyUI) -> None:
    assert comfyui.get("/api/queue").json() == {"queue_running": [], "queue_pending": []}
    assert comfyui.get("/api/prompt").json() == {"exec_info": {"queue_remaining": 0}}
