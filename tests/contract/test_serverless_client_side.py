"""What a client meets beyond one good job: chunks, retries, policy, webhooks, several endpoints, faults."""

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import requests
from serverless_client import KEY, REPOSITORY, Endpoint, serve, wait_until

from local.serverless_faults import KINDS

README = REPOSITORY / "local" / "README.md"
OPTIONS = ("--endpoint", "local", "--endpoint", "other", "--webhook-pause-s", "0.05")


@pytest.fixture(scope="module")
def shared() -> Iterator[Endpoint]:
    with serve(*OPTIONS) as endpoint:
        yield endpoint


@pytest.fixture
def endpoint(shared: Endpoint) -> Iterator[Endpoint]:
    """The stand-in with an empty queue and, afterwards, without faults."""
    shared.call("POST", "purge-queue")
    yield shared
    for fault in shared.call("GET", "../../_fault").json()["faults"]:
        shared.fault(fault["kind"], times=0)


def running(endpoint: Endpoint, **body: Any) -> str:
    """A job that pod1 has taken."""
    job_id = endpoint.post({"input": {"x": 1}, **body})
    assert endpoint.take("pod1").json()["id"] == job_id
    return job_id


# --- More calls ----------------------------------------------------------------------------------------------------


def test_retry_runs_a_failed_job_again_under_its_id(endpoint: Endpoint) -> None:
    job_id = running(endpoint)
    assert endpoint.call("POST", f"retry/{job_id}").status_code == 400, "it runs"
    endpoint.done("pod1", job_id, '{"error": "it broke"}')
    response = endpoint.call("POST", f"retry/{job_id}")
    assert (response.status_code, response.json()) == (200, {"id": job_id, "status": "IN_QUEUE"})
    assert endpoint.take("pod2").json() == {"id": job_id, "input": {"x": 1}}
    endpoint.done("pod2", job_id, '{"output": 2}')
    assert endpoint.status(job_id)["output"] == 2
    assert endpoint.call("POST", f"retry/{job_id}").status_code == 400, "it has succeeded"


def test_purge_queue_removes_waiting_jobs_only(endpoint: Endpoint) -> None:
    kept = running(endpoint)
    removed = [endpoint.run(x=1), endpoint.run(x=2)]
    response = endpoint.call("POST", "purge-queue")
    assert (response.status_code, response.json()) == (200, {"removed": 2, "status": "completed"})
    assert [endpoint.call("GET", f"status/{job_id}").status_code for job_id in removed] == [404, 404]
    assert endpoint.status(kept)["status"] == "IN_PROGRESS"
    assert endpoint.take("pod2").status_code == 204


def test_endpoints_share_nothing(endpoint: Endpoint) -> None:
    job_id = endpoint.run(x=1)
    other = endpoint.at("other")
    assert other.call("GET", f"status/{job_id}").status_code == 404
    assert other.take("pod1").status_code == 204
    assert other.health()["jobs"]["inQueue"] == 0
    theirs = other.run(x=2)
    assert other.take("pod1").json()["id"] == theirs
    assert endpoint.take("pod1").json()["id"] == job_id


def test_a_chunk_over_a_megabyte_is_refused(endpoint: Endpoint) -> None:
    job_id = running(endpoint)
    for size, status in ((900_000, 200), (1_000_000, 400)):
        body = json.dumps({"output": "x" * size})
        assert endpoint.call("POST", f"job-stream/pod1/{job_id}", key=KEY, data=body).status_code == status
    (chunk,) = endpoint.call("GET", f"stream/{job_id}").json()["stream"]
    assert len(chunk["output"]) == 900_000


@pytest.mark.parametrize(
    "extra",
    [
        *({"policy": {"executionTimeout": value}} for value in (4999, 7 * 24 * 3600 * 1000 + 1, "9000", True, 9000.5)),
        *({"policy": {"ttl": value}} for value in (9999, 7 * 24 * 3600 * 1000 + 1)),
        *({"policy": value} for value in ([], "x", None)),
        *({"webhook": value} for value in ("", "x", "ftp://127.0.0.1/", 7, "http://", "http://[")),
    ],
)
def test_a_policy_or_webhook_out_of_range_is_refused(endpoint: Endpoint, extra: dict[str, Any]) -> None:
    response = endpoint.call("POST", "run", json={"input": {"x": 1}, **extra})
    assert (response.status_code, response.json().keys()) == (400, {"error"})


