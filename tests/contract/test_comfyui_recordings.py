"""Recordings of three ComfyUI versions, replayed: the same requests give the same messages, histories and refusals."""

from __future__ import annotations

import copy
import os
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import recordings
import requests
from comfyui_client import (
    REPLY_TIMEOUT_S,
    ComfyUI,
    Listener,
    Message,
    boot,
    capture,
    empty,
    is_end,
    normal,
    post,
    quick,
    save,
    start_slow,
    tail,
)
from PIL import Image

WITH_FEATURE_FLAGS = {"ok_save_image_websocket_featureflags", "ok_feature_flags_handshake"}


def versions() -> list[str]:
    """The recorded versions that can be compared: all with the stand-in, its own with a real checkout."""
    if "COMFYUI_DIR" not in os.environ:
        return list(recordings.VERSIONS)
    own = runpy.run_path(str(Path(os.environ["COMFYUI_DIR"]) / "comfyui_version.py"))["__version__"]
    return [version for version in recordings.VERSIONS if version == own]


@pytest.fixture(scope="module", params=versions())
def version(request: pytest.FixtureRequest) -> str:
    """The version whose recordings are compared."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory, version: str) -> Iterator[ComfyUI]:
    """A server of that version, shared by the tests that it is compared in."""
    flags = () if "COMFYUI_DIR" in os.environ else ("--like", version)
    with boot(tmp_path_factory.mktemp("comfyui"), *flags) as server:
        yield server


@pytest.fixture
def inputs(fresh: ComfyUI) -> ComfyUI:
    """The files that the recorded requests name."""
    picture = Image.linear_gradient("L").resize((96, 72)).convert("RGB")
    picture.save(fresh.input / "a.png")
    (fresh.input / "job1" / "x").mkdir(parents=True)
    flipped = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    flipped.save(fresh.input / "job1" / "x" / "b.png")
    flipped.save(fresh.input / "b.png")
    (fresh.input / "zero.png").write_bytes(b"")
    (fresh.input / "text.txt").write_text("no picture")
    whole = (fresh.input / "a.png").read_bytes()
    (fresh.input / "trunc.png").write_bytes(whole[: len(whole) // 2])
    return fresh


def replay(server: ComfyUI, name: str, version: str) -> dict[str, Any]:
    """Send the request of a recording; the answer has the recording's form."""
    request = dict(capture(name, version)["request"])
    run = server.run(
        request.pop("prompt"),
        feature_flags=name in WITH_FEATURE_FLAGS,
        client_id=request.pop("client_id", None),
        **request,
    )
    words = {run.prompt_id: "<prompt>", str(server.input): "<input>"}
    job = described(server.get(f"/api/jobs/{run.prompt_id}"))
    return comparable(run.messages, {run.prompt_id: run.history}, run.answer, job, words)


def described(answer: requests.Response) -> dict[str, Any]:
    """An answer as the recordings describe one."""
    kind = answer.headers.get("Content-Type")
    is_json = (kind or "").startswith("application/json")
    return {"status": answer.status_code, "content_type": kind, "body": answer.json() if is_json else answer.text}


def recorded(name: str, version: str) -> dict[str, Any]:
    recording = capture(name, version)
    words = {recording["response"]["body"]["prompt_id"]: "<prompt>", "/ComfyUI/input": "<input>"}
    messages = [item["msg"] if item["kind"] == "text" else item for item in recording["ws"]]
    answer = recording["response"]["body"]
    return comparable(messages, recording["history"], answer, recording["api_job"], words)


def comparable(
    messages: list[Message],
    history: dict[str, Any],
    answer: dict[str, Any],
    job: dict[str, Any],
    words: dict[str, str],
) -> dict[str, Any]:
    """All that a prompt gave, in neutral words. The prompt's number depends on the requests before it."""
    client_ids = {message["data"]["sid"]: "<client>" for message in messages if "sid" in message.get("data", {})}
    for entry in history.values():
        entry["prompt"] = [sorted(part) if isinstance(part, list) else part for part in entry["prompt"][1:]]
    form = {
        "messages": [_without_pixels(message) for message in messages],
        "history": history,
        "answer": {key: value for key, value in answer.items() if key != "number"},
        "job": job,
    }
    return normal(form, {**words, **client_ids})  # type: ignore[no-any-return]


