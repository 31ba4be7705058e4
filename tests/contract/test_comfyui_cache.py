"""The result cache: what is answered from it, what gets past it, and the success without a file."""

from __future__ import annotations

from typing import Any

import pytest
from comfyui_client import ComfyUI, Workflow, capture, empty, normal, save
from PIL import Image


def workflow(color: int = 1, **more: Any) -> Workflow:
    return {"1": empty(color=color), "2": save("1", **more)}


def test_a_repeated_workflow_names_the_old_file_and_writes_none(fresh: ComfyUI) -> None:
    first = fresh.run(workflow())
    second = fresh.run(workflow())
    assert second.cached == ["1", "2"]
    assert second.ran == []
    assert second.files("2") == first.files("2") == [{"filename": "out_00001_.png", "subfolder": "", "type": "output"}]
    assert [file.name for file in fresh.output.iterdir()] == ["out_00001_.png"]


def test_success_but_no_output_after_the_file_was_removed(fresh: ComfyUI) -> None:
    (name,) = [file["filename"] for file in fresh.run(workflow()).files("2")]
    (fresh.output / name).unlink()
    again = fresh.run(workflow())
    assert again.history["status"]["status_str"] == "success"
    assert [file["filename"] for file in again.files("2")] == [name]
    assert list(fresh.output.iterdir()) == []
    assert fresh.get(f"/view?filename={name}&type=output").status_code == 404


def test_an_unknown_input_on_the_output_node_makes_only_that_node_run(fresh: ComfyUI) -> None:
    fresh.run(workflow(__job_nonce="a"))
    assert fresh.run(workflow(__job_nonce="a")).cached == ["1", "2"]
    again = fresh.run(workflow(__job_nonce="b"))
    assert again.cached == ["1"]
    assert again.ran == ["2"]
    assert [file["filename"] for file in again.files("2")] == ["out_00002_.png"]
    with Image.open(fresh.output / "out_00002_.png") as picture:
        assert "__job_nonce" in picture.info["prompt"]


def test_node_ids_do_not_matter(fresh: ComfyUI) -> None:
    fresh.run(workflow())
    assert fresh.run({"77": empty(color=1), "5:3": save("77")}).cached == ["77", "5:3"]


def test_only_the_newest_workflow_stays_cached(fresh: ComfyUI) -> None:
    fresh.run(workflow(1))
    fresh.run(workflow(2))
    assert fresh.run(workflow(1)).cached == []


def test_what_two_workflows_share_is_kept(fresh: ComfyUI) -> None:
    fresh.run(workflow())
    run = fresh.run({**workflow(), "3": save("1", "other")})
    assert run.cached == ["1", "2"]
    assert run.ran == ["3"]


def test_a_changed_file_under_the_same_name_is_noticed(fresh: ComfyUI) -> None:
    load = {"1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}}, "2": save("1")}
    Image.new("RGB", (4, 4), (1, 2, 3)).save(fresh.input / "a.png")
    fresh.run(load)
    assert fresh.run(load).cached == ["1", "2"]
    Image.new("RGB", (4, 4), (3, 2, 1)).save(fresh.input / "a.png")
    changed = fresh.run(load)
    assert changed.cached == []
    with Image.open(fresh.output / changed.files("2")[0]["filename"]) as picture:
        assert picture.getpixel((0, 0)) == (3, 2, 1)


@pytest.mark.parametrize(("wish", "empties"), [({"free_memory": True}, True), ({"unload_models": True}, False)])
def test_only_free_memory_empties_the_cache(fresh: ComfyUI, wish: dict[str, bool], empties: bool) -> None:
    fresh.run(workflow())
    answer = fresh.post("/free", wish)
    assert (answer.status_code, answer.text) == (200, "")
    # The worker thread takes the wish at once or, if a prompt comes first, after that prompt.
    cached = [fresh.run(workflow()).cached for _ in range(2)]
    assert ([] in cached) is empties


def test_clearing_the_history_does_not_clear_the_cache(fresh: ComfyUI) -> None:
    fresh.run(workflow())
    fresh.post("/history", {"clear": True})
    assert fresh.run(workflow()).cached == ["1", "2"]


def test_a_cached_prompt_without_client_has_no_outputs_as_recorded(fresh: ComfyUI) -> None:
    expected = capture("cached_without_client_id")["never_with_client_id"]
    prompts = [entry["prompt"][2] for entry in expected]
    for prompt, entry in zip(prompts, expected, strict=True):
        got = fresh.run(prompt, client_id=None).history
        for part in (got, entry):
            part["prompt"] = part["prompt"][2:]
            for _, data in part["status"]["messages"]:
                assert data.pop("prompt_id")
        assert normal(got, {}) == normal(entry, {})
