"""Queue, history, interrupts and reconnects."""

from __future__ import annotations

import pytest
from comfyui_client import ComfyUI, Listener, capture, post, quick, start_slow


def test_an_interrupt_for_another_prompt_changes_nothing(fresh: ComfyUI) -> None:
    with fresh.listen("me") as listener:
        prompt_id = start_slow(fresh, listener, "me", seconds=0.05, nodes=3)
        assert fresh.post("/interrupt", {"prompt_id": "another"}).status_code == 200
        listener.read_to_end(prompt_id)
    assert fresh.history(prompt_id)["status"]["status_str"] == "success"


def test_an_interrupt_while_idle_is_lost(fresh: ComfyUI) -> None:
    assert fresh.post("/interrupt", {}).status_code == 200
    assert fresh.run(quick()).history["status"]["status_str"] == "success"


def test_an_interrupt_does_not_reach_a_waiting_prompt(fresh: ComfyUI) -> None:
    with fresh.listen("me") as listener:
        first = start_slow(fresh, listener, "me", seconds=0.05, nodes=3)
        second = post(fresh, quick(), "me")
        assert fresh.post("/interrupt", {"prompt_id": second}).status_code == 200
        listener.read_to_end(first)
        listener.read_to_end(second)
    assert [fresh.history(name)["status"]["status_str"] for name in (first, second)] == ["success", "success"]


def test_a_deleted_waiting_prompt_leaves_no_trace(fresh: ComfyUI) -> None:
    with fresh.listen("me") as listener:
        first = start_slow(fresh, listener, "me", seconds=0.1, nodes=3)
        second, third = post(fresh, quick(1), "me"), post(fresh, quick(2), "me")
        answer = fresh.post("/queue", {"delete": [second]})
        assert (answer.status_code, answer.text) == (200, "")
        fresh.post("/queue", {"delete": [first, "unknown"]})  # neither waits: no effect
        queue = fresh.get("/queue").json()
        assert [[item[1] for item in queue[key]] for key in ("queue_running", "queue_pending")] == [[first], [third]]
        listener.read_to_end(third)
    assert fresh.history(second) == {}
    assert not [message for message in listener.messages if message.get("data", {}).get("prompt_id") == second]
    assert fresh.history(first)["status"]["status_str"] == "success"


def test_clearing_the_queue_leaves_what_runs(fresh: ComfyUI) -> None:
    with fresh.listen("me") as listener:
        first = start_slow(fresh, listener, "me", seconds=0.05, nodes=3)
        post(fresh, quick(), "me")
        assert fresh.post("/queue", {"clear": True}).status_code == 200
        assert fresh.get("/queue").json()["queue_pending"] == []
        listener.read_to_end(first)
    assert fresh.get("/history").json().keys() == {first}


def test_the_lowest_number_runs_first(fresh: ComfyUI) -> None:
    with fresh.listen("me") as listener:
        start_slow(fresh, listener, "me", seconds=0.05, nodes=2)
        late, middle = post(fresh, quick(1), "me"), post(fresh, quick(2), "me", front=True)
        early = post(fresh, quick(3), "me", number=-1e9)
        listener.read_to_end(late)
    started = [message["data"]["prompt_id"] for message in listener.messages if message["type"] == "execution_start"]
    assert started[1:] == [early, middle, late]


def test_a_queue_entry_has_the_recorded_form(fresh: ComfyUI) -> None:
    recorded = capture("queue_ops")["queue_before"]["queue_running"][0]
    with fresh.listen("me") as listener:
        prompt_id = start_slow(fresh, listener, "me", seconds=0.05, nodes=2)
        (entry,) = fresh.get("/queue").json()["queue_running"]
        listener.read_to_end(prompt_id)
    assert len(entry) == len(recorded)
    assert (entry[1], entry[3].keys(), entry[4]) == (prompt_id, recorded[3].keys(), ["9"])


@pytest.mark.parametrize("path", ["/queue", "/history", "/free"])
def test_a_body_that_is_not_json_is_answered_500_as_text(comfyui: ComfyUI, path: str) -> None:
    expected = capture("queue_ops")["bad"]["not_json"]
    answer = comfyui.post(path, "{nope")
    got = {"status": answer.status_code, "content_type": answer.headers["Content-Type"], "body": answer.text}
    assert got == expected


def test_the_history_can_be_listed_deleted_and_cleared(fresh: ComfyUI) -> None:
    ids = [fresh.run(quick(color)).prompt_id for color in range(4)]

    def listed(query: str = "") -> list[str]:
        return list(fresh.get(f"/history{query}").json())

    assert listed() == ids
    assert listed("?max_items=2") == ids[2:]
    assert listed("?max_items=2&offset=1") == ids[1:3]
    assert listed("?offset=3") == ids[3:]
    assert fresh.get("/history?max_items=x").status_code == 500
    assert fresh.post("/history", {"delete": [ids[0], "unknown"]}).text == ""
    assert listed() == ids[1:]
    assert fresh.get(f"/history/{ids[0]}").json() == {}
    fresh.post("/history", {"clear": True})
    assert listed() == []


def test_after_a_reconnect_comes_the_running_node_without_a_prompt_id(fresh: ComfyUI) -> None:
    with fresh.listen("me") as listener:
        prompt_id = start_slow(fresh, listener, "me", seconds=0.2, nodes=3)
    with Listener(fresh.base_url, "me") as listener:
        greeting, node = listener.next(), listener.next()
        listener.read_to_end(prompt_id)
    assert greeting["data"] == {"status": {"exec_info": {"queue_remaining": 1}}, "sid": "me"}
    assert node["type"] == "executing"
    assert node["data"].keys() == {"node"}
    recorded = [item["msg"] for item in capture("reconnect_old_closed_before")["ws_second"] if item["kind"] == "text"]
    assert [message["type"] for message in recorded[:2]] == [greeting["type"], node["type"]]
    assert recorded[1]["data"].keys() == node["data"].keys()


def test_a_second_socket_of_a_client_goes_silent_when_the_first_closes(fresh: ComfyUI) -> None:
    with fresh.listen("me") as first, fresh.listen("me") as second:
        assert [message["type"] for message in first.close_and_drain()] == ["status"]
        prompt_id = post(fresh, quick(), "me")
        fresh.wait_idle()
        assert fresh.history(prompt_id)["status"]["status_str"] == "success"
        assert [message["type"] for message in second.close_and_drain()] == ["status"]


def test_only_the_client_of_a_prompt_hears_about_its_nodes(fresh: ComfyUI) -> None:
    with fresh.listen("witness") as witness:
        run = fresh.run(quick(), client_id="me")
        heard = [message["type"] for message in witness.close_and_drain()]
    assert {"execution_start", "executing", "executed", "execution_success"} <= set(run.types)
    assert set(heard) == {"status"}