def _without_pixels(message: Message) -> Message:
    """Of a binary message its kind and what is said about the image."""
    kept = ("type", "data", "event", "image_format", "metadata", "node_id", "text")
    return {key: message[key] for key in kept if key in message}


def texts(items: list[dict[str, Any]]) -> list[Message]:
    """The text messages of a recorded socket."""
    return [item["msg"] for item in items if item["kind"] == "text"]


def outline(messages: list[Message]) -> list[str]:
    """The types of text messages in their order, each once, and without the steps that only some slow nodes report."""
    types = [message["type"] for message in messages if message.get("type", "progress") != "progress"]
    return [name for place, name in enumerate(types) if name not in types[:place]]


def test_nine_of_ten_recordings_are_replayed_and_the_others_have_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    for name in recordings.VERSIONS:
        files = recordings.recorded(name)
        assert files <= {*recordings.REQUESTS, *recordings.SCENARIOS, *recordings.NOT_USED}
        assert len(recordings.used(name)) >= 0.9 * len(files)
    recordings.main()
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*recordings.VERSIONS, *recordings.NOT_USED))
    source = Path(__file__).read_text()
    for name in recordings.SCENARIOS:
        stem = name.removeprefix("interrupt_").removeprefix("reconnect_").removeprefix("ksampler_")
        assert f'"{stem}"' in source or f'"{name}"' in source


@pytest.mark.parametrize("name", recordings.REQUESTS)
def test_a_recorded_request_gives_the_recorded_messages_history_and_job(
    inputs: ComfyUI, version: str, name: str
) -> None:
    first = recordings.REQUESTS[name]
    if first:
        replay(inputs, first, version)
    assert replay(inputs, name, version) == recorded(name, version)


def test_the_number_is_what_the_request_says_or_counts_up(inputs: ComfyUI) -> None:
    request = capture("ok_front_and_number")["request"]
    assert inputs.run(request["prompt"], number=-7, front=True).answer["number"] == -7.0
    first = inputs.run(request["prompt"]).answer["number"]
    assert inputs.run(request["prompt"]).answer["number"] == first + 1
    assert inputs.run(request["prompt"], front=True).answer["number"] == -(first + 2)


ANSWERED_200 = {"two_outputs_one_bad"}


@pytest.mark.parametrize("name", [name for name, case in capture("invalid_prompts").items() if "request" in case])
def test_a_recorded_invalid_request_is_refused_as_recorded(inputs: ComfyUI, version: str, name: str) -> None:
    case = capture("invalid_prompts", version)[name]
    got, expected = described(inputs.post("/prompt", case["request"])), case["response"]
    if name in ANSWERED_200:
        for answer in (got, expected):
            assert answer["body"].pop("prompt_id")
            assert isinstance(answer["body"].pop("number"), int)
    assert normal(got, {}) == normal(expected, {})
    inputs.wait_idle()
    after = {"system_stats": inputs.get("/system_stats").status_code, "queue": inputs.get("/queue").json()}
    assert after == capture("after_invalid", version)


def test_of_a_partly_valid_workflow_the_good_branch_runs(inputs: ComfyUI, version: str) -> None:
    run = inputs.run(capture("invalid_prompts", version)["two_outputs_one_bad"]["request"]["prompt"])
    (expected,) = capture("two_outputs_one_bad_history", version).values()
    assert set(run.answer["node_errors"]) == {"6"}
    for entry in (run.history, expected):
        entry["prompt"][3].pop("client_id", None)
    assert plain_history(run.history) == plain_history(expected)


def plain_history(entry: dict[str, Any]) -> Any:
    """A history entry without number and ids."""
    entry = copy.deepcopy(entry)
    entry["prompt"] = entry["prompt"][2:]
    for _, data in entry["status"]["messages"]:
        assert data.pop("prompt_id")
    return normal(entry, {})


MACHINE = {"/system_stats", "/api/system_stats"}
# The stand-in has no model folders, no users and not this node.
ABSENT = {"/models", "/models/checkpoints", "/models/nope", "/embeddings", "/users", "/object_info/UpscaleModelLoader"}
FOR_THE_INTERFACE = {"search_aliases", "essentials_category"}


