"""Rows of FAULTS.md in which half a minute or more is waited."""

import os
import signal

import pytest

from tests.process.fault_rows import EVERY, Row
from tests.process.stack import Driver, invert_job, slow_job, start_long_job


@pytest.mark.fault("C25")
def test_a_comfyui_that_neither_answers_nor_computes_is_ended_before_the_deadline(row: Row, worker: Driver) -> None:
    job_id = start_long_job(worker)
    pid = worker.comfyui_pid()
    os.kill(pid, signal.SIGSTOP)
    row.fails(worker.finish(job_id, timeout_s=60), "COMFYUI_CRASHED", "neither answered nor computed for 30 s")
    row.next_job_runs(worker)
    assert worker.comfyui_pid() != pid


@pytest.mark.fault("C28")
def test_a_comfyui_that_hangs_between_two_jobs_is_ended_and_the_job_goes_on(row: Row, worker: Driver) -> None:
    os.kill(worker.comfyui_pid(), signal.SIGSTOP)
    row.succeeds(worker.finish(worker.start_job(invert_job()), timeout_s=60))
    row.next_job_runs(worker)


@pytest.mark.fault("W5")
def test_a_node_that_works_for_a_minute_without_a_word_is_waited_for(row: Row, worker: Driver) -> None:
    pid = worker.comfyui_pid()
    worker.fault("ws_silent", times=EVERY)
    row.succeeds(worker.finish(worker.start_job(slow_job(60)), timeout_s=90))
    worker.disarm()
    row.next_job_runs(worker)
    assert worker.comfyui_pid() == pid
