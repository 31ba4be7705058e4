"""The platform's faults, and those of the container: rows P of FAULTS.md."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from local.__main__ import Platform
from tests.process.fault_rows import Row
from tests.process.stack import (
    Driver,
    boot_platform,
    boot_worker,
    invert_job,
    slow_job,
    start_long_job,
    start_worker,
    wait_until,
)

CLOCK = Path(__file__).with_name("jumping_clock")
STOPS_IN_S = 10.0  # a bound, not a promise: the table has what was measured


@contextlib.contextmanager
def own_stack(tmp_path: Path, *options: str, **settings: str) -> Iterator[Driver]:
    with (
        boot_platform(tmp_path / "platform-log", *options) as running,
        boot_worker(running, tmp_path / "log", **settings) as worker,
    ):
        yield worker


def assert_nothing_of_it_is_left(worker: Driver) -> None:
    assert not worker.ramdisk.exists()
    assert worker.own_pids() == []


def seconds_to_end(worker: Driver, code: int) -> float:
    started = time.monotonic()
    assert worker.worker.process.wait(STOPS_IN_S) == code
    assert_nothing_of_it_is_left(worker)
    return time.monotonic() - started


# --- cancelled ---


def assert_no_overlap(worker: Driver, first: str, second: str) -> None:
    """The worker's log has nothing of the first job once it has something of the second."""
    lines = worker.log().splitlines()
    last_of_first = max(number for number, line in enumerate(lines) if f"[{first}]" in line)
    assert last_of_first < min(number for number, line in enumerate(lines) if f"[{second}]" in line)


@pytest.mark.fault("P1")
def test_a_job_cancelled_in_the_queue_is_never_run(row: Row, worker: Driver) -> None:
    running = start_long_job(worker)
    waiting = worker.start_job(invert_job())
    worker.cancel(waiting)
    worker.cancel(running)
    row.ends(worker.finish(waiting), "CANCELLED")
    row.next_job_runs(worker)
    assert worker.posted(waiting) == []
    assert waiting not in worker.log()


@pytest.mark.fault("P2")
def test_a_job_cancelled_in_mid_run_makes_way_for_the_next(row: Row, worker: Driver) -> None:
    cancelled = start_long_job(worker)
    following = worker.start_job(invert_job())
    worker.cancel(cancelled)
    wait_until(lambda: f"[{cancelled}] cancelled by RunPod" in worker.log(), "the SDK has told the handler")
    started = time.monotonic()
    wait_until(lambda: f"[{cancelled}] wipe:" in worker.log(), "ComfyUI has let go, and the wipe is done", STOPS_IN_S)
    row.seconds = time.monotonic() - started
    assert worker.finish(following)["status"] == "COMPLETED"
    assert_no_overlap(worker, cancelled, following)
    row.ends(worker.status(cancelled), "CANCELLED")
    row.next_job_runs(worker)


@pytest.mark.fault("P3")
def test_a_job_cancelled_twice_is_cancelled(row: Row, worker: Driver) -> None:
    worker.platform_fault("stop-repeated")
    worker.fault("hang")  # still in the grace when the worker is told again
    cancelled = worker.start_job(invert_job())
    wait_until(lambda: worker.strikes("hang"), "the node hangs")
    following = worker.start_job(invert_job())
    for _ in range(2):
        assert worker.cancel(cancelled)["status"] == "CANCELLED"
    row.ends(worker.finish(cancelled), "CANCELLED")
    assert worker.finish(following)["status"] == "COMPLETED"
    assert_no_overlap(worker, cancelled, following)
    row.next_job_runs(worker)
    assert worker.platform_strikes("stop-repeated") == 1


# --- SIGTERM ---


