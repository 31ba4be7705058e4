"""The real SDK under the platform's faults and clock, and at its end; each group of workers has its own endpoint."""

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from serverless_client import TIMEOUT_S, Workers, kill_group, serve, start_worker, wait_until

PODS = {
    "faults": ["faults1"],
    "clock": ["clock1"],
    "term": ["term1"],
    "kill": ["kill1", "kill2"],
    "stream": ["stream1"],
}
LOST_S = 4
"""Four times what lies between two pings: a worker that lives is not taken for lost."""


@dataclass(frozen=True)
class Site:
    """A stand-in, the processes of its workers by pod, and a job that has run since the start with 5 s to live."""

    workers: Workers
    processes: dict[str, subprocess.Popen[bytes]]
    overdue: str

    def at(self, name: str) -> Workers:
        return Workers(self.workers.endpoint.at(name), self.workers.folder)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("faults")
    options = (word for name in PODS for word in ("--endpoint", name))
    with serve("--lost-s", str(LOST_S), *options) as endpoint, ExitStack() as stack:
        processes = {}
        for name, pods in PODS.items():
            handler = "generator" if name == "stream" else "handler"
            for pod_id in pods:
                processes[pod_id] = start_worker(endpoint.at(name), pod_id, folder, handler)
                stack.callback(kill_group, processes[pod_id])
        for name, pods in PODS.items():
            endpoint.at(name).until_idle(len(pods))
        overdue = endpoint.at("clock").post({"input": {"do": "wait"}, "policy": {"executionTimeout": 5000}})
        yield Site(Workers(endpoint, folder), processes, overdue)


@pytest.fixture
def faults(site: Site) -> Workers:
    """An idle worker under no fault."""
    workers = site.at("faults")
    workers.endpoint.until_idle(1)
    assert not any(fault["times"] for fault in workers.endpoint.call("GET", "../../_fault").json()["faults"])
    return workers


# --- Chunks of a generator -----------------------------------------------------------------------------------------


def read_stream(workers: Workers, job_id: str) -> Any:
    return workers.endpoint.call("GET", f"stream/{job_id}").json()


def test_chunks_are_streamed_once_and_their_list_is_the_output(site: Site) -> None:
    workers = site.at("stream")
    chunks = [{"step": 1}, "two", [3], 4]
    job_id = workers.endpoint.run(chunks=chunks)
    first = wait_until(lambda: (got := read_stream(workers, job_id))["stream"] and got, "the first chunk")
    assert first == {"status": "IN_PROGRESS", "stream": [{"output": {"step": 1}}]}
    assert read_stream(workers, job_id) == {"status": "IN_PROGRESS", "stream": []}
    workers.release(job_id)
    assert workers.endpoint.until(job_id, "COMPLETED")["output"] == chunks
    others = [{"output": chunk} for chunk in chunks[1:]]
    assert read_stream(workers, job_id) == {"status": "COMPLETED", "stream": others}


def test_a_generator_that_raises_fails_the_job_and_keeps_its_chunks(site: Site) -> None:
    workers = site.at("stream")
    job_id = workers.endpoint.run(chunks=[1, 2], error="it broke")
    workers.release(job_id)
    body = workers.endpoint.until(job_id, "FAILED")
    assert body["error"].startswith("handler: it broke") and "output" not in body
    assert read_stream(workers, job_id) == {"status": "FAILED", "stream": [{"output": 1}, {"output": 2}]}


# --- Results that are lost -----------------------------------------------------------------------------------------


def test_a_result_answered_500_once_arrives(faults: Workers) -> None:
    faults.endpoint.fault("job-done-500")
    job_id = faults.endpoint.run(do="return", value={"a": 1})
    assert faults.endpoint.until(job_id, "COMPLETED")["output"] == {"a": 1}
    assert faults.endpoint.posted(job_id) == ['{"output": {"a": 1}}'] * 2


@pytest.mark.parametrize(("kind", "times", "posts"), [("job-done-500", 3, 3), ("job-done-drop", 1, 1)])
def test_a_result_is_lost_and_the_worker_goes_on(faults: Workers, kind: str, times: int, posts: int) -> None:
    faults.endpoint.fault(kind, times=times)
    lost = faults.endpoint.run(do="return", value={"a": 1})
    following = faults.endpoint.run(do="echo")
    faults.endpoint.until(following, "COMPLETED")
    assert faults.endpoint.posted(lost) == ['{"output": {"a": 1}}'] * posts
    body = faults.endpoint.status(lost)
    assert body["status"] == "IN_PROGRESS" and "output" not in body
    faults.endpoint.call("POST", f"cancel/{lost}")


def test_a_refused_result_leaves_a_completed_job_without_output(faults: Workers) -> None:
    faults.endpoint.fault("job-done-400")
    job_id = faults.endpoint.run(do="return", value={"a": 1})
    assert "output" not in faults.endpoint.until(job_id, "COMPLETED")
    faults.endpoint.until(faults.endpoint.run(do="echo"), "COMPLETED")
    assert faults.endpoint.posted(job_id) == ['{"output": {"a": 1}}'], "posted once"


# --- Progress out of order -----------------------------------------------------------------------------------------


def posted_progress(workers: Workers, **order: Any) -> str:
    """A job whose progress has been posted and kept back."""
    job_id = workers.endpoint.run(do="wait", progress={"step": 1}, **order)
    wait_until(lambda: workers.endpoint.posted(job_id), "the progress was posted")
    assert "output" not in workers.endpoint.status(job_id)
    return job_id


