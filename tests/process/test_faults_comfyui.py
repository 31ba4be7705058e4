"""ComfyUI's faults: rows C of FAULTS.md."""

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from local.__main__ import Platform
from tests.process.conftest import FAULT_SETTINGS
from tests.process.fault_rows import Row
from tests.process.stack import (
    Driver,
    boot_worker,
    invert_job,
    invert_workflow,
    inverted,
    job,
    picture_bytes,
    slow_job,
    slow_workflow,
    start_long_job,
    start_worker,
    wait_until,
)


def is_another_start(worker: Driver, pid: int) -> Callable[[], bool]:
    return lambda: worker.comfyui_pid() != pid and worker.comfyui_answers()


# --- starting and dying ---


@pytest.mark.fault("C1")
def test_a_job_that_comes_before_comfyui_is_up_waits_in_the_queue(row: Row, platform: Platform, tmp_path: Path) -> None:
    slow_boot = json.dumps([{"kind": "slow_boot", "seconds": 2}])
    with start_worker(platform, tmp_path / "log", STANDIN_FAULTS=slow_boot) as worker:
        job_id = worker.start_job(invert_job())
        listened = worker.ramdisk / "run" / "listened"
        wait_until(lambda: worker.status(job_id)["status"] != "IN_QUEUE", "the job is taken")
        assert listened.exists()
        row.succeeds(worker.finish(job_id))
        row.next_job_runs(worker)


@pytest.mark.fault("C2")
def test_a_comfyui_that_dies_while_booting_ends_the_worker_and_another_one_does_the_job(
    row: Row, platform: Platform, tmp_path: Path
) -> None:
    crash_boot = json.dumps([{"kind": "crash_boot"}])
    with start_worker(platform, tmp_path / "log", STANDIN_FAULTS=crash_boot) as broken:
        job_id = broken.start_job(invert_job())
        assert broken.worker.process.wait(60) == 1
        assert "ComfyUI died while booting; the end of its log is above." in broken.log()
        assert "ComfyUI ended with code 137" in broken.log()
        own_words = [line for line in broken.log().splitlines() if " start.sh " not in line]
        assert any("ComfyUI" in line for line in own_words)  # it had the time to say what it is
        assert broken.status(job_id)["status"] == "IN_QUEUE"
    with start_worker(platform, tmp_path / "second-log") as worker:
        row.succeeds(worker.finish(job_id, timeout_s=60))
        row.next_job_runs(worker)


@pytest.mark.fault("C3")
def test_a_comfyui_killed_in_mid_job_is_told_with_its_log(row: Row, worker: Driver) -> None:
    job_id = start_long_job(worker)
    pid = worker.comfyui_pid()
    os.kill(pid, signal.SIGKILL)
    details = row.fails(worker.finish(job_id), "COMFYUI_CRASHED", "exit code 137, SIGKILL")
    assert (details["exit_code"], details["out_of_memory"]) == (137, False)
    assert details["log"]
    row.next_job_runs(worker)
    assert worker.comfyui_pid() != pid


@contextlib.contextmanager
def memory_group(pid: int, limit_bytes: int) -> Iterator[None]:
    """A memory group of its own for a process; what it has already stays where it is counted."""
    version_1 = Path("/sys/fs/cgroup/memory")
    group = (version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")) / f"comfy-endpoint-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if version_1.is_dir() else "memory.max")).write_text(str(limit_bytes))
        (group / "cgroup.procs").write_text(str(pid))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"needs the right to make a memory group: {error}")
    try:
        yield
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text(), "the group is empty")
        group.rmdir()


@pytest.mark.fault("C4")
def test_a_comfyui_killed_for_its_memory_is_told_so(row: Row, worker: Driver) -> None:
    with memory_group(worker.comfyui_pid(), limit_bytes=150_000_000):
        worker.fault("eat_memory", count=1000)
        details = row.fails(worker.run(invert_job()), "COMFYUI_CRASHED", "the container's memory was used up")
    assert (details["exit_code"], details["out_of_memory"]) == (137, True)
    row.next_job_runs(worker)


