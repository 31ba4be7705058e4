"""Faults: what is armed strikes, and only so often. Real ComfyUI gets them from tests/comfyui_faults."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import websocket
from comfyui_client import (
    BOOT_TIMEOUT_S,
    REPLY_TIMEOUT_S,
    ComfyUI,
    Workflow,
    boot,
    command,
    directory,
    empty,
    free_port,
    post,
    quick,
    save,
)

README = Path(__file__).resolve().parents[2] / "local" / "README.md"


def arm(server: ComfyUI, kind: str, **more: Any) -> None:
    answer = server.post("/_fault", {"kind": kind, **more})
    assert answer.status_code == 200, answer.text
    assert answer.json()["armed"][-1]["kind"] == kind


def fired(server: ComfyUI, kind: str) -> int:
    return sum(fault["fired"] for fault in server.get("/_fault").json()["armed"] if fault["kind"] == kind)


def is_worker_alive(server: ComfyUI) -> bool:
    return any(name.endswith("(prompt_worker)") for name in server.get("/_fault").json()["threads"])


def slept(color: int, seconds: float) -> Workflow:
    """Like `quick`, with a sleeping node, 3, before the saving one."""
    sleep = {"class_type": "StandinSleep", "inputs": {"image": ["1", 0], "seconds": seconds, "steps": 5}}
    return {"1": empty(color=color), "2": save("3"), "3": sleep}


def is_event(event: str) -> Any:
    return lambda message: message.get("type") == event


def run_raw(server: ComfyUI, workflow: Workflow) -> tuple[str, list[str | bytes]]:
    """The id of a prompt and every frame up to its execution_success, as they came."""
    frames: list[str | bytes] = []
    with server.listen("raw") as listener:
        prompt_id = post(server, workflow, "raw")
        while not frames or not str(frames[-1]).startswith('{"type": "execution_success"'):
            frames.append(listener.raw())
    server.wait_idle()
    return prompt_id, frames


# --- asking for faults ---


def test_what_makes_no_sense_is_refused_and_the_kinds_are_listed_as_documented(comfyui: ComfyUI) -> None:
    wrong: list[Any] = [{"often": 1}, {"after": "1"}, {"path": 5}, {"event": None}]
    for wish in ({"kind": "nope"}, [], {}, *({"kind": "crash", **more} for more in wrong)):
        assert comfyui.post("/_fault", wish).status_code == 400, wish
    answer = comfyui.get("/_fault").json()
    assert answer["armed"] == []
    section = README.read_text().split("### Its faults", 1)[1].split("\n### ", 1)[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", section, re.MULTILINE)
    documented = {kind: {"occasion": occasion, "effect": effect} for kind, occasion, effect in rows}
    assert documented == answer["kinds"]


# --- nodes ---


def test_out_of_memory_strikes_after_so_many_nodes_and_once(fresh: ComfyUI) -> None:
    arm(fresh, "out_of_memory", after=1)
    messages = fresh.run(quick(1)).history["status"]["messages"]
    assert messages[-1][1]["exception_type"] == "torch.OutOfMemoryError"
    assert messages[-1][1]["node_id"] == "2"
    assert fresh.run(quick(1)).history["status"]["completed"] is True


def test_an_exception_says_what_was_asked_for(fresh: ComfyUI) -> None:
    arm(fresh, "exception", text="CUDA error: device-side assert triggered")
    (event, error), *_ = reversed(fresh.run(quick(1)).history["status"]["messages"])
    assert (event, error["exception_type"], error["node_id"]) == ("execution_error", "RuntimeError", "1")
    assert error["exception_message"] == "CUDA error: device-side assert triggered\n"
    assert fresh.run(quick(1)).history["status"]["completed"] is True


def test_nodes_are_counted_where_nobody_listens_too(fresh: ComfyUI) -> None:
    arm(fresh, "exception")
    run = fresh.run(quick(1), client_id=None)
    assert run.history["status"]["messages"][-1][0] == "execution_error"


def test_a_node_that_hangs_is_deaf_to_interrupts(fresh: ComfyUI) -> None:
    arm(fresh, "hang", seconds=1)
    with fresh.listen("me") as listener:
        prompt_id = post(fresh, quick(10), "me")
        listener.read_until(is_event("executing"))
        fresh.post("/interrupt", {"prompt_id": prompt_id})
        time.sleep(0.3)
        assert len(fresh.get("/queue").json()["queue_running"]) == 1
        listener.read_to_end(prompt_id)
    fresh.wait_idle()
    # The node itself ended well, the one after it did not begin.
    assert fresh.history(prompt_id)["status"]["messages"][-1][1]["executed"] == ["1"]


def test_a_stall_stops_http_and_websocket_while_the_node_goes_on(fresh: ComfyUI) -> None:
    arm(fresh, "stall", seconds=1.0, after=1)
    with fresh.listen("me") as listener:
        prompt_id = post(fresh, slept(12, 0.1), "me")
        listener.read_until(lambda message: is_event("executing")(message) and message["data"]["node"] == "3")
        with pytest.raises(requests.Timeout):
            requests.get(f"{fresh.base_url}/queue", timeout=0.5)
        listener.read_to_end(prompt_id)
    times_ms = [data["timestamp"] for _, data in fresh.history(prompt_id)["status"]["messages"]]
    assert max(times_ms) - min(times_ms) < 900


def resident_mb(server: ComfyUI) -> float:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1024


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + REPLY_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_memory_is_eaten_while_the_prompt_runs(fresh: ComfyUI) -> None:
    before_mb = resident_mb(fresh)
    arm(fresh, "eat_memory", count=200, after=1)
    with fresh.listen("me") as listener:
        prompt_id = post(fresh, slept(13, 0.4), "me")
        wait_for(lambda: resident_mb(fresh) > before_mb + 190)
        listener.read_to_end(prompt_id)
    assert fresh.history(prompt_id)["status"]["completed"] is True
    wait_for(lambda: resident_mb(fresh) < before_mb + 100)


def test_a_flood_of_progress_state(fresh: ComfyUI) -> None:
    arm(fresh, "flood", count=400)
    messages = fresh.run(quick(11)).messages
    assert [message.get("type") for message in messages].count("progress_state") >= 400


def test_a_dead_worker_leaves_http_alive_and_a_crash_ends_the_process(tmp_path: Path) -> None:
    with boot(tmp_path) as server, server.listen("me") as listener:
        assert is_worker_alive(server)
        arm(server, "dead_worker")
        post(server, quick(6), "me")
        listener.read_until(is_event("executing"))
        wait_for(lambda: not is_worker_alive(server))
        assert server.get("/system_stats").status_code == 200
        assert len(server.get("/queue").json()["queue_running"]) == 1
    with boot(tmp_path) as server:
        arm(server, "crash", after=2)  # the first nodes can begin before the POST is answered
        post(server, slept(7, 0.3), "me")
        assert server.process.wait(timeout=20) == -signal.SIGKILL


# --- files and history ---


@pytest.mark.parametrize(("kind", "share"), [("file_missing", None), ("file_half", 0.5), ("file_empty", 0.0)])
def test_a_spoilt_output_file(fresh: ComfyUI, kind: str, share: float | None) -> None:
    def saved(color: int) -> Path:
        return fresh.output / fresh.run(quick(color)).files("2")[0]["filename"]

    whole = saved(2)
    size = whole.stat().st_size
    arm(fresh, kind)
    assert saved(2) == whole  # from the cache: nothing was saved
    spoilt = saved(3)
    if share is None:
        assert not spoilt.exists()
    else:
        assert spoilt.stat().st_size == pytest.approx(share * size, abs=5)
    spoilt.unlink(missing_ok=True)
    assert saved(4).stat().st_size == pytest.approx(size, abs=5)
    assert whole.stat().st_size == size


@pytest.mark.parametrize(
    ("text", "is_swapped"),
    [
        ("symlink", Path.is_symlink),
        ("fifo", Path.is_fifo),
        ("folder", Path.is_dir),
        ("hardlink", lambda path: path.stat().st_nlink == 2),
    ],
)
def test_a_swapped_output_file(fresh: ComfyUI, text: str, is_swapped: Callable[[Path], bool]) -> None:
    other = fresh.output / "other"
    other.touch()
    arm(fresh, "file_swapped", text=text, path=str(other) if text == "hardlink" else "/etc/passwd")
    swapped, whole = (fresh.output / fresh.run(quick(color)).files("2")[0]["filename"] for color in (5, 6))
    assert is_swapped(swapped)
    assert not is_swapped(whole)


def test_an_output_that_the_history_does_not_name(fresh: ComfyUI) -> None:
    arm(fresh, "output_unlisted")
    run = fresh.run({**quick(3), "2": save("3"), "3": empty(color=3, batch_size=2)})
    first, second = run.data("executed")[0]["output"]["images"]
    assert run.files("2") == [second]
    assert (fresh.output / first["filename"]).exists()
    assert len(fresh.run(quick(4)).files("2")) == 1


def test_a_missing_history(fresh: ComfyUI) -> None:
    arm(fresh, "history_missing")
    assert fresh.run(quick(4)).history == {}
    assert fresh.run(quick(5)).history["status"]["completed"] is True


def test_a_late_history_comes_after_its_success_was_told(fresh: ComfyUI) -> None:
    arm(fresh, "history_late", seconds=1)
    with fresh.listen("me") as listener:
        prompt_id = post(fresh, quick(8), "me")
        listener.read_until(is_event("execution_success"))
        assert fresh.history(prompt_id) == {}
        listener.read_to_end(prompt_id)
    assert fresh.history(prompt_id)["status"]["completed"] is True


# --- HTTP ---


def test_a_500_strikes_a_path_and_what_is_below_it(fresh: ComfyUI) -> None:
    arm(fresh, "http_500", path="/history", times=2, after=1)
    paths = ("/history", "/historian", "/api/history/an-id", "/queue", "/history", "/history")
    assert [fresh.get(path).status_code for path in paths] == [200, 404, 500, 200, 500, 200]


def test_an_answer_that_hangs_is_carried_out_at_once(fresh: ComfyUI) -> None:
    arm(fresh, "http_hang", seconds=REPLY_TIMEOUT_S)
    body = {"prompt": quick(14), "prompt_id": "given"}
    with pytest.raises(requests.Timeout):
        requests.post(f"{fresh.base_url}/prompt", json=body, timeout=0.3)
    fresh.wait_idle()
    assert fresh.history("given")["status"]["completed"] is True


def test_a_hang_of_no_seconds_counts_requests(fresh: ComfyUI) -> None:
    arm(fresh, "http_hang", path="/history", seconds=0, times=1000)
    for path in ("/history", "/history/an-id", "/queue"):
        assert fresh.get(path).status_code == 200
    assert fired(fresh, "http_hang") == 2


# --- websockets ---


def test_a_refused_websocket(fresh: ComfyUI) -> None:
    arm(fresh, "ws_refuse")
    with pytest.raises(websocket.WebSocketBadStatusException) as caught:
        fresh.listen("me")
    assert caught.value.status_code == 403
    with fresh.listen("me") as listener:
        assert listener.messages[0]["type"] == "status"


def test_a_cut_websocket(fresh: ComfyUI) -> None:
    arm(fresh, "ws_cut", after=3)
    with fresh.listen("me") as listener:
        post(fresh, quick(5), "me")
        with pytest.raises((websocket.WebSocketConnectionClosedException, ConnectionError)):
            listener.read_until(lambda _: False)
        assert len(listener.messages) == 3
    fresh.wait_idle()


def test_a_silent_websocket_says_nothing_while_the_prompt_runs_to_its_end(fresh: ComfyUI) -> None:
    with fresh.listen("me") as listener:
        greeting = len(listener.messages)
        arm(fresh, "ws_silent", times=1000)
        prompt_id = post(fresh, quick(9), "me")
        fresh.wait_idle()
        assert len(listener.close_and_drain()) == greeting
    assert fresh.history(prompt_id)["status"]["completed"] is True


def test_faults_of_messages_can_be_of_one_event(fresh: ComfyUI) -> None:
    arm(fresh, "ws_silent", event="executing", after=1)
    assert fresh.run(quick(15)).ran == ["1"]  # of 1 and 2, and of the end, which comes
    arm(fresh, "ws_silent", event="execution_success")
    heard = [fresh.run(quick(color)).types for color in (16, 17)]
    assert [types for types in heard[1] if types not in heard[0]] == ["execution_success"]


def test_garbage_comes_before_a_message(fresh: ComfyUI) -> None:
    arm(fresh, "ws_garbage", event="execution_success")
    prompt_id, frames = run_raw(fresh, quick(18))
    texts = [frame for frame in frames[:-1] if isinstance(frame, str)]
    junk = texts[texts.index("garbage") - 1 :]
    assert {"[]", "null", "[" * 100_000} < set(junk)
    wrong = {"type": "execution_cached", "data": {"prompt_id": prompt_id, "nodes": 5}}
    assert json.dumps(wrong) in junk
    assert not [text for text in junk if claims_the_end(text)]
    assert "garbage" not in run_raw(fresh, quick(19))[1]


def claims_the_end(text: str) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        message = json.loads(text)
        if isinstance(message, dict) and isinstance(message.get("data"), dict):
            event, data = message.get("type"), message["data"]
            ends = ("execution_success", "execution_error", "execution_interrupted")
            return event in ends or (event == "executing" and data.get("node") is None)
    return False


def test_binary_frames_come_before_a_message(fresh: ComfyUI) -> None:
    arm(fresh, "ws_binary", event="execution_success")
    _, frames = run_raw(fresh, quick(20))
    binary = [frame for frame in frames if isinstance(frame, bytes)]
    assert [len(frame) for frame in binary[:8]] == list(range(8))
    assert {int.from_bytes(frame[:4]) for frame in binary[8:]} == {1, 4, 77, 99}
    assert max(len(frame) for frame in binary) > 1_000_000
    assert not [frame for frame in run_raw(fresh, quick(21))[1] if isinstance(frame, bytes)]


# --- the start ---


def start_that_dies(root: Path) -> float:
    """Start a server that kills itself; for how many seconds it lived."""
    begun = time.monotonic()
    start = subprocess.run(
        command(root, free_port()), cwd=directory(), capture_output=True, timeout=BOOT_TIMEOUT_S, check=False
    )
    assert start.returncode == -signal.SIGKILL
    return time.monotonic() - begun


def test_faults_of_the_start_outlive_the_process(tmp_path: Path) -> None:
    with boot(tmp_path) as server:
        arm(server, "crash_boot")
        arm(server, "slow_boot", seconds=1, times=2)
        assert fired(server, "slow_boot") == 0
    assert start_that_dies(tmp_path) > 1
    with timed() as seconds, boot(tmp_path) as server:
        assert seconds() > 1
        assert (fired(server, "crash_boot"), fired(server, "slow_boot")) == (1, 2)
    with boot(tmp_path) as server:
        assert (fired(server, "crash_boot"), fired(server, "slow_boot")) == (1, 2)
        assert server.delete("/_fault").status_code == 200
        assert list((tmp_path / "user").glob("*faults*")) == []


def test_faults_of_the_start_in_the_environment_strike_at_each_start(tmp_path: Path) -> None:
    environ = {"STANDIN_FAULTS": json.dumps([{"kind": "slow_boot", "seconds": 0.5}, {"kind": "exception"}])}
    for _ in range(2):
        with timed() as seconds, boot(tmp_path, env=environ) as server:
            assert seconds() > 0.5
            assert fired(server, "slow_boot") == 1
            assert [fault["kind"] for fault in server.get("/_fault").json()["armed"]] == ["slow_boot", "exception"]
            assert not list((tmp_path / "user").glob("*faults*"))


@contextlib.contextmanager
def timed() -> Iterator[Any]:
    """Gives a function that tells the seconds since now."""
    begun = time.monotonic()
    yield lambda: time.monotonic() - begun