@pytest.mark.fault("P4")
def test_an_idle_worker_ends_at_once_and_a_job_offered_then_is_done_elsewhere(
    row: Row, platform: Platform, tmp_path: Path
) -> None:
    with boot_worker(platform, tmp_path / "log") as leaving:
        leaving.platform_fault("job-take-held", pod=leaving.worker.id)
        wait_until(lambda: leaving.platform_strikes("job-take-held"), "a poll is in flight")
        leaving.worker.process.send_signal(signal.SIGTERM)
        job_id = leaving.start_job(invert_job())
        row.seconds = seconds_to_end(leaving, 0)
        leaving.platform_fault("job-take-held", times=0)
    with boot_worker(platform, tmp_path / "second-log") as worker:
        answer = worker.finish(job_id)
        row.succeeds(answer)
        assert (answer["workerId"], answer.get("retries", 0)) == (worker.worker.id, 0)
        row.next_job_runs(worker)


def end_in_mid_job(row: Row, platform: Platform, tmp_path: Path, *, sigterms: int) -> None:
    """The running job is finished and posted, and then the worker ends."""
    with boot_worker(platform, tmp_path / "log") as leaving:
        job_id = start_long_job(leaving, seconds=3)
        for _ in range(sigterms):
            leaving.worker.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)  # two at once are one to the kernel
        assert leaving.status(job_id)["status"] == "IN_PROGRESS"
        row.succeeds(leaving.finish(job_id))
        seconds_to_end(leaving, 0)
    with boot_worker(platform, tmp_path / "second-log") as worker:
        row.next_job_runs(worker)


@pytest.mark.fault("P5")
def test_a_worker_finishes_and_posts_its_job_before_it_ends(row: Row, platform: Platform, tmp_path: Path) -> None:
    end_in_mid_job(row, platform, tmp_path, sigterms=1)


@pytest.mark.fault("P6")
def test_a_second_sigterm_changes_nothing(row: Row, platform: Platform, tmp_path: Path) -> None:
    end_in_mid_job(row, platform, tmp_path, sigterms=2)


# --- deadlines ---


@pytest.mark.fault("P7")
def test_a_job_past_its_own_deadline_is_stopped(row: Row, worker: Driver) -> None:
    row.fails(worker.run(slow_job(60, timeout_s=0.5)), "JOB_TIMEOUT", "within 0.5 s")
    assert worker.comfyui_is_idle()
    row.next_job_runs(worker)


@pytest.mark.fault("P8")
def test_a_job_past_the_workers_deadline_is_stopped(row: Row, tmp_path: Path) -> None:
    with own_stack(tmp_path, JOB_TIMEOUT_S="1") as worker:
        row.fails(worker.run(slow_job(60, timeout_s=50)), "JOB_TIMEOUT", "within 1 s")
        assert worker.comfyui_is_idle()
        row.next_job_runs(worker)


@pytest.mark.fault("P16")
def test_a_job_past_the_platforms_deadline_is_stopped(row: Row, worker: Driver) -> None:
    job_id = start_long_job(worker, policy={"executionTimeout": 5000})
    row.ends(worker.finish(job_id), "TIMED_OUT")
    row.next_job_runs(worker)


@pytest.mark.fault("P17")
@pytest.mark.parametrize("jump_s", [3600, -3600])
def test_deadlines_do_not_follow_the_wall_clock(row: Row, tmp_path: Path, jump_s: int) -> None:
    with own_stack(tmp_path, PYTHONPATH=str(CLOCK), CLOCK_JUMP_S=str(jump_s)) as worker:
        row.succeeds(worker.run(slow_job(2)))
        row.fails(worker.run(slow_job(60, timeout_s=1)), "JOB_TIMEOUT", "within 1 s")
        row.next_job_runs(worker)
        hours = {line[:2] for line in worker.log().splitlines() if " worker.steps [" in line}
    assert len(hours) > 2  # the handler's own clock did jump


# --- progress and results ---