@pytest.mark.fault("C5")
def test_a_node_that_hangs_is_ended_at_the_deadline(row: Row, worker: Driver) -> None:
    pid = worker.comfyui_pid()
    worker.fault("hang")
    details = row.fails(worker.run(invert_job(timeout_s=1)), "JOB_TIMEOUT", "within 1 s")
    assert details["timeout_s"] == 1
    row.next_job_runs(worker)
    assert worker.comfyui_pid() != pid  # deaf to interrupts: only its end helped


@pytest.mark.fault("C5")
def test_a_comfyui_that_stands_still_is_ended_at_the_deadline(row: Row, worker: Driver) -> None:
    pid = worker.comfyui_pid()
    job_id = start_long_job(worker, timeout_s=2)
    os.kill(pid, signal.SIGSTOP)  # it lives and answers nothing
    row.fails(worker.finish(job_id), "JOB_TIMEOUT", "within 2 s")
    row.next_job_runs(worker)
    assert worker.comfyui_pid() != pid


@pytest.mark.fault("C6")
def test_a_comfyui_whose_prompt_worker_died_is_ended_at_once(row: Row, worker: Driver) -> None:
    pid = worker.comfyui_pid()
    worker.fault("dead_worker")
    details = row.fails(worker.run(invert_job()), "COMFYUI_CRASHED", "exit code 70")
    assert "The prompt worker thread died of SystemExit; ComfyUI ends." in details["log"]
    row.next_job_runs(worker)
    assert worker.comfyui_pid() != pid


@pytest.mark.fault("C7")
def test_a_prompt_that_comfyui_no_longer_knows_is_not_waited_for(row: Row, worker: Driver) -> None:
    worker.fault("ws_silent", times=1000)
    worker.fault("history_missing")
    row.fails(worker.run(invert_job()), "COMFYUI_CRASHED", "no longer knows the prompt")
    worker.disarm()
    row.next_job_runs(worker)


@pytest.mark.fault("C7")
def test_a_restart_between_two_looks_is_seen(row: Row, worker: Driver) -> None:
    handler_pid, pid = worker.pid_of("rp_handler.py"), worker.comfyui_pid()
    job_id = start_long_job(worker)
    os.kill(handler_pid, signal.SIGSTOP)  # it sees nothing of what follows
    try:
        os.kill(pid, signal.SIGKILL)
        wait_until(is_another_start(worker, pid), "another ComfyUI answers")
    finally:
        os.kill(handler_pid, signal.SIGCONT)
    row.fails(worker.finish(job_id), "COMFYUI_CRASHED", "in the middle of the job")
    row.next_job_runs(worker)


# --- refusals ---


@pytest.mark.fault("C8")
def test_a_value_that_is_not_in_its_list_is_told_with_the_nearest_one(row: Row, worker: Driver) -> None:
    workflow = invert_workflow()
    scale = {"image": ["1", 0], "width": 8, "height": 8, "crop": "disabled", "upscale_method": "lanczoz"}
    workflow["2"] = {"class_type": "ImageScale", "inputs": scale}
    workflow["3"]["inputs"].pop("filename_prefix")
    said = ("Node 2 (ImageScale): upscale_method is 'lanczoz'", "the nearest it has: 'lanczos'")
    details = row.fails(worker.run(job(workflow)), "PROMPT_REJECTED", *said, "Node 3 (SaveImage): Required input")
    assert set(details["node_errors"]) == {"2", "3"}
    row.next_job_runs(worker)


@pytest.mark.fault("C8")
def test_of_a_long_list_the_nearest_is_told_too(row: Row, worker: Driver) -> None:
    """ComfyUI's refusal has no choices where there are more than 20."""
    workflow = invert_workflow()
    sampler = {"seed": 1, "steps": 1, "cfg": 1.0, "sampler_name": "eulr", "scheduler": "normal", "denoise": 1.0}
    empty = {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}
    workflow |= {"9": {"class_type": "KSampler", "inputs": {**sampler, "latent_image": ["e", 0]}}, "e": empty}
    workflow["d"] = {"class_type": "VAEDecode", "inputs": {"samples": ["9", 0]}}
    workflow["2"]["inputs"]["image"] = ["d", 0]
    row.fails(worker.run(job(workflow)), "PROMPT_REJECTED", "sampler_name is 'eulr'", "the nearest it has: 'euler'")
    row.next_job_runs(worker)