def test_a_progress_update_after_the_result_shows_a_finished_job_as_running(faults: Workers) -> None:
    faults.endpoint.fault("progress-after-result")
    job_id = posted_progress(faults)
    faults.release(job_id)
    body = wait_until(lambda: (seen := faults.endpoint.status(job_id)).get("output") and seen, "the late progress")
    assert (body["status"], body["output"]) == ("IN_PROGRESS", {"step": 1})
    assert json.loads(faults.endpoint.posted(job_id)[-1]) == {"output": {"released": True}}
    faults.endpoint.call("POST", f"cancel/{job_id}")


def test_a_delayed_progress_update_does_not_replace_the_result(faults: Workers) -> None:
    faults.endpoint.fault("progress-delayed")
    job_id = posted_progress(faults)
    faults.release(job_id)
    assert faults.endpoint.until(job_id, "COMPLETED")["output"] == {"released": True}
    assert faults.endpoint.status(job_id)["output"] == {"released": True}


def test_a_delayed_progress_update_replaces_the_newer_one(faults: Workers) -> None:
    faults.endpoint.fault("progress-delayed")
    job_id = posted_progress(faults)
    newer = json.dumps({"status": "IN_PROGRESS", "output": {"step": 2}})
    assert faults.endpoint.done("faults1", job_id, newer).status_code == 200
    assert faults.endpoint.status(job_id)["output"] == {"step": 1}
    faults.release(job_id)
    faults.endpoint.until(job_id, "COMPLETED")


# --- Workers that end ----------------------------------------------------------------------------------------------


def test_a_killed_workers_job_is_done_by_the_other(site: Site) -> None:
    workers = site.at("kill")
    job_id = workers.endpoint.run(do="wait")
    wait_until(lambda: job_id in workers.ran(), "the handler has begun")
    killed = next(pod_id for pod_id in PODS["kill"] if f"{job_id} {pod_id}" in workers.begun())
    (other,) = set(PODS["kill"]) - {killed}
    kill_group(site.processes[killed])
    wait_until(lambda: f"{job_id} {other}" in workers.begun(), "the other worker has begun the job")
    workers.release(job_id)
    body = workers.endpoint.until(job_id, "COMPLETED")
    assert (body["workerId"], body["output"], body["retries"]) == (other, {"released": True}, 1)
    assert workers.endpoint.health()["jobs"]["retried"] == 1


def test_a_job_delivered_after_sigterm_is_taken_and_never_run(site: Site) -> None:
    workers, worker = site.at("term"), site.processes["term1"]
    endpoint = workers.endpoint
    endpoint.fault("job-take-held", pod="term1")
    wait_until(lambda: endpoint.struck("job-take-held"), "a poll is held")
    job_id = endpoint.run(do="echo")
    worker.send_signal(signal.SIGTERM)
    endpoint.fault("ping-lost", pod="term1", times=2)
    wait_until(lambda: endpoint.struck("ping-lost") == 2, "two pings: long enough for the SDK's loop to have ended")
    assert endpoint.status(job_id)["status"] == "IN_QUEUE"
    endpoint.fault("job-take-held", times=0)
    endpoint.until(job_id, "IN_PROGRESS")
    assert worker.wait(TIMEOUT_S) == 0
    assert job_id not in workers.ran() and endpoint.posted(job_id) == []
    endpoint.until(job_id, "IN_QUEUE")
    assert endpoint.take("another").json()["id"] == job_id
    endpoint.done("another", job_id, '{"output": 1}')
    assert endpoint.status(job_id)["retries"] == 1


def test_a_job_over_its_execution_timeout_is_stopped(site: Site) -> None:
    workers = site.at("clock")
    body = workers.endpoint.until(site.overdue, "TIMED_OUT")
    assert body["executionTime"] > 5000
    assert (body["error"], body["workerId"]) == ("executionTimeout exceeded", "clock1")
    wait_until((workers.folder / f"cancelled-{site.overdue}").exists, "the handler saw the cancellation")
    workers.endpoint.until(workers.endpoint.run(do="echo"), "COMPLETED")


# --- Short keep-alive ----------------------------------------------------------------------------------------------


def test_a_short_keep_alive_loses_the_result_of_a_blocking_handler(tmp_path: Path) -> None:
    with serve("--keepalive-s", "0.5") as endpoint, ExitStack() as stack:
        worker = start_worker(endpoint, "blocking", tmp_path, "blocking")
        stack.callback(kill_group, worker)
        workers = Workers(endpoint, tmp_path)
        job_id = endpoint.run(x=1)
        wait_until(lambda: job_id in workers.ran(), "the handler has begun")
        port = int(endpoint.base_url.rpartition(":")[2])
        wait_until(lambda: not open_connections(worker.pid, port), "the platform has closed the idle connections")
        workers.release(job_id)
        wait_until(lambda: "Failed to return job results" in (tmp_path / "blocking.log").read_text(), "the post failed")
        assert endpoint.posted(job_id) == []
        assert endpoint.status(job_id)["status"] == "IN_PROGRESS"


def open_connections(pid: int, port: int) -> int:
    """How many sockets of a process still have a peer at this port that has not closed its side (/proc/net/tcp)."""
    targets = [str(descriptor.readlink()) for descriptor in Path(f"/proc/{pid}/fd").iterdir()]
    inodes = {target[len("socket:[") : -1] for target in targets if target.startswith("socket:[")}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[2].endswith(f":{port:04X}") and row[3] == "01" and row[9] in inodes for row in rows)
