"""A Hugging Face hub on 127.0.0.1: what huggingface_hub 2.4.0 asks for one file, and the hub's ways to refuse it.

Two servers, because the hub keeps large files on another host: `hub` answers /{repo}/resolve/{revision}/{file} with
a redirect to `storage`, which refuses a request that brings the token along, as S3 does. Every request is recorded.
"""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

MEMBER_TOKEN = "hf_member_of_every_repository"
STRANGER_TOKEN = "hf_stranger_without_any_rights"


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
    claimed_size_bytes: int
    """what the hub says that it has"""
    cut_after_bytes: int | None = None
    """the first answer ends here, the next ones are whole"""
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
        self.blobs: dict[str, Blob] = {}
        self.requests: list[Request] = []
        self.refusals: list[int] = []
        """statuses that the next requests to the hub get, whatever they ask"""

    def add(
        self,
        repo_id: str,
        files: dict[str, bytes],
        *,
        revision: str = "main",
        gated: bool = False,
        private: bool = False,
    ) -> str:
        """Commit files to a repository; returns the commit."""
        commit = hashlib.sha1(repr((repo_id, revision, sorted(files.items()))).encode()).hexdigest()
        repository = self.repositories.setdefault(repo_id, Repository({}, {}, gated, private))
        repository.commits[commit] = files
        repository.refs[revision] = commit
        for content in files.values():
            self.blobs[sha256(content)] = Blob(content, len(content))
        return commit

    def blob(self, content: bytes) -> Blob:
        return self.blobs[sha256(content)]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """Both servers, on free ports, until the end of the block."""
    state = HubServer()
    hub = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (_HubHandler,), {"state": state}))
    storage = ThreadingHTTPServer(("127.0.0.1", 0), type("StorageHandler", (_StorageHandler,), {"state": state}))
    state.url = f"http://127.0.0.1:{hub.server_port}"
    state.storage_url = f"http://127.0.0.1:{storage.server_port}"
    threads = [threading.Thread(target=server.serve_forever, args=(0.05,)) for server in (hub, storage)]
    for thread in threads:
        thread.start()
    try:
        yield state
    finally:
        for blob in state.blobs.values():
            blob.released.set()
        for server in (hub, storage):
            server.shutdown()
            server.server_close()
        for thread in threads:
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: HubServer

    def record(self, *, by_storage: bool) -> None:
        headers = self.headers
        request = Request(self.command, self.path, headers["Authorization"], headers["Range"], by_storage)
        self.state.requests.append(request)

    def answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: the requests are recorded."""


class _HubHandler(_Handler):
    def do_HEAD(self) -> None:
        self.record(by_storage=False)
        if self.state.refusals:
            return self.answer(self.state.refusals.pop(0), {})
        repo_id, _, rest = unquote(self.path).strip("/").partition("/resolve/")
        return self.answer(*self.resolve(repo_id, rest))

    do_GET = do_HEAD

    def resolve(self, repo_id: str, rest: str) -> tuple[int, dict[str, str]]:
        """The hub's checks, in its order."""
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if token and token not in (MEMBER_TOKEN, STRANGER_TOKEN):
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}
        repository = self.state.repositories.get(repo_id)
        if repository is None or (repository.private and token != MEMBER_TOKEN):
            return (404 if token else 401), {"X-Error-Code": "RepoNotFound"}
        if repository.gated and token != MEMBER_TOKEN:
            return (403 if token else 401), {"X-Error-Code": "GatedRepo"}
        revision, _, filename = rest.partition("/")
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}
        content = repository.commits[commit].get(filename)
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
        return 302, {
            "Location": f"{self.state.storage_url}/{sha256(content)}",
            "X-Repo-Commit": commit,
            "X-Linked-Etag": f'"{sha256(content)}"',
            "X-Linked-Size": str(self.state.blob(content).claimed_size_bytes),
        }


class _StorageHandler(_Handler):
    def do_GET(self) -> None:
        self.record(by_storage=True)
        if self.headers["Authorization"]:
            return self.answer(400, {})
        blob = self.state.blobs[self.path.strip("/")]
        first = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        size, last = len(blob.content), len(blob.content) - 1
        headers = {"Content-Length": str(size - first), "Content-Range": f"bytes {first}-{last}/{size}"}
        self.answer(206 if self.headers["Range"] else 200, headers)
        return self.send_body(blob, first)

    def send_body(self, blob: Blob, first: int) -> None:
        if blob.cut_after_bytes is not None:
            self.wfile.write(blob.content[first : blob.cut_after_bytes])
            blob.cut_after_bytes = None
            self.close_connection = True
            return
        if blob.stalled is not None:
            half = len(blob.content) // 2
            self.wfile.write(blob.content[first:half])
            self.wfile.flush()
            blob.stalled.set()
            blob.released.wait(timeout=60)
            self.close_connection = True
            return
        self.wfile.write(blob.content[first:])
