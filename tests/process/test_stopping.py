"""Ends that come from outside: cancellation, deadlines, signals, crashes. The next job always runs."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.stack import DEADLINE_S, Driver, boot, invert_job, slow_workflow, wait_until


def start_long_job(driver: Driver) -> str:
    job_id = driver.start_job({"workflow": slow_workflow(60)})
    wait_until(driver.comfyui_runs, "the long job runs")
    return job_id


def assert_next_job_runs(driver: Driver) -> None:
    answer = driver.run(invert_job())
    assert answer["status"] == "COMPLETED", answer
    assert driver.job_files() == []
    assert driver.comfyui("/history") == {}


def test_a_cancelled_job_frees_comfyui_for_the_next_one(driver: Driver) -> None:
    job_id = start_long_job(driver)
    assert driver.cancel(job_id)["status"] == "CANCELLED"
    wait_until(driver.comfyui_is_idle, "ComfyUI is idle", timeout_s=5)
    assert_next_job_runs(driver)
    assert driver.status(job_id)["status"] == "CANCELLED"


def test_ctrl_c_in_the_client_cancels_the_job(driver: Driver, tmp_path: Path) -> None:
    workflow = tmp_path / "slow.json"
    workflow.write_text(json.dumps(slow_workflow(60)))
    command = driver.client_command("--workflow", workflow, "--out", tmp_path)
    client = subprocess.Popen(command, env=driver.client_environ(), stderr=subprocess.PIPE, text=True)
    wait_until(driver.comfyui_runs, "the client's job runs")
    client.send_signal(signal.SIGINT)
    _, said = client.communicate(timeout=DEADLINE_S)
    assert client.returncode == 130
    assert "cancel" in said.lower()
    wait_until(driver.comfyui_is_idle, "ComfyUI is idle", timeout_s=5)
    assert_next_job_runs(driver)


def test_a_job_past_its_own_deadline_is_stopped(driver: Driver) -> None:
    answer = driver.run({"workflow": slow_workflow(60), "timeout_s": 0.5})
    assert answer["output"]["error_code"] == "JOB_TIMEOUT"
    assert "0.5 s" in answer["error"]
    assert driver.comfyui_is_idle()
    assert_next_job_runs(driver)


def test_a_leftover_prompt_is_cleared_before_the_next_job(driver: Driver) -> None:
    body = {"prompt": slow_workflow(60), "client_id": "somebody-else"}
    driver.post_comfyui("/prompt", body)
    wait_until(driver.comfyui_runs, "the leftover runs")
    answer = driver.run(invert_job())
    assert answer["status"] == "COMPLETED"
    assert driver.comfyui_is_idle()


def test_a_job_that_ends_a_comfyui_gets_its_log_and_the_next_one_a_new_comfyui(driver: Driver) -> None:
    job_id = start_long_job(driver)
    first_pid = driver.comfyui_pid()
    os.kill(first_pid, signal.SIGKILL)
    answer = driver.finish(job_id)
    assert answer["output"]["error_code"] == "COMFYUI_CRASHED"
    assert answer["output"]["details"]["log"]
    assert_next_job_runs(driver)
    assert driver.comfyui_pid() != first_pid


def test_a_comfyui_that_hangs_in_mid_job_is_killed_at_the_deadline(driver: Driver) -> None:
    job_id = driver.start_job({"workflow": slow_workflow(60), "timeout_s": 3})
    wait_until(driver.comfyui_runs, "the job runs")
    hung_pid = driver.comfyui_pid()
    os.kill(hung_pid, signal.SIGSTOP)  # it lives and answers nothing
    assert driver.finish(job_id)["output"]["error_code"] == "JOB_TIMEOUT"
    assert_next_job_runs(driver)
    assert driver.comfyui_pid() != hung_pid


# --- the whole worker ends ---


@pytest.fixture
def own_driver(tmp_path: Path) -> Iterator[Driver]:
    with boot(tmp_path / "log") as driver:
        yield driver


def assert_worker_ends(driver: Driver, code: int, timeout_s: float) -> None:
    assert driver.worker.process.wait(timeout_s) == code
    assert not driver.ramdisk.exists()
    for pid in driver.own_pids():
        pytest.fail(f"process {pid} stayed behind")


def test_sigterm_ends_an_idle_worker_at_once_and_the_next_worker_gets_the_job(own_driver: Driver) -> None:
    handler_pid = own_driver.pid_of("rp_handler.py")
    started = time.monotonic()
    own_driver.worker.process.send_signal(signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{handler_pid}").exists(), "the handler ends", timeout_s=2)
    assert time.monotonic() - started < 1.9  # the stand-in holds a poll for 2 s: it was cut, not waited for
    assert_worker_ends(own_driver, 0, timeout_s=10)
    job_id = own_driver.start_job(invert_job())
    assert own_driver.status(job_id)["status"] == "IN_QUEUE"


def test_sigterm_in_mid_job_lets_the_job_finish_and_post(own_driver: Driver) -> None:
    job_id = own_driver.start_job({"workflow": slow_workflow(2)})
    wait_until(own_driver.comfyui_runs, "the job runs")
    own_driver.worker.process.send_signal(signal.SIGTERM)
    own_driver.worker.process.send_signal(signal.SIGTERM)  # twice is the same as once
    answer = own_driver.finish(job_id)
    assert answer["status"] == "COMPLETED", answer
    assert len(answer["output"]["images"]) == 1
    assert_worker_ends(own_driver, 0, timeout_s=10)


def test_a_dead_handler_ends_the_container_with_its_code(own_driver: Driver) -> None:
    os.kill(own_driver.pid_of("rp_handler.py"), signal.SIGKILL)
    assert_worker_ends(own_driver, 137, timeout_s=10)
    assert "handler ended with code 137" in own_driver.log()


def test_a_comfyui_that_dies_again_and_again_ends_the_container(own_driver: Driver) -> None:
    for death in range(3):
        wait_until(own_driver.comfyui_answers, f"ComfyUI is up before death {death + 1}")
        os.kill(own_driver.comfyui_pid(), signal.SIGKILL)
        wait_until(
            lambda seen=death + 1: own_driver.log().count("ComfyUI ended with code 137") == seen, "its death is seen"
        )
    assert_worker_ends(own_driver, 1, timeout_s=10)
    assert "died 3 times" in own_driver.log()


def test_what_a_killed_worker_left_is_wiped_by_the_next_one(own_driver: Driver, tmp_path: Path) -> None:
    own_driver.run(invert_job(debug=True))
    kept = own_driver.job_files()
    assert kept
    with kept[0].open("rb") as held:
        before = held.read()
        for pid in own_driver.own_pids():
            os.kill(pid, signal.SIGKILL)
        own_driver.worker.process.wait(5)
        assert own_driver.job_files() == kept
        with boot(tmp_path / "second", RAMDISK_DIR=str(own_driver.ramdisk)) as second:
            assert second.job_files() == []
            assert "Wiping what an earlier worker left" in second.log()
            held.seek(0)
            assert held.read() == bytes(len(before))
