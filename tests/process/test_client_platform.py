"""client.py as a process against the platform stand-in: every fault that a client can meet, every end of a job.

In most tests the worker is the test itself: it takes the jobs and posts their results. Those that need the product's
own worker stand at the end.
"""

import base64
import contextlib
import json
import os
import signal
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from local.__main__ import ENDPOINT, Platform
from tests.client_process import CLIENT, IMPATIENT, ClientProcess, Ended
from tests.process.stack import (
    DEADLINE_S,
    ROOT,
    Api,
    Driver,
    boot_platform,
    picture_bytes,
    slow_workflow,
    start_worker,
    wait_until,
)

SAVED, JOB_FAILED, BAD_INPUT, PLATFORM, TIMED_OUT, INTERRUPTED = 0, 1, 2, 3, 4, 130
BUSY = "client-429"
BROKEN = ("client-500", "client-503", "client-502", "client-html", "client-drop", "client-cut")
PICTURE = {"filename": "a.png", "type": "base64", "data": base64.b64encode(picture_bytes()).decode()}
WORKFLOW = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0, "seed": 1}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "out"}},
}


class Bench(Api):
    """A platform on which the test is the worker."""

    def _as_worker(self, method: str, path: str, body: Any = None) -> bytes:
        request = urllib.request.Request(
            f"{self.platform.api_url}/{ENDPOINT}/{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": self.platform.api_key},
        )
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            return bytes(answer.read())

    def take(self) -> dict[str, Any]:
        """The next job, once there is one: {"id", "input"}."""
        return dict(json.loads(wait_until(lambda: self._as_worker("GET", "job-take/pod1"), "a job arrives")))

    def post(self, job_id: str, **body: Any) -> None:
        """A result as the SDK posts it (``output``, ``error``), or with ``status`` a progress update."""
        self._as_worker("POST", f"job-done/pod1/{job_id}", body)

    def jobs(self) -> dict[str, int]:
        return dict(self.call("GET", "health")["jobs"])


class Folder:
    """A folder with a workflow, in which clients run; what they save lies in its ``output``."""

    def __init__(self, path: Path, platform: Platform) -> None:
        self.path = path
        self.platform = platform
        (path / "workflow.json").write_text(json.dumps(WORKFLOW))

    def start(self, *arguments: str | Path, impatient: bool = False) -> ClientProcess:
        program = ("-c", IMPATIENT) if impatient else (CLIENT,)
        access = {"RUNPOD_API_KEY": self.platform.api_key, "RUNPOD_ENDPOINT_ID": ENDPOINT}
        told = ("--url", self.platform.api_url, *map(str, arguments))
        return ClientProcess(self.path, program, told, os.environ | access)

    def job(self, *arguments: str | Path, impatient: bool = False) -> ClientProcess:
        return self.start("--workflow", "workflow.json", *arguments, impatient=impatient)

    def run(self, *arguments: str | Path) -> Ended:
        return self.start(*arguments).end()

    def saved(self) -> dict[str, bytes]:
        with contextlib.suppress(FileNotFoundError):
            return {path.name: path.read_bytes() for path in (self.path / "output").iterdir()}
        return {}


@pytest.fixture(scope="module")
def shared_bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with boot_platform(tmp_path_factory.mktemp("platform") / "log", "--lost-s", "600") as running:
        yield Bench(running)


@pytest.fixture
def bench(shared_bench: Bench) -> Iterator[Bench]:
    """The platform with an empty queue and, afterwards, without faults."""
    shared_bench.call("POST", "purge-queue")
    yield shared_bench
    for kind in shared_bench.platform_faults():
        shared_bench.platform_fault(kind, times=0)


@pytest.fixture
def folder(bench: Bench, tmp_path: Path) -> Folder:
    return Folder(tmp_path, bench.platform)


def assert_one_error(ended: Ended, code: int, said: str) -> None:
    assert (ended.code, len(ended.errors)) == (code, 1), ended
    assert said in ended.errors[0]


