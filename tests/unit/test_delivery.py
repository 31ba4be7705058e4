"""From the outputs to the posted result: its size, and what is done where that is too much."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.bucket import Bucket, BucketSettings
from worker.control import JobControl
from worker.delivery import Delivery, posted_bytes, result_limit_bytes
from worker.errors import JobCancelled, ResultTooLarge
from worker.outputs import Output
from worker.payload import json_safe
from worker.ramdisk import RamDisk

REST = {"warnings": ['Ümlaut, "quote", line\n, surrogate \ud800'], "timings_ms": {"parse": 0.1}, "debug": {"a": 1.5}}
TEXTS = [{"node_id": "2", "text": 'ein Text mit Ümlaut \x07 "und" \ud83d'}]
OUTPUTS = [Output("1", "ä.bin", data=b"x" * 1000), Output("57:9", "b.bin", subfolder='s"', data=b"y" * 1001)]


def delivery(limit_bytes: int, bucket: Bucket | None = None, control: JobControl | None = None) -> Delivery:
    return Delivery("job-1", limit_bytes, RamDisk(Path("/nowhere")), bucket, control or JobControl(60))


def test_the_size_limit_counts_the_posted_body_to_the_byte() -> None:
    result = delivery(10**9).deliver(OUTPUTS, TEXTS, REST)
    # What rp_handler.py returns and the SDK posts (runpod 1.12.0, rp_http.py).
    body_bytes = len(json.dumps({"output": json_safe(result)}, ensure_ascii=False).encode())
    assert delivery(body_bytes).deliver(OUTPUTS, TEXTS, REST) == result
    with pytest.raises(ResultTooLarge) as caught:
        delivery(body_bytes - 1).deliver(OUTPUTS, TEXTS, REST)
    assert caught.value.details == {
        "body_bytes": body_bytes,
        "limit_bytes": body_bytes - 1,
        "files": [
            {"filename": "b.bin", "subfolder": 's"', "size_bytes": 1001},
            {"filename": "ä.bin", "subfolder": "", "size_bytes": 1000},
        ],
    }


@given(st.dictionaries(st.text(), st.text() | st.floats() | st.integers() | st.lists(st.text())))
def test_what_is_measured_is_what_is_posted(result: dict[str, Any]) -> None:
    assert posted_bytes(result) == len(json.dumps({"output": json_safe(result)}, ensure_ascii=False).encode())


def test_of_many_files_the_largest_are_told() -> None:
    outputs = [Output("1", f"{size}.bin", data=bytes(size)) for size in range(1, 201)]
    with pytest.raises(ResultTooLarge, match=r"'200.bin' 0.0 MB, '199.bin'.*, 195 more\)") as caught:
        delivery(1000).deliver(outputs, [], {})
    assert [file["size_bytes"] for file in caught.value.details["files"]] == list(range(200, 100, -1))


def test_a_cancelled_job_uploads_nothing() -> None:
    settings = BucketSettings(
        endpoint_url="http://127.0.0.1:1", access_key_id="k", secret_access_key="s", name="b", always=True
    )
    control = JobControl(60)
    control.cancel()
    with pytest.raises(JobCancelled):
        delivery(10**9, Bucket(settings), control).deliver(OUTPUTS, [], {})


def test_the_limit_is_that_of_the_job_with_a_margin() -> None:
    assert result_limit_bytes("abc-u1", None) == 9_800_000
    assert result_limit_bytes("sync-abc-u1", None) == 19_600_000
    assert result_limit_bytes("abc-sync-u1", None) == 9_800_000
    assert result_limit_bytes("sync-abc-u1", 5) == 5