@pytest.mark.parametrize("path", sorted(set(capture("get_at_start")) - ABSENT))
def test_what_a_new_server_says_is_as_recorded(fresh: ComfyUI, version: str, path: str) -> None:
    expected, got = capture("get_at_start", version)[path], described(fresh.get(path))
    if path in MACHINE:
        assert expected["body"]["system"]["os"] == got["body"]["system"]["os"]
        assert got["body"]["system"]["comfyui_version"].removesuffix("+standin") == version
        assert set(got["body"]["devices"][0]) <= set(expected["body"]["devices"][0])
        return
    if path == "/object_info/LoadImage":
        for answer in (expected, got):
            entry = answer["body"]["LoadImage"]
            answer["body"] = {key: value for key, value in entry.items() if key not in FOR_THE_INTERFACE}
    assert got == expected


def test_free_as_recorded(fresh: ComfyUI, version: str) -> None:
    expected = capture("free", version)
    first = [fresh.run(quick()).cached]
    got = {"unload_models": described(fresh.post("/free", {"unload_models": True}))}
    after_unload = [sorted(fresh.run(quick()).cached)]
    got["free_memory"] = described(fresh.post("/free", {"free_memory": True}))
    after_free = [fresh.run(quick()).cached]
    got["not_json"] = described(fresh.post("/free", "{nope"))
    got["empty_object"] = described(fresh.post("/free", {}))
    lists = {"first": first, "after_unload_models": after_unload, "after_free_memory": after_free}
    assert {**got, "execution_cached_nodes": lists} == {key: expected[key] for key in expected if key != "rss_mib"}


def test_uploads_as_recorded(fresh: ComfyUI, version: str) -> None:
    contents = {"other_content_same_name": b"other", "overwrite": b"new", "zero": b""}
    for name, case in capture("upload", version).items():
        files = {"image": (case["filename"], contents.get(name, b"content"))} if "filename" in case else {"x": b""}
        url = fresh.base_url + "/upload/image"
        answer = requests.post(url, data=case.get("fields"), files=files, timeout=REPLY_TIMEOUT_S)
        assert described(answer) == {key: case[key] for key in ("status", "content_type", "body")}, name
    assert (fresh.input / "a.png").read_bytes() == b"content"
    assert (fresh.input / "a (1).png").read_bytes() == b"other"
    assert (fresh.input / "job1" / "x" / "b.png").read_bytes() == b"content"


def test_view_as_recorded(inputs: ComfyUI, version: str) -> None:
    expected = capture("view", version)
    run = inputs.run({"1": empty(96, 72), "2": save("1", "lsi")})
    path = f"/view?filename={run.files('2')[0]['filename']}&type=output"
    for query in ("", "&preview=webp;90", "&channel=rgb", "&channel=a"):
        case, answer = expected[query or "plain"], inputs.get(path + query)
        assert answer.status_code == case["status"]
        assert answer.content[:4].hex() == case["head_hex"][:8]
        for name in ("Content-Type", "Content-Disposition"):
            assert normal(answer.headers[name], {}) == normal(case["headers"][name], {})
    assert described(inputs.get("/view?filename=../x.png&type=output")) == expected["escape"]
    assert described(inputs.get("/view?filename=x.png&type=output&subfolder=../..")) == expected["subfolder_escape"]
    url = inputs.base_url + path
    assert requests.head(url, timeout=REPLY_TIMEOUT_S).status_code == expected["head"]["status"]
    part = requests.get(url, headers={"Range": "bytes=0-9"}, timeout=REPLY_TIMEOUT_S)
    assert (part.status_code, len(part.content)) == (expected["range"]["status"], expected["range"]["len"])
    assert re.fullmatch(r"bytes 0-9/\d+", part.headers["Content-Range"])


