"""A Hugging Face hub on 127.0.0.1: what huggingface_hub 2.4.0 asks for files, and the hub's ways to refuse them.

Two servers, because the hub keeps large files on another host: `hub` answers /{repo}/resolve/{revision}/{file} with
a redirect to `storage`, which refuses a request that brings the token along, as S3 does. `hub` also lists the files of
a repository. Every request is recorded.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

MEMBER_TOKEN = "hf_member_of_every_repository"
STRANGER_TOKEN = "hf_stranger_without_any_rights"
PATIENCE_S = 15  # nothing waits longer for the test that holds it


@dataclass
class Repository:
    commits: dict[str, dict[str, bytes]]
    """commit -> file name -> content"""
    refs: dict[str, str]
    """branch or tag -> commit"""
    gated: bool = False
    private: bool = False


@dataclass
class Blob:
    """A file in storage, and what goes wrong with it."""

    content: bytes
    claimed_size_bytes: int | None
    """what the hub says that it has; None: it does not say"""
    is_small: bool = False
    """small files are not in storage: the hub itself sends them, and names no sha256"""
    cut_after_bytes: int | None = None
    """the first answer ends here, the next ones are whole"""
    refusals: list[int] = field(default_factory=list)
    """statuses that the next requests to the storage get"""
    wrong_answers: int = 0
    """so many answers have the right length and other bytes"""
    silent_answers: int = 0
    """so many answers keep silent after the first half, with the connection open"""
    stalled: threading.Event | None = None
    """set when half of the content is sent; the rest comes when `released` is set"""
    released: threading.Event = field(default_factory=threading.Event)


@dataclass
class Request:
    method: str
    path: str
    authorization: str | None
    range: str | None
    by_storage: bool


class HubServer:
    """Its state; tests change it at any time."""

    def __init__(self) -> None:
        self.url = ""
        self.storage_url = ""
        self.repositories: dict[str, Repository] = {}
        self.renamed: dict[str, str] = {}
        """repositories that have another name now"""
        self.blobs: dict[str, Blob] = {}
        self.requests: list[Request] = []
        self.refusals: list[int] = []
        """statuses that the next requests to the hub get, whatever they ask"""
        self.silence: threading.Event | None = None
        """the hub answers nothing until it is set"""
        self.asked_in_silence = threading.Event()
        self.meeting: threading.Barrier | None = None
        """requests to the storage are answered once so many have come"""

    def add(
        self,
        repo_id: str,
        files: dict[str, bytes],
        *,
        revision: str = "main",
        gated: bool = False,
        private: bool = False,
        are_small: bool = False,
    ) -> str:
        """Commit files to a repository; returns the commit."""
        commit = hashlib.sha1(repr((repo_id, revision, sorted(files.items()))).encode()).hexdigest()
        repository = self.repositories.setdefault(repo_id, Repository({}, {}, gated, private))
        repository.commits[commit] = files
        repository.refs[revision] = commit
        for content in files.values():
            self.blobs[sha256(content)] = Blob(content, len(content), are_small)
        return commit

    def blob(self, content: bytes) -> Blob:
        return self.blobs[sha256(content)]

    def fetched(self) -> list[str]:
        """The sha256 of each file that was asked of the storage, in the order of the requests."""
        return [request.path.strip("/") for request in self.requests if request.by_storage]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """Both servers, on free ports, until the end of the block."""
    state = HubServer()
    hub = _Server(("127.0.0.1", 0), type("HubHandler", (_HubHandler,), {"state": state}))
    storage = _Server(("127.0.0.1", 0), type("StorageHandler", (_StorageHandler,), {"state": state}))
    state.url = f"http://127.0.0.1:{hub.server_port}"
    state.storage_url = f"http://127.0.0.1:{storage.server_port}"
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,)) for server in (hub, storage)]
    for thread in threads:
        thread.start()
    try:
        yield state
    finally:
        if state.silence is not None:
            state.silence.set()
        for blob in state.blobs.values():
            blob.released.set()
        for server in (hub, storage):
            server.shutdown()
            server.server_close()
        for thread in threads:
            thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Quiet: clients that are killed or give up are what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: HubServer

    def record(self, *, by_storage: bool) -> None:
        headers = self.headers
        request = Request(self.command, self.path, headers["Authorization"], headers["Range"], by_storage)
        self.state.requests.append(request)

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: the requests are recorded."""


