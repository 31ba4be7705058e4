"""From the outputs to the result that is posted: Base64 where RunPod takes it, else links into a bucket."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from worker.bucket import Bucket, Upload
from worker.control import JobControl
from worker.errors import ResultTooLarge
from worker.outputs import Output, Text
from worker.payload import json_safe
from worker.ramdisk import RamDisk

# The limits count the posted JSON body; RunPod documents 10 MB, and 20 MB for jobs of /runsync, whose ids show it.
ASYNC_LIMIT_BYTES = 10_000_000
SYNC_LIMIT_BYTES = 20_000_000
MARGIN = 0.98
MAX_SHOWN_FILES, MAX_LISTED_FILES = 5, 100  # in the sentence, and in the details of a failure
MAX_ERROR_CHARS = 2000  # of a failure over the limit
SHRINK_AS_WEBP = ("image/apng", "image/bmp", "image/gif", "image/jpeg", "image/png", "image/tiff")
BUCKET_SETTINGS = "BUCKET_ENDPOINT_URL, BUCKET_ACCESS_KEY_ID, BUCKET_SECRET_ACCESS_KEY and BUCKET_NAME"

Item = dict[str, Any]


def result_limit_bytes(job_id: str, override: int | None) -> int:
    """How large the posted body may be for this job."""
    if override is not None:
        return override
    return int(MARGIN * (SYNC_LIMIT_BYTES if job_id.startswith("sync-") else ASYNC_LIMIT_BYTES))


@dataclass(frozen=True)
class Delivery:
    """How the results of one job reach its caller. ``bucket`` is None where the worker has none."""

    job_id: str
    limit_bytes: int
    ramdisk: RamDisk
    bucket: Bucket | None
    control: JobControl

    def deliver(self, outputs: Sequence[Output], texts: list[Text], rest: dict[str, Any]) -> dict[str, Any]:
        """``{"status", "images": [item...]}``, where there are any ``videos``, ``audio``, ``files`` and ``texts``, and
        ``rest``, which is measured with it.

        A result over the limit is uploaded, all its files, so that a caller gets one kind of item or the other.
        Raises OutputMissing, OutputDamaged, ResultTooLarge or UploadFailed, and what `Bucket.upload` does.
        """
        items = [output.item(output.size_bytes(self.ramdisk)) for output in outputs]
        result = _assembled(outputs, items, texts, rest)
        body_bytes = posted_bytes(result) + sum(base64_bytes(item["size_bytes"]) for item in items)
        if self.bucket is not None and outputs and (self.bucket.settings.always or body_bytes > self.limit_bytes):
            # Before anything is uploaded in vain, and with the links.
            self._check_without_files(result, "files go into the bucket, but texts do not; ask for less text")
            self._upload(self.bucket, outputs, items)
            self._check_without_files(result, "so many are the links to its files; save fewer")
        elif body_bytes > self.limit_bytes:
            raise self._too_large(body_bytes, items, _what_helps(items))
        else:
            for output, item in zip(outputs, items, strict=True):
                item["data"] = base64.b64encode(output.read(self.ramdisk)).decode("ascii")
        return result

    def _check_without_files(self, result: dict[str, Any], advice: str) -> None:
        if (body_bytes := posted_bytes(result)) > self.limit_bytes:
            raise self._too_large(body_bytes, [], advice)

    def _upload(self, bucket: Bucket, outputs: Sequence[Output], items: list[Item]) -> None:
        for output in outputs:
            output.read(self.ramdisk)  # one after the other, and only to see that each is whole
        uploads = [
            Upload(output.filename, output.media_type, item["size_bytes"], partial(output.open, self.ramdisk))
            for output, item in zip(outputs, items, strict=True)
        ]
        for item, link in zip(items, bucket.upload(self.job_id, uploads, self.control), strict=True):
            item.update(type="s3_url", data=link)

    def _too_large(self, body_bytes: int, items: list[Item], advice: str) -> ResultTooLarge:
        largest = sorted(items, key=lambda item: -int(item["size_bytes"]))
        shown = [f"{item['filename']!r} {item['size_bytes'] / 1e6:.1f} MB" for item in largest[:MAX_SHOWN_FILES]]
        shown += [f"{len(items) - MAX_SHOWN_FILES} more"] if len(items) > MAX_SHOWN_FILES else []
        files = [{key: item[key] for key in ("filename", "subfolder", "size_bytes")} for item in largest]
        return ResultTooLarge(
            f"The result takes {body_bytes / 1e6:.1f} MB and RunPod takes {self.limit_bytes / 1e6:.1f} MB"
            f"{' (' + ', '.join(shown) + ')' if shown else ''}: {advice}.",
            body_bytes=body_bytes,
            limit_bytes=self.limit_bytes,
            files=files[:MAX_LISTED_FILES],
        )


def posted_bytes(result: dict[str, Any]) -> int:
    """How many bytes the SDK posts for it: json.dumps({"output": result}, ensure_ascii=False) (runpod 1.12.0)."""
    return len(json.dumps({"output": json_safe(result)}, ensure_ascii=False).encode())


def fitted_failure(failure: dict[str, Any], limit_bytes: int) -> dict[str, Any]:
    """A failed job's answer; without its details, and with a shorter sentence, where it is over the limit.

    RunPod refuses a larger one with 400 and shows the job as COMPLETED, without output.
    """
    if posted_bytes(failure) <= limit_bytes:
        return failure
    return {**failure, "error": failure["error"][:MAX_ERROR_CHARS], "details": {}}


def base64_bytes(size_bytes: int) -> int:
    return 4 * ((size_bytes + 2) // 3)


def _assembled(outputs: Sequence[Output], items: list[Item], texts: list[Text], rest: dict[str, Any]) -> dict[str, Any]:
    lists: dict[str, list[Any]] = {"images": []}
    for output, item in zip(outputs, items, strict=True):
        lists.setdefault(output.category, []).append(item)
    if texts:
        lists["texts"] = texts
    return {"status": "success", **lists, **rest}


def _what_helps(items: list[Item]) -> str:
    if not items:
        return "ask for less text"
    shrinks = any(item["media_type"] in SHRINK_AS_WEBP for item in items)
    webp = "ask for 'output_format': 'webp', " if shrinks else ""
    return f"save fewer or smaller files, {webp}or give the worker a bucket ({BUCKET_SETTINGS})"
