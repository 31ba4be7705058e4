"""The state of the platform stand-in alone, with a clock of its own: everything that RunPod does by the clock."""

from typing import Any

import pytest

from local.serverless_jobs import LOST_ERROR, TIMEOUT_ERROR, Job, Platform, Policy, Status, Terms

INPUT = {"x": 1}
TERMS = Terms(lost_s=10, retention_s=1800, sync_retention_s=60)


class Timed:
    """A platform and its clock."""

    def __init__(self, terms: Terms = TERMS) -> None:
        self.now = 100.0
        self.platform = Platform(terms, clock=lambda: self.now)

    def submit(self, *, sync: bool = False, **terms: Any) -> Job:
        return self.platform.submit(INPUT, sync=sync, **terms)

    def running(self, pod_id: str = "pod1", **terms: Any) -> Job:
        job = self.submit(**terms)
        assert self.platform.take(pod_id) is job
        return job

    def later(self, seconds: float, *pinging: str) -> None:
        """Let time pass, with a ping of these workers at its end, and do what is due."""
        self.now += seconds
        for pod_id in pinging:
            self.platform.pinged(pod_id)
        self.platform.expire()

    def body(self, job: Job) -> dict[str, Any]:
        body = self.platform.describe(job)
        assert body.pop("id") == job.id
        return body


@pytest.fixture
def timed() -> Timed:
    return Timed()


def test_times_are_milliseconds_in_the_queue_and_in_the_worker(timed: Timed) -> None:
    job = timed.submit()
    timed.now += 1.5
    assert timed.platform.take("pod1") is job
    timed.now += 0.25
    assert timed.body(job) == {"status": "IN_PROGRESS", "delayTime": 1500, "executionTime": 250}
    timed.now += 2
    timed.platform.finish(job, "pod1", {"output": 1})
    timed.now += 60
    times = {"delayTime": 1500, "executionTime": 2250}
    assert timed.body(job) == {"status": "COMPLETED", "output": 1, "workerId": "pod1", **times}


def test_a_silent_worker_is_no_longer_counted(timed: Timed) -> None:
    timed.platform.saw("pod1", polled=True)
    timed.now += 9
    timed.platform.saw("pod2", polled=True)
    assert timed.platform.health()["workers"]["idle"] == 2
    timed.now += 2
    assert timed.platform.health()["workers"]["idle"] == 1


def test_the_job_of_a_lost_worker_is_queued_again_once_and_then_fails(timed: Timed) -> None:
    job = timed.running("pod1")
    timed.later(9, "pod1")
    timed.later(10)
    assert job.status is Status.IN_PROGRESS, "ten seconds after a ping"
    timed.later(1)
    assert timed.body(job) == {"status": "IN_QUEUE"}
    assert timed.platform.health()["jobs"]["retried"] == 1
    timed.platform.finish(job, "pod1", {"output": "too late"})
    assert timed.platform.take("pod2") is job
    timed.later(11)
    times = {"delayTime": 20_000, "executionTime": 11_000}
    failed = {"status": "FAILED", "error": "job timed out after 1 retries", "retries": 1, "workerId": "pod2"}
    assert timed.body(job) == {**failed, **times}
    assert timed.platform.take("pod3") is None


def test_a_job_that_is_done_at_its_second_worker_says_that_it_was_retried(timed: Timed) -> None:
    job = timed.running("pod1")
    timed.later(11)
    timed.platform.take("pod2")
    timed.platform.finish(job, "pod1", {"output": "of the lost worker"})
    timed.platform.finish(job, "pod2", {"output": "of the second"})
    assert timed.body(job).items() >= {"status": "COMPLETED", "output": "of the second", "retries": 1}.items()


def test_a_worker_that_pings_is_never_lost(timed: Timed) -> None:
    job = timed.running("pod1")
    for _ in range(20):
        timed.later(9, "pod1")
    assert job.status is Status.IN_PROGRESS and job.retries == 0


def test_taking_a_job_is_a_sign_of_life(timed: Timed) -> None:
    timed.platform.saw("pod1", polled=True)
    timed.now += 60
    job = timed.running("pod1")
    timed.later(10)
    assert job.status is Status.IN_PROGRESS


@pytest.mark.parametrize("status", [Status.TIMED_OUT, Status.FAILED])
def test_a_job_over_its_execution_timeout_ends_and_its_worker_is_told(status: Status) -> None:
    timed = Timed(Terms(timed_out=status))
    job = timed.submit(policy=Policy(execution_timeout_s=5))
    timed.later(100)
    assert job.status is Status.IN_QUEUE, "only the time in a worker counts"
    timed.platform.take("pod1")
    timed.later(5, "pod1")
    assert timed.platform.stops_for("pod1") == []
    timed.later(0.5, "pod1")
    times = {"delayTime": 100_000, "executionTime": 5500}
    assert timed.body(job) == {"status": status, "error": TIMEOUT_ERROR, "workerId": "pod1", **times}
    assert timed.platform.stops_for("pod1") == [job.id]
    timed.platform.finish(job, "pod1", {"output": "too late"})
    assert job.status is status


