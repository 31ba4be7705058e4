"""The platform stand-in, driven by the SDK's own worker loop and by plain HTTP; servers and workers are processes."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from serverless_client import (
    HOLD_S,
    KEY,
    TIMEOUT_S,
    Endpoint,
    Workers,
    serve,
    start_server,
    start_worker,
    stop,
    wait_until,
)

from local.serverless_api import CLIENT_CALLS as CALL_NAMES
from local.serverless_faults import KINDS, Faults
from local.serverless_wire import parse_object

PODS = {"pod1", "pod2"}


@pytest.fixture(scope="module")
def shared() -> Iterator[Endpoint]:
    """A stand-in without SDK workers, for tests that do not look at its whole state."""
    with serve() as endpoint:
        yield endpoint


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    """A fresh stand-in without workers."""
    with serve() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """A stand-in with two idle SDK workers."""
    folder = tmp_path_factory.mktemp("sdk_workers")
    with serve() as endpoint, ExitStack() as stack:
        for pod_id in sorted(PODS):
            stack.callback(stop, start_worker(endpoint, pod_id, folder))
        endpoint.until_idle(len(PODS))
        yield Workers(endpoint, folder)


# --- With the SDK's own loop ---------------------------------------------------------------------------------------


def test_a_result_completes_the_job(workers: Workers) -> None:
    job_id = workers.endpoint.run(do="echo", text="ü 🐟")
    assert job_id.endswith("-u1") and not job_id.startswith("sync-")
    body = workers.endpoint.until(job_id, "COMPLETED")
    assert body.keys() == {"delayTime", "executionTime", "id", "output", "status", "workerId"}
    assert body["id"] == job_id
    assert body["output"] == {"echo": {"do": "echo", "text": "ü 🐟"}}
    assert body["workerId"] in PODS
    assert isinstance(body["delayTime"], int) and isinstance(body["executionTime"], int)


def test_progress_is_the_output_of_a_running_job(workers: Workers) -> None:
    job_id = workers.endpoint.run(do="wait", progress={"step": 3, "of": 10})
    body = wait_until(lambda: (seen := workers.endpoint.status(job_id)).get("output") and seen, "progress")
    assert body.keys() == {"delayTime", "executionTime", "id", "output", "status"}
    assert (body["status"], body["output"]) == ("IN_PROGRESS", {"step": 3, "of": 10})
    workers.release(job_id)
    assert workers.endpoint.until(job_id, "COMPLETED")["output"] == {"released": True}


def test_runsync_returns_the_result(workers: Workers) -> None:
    response = workers.endpoint.call("POST", "runsync", json={"input": {"do": "echo"}})
    body = response.json()
    assert (response.status_code, body["status"], body["output"]) == (200, "COMPLETED", {"echo": {"do": "echo"}})
    assert body["id"].startswith("sync-")
    assert workers.endpoint.status(body["id"]) == body


def test_runsync_returns_the_running_job_when_its_wait_is_over(workers: Workers) -> None:
    response = workers.endpoint.call("POST", "runsync?wait=1000", json={"input": {"do": "wait"}})
    body = response.json()
    assert (response.status_code, body["status"]) == (200, "IN_PROGRESS")
    workers.release(body["id"])
    assert workers.endpoint.until(body["id"], "COMPLETED")["output"] == {"released": True}


def test_a_result_over_the_limit_is_lost(workers: Workers) -> None:
    body = workers.endpoint.until(workers.endpoint.run(do="big", size_bytes=10_000_000), "COMPLETED")
    assert "output" not in body
    response = workers.endpoint.call("POST", "runsync", json={"input": {"do": "big", "size_bytes": 10_000_000}})
    assert len(response.json()["output"]["data"]) == 10_000_000, "a /runsync result may have 20 MB"


def test_cancel_reaches_a_running_handler(workers: Workers) -> None:
    job_id = workers.endpoint.run(do="wait")
    workers.endpoint.until(job_id, "IN_PROGRESS")
    wait_until(lambda: job_id in workers.ran(), "the handler has begun")
    response = workers.endpoint.call("POST", f"cancel/{job_id}")
    assert (response.status_code, response.json()) == (200, {"id": job_id, "status": "CANCELLED"})
    assert workers.endpoint.status(job_id) == {"id": job_id, "status": "CANCELLED"}
    wait_until((workers.folder / f"cancelled-{job_id}").exists, "the handler saw the cancellation")


def test_two_workers_share_the_queue_and_health_counts_it(workers: Workers) -> None:
    endpoint = workers.endpoint
    idle = {"idle": 2, "initializing": 0, "ready": 2, "running": 0, "throttled": 0, "unhealthy": 0}
    wait_until(lambda: endpoint.health()["workers"] == idle, "both workers idle")
    before = endpoint.health()["jobs"]
    held = [endpoint.run(do="wait"), endpoint.run(do="wait")]
    for job_id in held:
        endpoint.until(job_id, "IN_PROGRESS")
    queued, cancelled = endpoint.run(do="echo"), endpoint.run(do="echo")
    assert endpoint.status(queued) == {"id": queued, "status": "IN_QUEUE"}
    assert endpoint.call("POST", f"cancel/{cancelled}").json() == {"id": cancelled, "status": "CANCELLED"}
    assert endpoint.health() == {
        "jobs": {**before, "inProgress": 2, "inQueue": 1},
        "workers": {**idle, "idle": 0, "ready": 0, "running": 2},
    }
    workers.release(*held)
    assert {endpoint.until(job_id, "COMPLETED")["workerId"] for job_id in held} == PODS
    endpoint.until(queued, "COMPLETED")
    assert endpoint.health()["jobs"] == {**before, "completed": before["completed"] + 3}
    assert endpoint.status(cancelled)["status"] == "CANCELLED"
    ran = workers.ran()
    assert len(ran) == len(set(ran)), "a job was given twice"
    assert cancelled not in ran


# --- With a worker of plain HTTP -----------------------------------------------------------------------------------


def test_an_empty_poll_is_held(shared: Endpoint) -> None:
    for path in ("job-take/pod1", "job-stop/pod1"):
        begun = time.monotonic()
        assert shared.call("GET", path, key=KEY).status_code == 204
        assert time.monotonic() - begun >= HOLD_S


def test_jobs_are_given_in_order_and_once(endpoint: Endpoint) -> None:
    jobs = [endpoint.run(number=number) for number in range(3)]
    taken = [endpoint.take(f"pod{number}").json() for number in range(3)]
    assert taken == [{"id": job_id, "input": {"number": number}} for number, job_id in enumerate(jobs)]
    assert endpoint.take("pod9").status_code == 204


def test_a_batch_has_what_waits_up_to_its_size(endpoint: Endpoint) -> None:
    jobs = [{"id": endpoint.run(number=number), "input": {"number": number}} for number in range(3)]
    takes = [endpoint.call("GET", "job-take-batch/pod1?gpu=none&batch_size=2", key=KEY) for _ in range(3)]
    assert [take.status_code for take in takes] == [200, 200, 204]
    assert [takes[0].json(), takes[1].json()] == [jobs[:2], jobs[2:]]
    for size in ("", "0", "-1", "x", "\u0662", "10000"):
        path = f"job-take-batch/pod1?batch_size={size}"
        assert endpoint.call("GET", path, key=KEY).status_code == 400


def test_held_polls_get_one_job_each(endpoint: Endpoint) -> None:
    pods = [f"pod{number}" for number in range(4)]

    def take_one(pod_id: str) -> str:
        return str(wait_until(lambda: (got := endpoint.take(pod_id)).status_code == 200 and got, "a job").json()["id"])

    with ThreadPoolExecutor(len(pods)) as pool:
        polls = [pool.submit(take_one, pod_id) for pod_id in pods]
        wait_until(lambda: endpoint.health()["workers"]["idle"] == len(pods), "all polls are held")
        jobs = [endpoint.run(number=number) for number in range(len(pods))]
        assert sorted(poll.result(TIMEOUT_S) for poll in polls) == sorted(jobs)


def test_a_worker_that_hangs_up_takes_no_job(endpoint: Endpoint) -> None:
    with pytest.raises(requests.ReadTimeout):
        requests.get(f"{endpoint.base_url}/v2/local/job-take/pod1", headers={"Authorization": KEY}, timeout=HOLD_S / 10)
    job_id = endpoint.run(number=1)
    assert endpoint.take("pod2").json()["id"] == job_id


def test_late_posts_do_not_change_a_finished_job(endpoint: Endpoint) -> None:
    job_id = endpoint.run(number=1)
    endpoint.take("pod1")
    assert endpoint.done("pod1", job_id, '{"output": {"answer": 42}}').status_code == 200
    body = endpoint.status(job_id)
    assert (body["status"], body["output"]) == ("COMPLETED", {"answer": 42})
    for late in ('{"status": "IN_PROGRESS", "output": 1}', '{"error": "late"}', '{"output": "late"}'):
        assert endpoint.done("pod1", job_id, late).status_code == 200
    assert endpoint.call("POST", f"cancel/{job_id}").json() == {"id": job_id, "status": "COMPLETED"}
    assert endpoint.status(job_id) == body


def test_a_job_cancelled_in_the_queue_is_given_to_no_worker(endpoint: Endpoint) -> None:
    cancelled, kept = endpoint.run(number=1), endpoint.run(number=2)
    for _ in range(2):
        response = endpoint.call("POST", f"cancel/{cancelled}")
        assert (response.status_code, response.json()) == (200, {"id": cancelled, "status": "CANCELLED"})
    assert endpoint.take("pod1").json()["id"] == kept
    assert endpoint.take("pod1").status_code == 204
    assert endpoint.status(cancelled) == {"id": cancelled, "status": "CANCELLED"}


def test_the_result_of_a_cancelled_job_is_ignored(endpoint: Endpoint) -> None:
    job_id = endpoint.run(number=1)
    endpoint.take("pod1")
    endpoint.call("POST", f"cancel/{job_id}")
    assert endpoint.done("pod1", job_id, '{"output": 1}').status_code == 200
    assert endpoint.status(job_id) == {"id": job_id, "status": "CANCELLED"}


def test_only_the_worker_that_runs_a_job_is_told_to_stop_it(endpoint: Endpoint) -> None:
    jobs = [endpoint.run(number=1), endpoint.run(number=2)]
    for pod_id in ("pod1", "pod2"):
        endpoint.take(pod_id)
    endpoint.call("POST", f"cancel/{jobs[1]}")
    assert endpoint.call("GET", "job-stop/pod1", key=KEY).status_code == 204
    assert endpoint.call("GET", "job-stop/pod2", key=KEY).json() == {"jobsToStop": [jobs[1]]}
    assert endpoint.call("GET", "job-stop/pod2", key=KEY).status_code == 204


def test_only_the_worker_that_runs_a_job_can_end_it(endpoint: Endpoint) -> None:
    job_id = endpoint.run(number=1)
    endpoint.take("pod1")
    endpoint.done("pod2", job_id, '{"output": "of another worker"}')
    endpoint.done("pod2", job_id, '{"status": "IN_PROGRESS", "output": "of another worker"}')
    assert "output" not in endpoint.status(job_id)
    endpoint.done("pod1", job_id, '{"output": "its own"}')
    assert endpoint.status(job_id)["output"] == "its own"


@pytest.mark.parametrize("body", ['{"output": NaN}', "output=1", "", "[]"])
def test_a_result_that_is_no_json_object_is_refused(endpoint: Endpoint, body: str) -> None:
    job_id = endpoint.run(number=1)
    endpoint.take("pod1")
    assert endpoint.done("pod1", job_id, body).status_code == 400
    seen = endpoint.status(job_id)
    assert seen["status"] == "COMPLETED" and "output" not in seen


def test_health_tells_the_states_of_workers_apart(endpoint: Endpoint) -> None:
    endpoint.call("GET", "ping/fresh", key=KEY)
    endpoint.call("GET", "ping/sick?status=unhealthy", key=KEY)
    endpoint.take("waiting")
    endpoint.run(number=1)
    endpoint.take("busy")
    assert endpoint.health()["workers"] == {
        "idle": 1,
        "initializing": 1,
        "ready": 1,
        "running": 1,
        "throttled": 0,
        "unhealthy": 1,
    }


# --- Clients: keys, limits, refusals -------------------------------------------------------------------------------

CLIENT_CALLS = [
    *("POST run", "POST runsync", "GET status/x", "GET stream/x", "POST cancel/x", "POST retry/x", "POST purge-queue"),
    *("GET health", "GET _posted/x", "GET ../../_fault", "POST ../../_fault"),
]
WORKER_CALLS = [
    *("GET job-take/p", "GET job-take-batch/p", "GET job-stop/p", "GET ping/p"),
    *("POST job-done/p/x", "POST job-stream/p/x"),
]


@pytest.mark.parametrize("call", CLIENT_CALLS + WORKER_CALLS)
def test_every_call_needs_the_key_in_its_form(shared: Endpoint, call: str) -> None:
    wrong_form = KEY if call in CLIENT_CALLS else f"Bearer {KEY}"
    for key in ("", "wrong", "Bearer wrong", wrong_form):
        response = shared.call(*call.split(), key=key)
        assert (response.status_code, response.json().keys()) == (401, {"error"}), key


def test_unknown_jobs_endpoints_and_paths_are_404(shared: Endpoint) -> None:
    known = shared.run(number=1)
    for method, path in (
        ("GET", "status/none"),
        ("POST", "cancel/none"),
        ("GET", "stream/none"),
        ("POST", "retry/none"),
        ("GET", "run"),
    ):
        response = shared.call(method, path)
        assert (response.status_code, response.json().keys()) == (404, {"error"}), path
    assert shared.done("pod1", "none", "{}").status_code == 404
    assert shared.call("GET", f"../other/status/{known}").status_code == 404


@pytest.mark.parametrize(("path", "limit"), [("run", 10), ("runsync?wait=1000", 20)])
def test_requests_over_the_limit_are_refused(shared: Endpoint, path: str, limit: int) -> None:
    empty = json.dumps({"input": {"x": ""}})
    fitting = json.dumps({"input": {"x": "y" * (limit * 1_000_000 - len(empty))}})
    response = shared.call("POST", path, data=fitting + " ")
    assert response.status_code == 400
    assert response.json() == {"error": f"exceeded max body size of {limit}MiB"}
    accepted = shared.call("POST", path, data=fitting)
    assert (accepted.status_code, accepted.json()["status"]) == (200, "IN_QUEUE")


@pytest.mark.parametrize("body", ["", "{", "[]", '"x"', "{}", '{"input": 1}', '{"input": {"x": NaN}}', "[" * 100_000])
def test_requests_without_an_input_object_are_refused(shared: Endpoint, body: str) -> None:
    response = shared.call("POST", "run", data=body)
    assert (response.status_code, response.json().keys()) == (400, {"error"})


@pytest.mark.parametrize("wait", ["999", "300001", "x", ""])
def test_runsync_refuses_a_wait_out_of_range(shared: Endpoint, wait: str) -> None:
    assert shared.call("POST", f"runsync?wait={wait}", json={"input": {"x": 1}}).status_code == 400


def test_an_empty_input_is_dropped_by_the_platform(endpoint: Endpoint) -> None:
    job_id = endpoint.run()
    body = endpoint.status(job_id)
    assert body.pop("delayTime") == 0 and body.pop("executionTime") == 0
    assert body == {"id": job_id, "status": "FAILED", "error": "job timed out after 1 retries", "retries": 1}
    assert endpoint.take("pod1").status_code == 204


# --- The program ---------------------------------------------------------------------------------------------------


def test_it_listens_on_one_loopback_address_only(shared: Endpoint) -> None:
    assert shared.call("GET", "health").status_code == 200
    with pytest.raises(requests.ConnectionError):
        Endpoint(shared.base_url.replace("127.0.0.1", "127.0.0.2")).call("GET", "health")


def test_a_taken_port_is_one_sentence(shared: Endpoint) -> None:
    port = shared.base_url.rpartition(":")[2]
    server = start_server("--port", port)
    stdout, stderr = server.communicate(timeout=TIMEOUT_S)
    assert (server.returncode, stdout) == (1, "")
    assert stderr.startswith(f"The RunPod stand-in cannot listen on port {port}: ") and stderr.count("\n") == 1


# --- What is read from outside ----------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=5,
)


@given(st.dictionaries(st.text(), JSON))
def test_a_json_object_is_read_as_it_is(value: dict[str, Any]) -> None:
    assert parse_object(json.dumps(value).encode()) == value


@given(st.binary() | st.sampled_from([b'{"a": 1e999}', b'{"a": -Infinity}', b'{"a": 1' + b"0" * 5000 + b"}"]))
def test_other_bytes_are_refused_with_value_error_or_can_be_sent_on(raw: bytes) -> None:
    try:
        value = parse_object(raw)
    except ValueError:
        return
    assert parse_object(json.dumps(value, allow_nan=False).encode()) == value


FAULT_FIELDS = {
    "kind": st.sampled_from(list(KINDS)) | JSON,
    "after": st.integers(-1, 3) | JSON,
    "times": st.integers(-1, 3) | JSON,
    "call": st.sampled_from(CALL_NAMES) | JSON,
    "pod": st.text() | JSON,
    "other": JSON,
}


@given(st.fixed_dictionaries({}, optional=FAULT_FIELDS))
def test_a_fault_is_armed_as_ordered_or_refused_with_value_error(order: dict[str, Any]) -> None:
    faults = Faults()
    try:
        faults.arm(order, CALL_NAMES)
    except ValueError:
        assert faults.describe() == []
        return
    armed = [{"after": 0, "times": 1, "struck": 0, **{key: value for key, value in order.items() if value is not None}}]
    assert faults.describe() == (armed if order.get("times", 1) else [])
