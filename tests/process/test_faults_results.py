"""Results that are too large to be posted, and the bucket that takes them: rows B of FAULTS.md."""

import json
import os
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from local.__main__ import Platform
from tests.process.bucket import BucketServer, running_bucket
from tests.process.bucket_server import ACCESS
from tests.process.fault_rows import EVERY, Row
from tests.process.stack import (
    Driver,
    base64_of,
    boot,
    boot_worker,
    invert_job,
    invert_workflow,
    is_inverted,
    job,
    start_worker,
    wait_until,
)
from worker.steps import WIDEST_TIMINGS_MS

pytestmark = pytest.mark.xdist_group("results")  # they share two boots

LIMIT_BYTES = 30_000
LIMIT = {"RESULT_LIMIT_MB": str(LIMIT_BYTES / 1e6), "INTERRUPT_GRACE_S": "1"}
ATTEMPTS = 4


@pytest.fixture(scope="session")
def bucket_server() -> Iterator[BucketServer]:
    with running_bucket() as server:
        yield server


@pytest.fixture(scope="session")
def bucket_stack(bucket_server: BucketServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    settings = {**bucket_server.settings(), **LIMIT, "LOG_LEVEL": "DEBUG"}
    with boot(tmp_path_factory.mktemp("bucket") / "log", **settings) as driver:
        yield driver


@pytest.fixture(scope="session")
def bare_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    with boot(tmp_path_factory.mktemp("no-bucket") / "log", **LIMIT) as driver:
        yield driver


@pytest.fixture
def bucket(bucket_server: BucketServer) -> Iterator[BucketServer]:
    """As it was at the start, before and after."""
    bucket_server.disarm()
    yield bucket_server
    bucket_server.disarm()
    bucket_server.give_access()


def noise(side: int = 160) -> bytes:
    """A PNG of three times side * side bytes, in which nothing repeats."""
    stream = BytesIO()
    Image.frombytes("RGB", (side, side), os.urandom(3 * side * side)).save(stream, "PNG")
    return stream.getvalue()


def large_job(content: bytes, pictures: int = 1, **extra: Any) -> dict[str, Any]:
    """Gives that many pictures, each the inverted content and too large for LIMIT_BYTES."""
    workflow = invert_workflow()
    for number in range(1, pictures):
        save = {"images": ["2", 0], "filename_prefix": f"more/of {number} ä"}
        workflow[f"more{number}"] = {"class_type": "SaveImage", "inputs": save}
    return {"workflow": workflow, "images": {"a.png": base64_of(content)}, **extra}


def text_job(length: int) -> dict[str, Any]:
    """Gives a picture that has no metadata and a text of so many letters, some of which need escapes or two bytes."""
    workflow = invert_workflow()
    workflow["3"] = {"class_type": "SaveImageWebsocket", "inputs": {"images": ["2", 0]}}
    text = 'ä"\\\n' + "x" * (length - 4)
    workflow["text"] = {"class_type": "PrimitiveStringMultiline", "inputs": {"value": text}}
    workflow["show"] = {"class_type": "PreviewAny", "inputs": {"source": ["text", 0]}}
    return job(workflow)


def without_secrets(driver: Driver, answer: dict[str, Any]) -> None:
    """Neither the log, at DEBUG, nor what the caller sees has the key; a link has its id, as every link does."""
    assert ACCESS["secret"] not in driver.log()
    assert ACCESS["id"] not in driver.log()
    assert "X-Amz-Signature" not in driver.log()
    assert ACCESS["secret"] not in json.dumps(answer)


# --- the limit ---


def length_that_fits(driver: Driver) -> int:
    """Letters of the text with which `text_job` is predicted to take LIMIT_BYTES."""
    details = driver.run(text_job(LIMIT_BYTES))["output"]["details"]
    return LIMIT_BYTES - (int(details["body_bytes"]) - LIMIT_BYTES)


@pytest.mark.fault("B1")
def test_a_result_just_under_the_limit_is_posted_with_the_predicted_bytes(row: Row, bare_stack: Driver) -> None:
    length = length_that_fits(bare_stack)
    job_id = bare_stack.start_job(text_job(length))
    result = row.succeeds(bare_stack.finish(job_id))
    times_left = len(json.dumps(WIDEST_TIMINGS_MS)) - len(json.dumps(result["timings_ms"]))
    assert bare_stack.posted_bytes(job_id)[-1] == LIMIT_BYTES - times_left
    assert set(result["timings_ms"]) == set(WIDEST_TIMINGS_MS)
    details = row.fails(bare_stack.run(text_job(length + 1)), "RESULT_TOO_LARGE")
    assert details["body_bytes"] == LIMIT_BYTES + 1
    row.next_job_runs(bare_stack)


@pytest.mark.fault("B2")
def test_a_result_too_large_to_be_posted_names_its_files_and_what_helps(row: Row, bare_stack: Driver) -> None:
    answer = bare_stack.run(large_job(noise(), pictures=2, debug=True))
    bucket = "BUCKET_ENDPOINT_URL, BUCKET_ACCESS_KEY_ID, BUCKET_SECRET_ACCESS_KEY and BUCKET_NAME"
    details = row.fails(answer, "RESULT_TOO_LARGE", "'inverted_00001_.png' 0.1 MB", "output_format", "webp", bucket)
    files = {(file["subfolder"], file["filename"]): file["size_bytes"] for file in details["files"]}
    kept = [Path(path) for path in details["debug"]["files"] if "/output/" in path]
    assert sorted(files.values()) == sorted(path.stat().st_size for path in kept)
    assert set(files) == {("", "inverted_00001_.png"), ("more", "of 1 ä_00001_.png")}
    bare_stack.run(invert_job())  # the files of the one before go
    row.next_job_runs(bare_stack)


@pytest.mark.fault("B3")
def test_texts_too_large_to_be_posted_are_told(
    row: Row, bare_stack: Driver, bucket_stack: Driver, bucket: BucketServer
) -> None:
    row.fails(bucket_stack.run(text_job(2 * LIMIT_BYTES)), "RESULT_TOO_LARGE", "texts do not; ask for less text")
    assert bucket.count() == 0
    workflow = text_job(2 * LIMIT_BYTES)["workflow"]
    row.fails(
        bare_stack.run({"workflow": {key: workflow[key] for key in ("text", "show")}}), "RESULT_TOO_LARGE", "text"
    )
    row.next_job_runs(bucket_stack)
    row.next_job_runs(bare_stack)


# --- the bucket ---


@pytest.mark.fault("B4")
def test_a_result_over_the_limit_is_uploaded_several_files_at_a_time(
    row: Row, bucket_stack: Driver, bucket: BucketServer
) -> None:
    content = noise()
    bucket.fault("gather", times=ATTEMPTS)
    job_id = bucket_stack.start_job(large_job(content, pictures=4))
    answer = bucket_stack.finish(job_id)
    names = {"3": content, "more1": content, "more2": content, "more3": content}
    result = row.succeeds(answer, names)
    assert bucket.count() == 4
    assert bucket_stack.posted_bytes(job_id)[-1] < LIMIT_BYTES
    for item in result["images"]:
        assert item["type"] == "s3_url"
        url = urllib.parse.urlsplit(item["data"])
        _, name, in_job, token, leaf = urllib.parse.unquote(url.path).split("/")
        assert (name, in_job, leaf) == (ACCESS["bucket"], job_id, item["filename"])
        assert len(token) == 32
        assert urllib.parse.parse_qs(url.query)["X-Amz-Expires"] == ["604800"]
        with urllib.request.urlopen(item["data"]) as download:
            assert download.headers["Content-Type"] == "image/png"
            assert len(download.read()) == item["size_bytes"]
        with pytest.raises(urllib.error.HTTPError, match="403"):  # the server checks links
            urllib.request.urlopen(item["data"].replace("results/", "results/a", 1))
    without_secrets(bucket_stack, answer)
    row.next_job_runs(bucket_stack)


@pytest.mark.fault("B5")
def test_with_bucket_always_every_result_is_uploaded(row: Row, bucket: BucketServer, tmp_path: Path) -> None:
    with boot(tmp_path / "log", **bucket.settings(), BUCKET_ALWAYS="1") as driver:
        result = row.succeeds(driver.run(invert_job()))
        assert [item["type"] for item in result["images"]] == ["s3_url"]
        row.next_job_runs(driver)


@pytest.mark.fault("B6")
def test_a_key_that_the_bucket_does_not_take_is_told(row: Row, bucket_stack: Driver, bucket: BucketServer) -> None:
    for other, setting in (("id", "BUCKET_ACCESS_KEY_ID"), ("secret", "BUCKET_SECRET_ACCESS_KEY")):
        bucket.disarm()
        bucket.give_access(**{other: "AKIAANOTHERKEY000000"})
        answer = bucket_stack.run(large_job(noise()))
        details = row.fails(answer, "UPLOAD_FAILED", "HTTP 403", f"look at {setting}", "inverted_00001_.png")
        assert details["retried"] is False
        assert f"upload failed ({details['reason']}) for good" in bucket_stack.log()
        assert bucket.count() == 1
        without_secrets(bucket_stack, answer)
    row.next_job_runs(bucket_stack)


@pytest.mark.fault("B7")
def test_a_bucket_that_does_not_exist_is_told(row: Row, bucket_stack: Driver, bucket: BucketServer) -> None:
    bucket.give_access(bucket="another")
    row.fails(bucket_stack.run(large_job(noise())), "UPLOAD_FAILED", "NoSuchBucket", "look at BUCKET_NAME")
    assert bucket.count() == 1
    row.next_job_runs(bucket_stack)


@pytest.mark.fault("B8")
def test_a_bucket_that_cannot_be_reached_is_tried_again_and_told(
    row: Row, bucket_stack: Driver, bucket: BucketServer
) -> None:
    bucket.stop()
    try:
        job_id = bucket_stack.start_job(large_job(noise()))
        row.fails(bucket_stack.finish(job_id), "UPLOAD_FAILED", "cannot be reached", "BUCKET_ENDPOINT_URL")
    finally:
        bucket.start()
    again = [line for line in bucket_stack.log().splitlines() if f"[{job_id}] upload failed" in line]
    assert len(again) == ATTEMPTS
    row.next_job_runs(bucket_stack)


@pytest.mark.fault("B9")
def test_an_upload_that_fails_twice_is_sent_again(row: Row, bucket_stack: Driver, bucket: BucketServer) -> None:
    bucket.fault("answer", status=500)
    bucket.fault("cut")
    content = noise()
    row.succeeds(bucket_stack.run(large_job(content)), {"3": content})
    assert bucket.count() == 3
    row.next_job_runs(bucket_stack)


@pytest.mark.fault("B10")
def test_a_bucket_that_always_fails_is_given_up(row: Row, bucket_stack: Driver, bucket: BucketServer) -> None:
    bucket.fault("answer", status=503, times=EVERY)
    details = row.fails(bucket_stack.run(large_job(noise())), "UPLOAD_FAILED", "HTTP 503", "send the job again later")
    assert details["retried"] is True
    assert bucket.count() == ATTEMPTS
    row.next_job_runs(bucket_stack)


@pytest.mark.fault("B11")
def test_a_bucket_that_hangs_does_not_hold_up_the_deadline(
    row: Row, bucket_stack: Driver, bucket: BucketServer
) -> None:
    bucket.fault("hang", times=EVERY)
    row.fails(bucket_stack.run(large_job(noise(), timeout_s=2)), "JOB_TIMEOUT")
    assert bucket.count() == 1
    row.next_job_runs(bucket_stack)


@pytest.mark.fault("B11")
def test_a_bucket_that_hangs_does_not_hold_up_a_cancellation(
    row: Row, bucket_stack: Driver, bucket: BucketServer
) -> None:
    bucket.fault("hang", times=EVERY)
    job_id = bucket_stack.start_job(large_job(noise()))
    wait_until(bucket.count, "the upload hangs")
    bucket_stack.cancel(job_id)
    row.ends(bucket_stack.finish(job_id), "CANCELLED")
    wait_until(lambda: f"[{job_id}] wipe:" in bucket_stack.log(), "the job has ended on the worker")
    row.next_job_runs(bucket_stack)


@pytest.mark.fault("B12")
def test_a_bucket_that_is_set_in_part_ends_the_container(
    row: Row, bucket: BucketServer, platform: Platform, tmp_path: Path
) -> None:
    settings = bucket.settings()
    for name in ("BUCKET_ACCESS_KEY_ID", "BUCKET_NAME"):
        del settings[name]
    with start_worker(platform, tmp_path / "log", **settings) as broken:
        job_id = broken.start_job(invert_job())
        assert broken.worker.process.wait(30) == 2
        assert "set BUCKET_ACCESS_KEY_ID, BUCKET_NAME too" in broken.log()
        assert ACCESS["secret"] not in broken.log()
    with boot_worker(platform, tmp_path / "second-log") as worker:
        row.succeeds(worker.finish(job_id))
        row.next_job_runs(worker)


# --- the client ---


def run_client(driver: Driver, folder: Path, content: bytes) -> subprocess.CompletedProcess[str]:
    (folder / "workflow.json").write_text(json.dumps(invert_workflow()))
    (folder / "noise.png").write_bytes(content)
    out = folder / "out"
    return driver.client("--workflow", folder / "workflow.json", "--img", folder / "noise.png", "--out", out)


@pytest.mark.fault("B13")
def test_the_client_downloads_what_is_in_the_bucket(
    row: Row, bucket_stack: Driver, bucket: BucketServer, tmp_path: Path
) -> None:
    content = noise()
    finished = run_client(bucket_stack, tmp_path, content)
    assert finished.returncode == 0, finished.stderr
    (saved,) = (tmp_path / "out").iterdir()
    assert finished.stdout.split("\n")[0] == str(saved)
    assert is_inverted({"type": "base64", "data": base64_of(saved.read_bytes())}, content)
    assert bucket.count("GET") == 1
    row.succeeds(bucket_stack.run(invert_job()))
    row.next_job_runs(bucket_stack)


@pytest.mark.fault("B13")
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"kind": "answer", "status": 403}, "HTTP 403; the link is not valid, or not any more"),
        ({"kind": "cut"}, "its download failed"),
    ],
)
def test_a_download_that_fails_is_told_by_the_client(
    row: Row, bucket_stack: Driver, bucket: BucketServer, tmp_path: Path, fault: dict[str, Any], words: str
) -> None:
    bucket.fault(**fault, method="GET", times=EVERY)
    finished = run_client(bucket_stack, tmp_path, noise())
    assert finished.returncode == 3
    assert "inverted_00001_.png is not saved: " in finished.stderr
    assert words in finished.stderr
    assert list((tmp_path / "out").iterdir()) == []
    row.succeeds(bucket_stack.run(invert_job()))
    row.next_job_runs(bucket_stack)


@pytest.mark.fault("B14")
def test_a_failure_too_large_to_be_posted_is_cut(row: Row, bare_stack: Driver) -> None:
    workflow = invert_workflow()
    for number in range(20):
        bad = dict.fromkeys(("upscale_method", "width", "height", "crop"), "x" * 5000)
        workflow[f"{number:0200}"] = {"class_type": "ImageScale", "inputs": {"image": ["1", 0], **bad}}
        workflow[f"s{number}"] = {"class_type": "PreviewImage", "inputs": {"images": [f"{number:0200}", 0]}}
    del workflow["3"]  # nothing of it is left that can run
    answer = bare_stack.run(job(workflow))
    assert row.fails(answer, "PROMPT_REJECTED", "upscale_method") == {}
    row.fails(bare_stack.run(job({"n" * 4_000_000: workflow["1"], **invert_workflow()})), "WORKFLOW_INVALID", "200")
    row.next_job_runs(bare_stack)