def test_the_default_execution_timeout_is_ten_minutes(timed: Timed) -> None:
    job = timed.running("pod1")
    timed.later(600, "pod1")
    assert job.status is Status.IN_PROGRESS
    timed.later(1, "pod1")
    assert job.status is Status.TIMED_OUT


def test_a_job_over_its_ttl_is_forgotten_in_the_queue_and_in_mid_run(timed: Timed) -> None:
    running = timed.running("pod1", policy=Policy(ttl_s=10))
    queued = timed.submit(policy=Policy(ttl_s=10))
    timed.later(10, "pod1")
    assert timed.platform.job(running.id) is running and timed.platform.job(queued.id) is queued
    timed.later(0.5, "pod1")
    assert timed.platform.job(running.id) is None and timed.platform.job(queued.id) is None
    assert timed.platform.take("pod2") is None
    assert timed.platform.stops_for("pod1") == [running.id]


def test_results_are_kept_half_an_hour_or_a_minute(timed: Timed) -> None:
    jobs = {"async": timed.running("pod1"), "sync": timed.running("pod2", sync=True)}
    cancelled = timed.submit()
    timed.platform.cancel(cancelled)
    for job, pod_id in zip(jobs.values(), ("pod1", "pod2"), strict=True):
        timed.platform.finish(job, pod_id, {"output": 1})
    timed.later(60)
    assert timed.platform.job(jobs["sync"].id) is jobs["sync"]
    timed.later(1)
    assert timed.platform.job(jobs["sync"].id) is None
    timed.later(1739)
    assert timed.platform.job(jobs["async"].id) is jobs["async"] and timed.platform.job(cancelled.id) is cancelled
    timed.later(1)
    assert timed.platform.job(jobs["async"].id) is None and timed.platform.job(cancelled.id) is None


def test_a_reopened_job_shows_as_running_until_it_is_forgotten_and_its_worker_is_free(timed: Timed) -> None:
    job = timed.running("pod1")
    timed.platform.saw("pod1", polled=True)
    timed.platform.finish(job, "pod1", {"output": 1})
    timed.platform.reopen(job, {"step": 1})
    timed.later(601)
    assert timed.body(job).items() >= {"status": "IN_PROGRESS", "output": {"step": 1}}.items()
    timed.platform.finish(job, "pod1", {"output": 2})
    timed.platform.saw("pod1")
    assert timed.platform.health()["workers"]["running"] == 0
    assert timed.platform.take("pod2") is None
    timed.later(1200)
    assert timed.platform.job(job.id) is None


def test_expire_says_whether_anything_changed(timed: Timed) -> None:
    timed.running("pod1")
    assert timed.platform.expire() is False
    timed.now += 11
    assert timed.platform.expire() is True
    assert timed.platform.expire() is False


@pytest.mark.parametrize("answer", [{"error": "it broke", "output": {"left": 1}}, None])
def test_retry_queues_a_failed_or_timed_out_job_again(timed: Timed, answer: dict[str, Any] | None) -> None:
    job = timed.running("pod1")
    if answer is None:
        timed.later(601, "pod1")
    else:
        timed.platform.finish(job, "pod1", answer)
    assert timed.platform.retry(job) is True
    assert timed.body(job) == {"status": "IN_QUEUE"}
    assert timed.platform.retry(job) is False, "it waits already"
    assert timed.platform.take("pod2") is job
    timed.platform.finish(job, "pod2", {"output": 2})
    assert timed.body(job).items() >= {"status": "COMPLETED", "output": 2, "workerId": "pod2"}.items()
    assert timed.platform.retry(job) is False, "it has succeeded"


def test_a_retried_job_may_be_lost_once_more(timed: Timed) -> None:
    job = timed.running("pod1")
    timed.later(11)
    timed.platform.take("pod2")
    timed.later(11)
    assert job.answer == {"error": LOST_ERROR}
    timed.platform.retry(job)
    timed.platform.take("pod3")
    timed.later(11)
    assert job.status is Status.IN_QUEUE


def test_purge_removes_what_waits_and_leaves_what_runs(timed: Timed) -> None:
    running, *queued = timed.running("pod1"), timed.submit(), timed.submit()
    assert timed.platform.purge() == 2
    assert [timed.platform.job(job.id) for job in (running, *queued)] == [running, None, None]
    assert timed.platform.take("pod2") is None
    assert timed.platform.purge() == 0


def test_webhooks_are_named_once_for_each_end(timed: Timed) -> None:
    job = timed.running("pod1", webhook="http://127.0.0.1/hook")
    timed.running("pod2")
    assert timed.platform.jobs_to_tell() == []
    timed.platform.finish(job, "pod1", {"error": "it broke"})
    assert timed.platform.jobs_to_tell() == [job]
    assert timed.platform.jobs_to_tell() == []
    timed.platform.retry(job)
    timed.platform.cancel(job)
    assert timed.platform.jobs_to_tell() == [job]


def test_a_stopped_worker_is_given_nothing_and_not_counted(timed: Timed) -> None:
    timed.platform.saw("pod1", polled=True)
    timed.platform.stop_pod("pod1")
    job = timed.submit()
    assert timed.platform.take("pod1") is None
    assert timed.platform.health()["workers"]["idle"] == 0
    assert timed.platform.take("pod2") is job