def test_queue_operations_as_recorded(fresh: ComfyUI, version: str) -> None:
    expected = capture("queue_ops", version)
    got: dict[str, Any] = {}
    with fresh.listen("me") as listener:
        ids = [start_slow(fresh, listener, "me", seconds=0.2, nodes=4)]
        ids += [post(fresh, quick(color), "me") for color in range(3)]
        got["queue_before"] = fresh.get("/queue").json()
        got["delete_pending"] = described(fresh.post("/queue", {"delete": [ids[1]]}))
        got["queue_after_delete"] = fresh.get("/queue").json()
        got["history_of_deleted"] = described(fresh.get(f"/history/{ids[1]}"))
        got["job_of_deleted"] = described(fresh.get(f"/api/jobs/{ids[1]}"))
        got["delete_running"] = described(fresh.post("/queue", {"delete": [ids[0]]}))
        got["delete_unknown"] = described(fresh.post("/queue", {"delete": ["unknown"]}))
        got["queue_after"] = fresh.get("/queue").json()
        got["clear"] = described(fresh.post("/queue", {"clear": True}))
        got["queue_after_clear"] = fresh.get("/queue").json()
        got["history_p3_after_clear"] = described(fresh.get(f"/history/{ids[3]}"))
        got["bad"] = {
            "not_json": described(fresh.post("/queue", "{nope")),
            "empty": described(fresh.post("/queue", "")),
            "delete_string": described(fresh.post("/queue", {"delete": "abc"})),
            "delete_null": described(fresh.post("/queue", {"delete": None})),
            "unknown_key": described(fresh.post("/queue", {"what": 1})),
            "http_delete": described(requests.delete(fresh.base_url + "/queue", timeout=REPLY_TIMEOUT_S)),
        }
        listener.read_to_end(ids[0])
    for name in [name for name in got if name.startswith("queue_")]:
        got[name], expected[name] = by_place(got[name], ids), by_place(expected[name], expected["p"])
    assert got == {name: expected[name] for name in got}
    assert outline(listener.messages) == outline(texts(expected["ws"]))


def by_place(queue: dict[str, Any], ids: list[str]) -> dict[str, Any]:
    """A queue with the places of its prompts in `ids` instead of the prompts."""
    return {key: sorted(ids.index(item[1]) for item in items) for key, items in queue.items()}


def test_the_queue_s_order_is_as_recorded(fresh: ComfyUI, version: str) -> None:
    with fresh.listen("me") as listener:
        names = {start_slow(fresh, listener, "me", seconds=0.1, nodes=3): "fifo0"}
        names |= {post(fresh, quick(color), "me"): f"fifo{color}" for color in (1, 2)}
        names[post(fresh, quick(3), "me", front=True)] = "front"
        names[post(fresh, quick(4), "me", number=-1e9)] = "number-1e9"
        last = next(prompt_id for prompt_id, name in names.items() if name == "fifo2")
        listener.read_to_end(last)
    started = [message["data"]["prompt_id"] for message in listener.messages if message["type"] == "execution_start"]
    assert [names[prompt_id] for prompt_id in started] == capture("queue_order", version)["named"]


def test_history_lists_and_operations_as_recorded(fresh: ComfyUI, version: str) -> None:
    listing, expected = capture("history_list", version), capture("history_ops", version)
    ids = [fresh.run(quick(color)).prompt_id for color in range(5)]
    shown = {query: fresh.get(f"/history{query}") for query in listing}
    assert {query: answer.status_code for query, answer in shown.items()} == {
        query: case["status"] for query, case in listing.items()
    }
    assert shown["?max_items=x"].text == listing["?max_items=x"]["keys"]
    all_recorded = listing[""]["keys"]
    for query, of_list in (("?max_items=2", slice(-2, None)), ("?offset=3", slice(3, None))):
        assert listing[query]["keys"] == all_recorded[of_list]
        assert list(shown[query].json()) == ids[of_list]
    assert list(shown["?max_items=2&offset=1"].json()) == ids[1:3]
    assert listing["?max_items=2&offset=1"]["keys"] == all_recorded[1:3]
    assert described(fresh.post("/history", {"delete": [ids[0]]})) == expected["delete"]
    assert list(fresh.get("/history").json()) == ids[1:]
    assert described(fresh.post("/history", {"clear": True})) == expected["clear"]
    assert described(fresh.get("/history")) == expected["after_clear"]
    assert described(fresh.post("/history", "{nope")) == expected["not_json"]