# --- the hand-over ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BROKEN)
def test_a_job_whose_handing_over_fails_is_not_sent_again(bench: Bench, folder: Folder, kind: str) -> None:
    bench.platform_fault(kind, call="run", times=1000)
    ended = folder.job().end()
    assert_one_error(ended, PLATFORM, "could not be handed over")
    assert "may" in ended.errors[0], "nobody knows whether the job was taken, and it is billed"
    assert (bench.platform_strikes(kind), bench.jobs()["inQueue"]) == (1, 1 if kind == "client-cut" else 0)


def test_an_endpoint_that_is_not_there_is_told(bench: Bench, folder: Folder) -> None:
    bench.platform_fault("client-404", call="run", times=1000)
    assert_one_error(folder.job().end(), PLATFORM, "there is no endpoint at")
    assert bench.platform_strikes("client-404") == 1
    assert_one_error(folder.job("--endpoint", "other").end(), PLATFORM, f"{bench.platform.api_url}/other")


@pytest.mark.parametrize(("call", "options"), [("run", ()), ("runsync", ("--sync",))])
def test_a_busy_platform_gets_the_job_once(bench: Bench, folder: Folder, call: str, options: tuple[str, ...]) -> None:
    bench.platform_fault(BUSY, call=call, times=3)
    client = folder.job(*options)
    bench.post(bench.take()["id"], output={"images": [PICTURE]})
    assert client.end().code == SAVED
    assert (bench.platform_strikes(BUSY), bench.jobs()["inQueue"]) == (3, 0)
    assert folder.saved() == {"a.png": picture_bytes()}


def test_a_request_over_the_limit_is_told_before_it_is_refused(bench: Bench, folder: Folder) -> None:
    noise = Image.effect_noise((3400, 3400), 60)
    noise.save(folder.path / "noise.png", compress_level=0)
    load = {"1": {"class_type": "LoadImage", "inputs": {"image": ""}}}
    (folder.path / "workflow.json").write_text(json.dumps(load))
    ended = folder.job("--img", "noise.png").end()
    (warning,) = [line for line in ended.err.splitlines() if line.startswith("warning: the request has")]
    assert all(text in warning for text in ("noise.png 15.4 MB", "RunPod takes 10 MB", "--max-side", "--sync"))
    assert_one_error(ended, PLATFORM, "")
    assert ended.err.index(warning) < ended.err.index(ended.errors[0])
    assert bench.jobs()["inQueue"] == 0
    client = folder.job("--img", "noise.png", "--sync")
    job = bench.take()
    assert base64.b64decode(job["input"]["images"]["noise.png"]) == (folder.path / "noise.png").read_bytes()
    bench.post(job["id"], output={"images": [PICTURE]})
    ended = client.end()
    assert (ended.code, job["id"].startswith("sync-")) == (SAVED, True)
    assert "warning" not in ended.err


# --- following -------------------------------------------------------------------------------------------------------


def test_following_survives_every_trouble(bench: Bench, folder: Folder) -> None:
    kinds = (BUSY, *BROKEN)
    for kind in kinds:
        bench.platform_fault(kind, call="status")
    client = folder.job()
    job_id = bench.take()["id"]
    wait_until(lambda: sum(bench.platform_faults().values()) == len(kinds), "each fault has struck")
    bench.post(job_id, output={"images": [PICTURE]})
    ended = client.end()
    assert (ended.code, ended.out, ended.errors) == (SAVED, "output/a.png\n", [])
    assert bench.jobs()["inQueue"] == 0


@pytest.mark.parametrize("kind", ["client-503", "client-html", "client-drop"])
def test_a_platform_that_stays_away_is_given_up(bench: Bench, folder: Folder, kind: str) -> None:
    bench.platform_fault(kind, call="status", times=1000)
    client = folder.job(impatient=True)
    job_id = bench.take()["id"]
    assert_one_error(client.end(), PLATFORM, f"job {job_id} is out of sight and may still run")
    bench.platform_fault(kind, times=0)
    assert bench.status(job_id)["status"] == "IN_PROGRESS"


