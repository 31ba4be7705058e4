"""Files into an S3 bucket, and links to them: for results that are too large to be posted.

boto3 comes with runpod. It is imported with the first upload, because it costs 0.3 s and 25 MB.
"""

from __future__ import annotations

import io
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urlsplit

from worker.control import JobControl
from worker.errors import UploadFailed

log = logging.getLogger(__name__)

LINK_VALID_S = 604_800  # seven days, the most that signature version 4 allows
PARALLEL_UPLOADS = 4
UPLOAD_TIMEOUT_S = 600.0  # of all files of a job together
SILENCE_TIMEOUT_S = 10.0  # of one connection, whether it is opened, written to or read from
RETRY_WAITS_S = (0.5, 1.0, 2.0)
TICK_S = 0.05  # how soon a cancellation or a deadline is seen
_REGION_IN_HOST = re.compile(r"(?:^|\.)s3(?:[.-]|api-)(?:dualstack\.)?([a-z]{2,3}(?:-[a-z]+)+-\d+)\.", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class BucketSettings:
    """Where results go. ``always``: also those that are small enough to be posted."""

    endpoint_url: str
    access_key_id: str = field(repr=False)
    secret_access_key: str = field(repr=False)
    name: str
    region: str | None = None
    always: bool = False

    @property
    def service_url(self) -> str:
        """The endpoint without the bucket, which some consoles show in front of the host or behind it."""
        url = urlsplit(self.endpoint_url)
        host, path = url.netloc.removeprefix(f"{self.name}."), url.path.rstrip("/").removesuffix(f"/{self.name}")
        return f"{url.scheme}://{host}{path}"

    @property
    def signing_region(self) -> str:
        """The region is a part of the signature: AWS and others have it in their host's name; R2 and MinIO take
        us-east-1, unless the owner of a MinIO has named another."""
        found = _REGION_IN_HOST.search(urlsplit(self.service_url).netloc)
        return self.region or (found[1] if found else "us-east-1")


class Upload(NamedTuple):
    """One file: ``open`` gives a new stream of its bytes each time."""

    filename: str
    media_type: str
    size_bytes: int
    open: Callable[[], AbstractContextManager[BinaryIO]]


class Bucket:
    """Uploads of one worker. Keys are unguessable and begin with the job's id."""

    def __init__(self, settings: BucketSettings) -> None:
        self.settings = settings
        self._client: Any = None

    def upload(self, job_id: str, uploads: Sequence[Upload], control: JobControl) -> list[str]:
        """Several at a time; returns a link for each, valid for LINK_VALID_S.

        Raises UploadFailed where one has failed for good, and what `JobControl.check` does. Threads that are stuck
        then are left behind: they send nothing more and end within SILENCE_TIMEOUT_S.
        """
        client = self._connected()
        stop = threading.Event()
        deadline = time.monotonic() + UPLOAD_TIMEOUT_S
        pool = ThreadPoolExecutor(PARALLEL_UPLOADS, thread_name_prefix="upload")
        try:
            # Each in a copy of this thread's context, which has the job's id for the log.
            futures = [pool.submit(copy_context().run, self._send, client, job_id, upload, stop) for upload in uploads]
            pending: set[Future[str]] = set(futures)
            while pending:
                control.check()
                if time.monotonic() > deadline:
                    raise UploadFailed(f"The bucket did not take the results within {UPLOAD_TIMEOUT_S:g} s.")
                done, pending = wait(pending, TICK_S, FIRST_EXCEPTION)
                for future in done:
                    future.result()
            return [future.result() for future in futures]
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _connected(self) -> Any:
        """The client, which speaks to nobody yet. Raises UploadFailed for settings that boto3 cannot use."""
        from botocore.exceptions import BotoCoreError

        try:
            if self._client is None:
                self._client = self._made()
        except (BotoCoreError, ValueError) as error:  # an invalid host, region or AWS_PROFILE
            advice = "look at BUCKET_ENDPOINT_URL and BUCKET_REGION"
            raise UploadFailed(f"There is no way to the bucket ({type(error).__name__}); {advice}.") from None
        return self._client

    def _made(self) -> Any:
        import boto3.session
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.settings.service_url,
            region_name=self.settings.signing_region,
            aws_access_key_id=self.settings.access_key_id,
            aws_secret_access_key=self.settings.secret_access_key,
            config=Config(
                signature_version="s3v4",
                # AWS, R2, MinIO, RunPod, Backblaze and Wasabi know it; host names need a wildcard certificate.
                s3={"addressing_style": "path"},
                # boto3's newer default sends checksums in a form that other servers than AWS refuse.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                connect_timeout=SILENCE_TIMEOUT_S,
                read_timeout=SILENCE_TIMEOUT_S,
                max_pool_connections=PARALLEL_UPLOADS,
                retries={"total_max_attempts": 1},  # `_send` tries again, and stops when the job does
            ),
        )

    def _send(self, client: Any, job_id: str, upload: Upload, stop: threading.Event) -> str:
        """Upload one file, tried again after RETRY_WAITS_S where that can help. Raises the last UploadFailed."""
        name = upload.filename.encode(errors="replace").decode()  # a file's name may hold what no URL can
        place = {"Bucket": self.settings.name, "Key": f"{job_id}/{secrets.token_hex(16)}/{name}"}
        waits_s = iter(RETRY_WAITS_S)
        while (failure := self._try(client, place, upload, stop)) is not None:
            wait_s = next(waits_s, None)
            if wait_s is None or not failure.details["retried"]:
                log.error("upload failed (%s) for good", failure.details["reason"])
                raise failure
            log.warning("upload failed (%s); trying again in %g s", failure.details["reason"], wait_s)
            if stop.wait(wait_s):
                raise failure
        return str(client.generate_presigned_url("get_object", Params=place, ExpiresIn=LINK_VALID_S))

    def _try(self, client: Any, place: dict[str, str], upload: Upload, stop: threading.Event) -> UploadFailed | None:
        from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError
        from botocore.parsers import ResponseParserError

        parameters = {**place, "ContentLength": upload.size_bytes, "ContentType": upload.media_type}
        try:
            with upload.open() as stream:
                answer = client.put_object(Body=_Body(stream, stop), **parameters)
        except ClientError as error:
            return _refusal(error.response, upload.filename)
        except (ConnectionError, HTTPClientError, OSError) as error:  # OSError: of urllib3, and of `_Body`
            return _failure(upload.filename, type(error).__name__, _NO_ANSWER, retried=True)
        except (BotoCoreError, ResponseParserError, ValueError) as error:  # what cannot be sent, or understood
            return _failure(upload.filename, type(error).__name__, _UNUSABLE, retried=False)
        if "ETag" not in answer:  # a console or a proxy that says 200 to everything
            return _failure(upload.filename, "an answer that is not S3's", _UNUSABLE, retried=False)
        return None