def test_a_cached_output_names_a_removed_file_as_recorded(fresh: ComfyUI, version: str) -> None:
    expected = capture("cached_output_deleted", version)
    workflow = {"1": empty(64, 64, color=28), "2": save("1", "gone")}
    name = fresh.run(workflow).files("2")[0]["filename"]
    (fresh.output / name).unlink()
    history = fresh.run(workflow).history
    for entry in (history, expected["history"]):
        entry["prompt"][3].pop("client_id")
    assert plain_history(history) == plain_history(expected["history"])
    assert fresh.get(f"/view?filename={name}&type=output").status_code == expected["view"]


@pytest.mark.parametrize("case", ["ran_first_with_client_id_then_without", "never_with_client_id"])
def test_cached_prompts_without_a_client_as_recorded(fresh: ComfyUI, version: str, case: str) -> None:
    expected = capture("cached_without_client_id", version)[case]
    if case == "ran_first_with_client_id_then_without":
        fresh.run(expected[0]["prompt"][2])
    for entry in expected:
        history = fresh.run(entry["prompt"][2], client_id=None).history
        assert plain_history(history) == plain_history(entry)


def test_a_file_that_changed_under_its_name_is_noticed_as_recorded(inputs: ComfyUI, version: str) -> None:
    workflow = capture("ok_load_scale_invert", version)["request"]["prompt"]
    got = {"first": [inputs.run(workflow).cached]}
    Image.new("RGB", (96, 72), "red").save(inputs.input / "a.png")
    got["file_changed"] = [inputs.run(workflow).cached]
    got["unchanged"] = [sorted(inputs.run(workflow).cached)]
    assert got == capture("input_changed_same_name", version)


INTERRUPT_BODIES: dict[str, Any] = {"prompt_id": None, "empty_json": {}, "no_body": "", "not_json": "{nope"}


@pytest.mark.parametrize("form", INTERRUPT_BODIES)
def test_an_interrupt_ends_the_running_prompt_as_recorded(fresh: ComfyUI, version: str, form: str) -> None:
    recording = capture(f"interrupt_{form}", version)
    with fresh.listen("me") as listener:
        prompt_id = start_slow(fresh, listener, "me")
        answer = fresh.post("/interrupt", {"prompt_id": prompt_id} if form == "prompt_id" else INTERRUPT_BODIES[form])
        listener.read_to_end(prompt_id)
    assert described(answer) == recording["interrupt_response"]
    assert tail(listener.messages, prompt_id) == tail(texts(recording["ws"]), recording["prompt_id"])
    (expected,) = recording["history"].values()
    assert fresh.history(prompt_id)["status"]["messages"][-1][0] == expected["status"]["messages"][-1][0]


@pytest.mark.parametrize("name", ["other_prompt_id", "during_last_compute_node"])
def test_interrupts_that_change_nothing_as_recorded(fresh: ComfyUI, version: str, name: str) -> None:
    """An interrupt of another prompt, and one that comes when only the end of a prompt is left."""
    recording = capture(f"interrupt_{name}", version)
    with fresh.listen("me") as listener:
        prompt_id = start_slow(fresh, listener, "me", seconds=0.02, nodes=2)
        if name == "other_prompt_id":
            answer = fresh.post("/interrupt", {"prompt_id": "another"})
        listener.read_to_end(prompt_id)
    if name == "during_last_compute_node":
        answer = fresh.post("/interrupt", {"prompt_id": prompt_id})
    assert described(answer) == recording["interrupt_response"]
    assert outline(listener.messages) == outline(texts(recording["ws"]))
    (expected,) = recording["history"].values()
    assert fresh.history(prompt_id)["status"]["status_str"] == expected["status"]["status_str"] == "success"


def test_an_interrupt_of_nothing_does_not_reach_the_next_prompt_as_recorded(fresh: ComfyUI, version: str) -> None:
    recording = capture("interrupt_while_idle_then_prompt", version)
    assert described(fresh.post("/interrupt", {})) == recording["interrupt"]
    run = fresh.run(quick())
    assert run.types == [message["type"] for message in texts(recording["ws"])]