def test_a_job_that_is_forgotten_is_told(tmp_path: Path) -> None:
    with boot_platform(tmp_path / "platform-log", "--lost-s", "600", "--retention-s", "0.1") as platform:
        bench, folder = Bench(platform), Folder(tmp_path, platform)
        job_id = bench.start_job({"x": 1})
        bench.take()
        bench.post(job_id, output={"images": []})

        def forgotten() -> bool:
            try:
                bench.status(job_id)
            except urllib.error.HTTPError as error:
                return error.code == 404
            return False

        wait_until(forgotten, "the job is forgotten")
        assert_one_error(folder.run("--resume", job_id), PLATFORM, f"no longer knows job {job_id}")


def test_progress_is_told_in_lines(bench: Bench, folder: Folder) -> None:
    client = folder.job()
    client.until("waiting in the queue")
    job_id = bench.take()["id"]
    update = {"stage": "running", "node": "57:3", "node_class": "KSampler", "value": 3, "max": 20, "percent": 15}
    for value in (3, 4):
        bench.post(job_id, status="IN_PROGRESS", output={**update, "value": value})
        client.until(f"running KSampler (node 57:3) {value}/20\n")
    bench.post(job_id, status="IN_PROGRESS", output="in words")
    client.until(", in words\n")
    bench.post(job_id, output={"images": [PICTURE]})
    ended = client.end()
    assert (ended.code, ended.out) == (SAVED, "output/a.png\n")
    assert ended.err.count("KSampler") == 2


def test_nothing_but_one_object_is_on_stdout_with_json(bench: Bench, folder: Folder) -> None:
    client = folder.job("--json", "--quiet", "--seed", "7")
    job_id = bench.take()["id"]
    bench.post(job_id, output={"images": [PICTURE], "texts": [{"node_id": "2", "text": "a cat"}]})
    ended = client.end()
    told = json.loads(ended.out)
    assert (ended.code, ended.err, told["ok"], told["job_id"], told["seeds"]) == (
        SAVED,
        "",
        True,
        job_id,
        {"1.seed": 7},
    )
    assert (told["saved"], told["texts"]) == (["output/a.png"], ["a cat"])


# --- the ends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("posted", "code", "said"),
    [
        ({"error": "[NO_OUTPUT] Nothing.", "output": {"error_code": "NO_OUTPUT"}}, JOB_FAILED, "[NO_OUTPUT] Nothing."),
        ({"error": json.dumps({"error_type": "ValueError", "error_message": "it broke"})}, JOB_FAILED, ": it broke"),
        ({"error": "job timed out after 1 retries"}, JOB_FAILED, "job timed out after 1 retries"),
        ({"error": "[JOB_TIMEOUT] After 5 s."}, TIMED_OUT, "After 5 s."),
        ({"error": "executionTimeout exceeded"}, TIMED_OUT, "executionTimeout exceeded"),
        ({}, JOB_FAILED, "completed without a result; most often it was larger than RunPod accepts"),
        ({"output": {"images": []}}, JOB_FAILED, "made nothing to save"),
        ({"output": ["a", "list"]}, JOB_FAILED, "result"),
    ],
)
def test_an_end_without_a_result_has_its_reason(
    bench: Bench, folder: Folder, posted: dict[str, Any], code: int, said: str
) -> None:
    job_id = bench.start_job({"x": 1})
    bench.take()
    bench.post(job_id, **posted)
    assert_one_error(folder.run("--resume", job_id), code, said)
    assert folder.saved() == {}


def test_a_result_that_runpod_refused_is_a_failure_with_the_reason(bench: Bench, folder: Folder) -> None:
    client = folder.job("--json")
    bench.platform_fault("job-done-400")
    job_id = bench.take()["id"]
    with pytest.raises(urllib.error.HTTPError):
        bench.post(job_id, output={"images": [PICTURE]})
    ended = client.end()
    assert_one_error(ended, JOB_FAILED, "larger than RunPod accepts")
    told = json.loads(ended.out)
    assert (told["ok"], told["exit_code"], told["state"]) == (False, JOB_FAILED, "COMPLETED")


