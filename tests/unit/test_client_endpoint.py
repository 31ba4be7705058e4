"""client.py against a real HTTP server: starting a job, following it through every kind of trouble, its outcome."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
from client_server import DONE, QUEUED, STEADY, Answer, Server, answer, cut, hang_up
from hypothesis import given
from hypothesis import strategies as st

import client


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.sleeps_s: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, pause_s: float) -> None:
        self.sleeps_s.append(pause_s)
        self.now_s += pause_s


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
    status = endpoint.follow("j1", endpoint.clock() + timeout_s, lambda update: seen.append(str(update["status"])))
    return status, seen


# --- starting --------------------------------------------------------------------------------------------------------


def test_submit_posts_the_body_with_the_key(server: Server, endpoint: client.Endpoint) -> None:
    server.script = [QUEUED]
    assert endpoint.submit(b'{"input": {}}', 2000) == "j1"
    assert server.requests == [("POST", "/v2/ep%201/run", "Bearer secret", b'{"input": {}}')]


def test_submit_waits_as_told_when_the_platform_is_busy(
    server: Server, endpoint: client.Endpoint, clock: Clock
) -> None:
    server.script = [answer(429, "slow down", Retry_After="7"), answer(429), QUEUED]
    assert endpoint.submit(b"{}", 2000) == "j1"
    assert clock.sleeps_s == [7.0, pytest.approx(0.15)]
    assert len(server.requests) == 3


def test_submit_gives_up_at_the_deadline(server: Server, endpoint: client.Endpoint, clock: Clock) -> None:
    server.script = [answer(429, Retry_After="99999")]
    with pytest.raises(client.JobTimedOut):
        endpoint.submit(b"{}", 1060)
    assert clock.now_s == 1060


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (answer(500, "<html>oops</html>"), "could not be handed over: .*HTTP 500"),
        (hang_up, "could not be handed over"),
        (cut, "could not be handed over"),
        (answer(200, "<html>"), "not JSON"),
        (answer(200, [1]), "not an object"),
        (answer(200, {"status": "IN_QUEUE"}), "no id"),
        (answer(200, {"id": "../../x\x1b[31m"}), "no id"),
        (answer(401, ""), "refused the key"),
        (answer(404, "<html>"), "there is no endpoint at"),
        (answer(400, "exceeded max body size of 10MiB"), "HTTP 400, exceeded max body size"),
        (answer(302, "", Location="http://127.0.0.1:1/"), "HTTP 302"),
    ],
)
def test_submit_sends_a_job_only_once(server: Server, endpoint: client.Endpoint, reply: Answer, message: str) -> None:
    server.script = [reply]
    with pytest.raises(client.PlatformError, match=message) as failure:
        endpoint.submit(b"{}", 2000)
    assert len(server.requests) == 1
    assert "secret" not in str(failure.value)


def test_a_server_that_is_not_there_is_told_in_its_own_words(clock: Clock) -> None:
    endpoint = client.Endpoint("http://127.0.0.1:1", "ep", "key", sleep=clock.sleep, clock=clock)
    with pytest.raises(client.PlatformError, match=r"/ep/run: Connection refused$"):
        endpoint.submit(b"{}", 2000)


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
        hang_up,
        cut,
        answer(200, [1, 2]),
        answer(200, {"id": "j1"}),
        answer(200, {"status": "IN_PROGRESS", "output": {"percent": 5}}),
        answer(200, {"status": "SOMETHING_NEW"}),
        answer(200, DONE),
    ]
    status, seen = follow(endpoint)
    assert status == DONE
    assert seen == ["IN_QUEUE", "IN_PROGRESS", "SOMETHING_NEW"]
    assert 30.0 in clock.sleeps_s
    assert {path for _, path, _, _ in server.requests} == {"/v2/ep%201/status/j1"}


def test_polling_is_fast_at_first_then_slower_and_fast_again_after_a_change(
    server: Server, endpoint: client.Endpoint, clock: Clock
) -> None:
    server.script = [QUEUED] * 20 + [answer(200, {"status": "IN_PROGRESS"})] * 2 + [answer(200, DONE)]
    follow(endpoint)
    waiting, running = clock.sleeps_s[:20], clock.sleeps_s[20:]
    assert waiting[0] == running[0] == client.FIRST_POLL_S
    assert waiting == sorted(waiting)
    assert waiting[-1] == client.LAST_POLL_S


def test_follow_gives_up_after_a_long_silence(server: Server, endpoint: client.Endpoint, clock: Clock) -> None:
    server.script = [QUEUED, answer(503, "<html>")]
    with pytest.raises(client.PlatformError, match=r"out of sight.*HTTP 503"):
        follow(endpoint)
    assert client.SILENCE_LIMIT_S < clock.now_s - 1000 < client.SILENCE_LIMIT_S + 10


def test_a_busy_platform_is_no_silence(server: Server, endpoint: client.Endpoint) -> None:
    server.script = [answer(429, Retry_After="60")] * 5 + [answer(200, DONE)]
    assert follow(endpoint)[0] == DONE


def test_follow_ends_at_the_deadline(server: Server, endpoint: client.Endpoint, clock: Clock) -> None:
    server.script = [QUEUED]
    with pytest.raises(client.JobTimedOut):
        follow(endpoint, timeout_s=33)
    assert clock.now_s == pytest.approx(1033)


@pytest.mark.parametrize(("code", "message"), [(404, "no longer knows job j1"), (401, "refused the key")])
def test_some_answers_end_following_at_once(server: Server, endpoint: client.Endpoint, code: int, message: str) -> None:
    server.script = [QUEUED, answer(code, "<html>")]
    with pytest.raises(client.PlatformError, match=message):
        follow(endpoint)
    assert len(server.requests) == 2


def test_a_job_past_its_deadline_is_cancelled(
    server: Server, endpoint: client.Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = [QUEUED]
    with pytest.raises(client.JobTimedOut):
        client.run_job(endpoint, b"{}", 20)
    assert server.requests[-1][:2] == ("POST", "/v2/ep%201/cancel/j1")
    assert "job j1 is cancelled" in capsys.readouterr().err


def test_ctrl_c_cancels_the_job_and_says_when_that_failed(
    server: Server, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    def ctrl_c(pause_s: float) -> None:
        raise KeyboardInterrupt

    endpoint = client.Endpoint(server.url, "ep", "secret", sleep=ctrl_c, clock=clock)
    server.script = [QUEUED, QUEUED, answer(500, "<html>")]
    with pytest.raises(KeyboardInterrupt):
        client.run_job(endpoint, b"{}", 20)
    assert server.requests[-1][:2] == ("POST", "/v2/ep/cancel/j1")
    assert "could not be cancelled and may still run" in capsys.readouterr().err


# --- the outcome -----------------------------------------------------------------------------------------------------

SDK_ERROR = json.dumps({"error_type": "<class 'ValueError'>", "error_message": "bad\nthing", "error_traceback": "..."})


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        ({"status": "COMPLETED"}, client.JobFailed, "without a result"),
        ({"status": "COMPLETED", "output": "text"}, client.JobFailed, "without a result"),
        ({"status": "COMPLETED", "output": {"error": "in vain"}}, client.JobFailed, "failed: in vain"),
        ({"status": "FAILED", "error": SDK_ERROR}, client.JobFailed, "failed: bad thing$"),
        ({"status": "FAILED", "error": "{not json"}, client.JobFailed, "failed: {not json$"),
        ({"status": "FAILED"}, client.JobFailed, "the job failed$"),
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
        ({"status": "TIMED_OUT"}, client.JobTimedOut, "ran out of time on RunPod$"),
        ({"status": "CANCELLED"}, client.JobFailed, "was cancelled$"),
    ],
)
def test_every_bad_end_has_its_reason(status: dict[str, Any], error: type[client.ClientError], message: str) -> None:
    with pytest.raises(error, match=message):
        client.outcome(status)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
UPDATES = st.dictionaries(st.sampled_from(["stage", "node", "node_class", "value", "max", "percent"]), JSON)


@STEADY
@given(
    st.fixed_dictionaries(
        {"status": st.sampled_from(["COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"])},
        optional={"output": JSON | st.dictionaries(st.sampled_from(["error_code", "error"]), JSON), "error": JSON},
    )
)
def test_any_final_answer_is_a_result_or_an_error_of_one_line(status: dict[str, Any]) -> None:
    try:
        assert client.outcome(status) is status["output"]
    except client.ClientError as error:
        assert str(error).isprintable()


@STEADY
@given(st.fixed_dictionaries({"status": st.text()}, optional={"output": JSON | UPDATES}))
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
            {"status": "IN_PROGRESS", "output": update},
        ):
            display.update(status)
    assert stream.getvalue().splitlines() == [
        "waiting in the queue",
        "in progress",
        "running ImageScale (node 3) 3/20",
    ]


def test_progress_is_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with client.ProgressDisplay(stream) as display:
        display.update({"status": "IN_PROGRESS", "output": {"stage": "running", "percent": 42}})
    assert "running |" in stream.getvalue()
    assert " 42% " in stream.getvalue()
