"""Faults of the stand-in: what is armed strikes, and only so often; and the nodes that draw from text and seed."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import websocket
from comfyui_client import ComfyUI, boot, command, directory, free_port, post, quick

pytestmark = pytest.mark.usefixtures("standin_only")


def arm(server: ComfyUI, kind: str, **more: Any) -> None:
    answer = server.post("/_fault", {"kind": kind, **more})
    assert answer.status_code == 200, answer.text
    assert answer.json()["armed"][-1]["kind"] == kind


def test_an_unknown_kind_is_refused_and_the_known_ones_are_listed(comfyui: ComfyUI) -> None:
    assert comfyui.post("/_fault", {"kind": "nope"}).status_code == 400
    assert comfyui.post("/_fault", {"kind": "crash", "often": 1}).status_code == 400
    assert "dead_worker" in comfyui.get("/_fault").json()["kinds"]


def test_out_of_memory_strikes_after_so_many_nodes_and_once(fresh: ComfyUI) -> None:
    arm(fresh, "out_of_memory", after=1)
    messages = fresh.run(quick(1)).history["status"]["messages"]
    assert messages[-1][1]["exception_type"] == "torch.OutOfMemoryError"
    assert messages[-1][1]["node_id"] == "2"
    assert fresh.run(quick(1)).history["status"]["completed"] is True


@pytest.mark.parametrize(("kind", "share"), [("file_missing", None), ("file_half", 2)])
def test_a_spoilt_output_file(fresh: ComfyUI, kind: str, share: int | None) -> None:
    whole = fresh.output / fresh.run(quick(2)).files("2")[0]["filename"]
    arm(fresh, kind)
    spoilt = fresh.output / fresh.run(quick(3)).files("2")[0]["filename"]
    assert spoilt.exists() is (share is not None)
    if share:
        assert spoilt.stat().st_size < whole.stat().st_size


def test_a_missing_history_and_a_500(fresh: ComfyUI) -> None:
    arm(fresh, "history_missing")
    assert fresh.run(quick(4)).history == {}
    arm(fresh, "http_500", path="/queue")
    assert [fresh.get("/queue").status_code for _ in range(2)] == [500, 200]


def test_a_cut_websocket(fresh: ComfyUI) -> None:
    arm(fresh, "ws_cut", after=3)
    with fresh.listen("me") as listener:
        post(fresh, quick(5), "me")
        with pytest.raises((websocket.WebSocketConnectionClosedException, ConnectionError)):
            listener.read_until(lambda _: False)
    fresh.wait_idle()


def test_a_dead_worker_leaves_http_alive_and_a_crash_ends_the_process(tmp_path: Path) -> None:
    with boot(tmp_path) as server, server.listen("me") as listener:
        arm(server, "dead_worker")
        post(server, quick(6), "me")
        listener.read_until(lambda message: message["type"] == "executing")
        assert server.get("/system_stats").status_code == 200
        assert len(server.get("/queue").json()["queue_running"]) == 1
    with boot(tmp_path) as server:
        arm(server, "crash")
        post(server, quick(7), "me")
        assert server.process.wait(timeout=20) == -signal.SIGKILL


def test_a_late_history_comes_after_its_success_was_told(fresh: ComfyUI) -> None:
    arm(fresh, "history_late", seconds=2)
    with fresh.listen("me") as listener:
        prompt_id = post(fresh, quick(8), "me")
        listener.read_until(lambda message: message["type"] == "execution_success")
        assert fresh.history(prompt_id) == {}
        listener.read_to_end(prompt_id)
    assert fresh.history(prompt_id)["status"]["completed"] is True


def test_a_silent_websocket_says_nothing_while_the_prompt_runs_to_its_end(fresh: ComfyUI) -> None:
    with fresh.listen("me") as listener:
        greeting = len(listener.messages)
        arm(fresh, "ws_silent", times=1000)
        prompt_id = post(fresh, quick(9), "me")
        fresh.wait_idle()
        assert len(listener.close_and_drain()) == greeting
    assert fresh.history(prompt_id)["status"]["completed"] is True
    assert fresh.delete("/_fault").status_code == 200


def test_a_node_that_hangs_is_deaf_to_interrupts(fresh: ComfyUI) -> None:
    arm(fresh, "hang", seconds=2)
    with fresh.listen("me") as listener:
        prompt_id = post(fresh, quick(10), "me")
        listener.read_until(lambda message: message["type"] == "executing")
        fresh.post("/interrupt", {"prompt_id": prompt_id})
        assert len(fresh.get("/queue").json()["queue_running"]) == 1
        listener.read_to_end(prompt_id)
    fresh.wait_idle()


def test_a_flood_of_progress_state(fresh: ComfyUI) -> None:
    arm(fresh, "flood", count=400)
    messages = fresh.run(quick(11)).messages
    assert [message.get("type") for message in messages].count("progress_state") >= 400


def test_a_crash_while_booting_outlives_the_process(tmp_path: Path) -> None:
    with boot(tmp_path) as server:
        arm(server, "crash_boot", times=2)
    for _ in range(2):
        start = subprocess.run(
            command(tmp_path, free_port()), cwd=directory(), capture_output=True, timeout=20, check=False
        )
        assert start.returncode == -signal.SIGKILL
    with boot(tmp_path) as server:
        assert server.get("/system_stats").status_code == 200


def picture(server: ComfyUI, text: str, seed: int) -> bytes:
    sampler = {"seed": seed, "steps": 2, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    links = {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]}
    workflow: dict[str, Any] = {
        "1": {"class_type": "StandinCheckpoint", "inputs": {}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": text, "clip": ["1", 1]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "bad", "clip": ["1", 1]}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "5": {"class_type": "KSampler", "inputs": {**sampler, **links}},
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "9": {"class_type": "SaveImageWebsocket", "inputs": {"images": ["6", 0]}},
    }
    (frame,) = [message["image"] for message in server.run(workflow).messages if "image" in message]
    content: bytes = frame
    return content


def test_text_and_seed_are_seen_in_the_pixels(fresh: ComfyUI) -> None:
    cat = picture(fresh, "a cat", 1)
    assert picture(fresh, "a cat", 1) == cat
    assert len({cat, picture(fresh, "a dog", 1), picture(fresh, "a cat", 2)}) == 3
