"""Uploads against a server of the test's own; tests/process/test_faults_results.py has a real one."""

import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import BinaryIO

import pytest

from worker import bucket as module
from worker.bucket import Bucket, BucketSettings, Upload
from worker.control import JobControl
from worker.errors import JobTimeout, OutputMissing, UploadFailed

CONTENT = bytes(range(256)) * 2000


class Server(ThreadingHTTPServer):
    """Answers each PUT with the next of ``answers``: a status and a body, or None, which is never answered."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[tuple[int, bytes] | None] = []
        self.received: list[tuple[str, str | None, bytes]] = []
        self.released = threading.Event()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.path, self.headers["Content-Type"], body))
        answer = self.server.answers.pop(0) if self.server.answers else (200, b"")
        if answer is None:
            self.server.released.wait(30)
            self.close_connection = True
            return
        self.send_response(answer[0])
        self.send_header("Content-Length", str(len(answer[1])))
        if not answer[1]:
            self.send_header("ETag", '"etag"')
        self.end_headers()
        self.wfile.write(answer[1])

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "RETRY_WAITS_S", (0.0, 0.0, 0.0))
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.released.set()
        running.shutdown()


def connected(server: Server, **other: str) -> Bucket:
    settings = {"access_key_id": "KEYID", "secret_access_key": "hidden", "name": "b", **other}
    return Bucket(BucketSettings(**{"endpoint_url": f"http://127.0.0.1:{server.server_port}", **settings}))  # type: ignore[arg-type]


def upload(name: str = "a.png") -> Upload:
    return Upload(name, "image/png", len(CONTENT), lambda: io.BytesIO(CONTENT))


def test_an_upload_is_sent_whole_again_after_silence_and_an_error(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SILENCE_TIMEOUT_S", 0.5)
    server.answers = [None, (503, b"<html>busy</html>")]
    (link,) = connected(server).upload("job-1", [upload()], JobControl(30))
    paths = {path for path, _, _ in server.received}
    assert [(kind, body == CONTENT) for _, kind, body in server.received] == [("image/png", True)] * 3
    assert len(paths) == 1
    assert link.startswith(f"http://127.0.0.1:{server.server_port}{paths.pop()}?")


@pytest.mark.parametrize("name", ["\udc80.png", "a\nb.png", "a b%?#&+ä.png", "x" * 251 + ".png"])
def test_any_name_of_a_file_gives_a_key(server: Server, name: str) -> None:
    (link,) = connected(server).upload("job-1", [upload(name)], JobControl(30))
    assert link.isascii()
    assert link.partition("?")[0].endswith(server.received[0][0])


@pytest.mark.parametrize(
    ("status", "body", "words", "attempts"),
    [
        (403, b"<Error><Code>AccessDenied</Code><Message>KEYID hidden</Message></Error>", "permissions", 1),
        (403, b"", "permissions", 1),
        (404, b"<html>no page</html>", "BUCKET_NAME", 1),
        (400, b"<Error><Code>AuthorizationHeaderMalformed</Code></Error>", "set BUCKET_REGION", 1),
        (400, b"<Error><Code>Some \n Nonsense</Code></Error>", "BUCKET_ENDPOINT_URL", 1),
        (307, b"", "BUCKET_ENDPOINT_URL", 1),
        (429, b"", "later", 4),
        (500, b"<Error><Code>InternalError</Code></Error>", "later", 4),
    ],
)
def test_what_a_bucket_refuses_is_said_in_our_own_words(
    server: Server, status: int, body: bytes, words: str, attempts: int
) -> None:
    server.answers = [(status, body)] * 10
    with pytest.raises(UploadFailed, match=words) as caught:
        connected(server).upload("job-1", [upload()], JobControl(30))
    assert len(server.received) == attempts
    assert f"HTTP {status}" in caught.value.message
    assert [word for word in ("KEYID", "hidden", "\n") if word in caught.value.message] == []
    assert caught.value.details["retried"] is (attempts > 1)


def test_a_page_that_says_200_is_no_success(server: Server) -> None:
    server.answers = [(200, b"<html>Welcome</html>")]
    with pytest.raises(UploadFailed, match=r"not S3's.*BUCKET_ENDPOINT_URL"):
        connected(server).upload("job-1", [upload()], JobControl(30))
    assert len(server.received) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"name": "no such name"},
        {"endpoint_url": "http://under_score:99999"},
        {"endpoint_url": "http://a b"},
        {"region": "no region"},
    ],
)
def test_settings_that_cannot_be_used_are_told(server: Server, other: dict[str, str]) -> None:
    with pytest.raises(UploadFailed, match="look at BUCKET_ENDPOINT_URL and") as caught:
        connected(server, **other).upload("job-1", [upload()], JobControl(30))
    assert server.received == []
    assert [word for word in ("KEYID", "hidden", "\n") if word in caught.value.message] == []


def test_a_deadline_ends_an_upload_that_is_still_sending(server: Server) -> None:
    """Nothing more is read of the file after it."""
    read_at: list[float] = []

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            time.sleep(0.02)
            read_at.append(time.monotonic())
            return super().read(min(1000, len(CONTENT) if size is None or size < 0 else size))

    slow = Upload("a.png", "image/png", len(CONTENT), lambda: Slow(CONTENT))
    with pytest.raises(JobTimeout):
        connected(server).upload("job-1", [slow], JobControl(0.5))
    ended_at = time.monotonic()
    for thread in threading.enumerate():
        if thread.name.startswith("upload"):
            thread.join(10)
            assert not thread.is_alive()
    assert [moment for moment in read_at if moment > ended_at + 1] == []


def test_a_file_that_is_gone_is_no_fault_of_the_bucket(server: Server) -> None:
    @contextmanager
    def gone() -> Iterator[BinaryIO]:
        raise OutputMissing("gone", file="a.png")
        yield

    with pytest.raises(OutputMissing):
        connected(server).upload("job-1", [Upload("a.png", "image/png", 1, gone)], JobControl(30))


def test_all_uploads_together_have_a_deadline(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UPLOAD_TIMEOUT_S", 0.3)
    server.answers = [None]
    with pytest.raises(UploadFailed, match=r"within 0.3 s"):
        connected(server).upload("job-1", [upload()], JobControl(30))