@pytest.mark.fault("C8")
def test_a_missing_model_is_told_with_what_models_has_to_do_with_it(row: Row, worker: Driver) -> None:
    loader = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "absent.safetensors"}}
    decoder = {"class_type": "VAEDecode", "inputs": {"vae": ["m", 2], "samples": ["e", 0]}}
    empty = {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}
    workflow = {**invert_workflow(), "m": loader, "e": empty, "d": decoder}
    workflow["2"]["inputs"]["image"] = ["d", 0]
    said = ("ckpt_name is 'absent.safetensors'", "MODELS names absent.safetensors, but it is missing", "HF_HUB_OFFLINE")
    row.fails(worker.run(job(workflow)), "PROMPT_REJECTED", *said)
    row.next_job_runs(worker)


@pytest.mark.fault("C9")
def test_a_refusal_without_a_reason_comes_with_comfyuis_log(row: Row, worker: Driver) -> None:
    worker.fault("http_500")
    details = row.fails(worker.run(invert_job()), "PROMPT_REJECTED", "status 500")
    assert any("Error" in line for line in details["log"])
    row.next_job_runs(worker)


@pytest.mark.fault("C10")
def test_the_good_branch_of_a_workflow_runs_and_the_bad_one_is_a_warning(row: Row, worker: Driver) -> None:
    workflow = invert_workflow()
    workflow["9"] = {"class_type": "SaveImage", "inputs": {"filename_prefix": "bad"}}
    result = row.succeeds(worker.run(job(workflow)))
    (warning,) = result["warnings"]
    assert warning.startswith("Node 9 (SaveImage): Required input is missing")
    row.next_job_runs(worker)


# --- nodes that fail ---


@pytest.mark.fault("C11")
def test_a_node_that_raises_is_named_and_no_secret_is(row: Row, worker: Driver) -> None:
    key, text = "sk-live-0123456789", "a lighthouse at dusk"
    workflow = invert_workflow(prefix=text)
    for node in workflow.values():
        node["_meta"] = {"title": "The one"}
    worker.fault("exception", text=f"401 for key {key}")
    answer = worker.run(job(workflow, comfy_org_api_key=key))
    details = row.fails(answer, "EXECUTION_FAILED", '"The one" (', "RuntimeError: 401 for key ***")
    assert details["node_type"] == workflow[details["node_id"]]["class_type"]
    assert details["node_title"] == "The one"
    assert details["exception_type"] == "RuntimeError"
    assert 1 <= len(details["traceback"]) <= 8
    assert key not in str(answer) and text not in str(answer)
    row.next_job_runs(worker)


@pytest.mark.fault("C12")
def test_memory_is_freed_between_a_job_that_had_too_little_and_the_next(row: Row, worker: Driver) -> None:
    def cached_nodes() -> set[str]:
        """Those that come from the cache in a job as the one before."""
        worker.run(invert_job(debug=True))  # which keeps the history
        (record,) = worker.comfyui("/history").values()
        return {
            node for kind, body in record["status"]["messages"] if kind == "execution_cached" for node in body["nodes"]
        }

    worker.run(invert_job())
    assert cached_nodes() == {"1", "2"}
    worker.fault("out_of_memory")
    row.fails(worker.run(invert_job()), "OUT_OF_GPU_MEMORY", "ran out of GPU memory; use a smaller picture")
    assert cached_nodes() == set()
    worker.run(invert_job())  # wipes what the one before has kept
    row.next_job_runs(worker)


# --- the history ---


@pytest.mark.fault("C13")
def test_a_late_history_is_waited_for(row: Row, worker: Driver) -> None:
    worker.fault("history_late", seconds=5)
    row.succeeds(worker.run(invert_job()))
    row.next_job_runs(worker)