def test_a_policy_in_range_is_accepted(endpoint: Endpoint) -> None:
    running(endpoint, policy={"executionTimeout": 5000, "ttl": 10_000, "lowPriority": True})
    running(endpoint, policy={})


def test_how_long_the_platform_waits_is_an_option() -> None:
    with serve("--retention-s", "0", "--sync-retention-s", "60", "--lost-s", "0.1") as endpoint:
        lost = running(endpoint)
        wait_until(lambda: endpoint.health()["jobs"]["retried"] == 1, "pod1, which never pings, is lost")
        assert endpoint.take("pod2").json()["id"] == lost
        wait_until(lambda: endpoint.call("GET", f"status/{lost}").status_code == 404, "the lost job is forgotten")
        sync = endpoint.call("POST", "runsync", json={"input": {}}).json()
        assert sync["status"] == "FAILED"
        forgotten = endpoint.run()
        wait_until(lambda: endpoint.call("GET", f"status/{forgotten}").status_code == 404, "the /run job is forgotten")
        assert endpoint.status(sync["id"]) == sync


# --- Webhooks ------------------------------------------------------------------------------------------------------


class Hook:
    """A server that notes what is posted to it and answers with these codes, then with 200."""

    def __init__(self, *codes: int) -> None:
        self.posted: list[Any] = []
        remaining = list(codes)
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                hook.posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(remaining.pop(0) if remaining else 200)
                self.end_headers()

            def log_message(self, *_arguments: Any) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> "Hook":
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.mark.parametrize(("codes", "calls"), [((), 1), ((500, 302), 3), ((204,), 2)])
def test_a_webhook_gets_the_last_status_until_it_answers_200(
    endpoint: Endpoint, codes: tuple[int, ...], calls: int
) -> None:
    with Hook(*codes) as hook, Hook(500, 500) as last:
        job_id = running(endpoint, webhook=hook.url)
        assert hook.posted == []
        endpoint.done("pod1", job_id, '{"error": "it broke", "output": {"left": 1}}')
        wait_until(lambda: len(hook.posted) == calls, f"{calls} calls")
        told_last(endpoint, last)
        assert hook.posted == [endpoint.status(job_id)] * calls


def test_a_webhook_that_never_answers_200_is_left_alone_after_two_retries(endpoint: Endpoint) -> None:
    with Hook(500, 500, 500, 500) as hook, Hook(500, 500) as last:
        job_id = running(endpoint, webhook=hook.url)
        endpoint.done("pod1", job_id, '{"output": 1}')
        wait_until(lambda: len(hook.posted) == 3, "three calls")
        told_last(endpoint, last)
        assert hook.posted == [endpoint.status(job_id)] * 3


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/", "http://127.0.0.1:99999/", "http://" + "a" * 300, "http://a b"])
def test_a_webhook_that_cannot_be_reached_harms_nobody(endpoint: Endpoint, url: str) -> None:
    job_id = running(endpoint, webhook=url)
    assert endpoint.done("pod1", job_id, '{"output": 1}').status_code == 200
    with Hook(500, 500) as last:
        told_last(endpoint, last)
    assert endpoint.status(job_id)["output"] == 1


def told_last(endpoint: Endpoint, hook: Hook) -> None:
    """Run one more job, whose webhook wants three calls: by the third, a call too many of another would have come."""
    job_id = running(endpoint, webhook=hook.url)
    endpoint.done("pod1", job_id, '{"output": 1}')
    wait_until(lambda: len(hook.posted) == 3, "the webhook of the last job")