class _Body:
    """A stream that ends with an error when the job has ended, so that nothing more of it is sent."""

    def __init__(self, stream: BinaryIO, stop: threading.Event) -> None:
        self._stream = stream
        self._stop = stop

    def read(self, size: int = -1) -> bytes:
        if self._stop.is_set():
            raise OSError("the job has ended")
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()


# --- what went wrong, in our own words: a server's message can hold the key's id -------------------------------------

_ADVICE = {
    "InvalidAccessKeyId": "the bucket does not know the key; look at BUCKET_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the bucket refuses the signature; look at BUCKET_SECRET_ACCESS_KEY, then BUCKET_REGION",
    "RequestTimeTooSkewed": "the bucket finds this machine's clock wrong",
    "NoSuchBucket": "there is no such bucket; look at BUCKET_NAME and BUCKET_ENDPOINT_URL",
    "AuthorizationHeaderMalformed": "the bucket is in another region; set BUCKET_REGION",
    "PermanentRedirect": "the bucket is in another region; look at BUCKET_ENDPOINT_URL and BUCKET_REGION",
}
_ADVICE_BY_STATUS = {
    401: "the bucket refuses the key; look at BUCKET_ACCESS_KEY_ID and BUCKET_SECRET_ACCESS_KEY",
    403: "the key may not write into the bucket; look at its permissions and BUCKET_NAME",
    404: "there is no such bucket; look at BUCKET_NAME and BUCKET_ENDPOINT_URL",
}
_NO_ANSWER = "the bucket cannot be reached or does not answer; look at BUCKET_ENDPOINT_URL and the network"
_UNUSABLE = "look at BUCKET_ENDPOINT_URL and BUCKET_NAME"


def _refusal(response: dict[str, Any], filename: str) -> UploadFailed:
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = re.sub(r"[^A-Za-z0-9]", "", str(response.get("Error", {}).get("Code", "")))[:60]
    retried = status >= 500 or status in (408, 429) or code == "RequestTimeout"
    advice = _ADVICE.get(code) or _ADVICE_BY_STATUS.get(status) or "look at BUCKET_ENDPOINT_URL"
    if retried:
        advice = "it failed on the bucket's side; send the job again later"
    return _failure(filename, f"HTTP {status} {code}".strip(), advice, retried=retried)


def _failure(filename: str, reason: str, advice: str, *, retried: bool) -> UploadFailed:
    sentence = f"{filename!r} could not be uploaded ({reason}): {advice}."
    return UploadFailed(sentence, file=filename, reason=reason, retried=retried)
