"""The product's main job, end to end, and what a job leaves behind: nothing."""

import base64
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps

from tests.process.fault_rows import Row
from tests.process.stack import (
    ROOT,
    Driver,
    base64_of,
    image_of,
    invert_job,
    invert_workflow,
    is_inverted,
    largest_difference,
    picture_bytes,
    slow_job,
    wait_until,
)

PHOTOS = ROOT / "workflows" / "photos"
VERSION = (ROOT / "VERSION").read_text().strip()
HUB_TESTS = json.loads((ROOT / ".runpod/tests.json").read_text())["tests"]


def saved_pictures(directory: Path) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(directory.iterdir())]


def test_the_demo_picture_is_the_photograph_as_plain_pillow_processes_it(driver: Driver, tmp_path: Path) -> None:
    photograph = Image.open(PHOTOS / "coffee.jpg").convert("RGB")
    cropped = photograph.crop((120, 40, 520, 340)).resize((640, 480), Image.Resampling.LANCZOS)
    finished = driver.client(
        *("--workflow", ROOT / "workflows/one_image.json", "--img", PHOTOS / "coffee.jpg", "--out", tmp_path)
    )
    assert finished.returncode == 0, finished.stderr
    assert [Path(line) for line in finished.stdout.splitlines()] == list(tmp_path.iterdir())
    (picture,) = saved_pictures(tmp_path)
    # ComfyUI truncates 255 * (1 - v / 255) in float32, so a level may be one lower than Pillow's.
    assert largest_difference(picture, ImageOps.invert(cropped)) <= 1
    assert largest_difference(picture, cropped) > 200


def test_two_images_reach_the_loaders_in_node_order(driver: Driver, tmp_path: Path) -> None:
    coffee, cat = PHOTOS / "coffee.jpg", PHOTOS / "cat.png"
    finished = driver.client(
        *("--workflow", ROOT / "workflows/two_images.json", "--img", coffee, cat, "--out", tmp_path)
    )
    assert finished.returncode == 0, finished.stderr
    size = (384, 256)
    first = Image.open(coffee).convert("RGB").resize(size, Image.Resampling.LANCZOS)
    # 451 x 300 is a pixel wider than 3 : 2 on either side, as ComfyUI's crop "center" rounds it.
    second = Image.open(cat).convert("RGB").crop((1, 0, 450, 300)).resize(size, Image.Resampling.LANCZOS)
    expected = [first, ImageOps.invert(second)]
    pictures = saved_pictures(tmp_path)
    assert len(pictures) == 2
    for picture, oracle in zip(pictures, expected, strict=True):  # their prefixes, "first" and "second", sort so
        assert largest_difference(picture, oracle) <= 1


def test_a_batch_gives_all_its_pictures(driver: Driver, tmp_path: Path) -> None:
    finished = driver.client(
        *("--workflow", ROOT / "workflows/batch.json", "--img", PHOTOS / "coffee.jpg", "--out", tmp_path)
    )
    assert finished.returncode == 0, finished.stderr
    pictures = saved_pictures(tmp_path)
    assert len(pictures) == 3
    assert largest_difference(pictures[0], pictures[1]) > 100


def test_the_same_job_word_for_word_gives_its_picture_both_times(driver: Driver) -> None:
    job = invert_job()
    answers = [driver.run(job) for _ in range(2)]
    expected = ImageOps.invert(image_of({"data": job["images"]["a.png"]}))
    for answer in answers:
        assert answer["status"] == "COMPLETED", answer
        (item,) = answer["output"]["images"]
        assert largest_difference(image_of(item), expected) <= 1


def test_three_jobs_leave_the_ram_disk_and_the_history_empty(driver: Driver) -> None:
    for job in (invert_job(), {"workflow": {"1": {"class_type": "NoSuchNode", "inputs": {}}}}, invert_job()):
        driver.run(job)
        assert driver.job_files() == []
        assert driver.comfyui("/history") == {}
        log = (driver.ramdisk / "run" / "comfyui.log").read_text().splitlines()
        # ComfyUI writes this line after its last message (main.py, 0.18.1): it may come after the wipe.
        assert [line for line in log if not line.startswith("Prompt executed in")] == []


@pytest.mark.parametrize("case", HUB_TESTS, ids=lambda case: str(case["name"]))
def test_the_jobs_that_runpods_hub_tests_with_give_their_picture(driver: Driver, case: dict[str, Any]) -> None:
    answer = driver.run(case["input"])
    assert answer["status"] == "COMPLETED", answer
    (item,) = answer["output"]["images"]
    sent = case["input"].get("images", {}).values()
    if sent:
        assert all(is_inverted(item, base64.b64decode(content)) for content in sent)
    else:
        assert largest_difference(image_of(item), Image.new("RGB", (64, 48), "orange")) == 0
    assert answer["output"]["warnings"] == []


def test_the_version_is_in_the_log_of_both_programs(driver: Driver) -> None:
    (start_sh,) = [line for line in driver.log().splitlines() if line.endswith(f"comfy-endpoint {VERSION}")]
    assert " start.sh " in start_sh
    assert f"comfy-endpoint {VERSION}: ComfyUI answers after" in driver.log()


def test_both_request_forms_give_the_same_picture(driver: Driver) -> None:
    content = base64_of(picture_bytes())
    ours = driver.run({"workflow": invert_workflow(), "images": {"a.png": content}})
    theirs = driver.run(
        {
            "workflow": invert_workflow(),
            "images": [{"name": "a.png", "image": f"data:image/png;base64,{content}"}],
        }
    )
    pictures = [image_of(answer["output"]["images"][0]) for answer in (ours, theirs)]
    assert largest_difference(*pictures) == 0