@pytest.mark.parametrize("name", ["old_closed_after", "old_closed_before", "old_left_open"])
def test_a_second_socket_of_the_client_as_recorded(fresh: ComfyUI, version: str, name: str) -> None:
    recording = capture(f"reconnect_{name}", version)
    first = fresh.listen("me")
    prompt_id = start_slow(fresh, first, "me", seconds=0.2, nodes=4)
    if name == "old_closed_before":
        first.close_and_drain()
    with Listener(fresh.base_url, "me") as second:
        greeting, node = second.next(), second.next()
        if name == "old_closed_after":
            first.close_and_drain()
            fresh.wait_idle()
            second.close_and_drain()
        else:
            second.read_to_end(prompt_id)
        if name == "old_left_open":
            first.close_and_drain()
    expected = texts(recording["ws_second"])
    assert [greeting["type"], node["type"]] == [message["type"] for message in expected[:2]]
    assert node["data"].keys() == expected[1]["data"].keys() == {"node"}
    heard = outline(second.messages)
    if name == "old_closed_after":
        assert "execution_success" not in heard
        assert len(expected) == 2
    else:
        assert [kind for kind in heard if kind != "progress"] == outline(expected)
    if name != "old_closed_before":
        assert "execution_success" not in [message["type"] for message in first.messages]