@pytest.mark.fault("C14")
def test_a_history_that_never_comes_is_given_up(row: Row, worker: Driver) -> None:
    worker.fault("history_missing")
    row.fails(worker.run(invert_job()), "HISTORY_MISSING", "no history of it after 7.8 s")
    row.next_job_runs(worker)


# --- outputs ---


@pytest.mark.fault("C15")
def test_a_file_that_is_named_and_not_there_is_a_failure(row: Row, worker: Driver) -> None:
    worker.fault("file_missing")
    row.fails(worker.run(invert_job()), "OUTPUT_MISSING", "inverted_00001_.png")
    row.next_job_runs(worker)


@pytest.mark.fault("C16")
def test_the_same_job_gives_its_own_files_every_time(row: Row, worker: Driver) -> None:
    workflow = invert_workflow()
    workflow["4"] = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "inverted"}}
    contents = {"3": picture_bytes(), "4": inverted(picture_bytes())}
    for _ in range(3):
        result = row.succeeds(worker.run(job(workflow)), contents)
        assert len({item["filename"] for item in result["images"]}) == 2
    row.next_job_runs(worker)


@pytest.mark.fault("C17")
def test_an_output_in_a_subfolder_is_found_there(row: Row, worker: Driver) -> None:
    (item,) = row.succeeds(worker.run(job(invert_workflow(prefix="a/b/picture"))))["images"]
    assert (item["subfolder"], item["filename"]) == ("a/b", "picture_00001_.png")
    row.next_job_runs(worker)


@pytest.mark.fault("C18")
def test_previews_are_returned_where_there_is_nothing_else(row: Row, worker: Driver) -> None:
    workflow = invert_workflow()
    workflow["3"] = {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}}
    row.succeeds(worker.run(job(workflow)))
    row.next_job_runs(worker)


@pytest.mark.fault("C19")
def test_a_run_that_names_no_output_is_no_success(row: Row, worker: Driver) -> None:
    worker.fault("output_unlisted")
    row.fails(worker.run(invert_job()), "NO_OUTPUT", "gave nothing", "no node names", "inverted_00001_.png")
    row.next_job_runs(worker)


@pytest.mark.fault("C20")
@pytest.mark.parametrize("kind", ["file_empty", "file_half"])
def test_a_file_that_is_not_whole_is_a_failure(row: Row, worker: Driver, kind: str) -> None:
    worker.fault(kind)
    details = row.fails(worker.run(invert_job()), "OUTPUT_DAMAGED", "only in part")
    assert details["file"] == "inverted_00001_.png"
    row.next_job_runs(worker)


# --- what an earlier job has left ---


@pytest.mark.fault("C21")
def test_a_leftover_prompt_is_cleared_away(row: Row, worker: Driver) -> None:
    empty = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}}
    leftover = slow_workflow(60) | {"1": empty}
    for _ in range(2):
        worker.post_comfyui("/prompt", {"prompt": leftover, "client_id": "somebody-else"})
    wait_until(worker.comfyui_runs, "the leftover runs")
    row.succeeds(worker.run(invert_job()))
    assert worker.comfyui_is_idle()
    row.next_job_runs(worker)


@pytest.mark.fault("C22")
def test_a_node_that_cannot_take_the_extra_input_runs_without_it(row: Row, worker: Driver) -> None:
    workflow = invert_workflow()
    workflow["3"]["class_type"] = "StandinStrict"
    for _ in range(3):  # found out, remembered, and repeated word for word
        assert row.succeeds(worker.run(job(workflow)))["warnings"] == []
    row.next_job_runs(worker)


# --- giving up, and not letting go ---


@pytest.mark.fault("C23")
def test_a_comfyui_that_dies_three_times_in_a_row_ends_the_container(
    row: Row, platform: Platform, tmp_path: Path
) -> None:
    always = json.dumps([{"kind": "crash"}])  # armed anew at each start
    with boot_worker(platform, tmp_path / "log", STANDIN_FAULTS=always) as broken:
        for _ in range(3):
            row.fails(broken.run(invert_job()), "COMFYUI_CRASHED", "exit code 137")
        assert broken.worker.process.wait(20) == 1
        assert "ComfyUI died 3 times without finishing a job; giving up." in broken.log()
        assert not broken.ramdisk.exists()
        assert broken.own_pids() == []
    with boot_worker(platform, tmp_path / "second-log") as worker:
        row.next_job_runs(worker)