def test_a_job_that_shows_as_running_for_good_is_ended_by_the_timeout(bench: Bench, folder: Folder) -> None:
    bench.platform_fault("progress-after-result")
    client = folder.job("--timeout", "2")
    job_id = bench.take()["id"]
    bench.post(job_id, status="IN_PROGRESS", output={"stage": "running"})
    bench.post(job_id, output={"images": [PICTURE]})
    ended = client.end()
    assert_one_error(ended, TIMED_OUT, "--timeout")
    assert f"job {job_id} is cancelled" in ended.err
    assert bench.status(job_id)["status"] == "CANCELLED"


def test_a_job_that_no_worker_takes_is_taken_back_at_the_timeout(bench: Bench, folder: Folder) -> None:
    ended = folder.job("--timeout", "1", "--json").end()
    assert_one_error(ended, TIMED_OUT, "--timeout")
    told = json.loads(ended.out)
    assert (told["state"], told["exit_code"], bench.jobs()["inQueue"]) == ("CANCELLED", TIMED_OUT, 0)


def test_a_job_that_somebody_cancelled_has_failed(bench: Bench, folder: Folder) -> None:
    client = folder.job()
    job_id = bench.take()["id"]
    bench.cancel(job_id)
    assert_one_error(client.end(), JOB_FAILED, "was cancelled")


def test_a_job_runs_no_longer_than_asked_although_nobody_waits(bench: Bench, folder: Folder) -> None:
    started = folder.run("--workflow", "workflow.json", "--detach", "--timeout", "5")
    job_id = started.out.strip()
    assert (started.code, bench.take()["id"]) == (SAVED, job_id)
    wait_until(lambda: bench.status(job_id)["status"] == "TIMED_OUT", "RunPod ends the job")
    assert_one_error(folder.run("--resume", job_id), TIMED_OUT, "ran out of time on RunPod")


def test_an_item_that_cannot_be_saved_is_told_and_the_others_are_kept(bench: Bench, folder: Folder) -> None:
    (folder.path / "output").mkdir()
    (folder.path / "output" / "a.png").write_bytes(b"mine")
    client = folder.job("--json")
    items = [PICTURE, {**PICTURE, "filename": "../../b.png", "data": "no Base64!"}, {**PICTURE, "size_bytes": 3}]
    clip = {**PICTURE, "filename": "../c.mp4"}
    bench.post(bench.take()["id"], output={"images": items, "videos": [clip], "warnings": ["one branch\nfailed"]})
    ended = client.end()
    told = json.loads(ended.out)
    assert (ended.code, told["exit_code"], told["ok"]) == (JOB_FAILED, JOB_FAILED, False)
    assert ["b.png" in ended.errors[0], "a.png" in ended.errors[1], len(ended.errors)] == [True, True, 2]
    assert "warning: one branch failed" in ended.err
    assert sorted(told["saved"]) == ["output/a_1.png", "output/c.mp4"]
    assert folder.saved() == {"a.png": b"mine", "a_1.png": picture_bytes(), "c.mp4": picture_bytes()}


# --- cancelling ------------------------------------------------------------------------------------------------------


def followed(bench: Bench, folder: Folder, *arguments: str, impatient: bool = False) -> tuple[ClientProcess, str]:
    """A client whose job the test has taken, and which has seen that."""
    client = folder.job(*arguments, impatient=impatient)
    job_id = bench.take()["id"]
    client.until("in progress")
    return client, job_id


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_client_cancels_its_job(bench: Bench, folder: Folder, number: int) -> None:
    client, job_id = followed(bench, folder)
    client.interrupt(number)
    ended = client.end()
    assert (ended.code, ended.out) == (INTERRUPTED, "")
    assert f"job {job_id} is cancelled\n" in ended.err
    assert bench.status(job_id)["status"] == "CANCELLED"


@pytest.mark.parametrize("kind", [BUSY, *BROKEN])
def test_a_cancellation_that_fails_is_asked_for_again(bench: Bench, folder: Folder, kind: str) -> None:
    client, job_id = followed(bench, folder)
    bench.platform_fault(kind, call="cancel")
    client.interrupt()
    ended = client.end()
    assert (ended.code, bench.platform_strikes(kind)) == (INTERRUPTED, 1)
    assert f"job {job_id} is cancelled\n" in ended.err
    assert bench.status(job_id)["status"] == "CANCELLED"