class _HubHandler(_Handler):
    def do_HEAD(self) -> None:
        self.record(by_storage=False)
        if self.state.silence is not None:
            self.state.asked_in_silence.set()
            self.state.silence.wait(PATIENCE_S)
        if self.state.refusals:
            return self.answer(self.state.refusals.pop(0), {})
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/"):
            return self.list_files(path.removeprefix("/api/models/"))
        repo_id, _, rest = path.strip("/").partition("/resolve/")
        if repo_id in self.state.renamed:
            return self.answer(307, {"Location": f"/{self.state.renamed[repo_id]}/resolve/{rest}"})
        revision, _, filename = rest.partition("/")
        return self.resolve(repo_id, revision, filename)

    do_GET = do_HEAD

    def resolve(self, repo_id: str, revision: str, filename: str) -> None:
        commit, error = self.commit_of(repo_id, revision)
        if error is not None:
            return self.answer(*error)
        content = self.state.repositories[repo_id].commits[commit].get(filename)
        if content is None:
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        blob = self.state.blob(content)
        if blob.is_small:
            etag = hashlib.sha1(content).hexdigest()
            return self.answer(200, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}, blob.content)
        size = {} if blob.claimed_size_bytes is None else {"X-Linked-Size": str(blob.claimed_size_bytes)}
        location = {"Location": f"{self.state.storage_url}/{sha256(content)}", "X-Repo-Commit": commit}
        return self.answer(302, {**location, "X-Linked-Etag": f'"{sha256(content)}"', **size})

    def commit_of(self, repo_id: str, revision: str) -> tuple[str, tuple[int, dict[str, str]] | None]:
        """The hub's checks, in its order: a commit, or status and headers of a refusal."""
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if token and token not in (MEMBER_TOKEN, STRANGER_TOKEN):
            return "", (401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        repository = self.state.repositories.get(repo_id)
        if repository is None or (repository.private and token != MEMBER_TOKEN):
            return "", ((404 if token else 401), {"X-Error-Code": "RepoNotFound"})
        if repository.gated and token != MEMBER_TOKEN:
            return "", ((403 if token else 401), {"X-Error-Code": "GatedRepo"})
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            return "", (404, {"X-Error-Code": "RevisionNotFound"})
        return commit, None

    def list_files(self, rest: str) -> None:
        """{repo}[/revision/{revision}], as model_info asks."""
        repo_id, _, revision = rest.partition("/revision/")
        commit, error = self.commit_of(repo_id, revision or "main")
        if error is not None:
            return self.answer(*error)
        names = sorted(self.state.repositories[repo_id].commits[commit])
        info = {"id": repo_id, "sha": commit, "siblings": [{"rfilename": name} for name in names]}
        return self.answer(200, {"Content-Type": "application/json"}, json.dumps(info).encode())


class _StorageHandler(_Handler):
    def do_GET(self) -> None:
        self.record(by_storage=True)
        if self.headers["Authorization"]:
            return self.answer(400, {})
        blob = self.state.blobs[self.path.strip("/")]
        if self.state.meeting is not None:
            self.state.meeting.wait(PATIENCE_S)  # broken: the connection is closed without an answer
        if blob.refusals:
            return self.answer(blob.refusals.pop(0), {})
        content = blob.content
        if blob.wrong_answers > 0:
            blob.wrong_answers -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        first = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        size, last = len(content), len(content) - 1
        headers = {"Content-Length": str(size - first), "Content-Range": f"bytes {first}-{last}/{size}"}
        self.send_response(206 if self.headers["Range"] else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        return self.send_body(blob, content, first)

    def send_body(self, blob: Blob, content: bytes, first: int) -> None:
        if blob.cut_after_bytes is not None:
            self.wfile.write(content[first : blob.cut_after_bytes])
            blob.cut_after_bytes = None
            self.close_connection = True
            return
        half = max(first, len(content) // 2)
        if blob.silent_answers > 0 or blob.stalled is not None:
            self.wfile.write(content[first:half])
            self.wfile.flush()
            if blob.stalled is not None:
                blob.stalled.set()
            else:
                blob.silent_answers -= 1
            blob.released.wait(PATIENCE_S)
            first = half
        self.wfile.write(content[first:])
