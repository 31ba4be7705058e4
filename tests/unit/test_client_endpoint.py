"""client.py against a real HTTP server: starting a job, following it through every kind of trouble, its outcome."""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
import requests
from client_server import DONE, QUEUED, STEADY, Answer, Server, answer, cut, hang_up
from hypothesis import given
from hypothesis import strategies as st

import client

JOB = client.Job({"1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}}}, timeout_s=90)
HOUR_S = 3600.0


class Clock:
    """Time that passes only by sleeping. Every sleep takes `late_s` longer than asked."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.late_s = 0.0
        self.sleeps_s: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, pause_s: float) -> None:
        self.sleeps_s.append(pause_s)
        self.now_s += pause_s + self.late_s


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def endpoint(server: Server, clock: Clock) -> client.Endpoint:
    return client.Endpoint(server.url + "/", "ep 1", "secret", sleep=clock.sleep, clock=clock)


def follow(endpoint: client.Endpoint, *, timeout_s: float = 600) -> tuple[dict[str, Any], list[str]]:
    seen: list[str] = []
    status = endpoint.follow("j1", endpoint.now() + timeout_s, lambda update: seen.append(str(update["status"])))
    return status, seen


# --- starting --------------------------------------------------------------------------------------------------------


def test_submit_posts_the_job_with_the_key(server: Server, endpoint: client.Endpoint) -> None:
    server.script = [QUEUED]
    job = client.Job(JOB.workflow, {"a.png": b"\0\xff", "b.png": "https://host/b.png"}, {"v.mp4": b"v"}, timeout_s=90)
    assert endpoint.submit(job, 2000) == "j1"
    ((method, path, authorization, body),) = server.requests
    assert (method, path, authorization) == ("POST", "/v2/ep%201/run", "Bearer secret")
    assert json.loads(body) == {
        "input": {
            "workflow": JOB.workflow,
            "images": {"a.png": base64.b64encode(b"\0\xff").decode(), "b.png": "https://host/b.png"},
            "files": {"v.mp4": base64.b64encode(b"v").decode()},
        },
        "policy": {"executionTimeout": 90_000},
    }


def test_sync_hands_over_by_runsync_and_waits_as_shortly_as_it_can(server: Server, clock: Clock) -> None:
    endpoint = client.Endpoint(server.url, "ep", "secret", sync=True, sleep=clock.sleep, clock=clock)
    server.script = [answer(200, {"id": "sync-1", "status": "IN_PROGRESS"}), answer(200, DONE)]
    assert endpoint.submit(JOB, 2000) == "sync-1"
    endpoint.follow("sync-1", 2000, print)
    asked = [(method, path) for method, path, _, _ in server.requests]
    assert asked == [("POST", "/v2/ep/runsync?wait=1000"), ("GET", "/v2/ep/status/sync-1")]


@pytest.mark.parametrize(("timeout_s", "sent_ms"), [(1, 5_000), (5, 5_000), (7.5, 7_500), (86_400, 86_400_000)])
def test_the_time_for_the_job_is_sent_within_what_runpod_takes(timeout_s: float, sent_ms: int) -> None:
    body = json.loads(client.request_body(client.Job(JOB.workflow, timeout_s=timeout_s)))
    assert body["policy"] == {"executionTimeout": sent_ms}


def test_submit_waits_as_told_when_the_platform_is_busy(
    server: Server, endpoint: client.Endpoint, clock: Clock
) -> None:
    server.script = [answer(429, "slow down", Retry_After="7"), answer(429), QUEUED]
    assert endpoint.submit(JOB, 2000) == "j1"
    assert clock.sleeps_s == [7.0, pytest.approx(0.15)]
    assert len({body for _, _, _, body in server.requests}) == 1
    assert len(server.requests) == 3


def test_submit_gives_up_at_the_deadline(server: Server, endpoint: client.Endpoint, clock: Clock) -> None:
    server.script = [answer(429, Retry_After="99999")]
    with pytest.raises(client.JobTimedOut):
        endpoint.submit(JOB, 1150)
    assert clock.now_s == 1150


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (answer(500, "<html>oops</html>"), "could not be handed over; it may have been taken .*HTTP 500"),
        (answer(503, Retry_After="1"), "could not be handed over; it may have been taken .*HTTP 503"),
        (hang_up, "could not be handed over"),
        (cut, "could not be handed over"),
        (answer(200, "<html>"), "not JSON"),
        (answer(200, [1]), "not an object"),
        (answer(200, "[" * 100_000), "not JSON"),
        (answer(204, ""), "no id"),
        (answer(200, {"status": "IN_QUEUE"}), "no id"),
        (answer(200, {"id": 7}), "no id"),
        (answer(200, {"id": "../../x\x1b[31m"}), "no id"),
        (answer(401, ""), "key was refused"),
        (answer(403, ""), "key was refused"),
        (answer(404, "<html>"), "there is no endpoint at"),
        (answer(400, "exceeded max body size of 10MiB"), "HTTP 400, exceeded max body size"),
        (answer(400, "\x1b[31m\r\nred"), r"HTTP 400, \?\[31m red"),
        (answer(400, ""), "HTTP 400, no reason given"),
        (answer(302, "", Location="http://127.0.0.1:1/"), "HTTP 302"),
    ],
)
def test_submit_sends_a_job_only_once(server: Server, endpoint: client.Endpoint, reply: Answer, message: str) -> None:
    server.script = [reply, QUEUED]
    with pytest.raises(client.PlatformError, match=message) as failure:
        endpoint.submit(JOB, 2000)
    assert len(server.requests) == 1
    assert "secret" not in str(failure.value)
    assert str(failure.value).isprintable()


def test_a_server_that_is_not_there_is_told_in_its_own_words(clock: Clock) -> None:
    endpoint = client.Endpoint("http://127.0.0.1:1", "ep", "key", sleep=clock.sleep, clock=clock)
    with pytest.raises(client.PlatformError, match=r"/ep/run: Connection refused$"):
        endpoint.submit(JOB, 2000)


@pytest.mark.parametrize(
    ("size_bytes", "sync", "told", "not_told"),
    [
        (10_000_000, False, None, ""),
        (10_000_001, False, "--sync", "20 MB;"),
        (20_000_001, False, "--max-side", "--sync"),
        (10_000_001, True, None, ""),
        (20_000_001, True, "--max-side", "--sync"),
    ],
)
def test_what_helps_a_large_request_depends_on_its_size(
    size_bytes: int, sync: bool, told: str | None, not_told: str
) -> None:
    job = client.Job({}, {"a.png": bytes(3_000_000), "far.png": "https://h/far.png"}, {"v.mp4": bytes(1_500_000)})
    warning = client.size_warning(job, size_bytes, sync)
    if told is None:
        assert warning is None
    else:
        assert warning is not None
        assert told in warning
        assert not_told not in warning
        assert "a.png 4.0 MB" in warning
        assert "v.mp4 2.0 MB" in warning


# --- following -------------------------------------------------------------------------------------------------------


def test_follow_survives_every_trouble_and_returns_the_end(
    server: Server, endpoint: client.Endpoint, clock: Clock
) -> None:
    server.script = [
        QUEUED,
        answer(429, Retry_After="30"),
        answer(500, "<html>"),
        answer(502),
        answer(200, "<html>maintenance</html>"),
        answer(200, ""),
        hang_up,
        cut,
        answer(200, [1, 2]),
        answer(200, {"id": "j1"}),
        answer(200, {"status": 5}),
        answer(200, {"status": "IN_PROGRESS", "output": {"percent": 5}}),
        answer(200, {"status": "SOMETHING_NEW"}),
        answer(200, DONE),
    ]
    status, seen = follow(endpoint)
    assert status == DONE
    assert seen == ["IN_QUEUE", "IN_PROGRESS", "SOMETHING_NEW"]
    assert 30.0 in clock.sleeps_s
    assert {path for _, path, _, _ in server.requests} == {"/v2/ep%201/status/j1"}


@pytest.mark.parametrize("state", sorted(client.FINAL_STATES))
def test_every_final_state_ends_following(server: Server, endpoint: client.Endpoint, state: str) -> None:
    server.script = [answer(200, {"status": state}), answer(500)]
    assert follow(endpoint) == ({"status": state}, [])


def test_polling_is_fast_at_first_then_slower_and_fast_again_after_a_change(
    server: Server, endpoint: client.Endpoint, clock: Clock
) -> None:
    server.script = [QUEUED] * 20 + [answer(200, {"status": "IN_PROGRESS"})] * 2 + [answer(200, DONE)]
    follow(endpoint)
    waiting, running = clock.sleeps_s[:20], clock.sleeps_s[20:]
    assert waiting[0] == running[0] == client.FIRST_POLL_S
    assert waiting == sorted(waiting)
    assert waiting[-1] == client.LAST_POLL_S


@pytest.mark.parametrize(
    ("header", "pause_s"),
    [("30", 30.0), ("0", 0.1), ("", 0.1), ("-5", 0.1), ("1e9", 0.1), ("Wed, 21 Oct 2026 07:28:00 GMT", 0.1)],
)
@pytest.mark.parametrize("code", [429, 503])
def test_retry_after_is_honoured_and_never_makes_polling_faster(
    server: Server, endpoint: client.Endpoint, clock: Clock, code: int, header: str, pause_s: float
) -> None:
    server.script = [answer(code, Retry_After=header), answer(200, DONE)]
    follow(endpoint)
    assert clock.sleeps_s == [pause_s]


def test_a_short_retry_after_does_not_make_late_polling_faster(
    server: Server, endpoint: client.Endpoint, clock: Clock
) -> None:
    server.script = [QUEUED] * 20 + [answer(429, Retry_After="1"), answer(200, DONE)]
    follow(endpoint)
    assert clock.sleeps_s[-1] == client.LAST_POLL_S


@pytest.mark.parametrize("code", [429, 503])
def test_nobody_is_made_to_wait_for_hours(server: Server, endpoint: client.Endpoint, clock: Clock, code: int) -> None:
    server.script = [answer(code, Retry_After="7200"), answer(200, DONE)]
    assert follow(endpoint, timeout_s=86_400)[0] == DONE
    assert clock.sleeps_s == [60.0]


@pytest.mark.parametrize("trouble", [answer(503, "<html>"), hang_up, answer(200, {}), answer(200, "<html>")])
def test_follow_gives_up_after_a_long_silence(
    server: Server, endpoint: client.Endpoint, clock: Clock, trouble: Answer
) -> None:
    server.script = [QUEUED, trouble]
    with pytest.raises(client.PlatformError, match=r"job j1 is out of sight and may still run: ."):
        follow(endpoint)
    assert client.SILENCE_LIMIT_S < clock.now_s - 1000 < client.SILENCE_LIMIT_S + 10


def test_one_usable_answer_ends_a_silence(server: Server, endpoint: client.Endpoint) -> None:
    server.script = [*[answer(503, Retry_After="60")] * 2, QUEUED, *[answer(503, Retry_After="60")] * 2]
    server.script.append(answer(200, DONE))
    assert follow(endpoint)[0] == DONE


def test_a_busy_platform_is_no_silence(server: Server, endpoint: client.Endpoint) -> None:
    server.script = [answer(429, Retry_After="60")] * 5 + [answer(200, DONE)]
    assert follow(endpoint)[0] == DONE


def test_follow_ends_at_the_deadline_and_asks_once_more_then(
    server: Server, endpoint: client.Endpoint, clock: Clock
) -> None:
    server.script = [QUEUED]
    with pytest.raises(client.JobTimedOut):
        follow(endpoint, timeout_s=33)
    assert clock.now_s == pytest.approx(1033)
    assert len(server.requests) == len(clock.sleeps_s) + 1


@pytest.mark.parametrize(
    ("code", "message"), [(404, "no longer knows job j1"), (401, "key was refused"), (400, "HTTP 400, <html>")]
)
def test_some_answers_end_following_at_once(server: Server, endpoint: client.Endpoint, code: int, message: str) -> None:
    server.script = [QUEUED, answer(code, "<html>")]
    with pytest.raises(client.PlatformError, match=message):
        follow(endpoint)
    assert len(server.requests) == 2


# --- a computer that sleeps ------------------------------------------------------------------------------------------


def test_time_that_the_computer_sleeps_does_not_count_for_the_deadline(
    server: Server, endpoint: client.Endpoint, clock: Clock
) -> None:
    clock.late_s = HOUR_S
    server.script = [QUEUED] * 5 + [answer(200, DONE)]
    assert follow(endpoint, timeout_s=60)[0] == DONE
    assert clock.now_s > 1000 + 5 * HOUR_S


def test_time_that_the_computer_sleeps_is_no_silence(server: Server, endpoint: client.Endpoint, clock: Clock) -> None:
    clock.late_s = HOUR_S
    server.script = [QUEUED, answer(503), hang_up, answer(502), answer(200, DONE)]
    assert follow(endpoint)[0] == DONE


def test_time_awake_counts_for_the_deadline_also_on_a_computer_that_sleeps(
    server: Server, endpoint: client.Endpoint, clock: Clock
) -> None:
    clock.late_s = HOUR_S
    server.script = [QUEUED]
    with pytest.raises(client.JobTimedOut):
        follow(endpoint, timeout_s=33)
    assert sum(clock.sleeps_s) == pytest.approx(33)


def test_pauses_that_are_a_little_late_count(server: Server, endpoint: client.Endpoint, clock: Clock) -> None:
    clock.late_s = 20.0  # a computer under load
    server.script = [QUEUED]
    with pytest.raises(client.JobTimedOut):
        follow(endpoint, timeout_s=33)
    assert clock.now_s <= 1000 + 33 + 20


def test_a_computer_may_also_sleep_while_a_request_is_under_way(
    server: Server, endpoint: client.Endpoint, clock: Clock
) -> None:
    def slept(handler: BaseHTTPRequestHandler) -> None:
        clock.now_s += HOUR_S
        hang_up(handler)

    server.script = [QUEUED, slept, answer(503), QUEUED, slept, answer(200, DONE)]
    assert follow(endpoint)[0] == DONE


def test_a_computer_may_sleep_before_the_job_is_taken(server: Server, endpoint: client.Endpoint, clock: Clock) -> None:
    clock.late_s = HOUR_S
    deadline = endpoint.now() + 60
    server.script = [answer(429), answer(429), QUEUED, QUEUED, answer(200, DONE)]
    job_id = endpoint.submit(JOB, deadline)
    assert endpoint.follow(job_id, deadline, lambda update: None) == DONE


# --- cancelling ------------------------------------------------------------------------------------------------------


def test_a_cancel_is_tried_again_where_the_platform_stumbles(server: Server, endpoint: client.Endpoint) -> None:
    server.script = [answer(500), hang_up, answer(429), answer(200, {"id": "j1", "status": "CANCELLED"})]
    assert endpoint.cancel("j1") == "CANCELLED"
    assert [request[:2] for request in server.requests] == [("POST", "/v2/ep%201/cancel/j1")] * 4


def test_a_cancel_tells_the_state_of_a_job_that_had_ended(server: Server, endpoint: client.Endpoint) -> None:
    server.script = [answer(200, {"id": "j1", "status": "COMPLETED"})]
    assert endpoint.cancel("j1") == "COMPLETED"


@pytest.mark.parametrize(("code", "message"), [(404, "RunPod does not know job j1"), (401, "key was refused")])
def test_a_cancel_that_is_refused_is_not_tried_again(
    server: Server, endpoint: client.Endpoint, code: int, message: str
) -> None:
    server.script = [answer(code)]
    with pytest.raises(client.PlatformError, match=message):
        endpoint.cancel("j1")
    assert len(server.requests) == 1


# --- answers ---------------------------------------------------------------------------------------------------------


@STEADY
@given(
    st.sampled_from([200, 201, 302, 400, 401, 404, 413, 429, 500, 503]),
    st.binary(max_size=40) | st.sampled_from([b"{}", b'{"a": NaN}', b'{"a": 1e999}', b'"\\ud800"', b"[" * 10_000]),
    st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), max_size=12),
)
def test_any_answer_is_an_object_or_one_line_of_error(code: int, body: bytes, header: str) -> None:
    response = requests.Response()
    response.status_code, response._content = code, body
    response.headers["Retry-After"] = header
    try:
        read = client.read_answer(response, "GET /status")
    except client.PlatformError as error:
        assert str(error).isprintable()
    else:
        assert code < 300
        assert isinstance(read, dict)


# --- the outcome -----------------------------------------------------------------------------------------------------

SDK_ERROR = json.dumps({"error_type": "<class 'ValueError'>", "error_message": "bad\nthing", "error_traceback": "..."})


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        ({"status": "COMPLETED"}, client.JobFailed, "without a result"),
        ({"status": "COMPLETED", "output": None}, client.JobFailed, "without a result"),
        ({"status": "COMPLETED", "output": {}}, client.JobFailed, "without a result"),
        ({"status": "COMPLETED", "output": "text"}, client.JobFailed, "without a result"),
        ({"status": "COMPLETED", "output": {"error": "in vain"}}, client.JobFailed, "failed: in vain"),
        (
            {"status": "COMPLETED", "output": {"error": "in vain", "error_code": "NO_OUTPUT"}},
            client.JobFailed,
            r"failed: \[NO_OUTPUT\] in vain$",
        ),
        ({"status": "FAILED", "error": SDK_ERROR}, client.JobFailed, "failed: bad thing$"),
        ({"status": "FAILED", "error": {"error_message": "an object"}}, client.JobFailed, "failed: an object$"),
        ({"status": "FAILED", "error": {"message": "an object"}}, client.JobFailed, "failed: an object$"),
        ({"status": "FAILED", "error": {"code": 5}}, client.JobFailed, r"failed: \{'code': 5\}$"),
        ({"status": "FAILED", "error": "{not json"}, client.JobFailed, "failed: {not json$"),
        ({"status": "FAILED"}, client.JobFailed, "the job failed$"),
        ({"status": "FAILED", "error": ""}, client.JobFailed, "the job failed$"),
        ({"status": "FAILED", "error": None, "output": {"error_code": "X"}}, client.JobFailed, r"failed: \[X\]$"),
        (
            {"status": "FAILED", "error": "job timed out after 1 retries", "retries": 1, "workerId": "w"},
            client.JobFailed,
            "failed: job timed out after 1 retries$",
        ),
        (
            {"status": "FAILED", "error": "No room.", "output": {"error_code": "RAM_DISK_FULL"}},
            client.JobFailed,
            r"failed: \[RAM_DISK_FULL\] No room\.$",
        ),
        (
            {"status": "FAILED", "error": "[NO_OUTPUT] Nothing.", "output": {"error_code": "NO_OUTPUT"}},
            client.JobFailed,
            r"failed: \[NO_OUTPUT\] Nothing\.$",
        ),
        ({"status": "FAILED", "error": "executionTimeout exceeded"}, client.JobTimedOut, "ran out of time"),
        ({"status": "FAILED", "error": "[JOB_TIMEOUT] Too slow."}, client.JobTimedOut, "ran out of time"),
        (
            {"status": "FAILED", "error": "Too slow.", "output": {"error_code": "JOB_TIMEOUT"}},
            client.JobTimedOut,
            "ran out of time",
        ),
        ({"status": "TIMED_OUT"}, client.JobTimedOut, "ran out of time on RunPod$"),
        ({"status": "TIMED_OUT", "error": "executionTimeout exceeded"}, client.JobTimedOut, "exceeded$"),
        ({"status": "CANCELLED"}, client.JobFailed, "was cancelled$"),
        ({"status": "CANCELLED", "output": {"percent": 5}}, client.JobFailed, "was cancelled$"),
    ],
)
def test_every_bad_end_has_its_reason(status: dict[str, Any], error: type[client.ClientError], message: str) -> None:
    with pytest.raises(error, match=message) as failure:
        client.outcome(status)
    assert type(failure.value) is error


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
UPDATES = st.dictionaries(st.sampled_from(["stage", "node", "node_class", "value", "max", "percent"]), JSON)


@STEADY
@given(
    st.fixed_dictionaries(
        {"status": st.sampled_from(["COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"])},
        optional={
            "output": JSON | st.dictionaries(st.sampled_from(["error_code", "error"]), JSON),
            "error": JSON | st.builds(json.dumps, JSON) | st.just('{"a": ' * 10_000),
        },
    )
)
def test_any_final_answer_is_a_result_or_an_error_of_one_line(status: dict[str, Any]) -> None:
    try:
        assert client.outcome(status) is status["output"]
    except client.ClientError as error:
        assert str(error).isprintable()


@STEADY
@given(st.fixed_dictionaries({"status": st.text()}, optional={"output": JSON | UPDATES, "delayTime": JSON}))
def test_any_progress_update_is_one_printable_line(status: dict[str, Any]) -> None:
    text, percent = client.describe_progress(status)
    assert text.isprintable()
    assert percent is None or 0 <= percent <= 100


def test_progress_is_told_in_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    update = {"stage": "running", "node": "3", "node_class": "ImageScale", "value": 3, "max": 20, "percent": 42}
    with client.ProgressDisplay(stream) as display:
        for status in (
            {"status": "IN_QUEUE"},
            {"status": "IN_QUEUE"},
            {"status": "IN_PROGRESS"},
            {"status": "IN_PROGRESS", "output": update, "delayTime": 1530},
        ):
            display.update(status)
    assert stream.getvalue().splitlines() == [
        "waiting in the queue",
        "in progress",
        "queue 1.5 s, running ImageScale (node 3) 3/20",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal() -> None:
    stream = Terminal()
    with client.ProgressDisplay(stream) as display:
        display.update({"status": "IN_PROGRESS", "output": {"stage": "running", "percent": 42}})
        display.update({"status": "IN_PROGRESS", "output": {"stage": "waiting"}})
    assert "running |" in stream.getvalue()
    assert " 42% " in stream.getvalue().partition("waiting |")[2]


def test_without_tqdm_progress_is_told_in_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    stream = Terminal()
    with client.ProgressDisplay(stream) as display:
        display.update({"status": "IN_QUEUE"})
    assert stream.getvalue() == "waiting in the queue\n"


def test_no_progress_is_shown_where_nobody_looks() -> None:
    with client.ProgressDisplay(None) as display:
        display.update({"status": "IN_QUEUE"})
