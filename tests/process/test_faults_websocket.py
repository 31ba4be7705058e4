"""Faults of ComfyUI's websocket: rows W of FAULTS.md. The picture comes whatever the websocket does."""

import pytest

from tests.process.fault_rows import EVERY, Row
from tests.process.stack import Driver, invert_job, invert_workflow, job, slow_job


@pytest.mark.fault("W1")
def test_a_refused_websocket_is_done_without(row: Row, worker: Driver) -> None:
    worker.fault("ws_refuse", times=EVERY)
    row.succeeds(worker.run(slow_job(1)))
    assert worker.strikes("ws_refuse") >= 2  # it was asked for again
    worker.disarm()
    row.next_job_runs(worker)


@pytest.mark.fault("W2")
def test_a_websocket_cut_before_the_run_is_done_without(row: Row, worker: Driver) -> None:
    worker.fault("ws_cut", event="status")  # the greeting
    row.succeeds(worker.run(slow_job(1)))
    assert worker.strikes("ws_cut") == 1
    row.next_job_runs(worker)


@pytest.mark.fault("W3")
def test_a_websocket_cut_in_mid_run_is_opened_again(row: Row, worker: Driver) -> None:
    worker.fault("ws_cut", event="progress", after=1)
    job_id = worker.start_job(slow_job(4))
    row.succeeds(worker.finish(job_id))
    assert worker.strikes("ws_cut") == 1
    row.next_job_runs(worker)
    *updates, _ = worker.posted(job_id)
    assert max(update["output"].get("value", 0) for update in updates) > 2  # told after the cut


@pytest.mark.fault("W4")
@pytest.mark.parametrize(("event", "after", "seconds"), [("execution_success", 0, 0.5), ("executing", 3, 0.6)])
def test_a_websocket_cut_before_the_last_message_hides_no_end(
    row: Row, worker: Driver, event: str, after: int, seconds: float
) -> None:
    worker.run(invert_job())  # LoadImage is cached: the fourth `executing` is the one that tells the end
    worker.fault("ws_cut", event=event, after=after)
    row.succeeds(worker.run(slow_job(seconds)))
    assert worker.strikes("ws_cut") == 1
    row.next_job_runs(worker)


@pytest.mark.fault("W6")
def test_garbage_is_passed_over(row: Row, worker: Driver) -> None:
    worker.fault("ws_garbage", times=EVERY)
    assert row.succeeds(worker.run(slow_job(1)))["warnings"] == []
    assert worker.strikes("ws_garbage") > 5
    worker.disarm()
    row.next_job_runs(worker)


@pytest.mark.fault("W7")
def test_unknown_binary_frames_are_passed_over(row: Row, worker: Driver) -> None:
    worker.fault("ws_binary", times=EVERY)
    row.succeeds(worker.run(slow_job(1)))
    assert worker.strikes("ws_binary") > 5
    worker.disarm()
    row.next_job_runs(worker)


@pytest.mark.fault("W8")
def test_a_flood_of_progress_state_is_read_away(row: Row, worker: Driver) -> None:
    workflow, nodes = invert_workflow(), 60
    for number in range(nodes):  # an even number of inversions more; every message names each node so far
        source = f"x{number - 1}" if number else "2"
        workflow[f"x{number}"] = {"class_type": "ImageInvert", "inputs": {"image": [source, 0]}}
    workflow["3"]["inputs"]["images"] = [f"x{nodes - 1}", 0]
    worker.fault("flood", count=2000, after=nodes)
    row.succeeds(worker.run(job(workflow)))
    assert worker.strikes("flood") == 1
    row.next_job_runs(worker)


@pytest.mark.fault("W9")
def test_a_run_that_ends_while_the_websocket_is_down_is_found_in_the_history(row: Row, worker: Driver) -> None:
    worker.fault("ws_cut", event="progress")
    worker.fault("ws_refuse", after=1, times=EVERY)  # the first is that of the job's start
    row.succeeds(worker.run(slow_job(2)))
    assert worker.strikes("ws_refuse") >= 2
    worker.disarm()
    row.next_job_runs(worker)


@pytest.mark.fault("W10")
def test_pictures_that_only_the_websocket_carries_are_sent_again(row: Row, worker: Driver) -> None:
    workflow = invert_workflow()
    workflow["3"] = {"class_type": "SaveImageWebsocket", "inputs": {"images": ["2", 0]}}
    worker.fault("ws_cut", event="1")  # the number of a picture's message
    (item,) = row.succeeds(worker.run(job(workflow)))["images"]
    assert item["filename"] == "websocket_00001_.png"
    assert worker.strikes("ws_cut") == 1
    row.next_job_runs(worker)


@pytest.mark.fault("W11")
def test_pictures_that_never_come_are_no_success(row: Row, worker: Driver) -> None:
    workflow = invert_workflow()
    workflow["3"] = {"class_type": "SaveImageWebsocket", "inputs": {"images": ["2", 0]}}
    worker.fault("ws_silent", times=EVERY)
    job_id = worker.start_job(job(workflow))
    row.fails(worker.finish(job_id), "NO_OUTPUT", "pictures sent over it may be missing")
    assert f"[{job_id}] running again: pictures may have been lost" in worker.log()
    worker.disarm()
    row.next_job_runs(worker)