@pytest.mark.fault("P9")
def test_a_burst_of_progress_is_thinned_and_in_order_and_ends_before_the_result(row: Row, worker: Driver) -> None:
    job_id = worker.start_job(slow_job(3, steps=200))
    answer = worker.finish(job_id)
    row.succeeds(answer)
    row.next_job_runs(worker)
    *updates, result = worker.posted(job_id)
    assert [update["status"] for update in updates] == ["IN_PROGRESS"] * len(updates)
    assert result.get("status") != "IN_PROGRESS"
    assert 1 <= len(updates) <= answer["executionTime"] / 1000
    percents = [update["output"]["percent"] for update in updates]
    values = [update["output"]["value"] for update in updates if update["output"]["node"] == "sleep"]
    assert (percents, values) == (sorted(percents), sorted(values))
    assert values
    assert worker.status(job_id)["status"] == "COMPLETED"


@pytest.mark.fault("P10")
def test_a_keep_alive_shorter_than_the_job_loses_no_result(row: Row, tmp_path: Path) -> None:
    with own_stack(tmp_path, "--keepalive-s", "0.5") as worker:
        row.succeeds(worker.run(slow_job(2)))
        row.next_job_runs(worker)


@pytest.mark.fault("P11")
def test_a_result_answered_500_is_sent_again(row: Row, worker: Driver) -> None:
    worker.platform_fault("job-done-500")
    row.succeeds(worker.run(invert_job()))
    assert worker.platform_strikes("job-done-500") == 1
    row.next_job_runs(worker)


@pytest.mark.fault("P12")
def test_a_result_lost_by_the_sdk_is_logged_with_its_job(row: Row, worker: Driver) -> None:
    worker.platform_fault("job-done-drop")
    job_id = worker.start_job(invert_job(), policy={"executionTimeout": 5000})
    row.next_job_runs(worker)
    row.ends(worker.finish(job_id), "TIMED_OUT")
    (line,) = [line for line in worker.log().splitlines() if "Failed to return job results" in line]
    assert job_id in line


# --- what dies ---


@pytest.mark.fault("P13")
def test_a_killed_handler_ends_the_container_and_another_worker_does_the_job(
    row: Row, platform: Platform, tmp_path: Path
) -> None:
    with boot_worker(platform, tmp_path / "log") as dying:
        handler_pid = dying.pid_of("rp_handler.py")
        job_id = start_long_job(dying, seconds=3)
        os.kill(handler_pid, signal.SIGKILL)
        seconds_to_end(dying, 137)
        assert "The handler ended with code 137." in dying.log()
    with boot_worker(platform, tmp_path / "second-log") as worker:
        answer = worker.finish(job_id)
        row.succeeds(answer)
        assert (answer["workerId"], answer["retries"]) == (worker.worker.id, 1)
        row.next_job_runs(worker)