@pytest.mark.parametrize("kind", [BUSY, "client-404", "client-drop"])
def test_a_job_that_cannot_be_cancelled_is_named(bench: Bench, folder: Folder, kind: str) -> None:
    client, job_id = followed(bench, folder, impatient=True)
    bench.platform_fault(kind, call="cancel", times=1000)
    client.interrupt()
    ended = client.end()
    assert ended.code == INTERRUPTED
    assert f"warning: job {job_id} could not be cancelled and may still run" in ended.err
    assert "is cancelled" not in ended.err


def test_a_second_ctrl_c_leaves_at_once_and_names_the_job(bench: Bench, folder: Folder) -> None:
    client, job_id = followed(bench, folder)
    bench.platform.process.send_signal(signal.SIGSTOP)  # it takes the connection, and answers nothing
    try:
        client.interrupt()
        client.until("cancel")
        client.interrupt()
        ended = client.end()
    finally:
        bench.platform.process.send_signal(signal.SIGCONT)
    assert ended.code == INTERRUPTED
    assert f"job {job_id} may still run" in ended.err.replace("could not be cancelled and ", "")


def test_a_detached_job_is_resumed_and_cancelled_by_its_id(bench: Bench, folder: Folder) -> None:
    started = [folder.run("--workflow", "workflow.json", "--detach") for _ in range(2)]
    jobs = [bench.take()["id"] for _ in started]
    assert [(ended.code, ended.out) for ended in started] == [(SAVED, f"{job_id}\n") for job_id in jobs]
    assert folder.run("--cancel", jobs[0]).code == SAVED
    assert bench.status(jobs[0])["status"] == "CANCELLED"
    assert_one_error(folder.run("--resume", jobs[0]), JOB_FAILED, "was cancelled")
    resumed = folder.start("--resume", jobs[1])
    resumed.until("in progress")
    bench.post(jobs[1], output={"images": [PICTURE]})
    assert (resumed.end().code, folder.saved()) == (SAVED, {"a.png": picture_bytes()})
    late = folder.run("--cancel", jobs[1], "--json")
    assert json.loads(late.out)["state"] == "COMPLETED", "it was too late to cancel it"
    assert "is cancelled" not in late.err
    assert_one_error(folder.run("--cancel", "unknown"), PLATFORM, "RunPod does not know job unknown")


def test_of_many_jobs_one_failure_stops_none_and_ctrl_c_cancels_those_that_run(bench: Bench, folder: Folder) -> None:
    client = folder.job("--repeat", "5", "--parallel", "2", "--json")
    first, second = bench.take(), bench.take()
    assert bench.jobs()["inQueue"] == 0
    bench.post(first["id"], error="[OUT_OF_MEMORY] Too large.")
    client.until("[1/5]")
    bench.post(second["id"], output={"images": [PICTURE]})
    client.until("[2/5]")
    running = [bench.take()["id"] for _ in range(2)]
    client.interrupt()
    ended = client.end()
    assert ended.code == INTERRUPTED
    assert [bench.status(job_id)["status"] for job_id in running] == ["CANCELLED", "CANCELLED"]
    assert bench.jobs()["inQueue"] == 0
    *rows, summary = ended.err.splitlines()[-6:]
    assert sorted(row.split()[1] for row in rows) == ["cancelled", "cancelled", "failed", "not", "saved"]
    assert summary.startswith("5 jobs in "), summary
    jobs = json.loads(ended.out)["jobs"]
    assert len(jobs) == 5
    seeds = [job["input"]["workflow"]["1"]["inputs"]["seed"] for job in (first, second)]
    assert {job["seeds"]["1.seed"] for job in jobs if job.get("job_id") in (first["id"], second["id"])} == set(seeds)


# --- with the product's worker ---------------------------------------------------------------------------------------