def test_a_client_that_connects_late_hears_the_rest_as_recorded(fresh: ComfyUI, version: str) -> None:
    with fresh.listen("witness") as witness:
        prompt_id = post(fresh, start_workflow(), "late")
        witness.read_until(lambda message: message["data"]["status"]["exec_info"]["queue_remaining"] == 1)
        with Listener(fresh.base_url, "late") as late:
            late.read_to_end(prompt_id)
    expected = texts(capture("connect_late", version)["ws"])
    heard = late.messages[next(i for i, m in enumerate(late.messages) if m["type"] == "executing") :]
    # It may have come a node earlier or later than the recorded one, and in time for the second status of the POST.
    passing = [{"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 1}}}}]
    told = outline([message for message in heard if message["type"] != "progress" and message not in passing])
    recorded = outline(expected[1:])
    common = min(len(told), len(recorded)) - 1
    assert common >= 4
    assert told[0] == recorded[0]
    assert told[-common:] == recorded[-common:]
    assert late.messages[0]["data"].keys() == expected[0]["data"].keys()


def start_workflow() -> Any:
    blurs = {
        str(number): {
            "class_type": "ImageBlur",
            "inputs": {"image": [str(number - 1), 0], "blur_radius": 31, "sigma": 5.0},
        }
        for number in range(2, 6)
    }
    return {"1": empty(640, 640, color=9), **blurs, "6": save("5", "late")}


def test_odd_messages_of_a_client_are_ignored_as_recorded(fresh: ComfyUI, version: str) -> None:
    expected = texts(capture("ws_odd_client_messages", version)["ws"])
    with Listener(fresh.base_url, "odd") as listener:
        for message in ("{nope", "[]", "5", '{"type": "unknown"}', '{"type": "feature_flags", "data": {}}'):
            listener.send(message)
        fresh.get("/queue")
        heard = listener.close_and_drain()
    assert [message["type"] for message in heard] == [message["type"] for message in expected]


def test_a_session_without_a_client_id_gets_one_that_works_as_recorded(fresh: ComfyUI, version: str) -> None:
    recording = capture("ws_without_client_id", version)
    with Listener(fresh.base_url, None) as listener:
        sid = listener.next()["data"]["sid"]
        prompt_id = post(fresh, quick(), sid)
        listener.read_to_end(prompt_id)
    assert re.fullmatch("[0-9a-f]{32}", sid)
    assert re.fullmatch("[0-9a-f]{32}", recording["sid"])
    assert [message["type"] for message in listener.messages] == [m["type"] for m in texts(recording["ws"])]


def test_jobs_as_recorded(inputs: ComfyUI, version: str) -> None:
    recording = capture("jobs_after_errors", version)
    names = ["err_zero_byte_image", "ok_empty_save", "err_text_file_as_image", "err_two_branches_one_fails"]
    for name in names:
        replay(inputs, name, version)
    answers = {query: described(inputs.get(f"/api/jobs{query}")) for query in recording}
    known = [job for case in recording.values() if "jobs" in case["body"] for job in case["body"]["jobs"]]
    shapes = {(job["status"], frozenset(job)) for job in known}
    for query, expected in recording.items():
        got = answers[query]
        if "jobs" in expected["body"]:
            assert got["body"]["pagination"].keys() == expected["body"]["pagination"].keys()
            assert {(job["status"], frozenset(job)) for job in got["body"]["jobs"]} <= shapes
            del got["body"], expected["body"]
        assert got == expected
    if answers[""]["status"] == 200:
        statuses = [job["status"] for job in inputs.get("/api/jobs").json()["jobs"]]
        assert statuses == ["failed", "failed", "completed", "failed"]


def linked(link: list[Any]) -> dict[str, Any]:
    """A SaveImage node with this link."""
    return {"class_type": "SaveImage", "inputs": {"images": link, "filename_prefix": "h"}}


IMAGE_TO_FILE: dict[str, Any] = {"1": empty(), "2": save("1", "h")}
HOSTILE: dict[str, dict[str, Any]] = {
    "extra_data null": {"extra_data": None},
    "extra_data list": {"extra_data": []},
    "extra_data string": {"extra_data": "x"},
    "extra_data list + client_id": {"extra_data": [], "client_id": "x"},
    "client_id None": {"client_id": None},
    "client_id 5": {"client_id": 5},
    "client_id ''": {"client_id": ""},
    "client_id True": {"client_id": True},
    "extra_data.preview_method 5": {"extra_data": {"preview_method": 5}},
    "extra_data.preview_method list": {"extra_data": {"preview_method": []}},
    "prompt_id None": {"prompt_id": None},
    "prompt_id 5": {"prompt_id": 5},
    "prompt_id ''": {"prompt_id": ""},
    "prompt_id 'a/b'": {"prompt_id": "a/b"},
    "prompt_id '\u00fc'": {"prompt_id": "\u00fc"},
    "number NaN": {"number": float("nan")},
    "number Infinity": {"number": float("inf")},
    "number null": {"number": None},
    "input NaN": {"prompt": {"1": empty(width=float("nan")), "2": save("1")}},  # type: ignore[arg-type]
    "extra input key": {"prompt": {"1": empty(), "2": save("1", extra="x")}},
    "filename_prefix escape": {"prompt": {"1": empty(), "2": save("1", "../../../../tmp/evil")}},
    "filename_prefix absolute": {"prompt": {"1": empty(), "2": save("1", "/tmp/evil")}},
    "filename_prefix subdir+date": {"prompt": {"1": empty(), "2": save("1", "a/%year%/b")}},
    "filename_prefix empty": {"prompt": {"1": empty(), "2": save("1", "")}},
    "filename_prefix unicode": {"prompt": {"1": empty(), "2": save("1", "\u00fc \u2713")}},
    "partial_execution_targets []": {"partial_execution_targets": []},
    "partial_execution_targets unknown": {"partial_execution_targets": ["77"]},
    "link as int node id": {"prompt": {"1": empty(), "2": linked([1, 0])}},
    "link slot as string": {"prompt": {"1": empty(), "2": linked(["1", "0"])}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_is_answered_as_recorded_and_harms_nothing(fresh: ComfyUI, version: str, name: str) -> None:
    case = capture("hostile", version)[name]
    if not case["healthy"]:
        pytest.skip("ends the worker thread of this version; a test of its own has that")
    answer = fresh.post("/prompt", {"prompt": copy.deepcopy(IMAGE_TO_FILE), **copy.deepcopy(HOSTILE[name])})
    status, text = case["response"]
    assert answer.status_code == status
    assert known_part(answer.text) == known_part(text)[: len(known_part(answer.text))]
    fresh.wait_idle()
    assert fresh.run(quick(5)).history["status"]["status_str"] == "success"


def test_extra_data_null_ends_the_worker_thread_of_0_3_64(tmp_path: Path, standin_only: None) -> None:
    case = capture("hostile", "0.3.64")["extra_data null"]
    with boot(tmp_path, "--like", "0.3.64") as server:
        answer = server.post("/prompt", {"prompt": IMAGE_TO_FILE, "extra_data": None})
        assert answer.status_code == case["response"][0] == 200
        prompt_id = post(server, quick(), "me")
        assert server.get("/system_stats").status_code == case["after"]["system_stats"] == 200
        assert server.history(prompt_id) == {}
        assert prompt_id in [item[1] for item in server.get("/queue").json()["queue_pending"]]
    assert case["after"]["plain_prompt_runs"] is False


def known_part(text: str) -> str:
    """The start of an answer (the recording holds no more), without id, number and the names of classes."""
    text = re.sub(r'"prompt_id": "[^"]*", "number": [^,]*', "<prompt>", text)
    return re.sub(r"[0-9a-f-]{36}", "<id>", text)[:150]


SAMPLER_PREVIEWS = ("previews_plain", "previews_with_metadata")


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    """A stand-in that shows previews, with a file in the place of the recorded checkpoint."""
    if "COMFYUI_DIR" in os.environ:
        pytest.skip("the recordings were made with a checkpoint that is not at hand")
    root = tmp_path_factory.mktemp("sampler")
    (root / "models" / "checkpoints").mkdir(parents=True)
    (root / "models" / "checkpoints" / "tiny_sd15.safetensors").write_bytes(b"")
    with boot(root, "--base-directory", str(root), "--preview-method", "auto") as server:
        yield server


@pytest.mark.parametrize("name", SAMPLER_PREVIEWS)
def test_a_sampler_s_previews_as_recorded(sampler: ComfyUI, name: str) -> None:
    recording = capture(f"ksampler_{name}")
    workflow = recording["history"]["prompt"][2]
    rich = name == "previews_with_metadata"
    sampler.forget_everything()
    if rich:
        other_seed = copy.deepcopy(workflow)
        other_seed["5"]["inputs"]["seed"] = 0
        sampler.run(other_seed)
    run = sampler.run(workflow, feature_flags=rich)
    words = {run.prompt_id: "<prompt>", recording["history"]["prompt"][1]: "<prompt>"}
    messages = [item["msg"] if item["kind"] == "text" else item for item in recording["ws"]]
    got, expected = ([m for m in sequence(part, words) if m != "feature_flags"] for part in (run.messages, messages))
    assert got == expected
    assert plain_history({**run.history, "prompt": [0, 0, workflow, {}, ["9"]]})["outputs"] == normal(
        recording["history"]["outputs"], {}
    )


def sequence(messages: list[Message], words: dict[str, str]) -> list[Any]:
    """The messages about nodes: what came, of which node, with which value, in which order."""
    told: list[Any] = []
    for message in messages:
        data = message.get("data", {})
        if message.get("type") == "progress_state":
            told.append([(key, node["state"], node["value"]) for key, node in sorted(data["nodes"].items())][-1:])
        elif "event" in message:
            told.append((message["event"], message.get("image_format"), normal(message.get("metadata"), words)))
        elif message["type"] in ("executing", "progress", "executed"):
            told.append((message["type"], data["node"], data.get("value")))
        else:
            told.append(message["type"])
    return told


def test_a_sampler_stops_between_steps_as_recorded(sampler: ComfyUI) -> None:
    recording = texts(capture("interrupt_in_ksampler")["ws"])
    workflow = copy.deepcopy(capture("ksampler_previews_plain")["history"]["prompt"][2])
    sampler.forget_everything()
    sampler.run(workflow)
    workflow["5"]["inputs"].update(steps=10000, seed=5)
    with sampler.listen("me") as listener:
        prompt_id = post(sampler, workflow, "me")
        listener.read_until(lambda message: message.get("type") == "progress")
        sampler.post("/interrupt", {"prompt_id": prompt_id})
        listener.read_to_end(prompt_id)
    assert outline(listener.messages) == outline(recording)
    stopped = next(message["data"] for message in recording if message["type"] == "execution_interrupted")
    (got,) = [m["data"] for m in listener.messages if m.get("type") == "execution_interrupted"]
    assert (got["node_id"], got["node_type"], got["executed"]) == (
        stopped["node_id"],
        stopped["node_type"],
        stopped["executed"],
    )


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