@pytest.mark.fault("P14")
def test_a_dead_sshd_is_a_warning(row: Row, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sshd").write_text("#!/bin/sh\nsleep 1\nexit 7\n")
    (programs / "sshd").chmod(0o755)
    ssh = {
        "PUBLIC_KEY": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGSpb40uabyMkaDunrvKKLi+m5ncx5xxTuGdHg86qCV1",
        "SSH_DIR": str(tmp_path / "ssh"),
    }
    with own_stack(tmp_path, PATH=f"{programs}:{os.environ['PATH']}", **ssh) as worker:
        wait_until(lambda: "WARNING start.sh sshd ended with code 7; no SSH any more." in worker.log(), "sshd's end")
        row.succeeds(worker.run(invert_job()))
        row.next_job_runs(worker)


@pytest.mark.fault("P15")
def test_two_workers_of_which_one_dies_lose_no_job(row: Row, platform: Platform, tmp_path: Path) -> None:
    with (
        boot_worker(platform, tmp_path / "log") as dying,
        boot_worker(platform, tmp_path / "second-log") as worker,
    ):
        pids = dying.own_pids()
        job_ids = [worker.start_job(slow_job(1)) for _ in range(6)]
        wait_until(dying.comfyui_runs, "the first worker has a job")
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        answers = [worker.finish(job_id, timeout_s=60) for job_id in job_ids]
        for answer in answers:
            row.succeeds(answer)
        assert sum(answer.get("retries", 0) for answer in answers) == 1
        row.next_job_runs(worker)


@pytest.mark.fault("P19")
def test_a_platform_that_gives_no_jobs_for_a_while_is_asked_again(row: Row, worker: Driver) -> None:
    for kind in ("job-take-500", "job-take-drop"):
        worker.platform_fault(kind, times=20)
        wait_until(lambda kind=kind: worker.platform_strikes(kind) == 20, "every one has struck")
    row.succeeds(worker.run(invert_job()))
    row.next_job_runs(worker)


@pytest.mark.fault("P18")
def test_a_platform_that_is_slow_costs_time_only(row: Row, tmp_path: Path) -> None:
    with own_stack(tmp_path, "--latency-s", "2") as worker:
        row.succeeds(worker.run(slow_job(3)))
        row.next_job_runs(worker)


# --- SIGTERM at a bad time ---


@pytest.mark.fault("P20")
def test_a_worker_that_boots_ends_at_once(row: Row, platform: Platform, tmp_path: Path) -> None:
    slow_boot = json.dumps([{"kind": "slow_boot", "seconds": 60}])
    with start_worker(platform, tmp_path / "log", STANDIN_FAULTS=slow_boot) as leaving:
        job_id = leaving.start_job(invert_job())
        wait_until((leaving.ramdisk / "run" / "comfyui").exists, "ComfyUI has been started")
        leaving.worker.process.send_signal(signal.SIGTERM)
        row.seconds = seconds_to_end(leaving, 0)
    with boot_worker(platform, tmp_path / "second-log") as worker:
        answer = worker.finish(job_id)
        row.succeeds(answer)
        assert (answer["workerId"], answer.get("retries", 0)) == (worker.worker.id, 0)
        row.next_job_runs(worker)


@pytest.mark.fault("P21")
def test_a_comfyui_that_dies_after_sigterm_does_not_hold_up_the_end(
    row: Row, platform: Platform, tmp_path: Path
) -> None:
    with boot_worker(platform, tmp_path / "log") as leaving:
        job_id = start_long_job(leaving)
        leaving.worker.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "start.sh Stopping." in leaving.log(), "start.sh knows")
        os.kill(leaving.comfyui_pid(), signal.SIGKILL)
        row.fails(leaving.finish(job_id), "COMFYUI_CRASHED", "exit code 137")
        seconds_to_end(leaving, 0)
    with boot_worker(platform, tmp_path / "second-log") as worker:
        row.next_job_runs(worker)


@pytest.mark.fault("P22")
def test_a_handler_that_dies_with_comfyui_ends_the_container(row: Row, platform: Platform, tmp_path: Path) -> None:
    with boot_worker(platform, tmp_path / "log") as dying:
        pids = (dying.comfyui_pid(), dying.pid_of("rp_handler.py"))
        job_id = start_long_job(dying, seconds=3)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        seconds_to_end(dying, 137)
    with boot_worker(platform, tmp_path / "second-log") as worker:
        answer = worker.finish(job_id)
        row.succeeds(answer)
        assert (answer["workerId"], answer["retries"]) == (worker.worker.id, 1)
        row.next_job_runs(worker)


@pytest.mark.fault("P23")
def test_sigterm_just_after_comfyui_died_ends_the_worker(row: Row, platform: Platform, tmp_path: Path) -> None:
    with boot_worker(platform, tmp_path / "log") as leaving:
        os.kill(leaving.comfyui_pid(), signal.SIGKILL)
        leaving.worker.process.send_signal(signal.SIGTERM)
        row.seconds = seconds_to_end(leaving, 0)
        job_id = leaving.start_job(invert_job())
    with boot_worker(platform, tmp_path / "second-log") as worker:
        row.succeeds(worker.finish(job_id))
        row.next_job_runs(worker)