def test_an_item_tells_all_that_the_contract_promises(driver: Driver) -> None:
    result = driver.run(invert_job(unknown=1))["output"]
    (item,) = result["images"]
    assert (item["filename"], item["type"], item["media_type"]) == ("inverted_00001_.png", "base64", "image/png")
    assert (item["node_id"], item["subfolder"]) == ("3", "")
    assert item["size_bytes"] == len(item["data"]) * 3 // 4 - item["data"].count("=")
    assert result["status"] == "success"
    assert ["unknown" in warning for warning in result["warnings"]] == [True]
    assert set(result["timings_ms"]) == {"parse", "clear", "write", "run", "collect", "wipe"}


@pytest.mark.fault("V6")
def test_debug_keeps_the_files_and_says_where_until_the_next_job_overwrites_them(row: Row, driver: Driver) -> None:
    result = row.succeeds(driver.run(invert_job(debug=True)))
    assert driver.comfyui("/history").keys() == {result["debug"]["prompt_id"]}
    assert result["debug"]["version"] == VERSION
    kept = [Path(path) for path in result["debug"]["files"]]
    assert kept == [driver.ramdisk / "input/a.png", driver.ramdisk / "output/inverted_00001_.png"]
    assert len(driver.comfyui("/history")) == 1
    held = {path: os.open(path, os.O_RDONLY) for path in kept}
    try:
        sizes = {path: os.fstat(fd).st_size for path, fd in held.items()}
        assert all(os.pread(fd, 8, 0) == b"\x89PNG\r\n\x1a\n" for fd in held.values())
        driver.run(invert_job())
        for path, fd in held.items():  # the inode outlives its name: what it holds now is what a thief would find
            assert not path.exists()
            assert os.pread(fd, sizes[path] + 1, 0) == bytes(sizes[path])
        row.next_job_runs(driver)
    finally:
        for fd in held.values():
            os.close(fd)


@pytest.mark.parametrize(
    ("job", "code", "said"),
    [
        ({"workflow": {"nodes": [], "links": []}}, "WORKFLOW_INVALID", "Export (API)"),
        ({"workflow": {"1": {"class_type": "Nope", "inputs": {}}}}, "PROMPT_REJECTED", "Nope"),
        (
            {
                "workflow": {
                    "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}},
                    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x" * 300}},
                }
            },
            "EXECUTION_FAILED",
            "Node 2 (SaveImage)",
        ),
        (invert_job(images={"a.png": base64_of(picture_bytes()[:-9])}), "MEDIA_INVALID", "cut short"),
        ({"workflow": invert_workflow("missing.png")}, "WORKFLOW_INVALID", "'missing.png', which was not sent"),
        (
            {"workflow": {"1": {"class_type": "EmptyImage", "inputs": {}}}},
            "PROMPT_REJECTED",
            "no outputs",
        ),
    ],
)
def test_a_job_that_cannot_run_says_why_and_the_next_one_runs(
    driver: Driver, job: dict[str, Any], code: str, said: str
) -> None:
    answer = driver.run(job)
    assert answer["status"] == "FAILED"
    assert answer["output"]["error_code"] == code
    assert answer["error"].startswith(f"[{code}] ")
    assert said in answer["error"]
    assert driver.job_files() == []
    assert driver.run(invert_job())["status"] == "COMPLETED"


def test_progress_arrives_while_the_job_runs_and_never_after(driver: Driver) -> None:
    slow = slow_job(3)
    job_id = driver.start_job(slow)

    def progress() -> Any:
        body = driver.status(job_id)
        return body.get("output") if body["status"] == "IN_PROGRESS" else None

    seen = wait_until(progress, "a progress update")
    assert seen["stage"] == "running"
    assert seen["node_class"] == slow["workflow"][seen["node"]]["class_type"]
    assert 0 < seen["percent"] < 100
    assert driver.finish(job_id)["output"]["status"] == "success"
    assert driver.status(job_id)["status"] == "COMPLETED"


def test_neither_prompt_text_nor_pictures_nor_keys_reach_a_log(driver: Driver) -> None:
    marker, key = "xyzzy-secret-marker", "xyzzy-secret-key"
    workflow = invert_workflow(prefix=marker)
    workflow["3"]["inputs"]["filename_prefix"] = marker + "x" * 300  # fails in the node, with the value
    picture = base64_of(picture_bytes())
    for extra in ({}, {"debug": True}):
        answer = driver.run({"workflow": workflow, "images": {"a.png": picture}, "comfy_org_api_key": key, **extra})
        assert marker in answer["error"] + str(answer["output"])  # the caller is told
    assert driver.run({"workflow": {"1": {"class_type": marker, "inputs": {"text": marker}}}})["status"] == "FAILED"
    refused = invert_workflow()
    refused["2"] = {"class_type": "ImageScale", "inputs": {"image": ["1", 0], "upscale_method": marker}}
    assert driver.run({"workflow": refused, "images": {"a.png": picture}, "debug": True})["status"] == "FAILED"
    debug = driver.run(invert_job(debug=True))["output"]["debug"]
    assert marker not in str(debug)  # it may go to another caller
    driver.run({"workflow": refused, "images": {"a.png": picture}, "debug": True})
    pid = driver.comfyui_pid()
    os.kill(pid, signal.SIGKILL)  # a crash must not print the log of that job
    wait_until(lambda: driver.comfyui_pid() != pid, "ComfyUI is started again")
    assert driver.run(invert_job())["status"] == "COMPLETED"
    assert marker not in driver.log()
    assert key not in driver.log()
    assert picture[:64] not in driver.log()
