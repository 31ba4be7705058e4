"""The nodes that ComfyUI itself has not: those of the stand-in, which tests/comfyui_faults brings into real ComfyUI."""

from __future__ import annotations

import base64
import json
from typing import Any

from comfyui_client import ComfyUI, empty, post, quick, save


def test_steps_of_a_slow_node_are_reported_and_interrupts_act_between_them(fresh: ComfyUI) -> None:
    sleep = {"class_type": "StandinSleep", "inputs": {"image": ["1", 0], "seconds": 600.0, "steps": 6000}}
    with fresh.listen("me") as listener:
        prompt_id = post(fresh, {"1": empty(), "2": sleep, "3": save("2")}, "me")
        step = listener.read_until(lambda message: message.get("type") == "progress")
        fresh.post("/interrupt", {"prompt_id": prompt_id})
        listener.read_to_end(prompt_id)
    assert step["data"] == {"value": 1, "max": 6000, "prompt_id": prompt_id, "node": "2"}
    assert fresh.history(prompt_id)["status"]["messages"][-1][1]["node_id"] == "2"


def test_an_input_too_much_passes_the_validation_of_a_strict_node_and_fails_in_its_run(fresh: ComfyUI) -> None:
    strict = {"class_type": "StandinStrict", "inputs": {"images": ["1", 0], "filename_prefix": "strict"}}
    described = fresh.get("/object_info/StandinStrict").json()["StandinStrict"]
    assert (described["output_node"], described["input"]["optional"]) == (True, {})
    name = fresh.run({"1": empty(), "2": strict}).files("2")[0]["filename"]
    assert (fresh.output / name).exists()
    strict["inputs"]["__job_nonce"] = "n1"
    run = fresh.run({"1": empty(), "2": strict})
    assert run.answer["node_errors"] == {}
    event, error = run.history["status"]["messages"][-1]
    assert (event, error["node_id"], error["exception_type"]) == ("execution_error", "2", "TypeError")
    message = "StandinStrict.run() got an unexpected keyword argument '__job_nonce'"
    assert error["exception_message"].strip() == message


def test_a_tee_saves_and_passes_on(fresh: ComfyUI) -> None:
    assert fresh.get("/object_info/StandinTee").json()["StandinTee"]["output_node"] is True
    tee = {"class_type": "StandinTee", "inputs": {"images": ["1", 0], "filename_prefix": "tee"}}
    run = fresh.run({"1": empty(color=0x336699), "2": tee, "3": save("2")})
    saved = [fresh.output / run.files(node)[0]["filename"] for node in ("2", "3")]
    assert saved[0].read_bytes() == saved[1].read_bytes()


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


def test_text_and_seed_are_seen_in_the_pixels(fresh: ComfyUI, standin_only: None) -> None:
    cat = picture(fresh, "a cat", 1)
    assert picture(fresh, "a cat", 1) == cat
    assert len({cat, picture(fresh, "a dog", 1), picture(fresh, "a cat", 2)}) == 3


def test_a_path_that_is_handed_on_comes_from_the_cache_although_the_file_is_gone(fresh: ComfyUI) -> None:
    workflow = quick(12)
    workflow["7"] = {"class_type": "StandinToFile", "inputs": {"image": ["1", 0]}}
    workflow["8"] = {"class_type": "StandinFromFile", "inputs": {"path": ["7", 0]}}
    workflow["2"]["inputs"]["images"] = ["8", 0]
    assert fresh.run(workflow).history["status"]["completed"] is True
    for path in fresh.temp.glob("standin_*.png"):
        path.unlink()
    workflow["8"]["inputs"]["nonce"] = "1"  # has to run again
    messages = fresh.run(workflow).history["status"]["messages"]
    assert messages[-1][1]["exception_type"] == "FileNotFoundError"
    assert "/temp/standin_" in messages[-1][1]["exception_message"]


def test_a_node_can_have_any_outputs(fresh: ComfyUI) -> None:
    said = {"3d": [{"filename": "a.glb", "subfolder": "mesh", "type": "output"}], "text": ["two", 2]}
    files = {"mesh/a.glb": base64.b64encode(b"glTF").decode(), "b.csv": ""}
    inputs = {"files": json.dumps(files), "ui": json.dumps(said)}
    workflow = {"1": {"class_type": "StandinFiles", "inputs": inputs}}
    workflow["2"] = {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}
    run = fresh.run(workflow)
    assert run.history["outputs"] == {"1": said, "2": {"text": ["mesh/a.glb"]}}
    assert ((fresh.output / "mesh/a.glb").read_bytes(), (fresh.output / "b.csv").read_bytes()) == (b"glTF", b"")
