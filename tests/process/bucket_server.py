"""A real S3 server as a process: moto, which checks every signature here, with faults in front of it.

    python -m tests.process.bucket_server PORT      prints "listening URL"; PORT may be 0

It has one bucket and one key, below. `POST /_fault {"kind": ..., "times": 1}` strikes the next uploads, or with
`"method": "GET"` the next downloads; `GET /_fault` tells how many uploads and downloads have come, struck ones too.

- `answer`: they are answered with `status`; `cut`: the connection is closed; `hang`: they wait for DELETE /_fault
- `gather`: they wait until so many are there as `times` says, and are answered 500 after GATHER_TIMEOUT_S without

`POST /_access {"id": ..., "secret": ..., "bucket": ...}`: from now on the server knows this key and this bucket only.
"""

import hashlib
import hmac
import json
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.core.authorization import ActionAuthenticatorMixin
from moto.iam.models import iam_backends
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

ACCESS = {"id": "AKIATESTBUCKETKEY000", "secret": "the-secret-of-the-test-bucket-0123456789", "bucket": "results"}
ACCOUNT, REGION = "123456789012", "us-east-1"
GATHER_TIMEOUT_S = 20.0
HANG_TIMEOUT_S = 120.0
ALLOW_ALL = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
_HIDDEN: dict[str, Any] = {}  # buckets that are not to be found now

StartResponse = Callable[..., Any]


class Server:
    """The WSGI application."""

    def __init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Condition()
        self._armed: list[dict[str, Any]] = []
        self._counts = {"PUT": 0, "GET": 0}
        self._gathered = 0
        self._released = threading.Event()

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        request = Request(environ)
        if request.path == "/_fault":
            return self._fault(request)(environ, start_response)
        if request.path == "/_access":
            give_access(**{**ACCESS, **json.loads(request.get_data())})
            return Response()(environ, start_response)
        if request.method in self._counts and request.path.count("/") > 2:  # an object, not the bucket
            fault = self._struck(request.method)
            answer = None if fault is None else self._strike(fault, request)
            if answer is None and "X-Amz-Signature" in request.args and not is_signed_link(request):
                answer = Response(status=403)
            if answer is not None:
                return answer(environ, start_response)
        return self._moto(environ, start_response)  # type: ignore[no-any-return]

    def _fault(self, request: Request) -> Response:
        with self._lock:
            if request.method == "POST":
                self._armed.append({"times": 1, "method": "PUT", **json.loads(request.get_data())})
                self._gathered = 0
                self._released.clear()
            elif request.method == "DELETE":
                self._armed.clear()
                self._counts = dict.fromkeys(self._counts, 0)
                self._released.set()
            return Response(json.dumps(self._counts))

    def _struck(self, method: str) -> dict[str, Any] | None:
        with self._lock:
            self._counts[method] += 1
            for fault in self._armed:
                if fault["method"] == method and fault["times"] > 0:
                    wanted = dict(fault)
                    fault["times"] -= fault["kind"] != "gather"
                    return wanted
        return None

    def _strike(self, fault: dict[str, Any], request: Request) -> Response | None:
        if fault["kind"] == "cut":
            raise ConnectionAbortedError
        if fault["kind"] != "gather":
            request.get_data()  # else the client is told of a broken pipe
        if fault["kind"] == "hang":
            self._released.wait(HANG_TIMEOUT_S)
            return Response(status=503)
        if fault["kind"] == "answer":
            return Response(status=fault["status"])
        with self._lock:
            self._gathered += 1
            self._lock.notify_all()
            met = self._lock.wait_for(lambda: self._gathered >= fault["times"], GATHER_TIMEOUT_S)
        return None if met else Response(status=500)


def give_access(id: str, secret: str, bucket: str) -> None:
    """Only this key, and only this bucket."""
    iam, s3 = iam_backends[ACCOUNT]["aws"], s3_backends[ACCOUNT]["aws"]
    if "worker" not in iam.users:
        iam.create_user(REGION, "worker")
        iam.put_user_policy("worker", "all", json.dumps(ALLOW_ALL))
        iam.create_access_key("worker")
    (key,) = iam.users["worker"].access_keys
    key.access_key_id, key.secret_access_key = id, secret
    if bucket not in s3.buckets | _HIDDEN:
        s3.create_bucket(bucket, REGION)
    _HIDDEN.update(s3.buckets)
    s3.buckets.clear()
    s3.buckets[bucket] = _HIDDEN.pop(bucket)
    s3_backends.bucket_accounts = {bucket: ("aws", ACCOUNT)}  # where moto looks first


def is_signed_link(request: Request) -> bool:
    """Whether a link is signed with the key that the server knows (AWS signature version 4, in the query)."""
    (key,) = iam_backends[ACCOUNT]["aws"].users["worker"].access_keys
    path, _, query = request.environ["RAW_URI"].partition("?")
    signed = "&".join(sorted(part for part in query.split("&") if not part.startswith("X-Amz-Signature=")))
    canonical = f"{request.method}\n{path}\n{signed}\nhost:{request.host}\n\nhost\nUNSIGNED-PAYLOAD"
    key_id, _, scope = request.args["X-Amz-Credential"].partition("/")
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    secret = f"AWS4{key.secret_access_key}".encode()
    for part in [*scope.split("/"), f"AWS4-HMAC-SHA256\n{request.args['X-Amz-Date']}\n{scope}\n{digest}"]:
        secret = hmac.digest(secret, part.encode(), "sha256")
    return key_id == key.access_key_id and secret.hex() == request.args["X-Amz-Signature"]


def check_signed_headers_only() -> None:
    """moto looks for a signature in the Authorization header; links have theirs in the query."""
    check = ActionAuthenticatorMixin._authenticate_and_authorize_action

    def checked(self: Any, iam_request_cls: type, resource: str = "*") -> None:
        if "X-Amz-Signature=" not in self.uri:
            check(self, iam_request_cls, resource)

    ActionAuthenticatorMixin._authenticate_and_authorize_action = checked  # type: ignore[method-assign]


class Quiet(WSGIRequestHandler):
    def log(self, *arguments: Any) -> None:
        """Nothing: requests hold signatures."""

    def connection_dropped(self, error: BaseException, environ: Any = None) -> None:
        self.close_connection = True


def main() -> None:
    check_signed_headers_only()
    give_access(**ACCESS)
    server = make_server("127.0.0.1", int(sys.argv[1]), Server(), threaded=True, request_handler=Quiet)
    print(f"listening http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