def test_a_request_of_11_mb_goes_through_runsync_and_its_picture_comes_back(driver: Driver, tmp_path: Path) -> None:
    folder = Folder(tmp_path, driver.platform)
    noise = Image.frombytes("RGB", (1700, 1700), os.urandom(1700 * 1700 * 3))
    noise.save(tmp_path / "noise.png", compress_level=0)
    crop = {"image": ["1", 0], "x": 1690, "y": 1680, "width": 10, "height": 20}
    workflow = {
        "1": {"class_type": "LoadImage", "inputs": {"image": ""}},
        "2": {"class_type": "ImageCrop", "inputs": crop},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "crop"}},
    }
    (tmp_path / "workflow.json").write_text(json.dumps(workflow))
    ended = folder.job("--img", "noise.png", "--sync").end()
    assert (ended.code, "warning" in ended.err) == (SAVED, False), ended.err
    with Image.open(tmp_path / ended.out.strip()) as picture:
        assert picture.convert("RGB").tobytes() == noise.crop((1690, 1680, 1700, 1700)).tobytes()


def test_a_detached_job_ends_on_the_worker_when_it_is_cancelled(driver: Driver, tmp_path: Path) -> None:
    folder = Folder(tmp_path, driver.platform)
    (tmp_path / "workflow.json").write_text(json.dumps(slow_workflow(60)))
    (tmp_path / "a.png").write_bytes(picture_bytes())
    for by_hand in (True, False):
        job_id = folder.job("--img", "a.png", "--detach").end().out.strip()
        wait_until(driver.comfyui_runs, "the job runs")
        if by_hand:
            assert folder.run("--cancel", job_id).code == SAVED
        else:
            resumed = folder.start("--resume", job_id)
            resumed.until("StandinSleep (node sleep)")  # it shows the worker's progress
            resumed.interrupt()
            ended = resumed.end()
            assert (ended.code, f"job {job_id} is cancelled\n" in ended.err) == (INTERRUPTED, True)
        wait_until(driver.comfyui_is_idle, "the worker has stopped the job")
        assert driver.status(job_id)["status"] == "CANCELLED"


def test_twenty_jobs_on_four_workers_are_all_saved_and_all_different(tmp_path: Path) -> None:
    links = {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]}
    sampler = {"seed": 1, "steps": 2, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    workflow = {
        "1": {"class_type": "StandinCheckpoint", "inputs": {}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["1", 1]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "bad", "clip": ["1", 1]}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "5": {"class_type": "KSampler", "inputs": {**sampler, **links}},
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "out"}},
    }
    with ExitStack() as stack:
        platform = stack.enter_context(boot_platform(tmp_path / "platform-log"))
        settings = {
            "COMFYUI_DIR": str(ROOT / "local" / "comfyui"),
            "COMFYUI_PYTHON": sys.executable,
        }  # it has the model
        workers = [
            stack.enter_context(start_worker(platform, tmp_path / f"log-{number}", **settings)) for number in range(4)
        ]
        api, folder = Api(platform), Folder(tmp_path, platform)
        wait_until(lambda: api.call("GET", "health")["workers"]["idle"] == 4, "four workers ask for jobs")
        (tmp_path / "workflow.json").write_text(json.dumps(workflow))
        ended = folder.job("--prompt", "a cat", "--repeat", "20", "--json").end()
        assert ended.code == SAVED, ended.err
        jobs = json.loads(ended.out)["jobs"]
        done_by = {api.status(job["job_id"])["workerId"] for job in jobs}
    assert done_by == {worker.worker.id for worker in workers}
    pictures = {}
    for job in jobs:
        (path,) = job["saved"]
        with Image.open(tmp_path / path) as picture:
            sent = json.loads(picture.info["prompt"])
            pictures[job["seeds"]["5.seed"]] = picture.convert("RGB").tobytes()
        assert (sent["2"]["inputs"]["text"], sent["3"]["inputs"]["text"]) == ("a cat", "bad")
        assert sent["5"]["inputs"]["seed"] == job["seeds"]["5.seed"]
    assert (len(pictures), len(set(pictures.values())), len(folder.saved())) == (20, 20, 20)
    header, *rows, summary = ended.err.splitlines()[-22:]
    assert header.split()[:3] == ["job", "state", "time"]
    assert [row.split()[:2] for row in rows] == [[f"{number}/20", "saved"] for number in range(1, 21)]
    assert (summary.startswith("20 jobs in "), summary.endswith(": 20 saved")) == (True, True)