# --- Faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [404, 429, 500, 503])
def test_a_client_meets_an_error_for_a_while(endpoint: Endpoint, code: int) -> None:
    endpoint.fault(f"client-{code}", after=1, times=2)
    responses = [endpoint.call("GET", "health") for _ in range(4)]
    assert [response.status_code for response in responses] == [200, code, code, 200]
    assert responses[1].json().keys() == {"error"}
    assert endpoint.struck(f"client-{code}") == 2


@pytest.mark.parametrize(("kind", "code"), [("client-html", 200), ("client-502", 502)])
def test_a_client_meets_an_html_page(endpoint: Endpoint, kind: str, code: int) -> None:
    endpoint.fault(kind)
    response = endpoint.call("GET", "health")
    assert (response.status_code, response.headers["Content-Type"]) == (code, "text/html; charset=utf-8")
    assert response.text.startswith("<!DOCTYPE html>")


def test_a_dropped_call_does_nothing(endpoint: Endpoint) -> None:
    endpoint.fault("client-drop")
    with pytest.raises(requests.ConnectionError):
        endpoint.run(x=1)
    assert endpoint.health()["jobs"]["inQueue"] == 0


def test_a_cut_call_is_carried_out_and_its_answer_is_half(endpoint: Endpoint) -> None:
    endpoint.fault("client-cut")
    with pytest.raises(requests.exceptions.ChunkedEncodingError, match="IncompleteRead"):
        endpoint.run(x=1)
    assert endpoint.health()["jobs"]["inQueue"] == 1


def test_a_fault_can_be_limited_to_one_call(endpoint: Endpoint) -> None:
    endpoint.fault("client-500", call="status")
    job_id = endpoint.run(x=1)
    assert endpoint.call("GET", "health").status_code == 200
    assert [endpoint.call("GET", f"status/{job_id}").status_code for _ in range(2)] == [500, 200]


def test_faults_are_listed_and_taken_back(endpoint: Endpoint) -> None:
    endpoint.fault("client-500", call="status", after=1, times=3)
    endpoint.fault("job-done-400", pod="pod1")
    endpoint.call("GET", "status/x")
    endpoint.call("GET", "status/x")
    listed = endpoint.call("GET", "../../_fault").json()
    assert listed == {
        "faults": [
            {"kind": "client-500", "after": 0, "times": 2, "struck": 1, "call": "status"},
            {"kind": "job-done-400", "after": 0, "times": 1, "struck": 0, "pod": "pod1"},
        ]
    }
    endpoint.fault("client-500", times=0)
    assert endpoint.call("GET", "status/x").status_code == 404
    assert [fault["kind"] for fault in endpoint.call("GET", "../../_fault").json()["faults"]] == ["job-done-400"]


def test_a_lost_ping_is_answered_and_not_seen(endpoint: Endpoint) -> None:
    endpoint.fault("ping-lost", pod="fresh")
    before = endpoint.health()["workers"]["initializing"]
    counts = []
    for _ in range(2):
        assert endpoint.call("GET", "ping/fresh", key=KEY).status_code == 200
        counts.append(endpoint.health()["workers"]["initializing"] - before)
    assert counts == [0, 1]


def test_the_documented_faults_are_those_that_there_are() -> None:
    section = README.read_text().split("### Faults", 1)[1].split("\n### ", 1)[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert sorted(kind for row in rows for kind in re.findall(r"`([^`]+)`", row)) == sorted(KINDS)


@pytest.mark.parametrize(
    "order",
    [
        *({}, {"kind": "none"}, {"kind": []}),
        *(
            {"kind": "client-500", **wrong}
            for wrong in ({"times": -1}, {"after": True}, {"call": "none"}, {"pod": "p"})
        ),
        *({"kind": "ping-lost", **wrong} for wrong in ({"call": "run"}, {"pod": 1}, {"time": 1})),
    ],
)
def test_a_fault_that_makes_no_sense_is_refused(endpoint: Endpoint, order: dict[str, Any]) -> None:
    response = endpoint.call("POST", "../../_fault", json=order)
    assert (response.status_code, response.json().keys()) == (400, {"error"})
    assert endpoint.call("GET", "../../_fault").json() == {"faults": []}
