"""What the SDK posts for everything that a handler may return or do, and what a client then sees of the job."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from serverless_client import TIMEOUT_S, Workers, kill_group, serve, start_worker, wait_until

NAMES = ["sys.exit", "os._exit", "refresh"]


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """One SDK worker at `local`."""
    folder = tmp_path_factory.mktemp("rows")
    with serve() as endpoint, ExitStack() as stack:
        stack.callback(kill_group, start_worker(endpoint, "rows", folder))
        endpoint.until_idle(1)
        yield Workers(endpoint, folder)


def done(workers: Workers, value: Any, status: str) -> tuple[str, dict[str, Any]]:
    """The one post of a job that returns `value`, and what of its last status body is not always there."""
    job_id = workers.endpoint.run(do="return", value=value)
    body = workers.endpoint.until(job_id, status)
    (posted,) = workers.endpoint.posted(job_id)
    return posted, {key: body[key] for key in body.keys() - {"id", "status", "delayTime", "executionTime", "workerId"}}


@pytest.mark.parametrize("value", [{"a": 1}, "ü 🐟", [1, {"b": None}], None, True])
def test_a_value_is_the_output(workers: Workers, value: Any) -> None:
    posted, body = done(workers, value, "COMPLETED")
    assert json.loads(posted) == body == {"output": value}


def test_an_empty_dict_posts_no_output(workers: Workers) -> None:
    assert done(workers, {}, "COMPLETED") == ("{}", {})


def test_an_error_stands_beside_the_rest(workers: Workers) -> None:
    posted, body = done(workers, {"error": "m", "extra": 1}, "FAILED")
    assert json.loads(posted) == body == {"output": {"extra": 1}, "error": "m"}


def test_an_error_alone_posts_no_output(workers: Workers) -> None:
    posted, body = done(workers, {"error": "m"}, "FAILED")
    assert json.loads(posted) == body == {"error": "m"}


def test_an_error_that_is_a_dict_is_posted_as_it_is(workers: Workers) -> None:
    posted, body = done(workers, {"error": {"code": 5}}, "FAILED")
    assert json.loads(posted) == body == {"error": {"code": 5}}


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_error_is_dropped_and_counts_as_success(workers: Workers, empty: Any) -> None:
    posted, body = done(workers, {"error": empty, "a": 1}, "COMPLETED")
    assert json.loads(posted) == body == {"output": {"a": 1}}


def test_an_exception_is_posted_as_a_json_string(workers: Workers) -> None:
    job_id = workers.endpoint.run(do="raise")
    body = workers.endpoint.until(job_id, "FAILED")
    (posted,) = workers.endpoint.posted(job_id)
    assert json.loads(posted) == {"error": body["error"]}
    error = json.loads(body["error"])
    assert error.keys() == {
        *("error_type", "error_message", "error_traceback"),
        *("hostname", "worker_id", "runpod_version"),
    }
    assert (error["error_type"], error["error_message"]) == ("<class 'ValueError'>", "the handler broke")
    assert error["worker_id"] == body["workerId"] == "rows"


def test_what_cannot_be_sent_is_never_posted(workers: Workers) -> None:
    lost = [workers.endpoint.run(do=what) for what in ("bytes", "circular", "surrogate")]
    following = workers.endpoint.run(do="echo")
    workers.endpoint.until(following, "COMPLETED")
    assert workers.ran()[-4:] == [*lost, following], "one worker, one job after the other"
    for job_id in lost:
        assert workers.endpoint.posted(job_id) == []
        body = workers.endpoint.status(job_id)
        assert body["status"] == "IN_PROGRESS" and "output" not in body
        workers.endpoint.call("POST", f"cancel/{job_id}")


def test_nan_is_posted_as_no_json_and_the_result_is_lost(workers: Workers) -> None:
    job_id = workers.endpoint.run(do="nan")
    body = workers.endpoint.until(job_id, "COMPLETED")
    assert workers.endpoint.posted(job_id) == ['{"output": {"a": NaN}}']
    assert "output" not in body


@pytest.fixture(scope="module")
def dying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A stand-in with three endpoints, one worker each, that end in three ways; all boot side by side."""
    folder = tmp_path_factory.mktemp("dying")
    with serve(*(word for name in NAMES for word in ("--endpoint", name))) as endpoint, ExitStack() as stack:
        processes = {name: start_worker(endpoint.at(name), f"pod-{name}", folder) for name in NAMES}
        for process in processes.values():
            stack.callback(kill_group, process)
        for name in NAMES:
            endpoint.at(name).until_idle(1)
        yield {"workers": Workers(endpoint, folder), "processes": processes}


def test_sys_exit_ends_the_worker_and_its_ping_process(dying: dict[str, Any]) -> None:
    worker = exited(dying, "sys.exit", 3)
    wait_until(lambda: not has_living_group(worker), "the ping process has ended too")


def test_os_exit_ends_the_worker_and_the_pings_go_on(dying: dict[str, Any]) -> None:
    endpoint = dying["workers"].endpoint.at("os._exit")
    worker = exited(dying, "os._exit", 7)
    endpoint.fault("ping-lost", pod="pod-os._exit")
    wait_until(lambda: endpoint.struck("ping-lost"), "a ping of the orphaned ping process")
    assert has_living_group(worker)
    assert endpoint.health()["workers"]["running"] == 1, "for the pings hide that the worker is gone"


def exited(dying: dict[str, Any], what: str, code: int) -> subprocess.Popen[bytes]:
    """The worker whose handler has ended it; nothing was posted."""
    endpoint, worker = dying["workers"].endpoint.at(what), dying["processes"][what]
    job_id = endpoint.run(do=what)
    assert worker.wait(TIMEOUT_S) == code
    assert endpoint.posted(job_id) == []
    assert endpoint.status(job_id)["status"] == "IN_PROGRESS"
    return worker


def has_living_group(worker: subprocess.Popen[bytes]) -> bool:
    try:
        os.killpg(worker.pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_refresh_worker_asks_for_a_stop_and_the_sdk_goes_on_taking_jobs(dying: dict[str, Any]) -> None:
    workers = dying["workers"]
    endpoint = workers.endpoint.at("refresh")
    endpoint.fault("stop-pod-ignored")
    bodies = []
    for _ in range(2):
        job_id = endpoint.run(do="return", value={"refresh_worker": True, "a": 1})
        bodies.append(endpoint.until(job_id, "COMPLETED"))
        (posted,) = endpoint.posted(job_id)
        assert json.loads(posted) == {"output": {"a": 1}, "stopPod": True}
    assert [body["output"] for body in bodies] == [{"a": 1}, {"a": 1}], "the second was given after the first's wish"
    assert endpoint.health()["workers"]["idle"] == 0, "stopped now"
    waiting = endpoint.run(do="echo")
    assert endpoint.take("pod-refresh").status_code == 204, "a stopped worker gets nothing"
    assert endpoint.take("another").json()["id"] == waiting
    assert dying["processes"]["refresh"].poll() is None, "the stand-in ends no process"