@pytest.mark.fault("C24")
def test_a_comfyui_that_does_not_let_go_is_ended_after_the_grace(row: Row, worker: Driver) -> None:
    pid = worker.comfyui_pid()
    worker.fault("hang")
    job_id = worker.start_job(invert_job())
    wait_until(lambda: worker.strikes("hang"), "the node hangs")
    worker.cancel(job_id)
    row.ends(worker.finish(job_id), "CANCELLED")
    wait_until(is_another_start(worker, pid), "ComfyUI is started again, without a next job that needs it")
    row.next_job_runs(worker)
    grace = FAULT_SETTINGS["INTERRUPT_GRACE_S"]
    (line,) = [line for line in worker.log().splitlines() if f"[{job_id}]" in line and "did not stop within" in line]
    assert f"did not stop within {grace} s; ending it" in line


# --- found on the way ---


@pytest.mark.fault("C26")
def test_a_comfyui_that_dies_between_two_jobs_costs_none_of_them(row: Row, worker: Driver) -> None:
    worker.fault("slow_boot", seconds=2)
    os.kill(worker.comfyui_pid(), signal.SIGKILL)
    row.succeeds(worker.run(invert_job()))
    row.next_job_runs(worker)


@pytest.mark.fault("C27")
def test_a_comfyui_that_dies_again_while_it_is_restarted_costs_no_job(row: Row, worker: Driver) -> None:
    worker.fault("crash_boot")
    os.kill(worker.comfyui_pid(), signal.SIGKILL)
    row.succeeds(worker.run(invert_job()))
    row.next_job_runs(worker)


@pytest.mark.fault("C30")
def test_a_post_that_is_not_answered_does_not_hold_up_the_deadline(row: Row, worker: Driver) -> None:
    pid = worker.comfyui_pid()
    worker.fault("http_hang", path="/prompt", seconds=50)
    row.fails(worker.run(slow_job(60, timeout_s=1)), "JOB_TIMEOUT")
    row.next_job_runs(worker)
    assert worker.comfyui_pid() != pid  # it might have taken the prompt yet


@pytest.mark.fault("C31")
def test_an_output_node_that_others_link_from_gives_its_own_file_every_time(row: Row, worker: Driver) -> None:
    workflow = invert_workflow()
    workflow["3"]["class_type"] = "StandinTee"
    workflow["back"] = {"class_type": "ImageInvert", "inputs": {"image": ["3", 0]}}
    workflow["4"] = {"class_type": "SaveImage", "inputs": {"images": ["back", 0], "filename_prefix": "inverted"}}
    for _ in range(3):
        # A file of node 3 that was left out would not be missed: node 4's takes its name.
        result = row.succeeds(worker.run(job(workflow)), {"3": picture_bytes(), "4": inverted(picture_bytes())})
        assert result["warnings"] == []
    row.next_job_runs(worker)


@pytest.mark.fault("C29")
def test_a_comfyui_that_stands_still_for_a_while_is_only_slow(row: Row, worker: Driver) -> None:
    pid = worker.comfyui_pid()
    worker.fault("stall", seconds=6)
    row.succeeds(worker.run(slow_job(7)))
    row.next_job_runs(worker)
    assert worker.comfyui_pid() == pid


@pytest.mark.fault("C32")
def test_a_cached_path_to_a_file_of_an_earlier_job_is_no_failure(row: Row, worker: Driver) -> None:
    workflow = invert_workflow()
    workflow["7"] = {"class_type": "StandinToFile", "inputs": {"image": ["1", 0]}}
    workflow["8"] = {"class_type": "StandinFromFile", "inputs": {"path": ["7", 0]}}
    workflow["2"]["inputs"]["image"] = ["8", 0]
    for seed in range(3):
        workflow["8"]["inputs"]["seed"] = seed  # an input that is not known, and new: this node is not cached
        assert row.succeeds(worker.run(job(workflow)))["warnings"] == []
    row.next_job_runs(worker)
