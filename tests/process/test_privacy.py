"""What stays of a job: nothing on the RAM disk, in a log, in ComfyUI's answers, and, if asked for, in its memory."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from local.__main__ import Platform, free_port
from tests.process.fault_rows import Row
from tests.process.privacy import (
    MARKER,
    count_in_memory,
    files_with_marker,
    has_marker,
    marked_job,
    marked_jpeg,
    marked_png,
)
from tests.process.stack import (
    ROOT,
    Driver,
    base64_of,
    boot,
    boot_worker,
    invert_job,
    invert_workflow,
    picture_bytes,
    start_worker,
    wait_until,
)

# As talkative as it gets, and with every secret that a worker can have.
SECRETS = {
    "HF_TOKEN": "hf-secret",
    "HUGGING_FACE_HUB_TOKEN": "hf-secret",
    "BUCKET_ENDPOINT_URL": "http://127.0.0.1:9",
    "BUCKET_NAME": "bucket",
    "BUCKET_ACCESS_KEY_ID": "s3-secret",
    "BUCKET_SECRET_ACCESS_KEY": "s3-secret",
    "AWS_SECRET_ACCESS_KEY": "aws-secret",
    "PUBLIC_KEY": "ssh-ed25519 AAAA",
    "RUNPOD_TEST": "runpod-secret",
}
TALKATIVE = {"LOG_LEVEL": "DEBUG", "RUNPOD_LOG_LEVEL": "DEBUG", "RUNPOD_DEBUG_LEVEL": "TRACE"}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    log_path = tmp_path_factory.mktemp("private") / "log"
    settings = {**SECRETS, **TALKATIVE, "SSH_DIR": "/proc/nowhere", "INTERRUPT_GRACE_S": "1", "ALLOW_URL_INPUTS": "1"}
    with boot(log_path, **settings) as driver:
        yield driver


@pytest.fixture
def driver(stack: Driver) -> Iterator[Driver]:
    yield stack
    wait_until(stack.comfyui_is_idle, "ComfyUI is idle after the test")
    stack.disarm()


# --- the wipe, seen through inodes that are held ---


def wide_job(prefix: str, seconds: float, **extra: Any) -> dict[str, Any]:
    """Writes into input/deep, output/deep/er and temp, works for ``seconds``, and saves once more under ``prefix``."""
    workflow: dict[str, Any] = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "deep/a.png"}},
        "2": {"class_type": "StandinTee", "inputs": {"images": ["1", 0], "filename_prefix": "deep/er/picture"}},
        "3": {"class_type": "StandinToFile", "inputs": {"image": ["2", 0]}},
        "4": {"class_type": "StandinFromFile", "inputs": {"path": ["3", 0]}},
        "5": {"class_type": "StandinSleep", "inputs": {"image": ["4", 0], "seconds": seconds, "steps": 100}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": prefix}},
    }
    return {"workflow": workflow, "images": {"deep/a.png": base64_of(picture_bytes())}, **extra}


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(
    ("ending", "prefix", "seconds", "extra"),
    [
        ("COMPLETED", "last", 2, {}),
        ("EXECUTION_FAILED", "x" * 300, 2, {}),
        ("CANCELLED", "last", 60, {}),
        ("JOB_TIMEOUT", "last", 60, {"timeout_s": 3}),
    ],
)
@pytest.mark.fault("V2")
@pytest.mark.xdist_group("test_privacy.py")
def test_what_a_job_wrote_is_zeros_whichever_way_it_ended(
    row: Row, driver: Driver, ending: str, prefix: str, seconds: float, extra: dict[str, Any]
) -> None:
    job_id = driver.start_job(wide_job(prefix, seconds, **extra))
    wait_until(driver.comfyui_runs, "the job runs")
    with stopped(driver.pid_of("rp_handler.py")):  # nothing is wiped yet
        wait_until(lambda: len(driver.job_files()) >= 3, "input, output and temp have their files")
        if ending in ("COMPLETED", "EXECUTION_FAILED"):
            wait_until(driver.comfyui_is_idle, "the run is over")
        (driver.ramdisk / "temp" / "folder").mkdir()
        (driver.ramdisk / "temp" / "folder" / "of a node").write_bytes(b"pixels")
        held = {path.relative_to(driver.ramdisk): path.open("rb") for path in driver.job_files()}
        if ending == "CANCELLED":
            driver.cancel(job_id)
    assert {path.parts[0] for path in held} == {"input", "output", "temp"}
    assert {str(path.parent) for path in held} >= {"input/deep", "output/deep/er", "temp", "temp/folder"}
    row.ends(driver.finish(job_id), ending)
    wait_until(lambda: driver.job_files() == [], "the job is wiped")
    for path, stream in held.items():
        assert is_zeros(stream), path
    row.next_job_runs(driver)


def is_zeros(stream: BinaryIO) -> bool:
    """Whether a file that has no name any more has its length and nothing else; closes it."""
    with stream:
        content = stream.read()
    return len(content) > 0 and content == bytes(len(content))


@pytest.mark.fault("V1")
@pytest.mark.xdist_group("test_privacy.py")
def test_previews_of_a_comfyui_that_dies_are_overwritten_before_the_next_one_removes_them(
    row: Row, driver: Driver
) -> None:
    job_id = driver.start_job(wide_job("last", 60))
    wait_until(driver.comfyui_runs, "the job runs")
    pid = driver.comfyui_pid()
    with stopped(driver.pid_of("rp_handler.py")):  # the wipe after the job comes too late
        wait_until(lambda: len(driver.job_files()) >= 3, "input, output and temp have their files")
        held = [path.open("rb") for path in (driver.ramdisk / "temp").iterdir()]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: driver.comfyui_pid() != pid and driver.comfyui_answers(), "ComfyUI is started again")
        assert [is_zeros(stream) for stream in held] == [True]
    row.fails(driver.finish(job_id), "COMFYUI_CRASHED")
    row.next_job_runs(driver)


# --- a marker ---


def refused_job() -> dict[str, Any]:
    """A job that ComfyUI refuses, with the marker in what it says."""
    job = {**marked_job(), "workflow": invert_workflow(f"{MARKER}.png")}
    job["workflow"]["2"] = {"class_type": "ImageScale", "inputs": {"image": ["1", 0], "upscale_method": MARKER}}
    return job


def mixed_jobs() -> list[tuple[dict[str, Any], str]]:
    """Jobs with the marker in them that run to their end by themselves, each with that end."""
    failing, by_socket, refused = marked_job(), marked_job(), refused_job()
    failing["workflow"]["3"]["inputs"]["filename_prefix"] = f"{MARKER}{'x' * 300}"
    by_socket["workflow"]["3"] = {"class_type": "SaveImageWebsocket", "inputs": {"images": ["2", 0]}}
    photograph = {"workflow": invert_workflow(f"{MARKER}.jpg"), "images": {f"{MARKER}.jpg": base64_of(marked_jpeg())}}
    unknown = {"workflow": {"1": {"class_type": MARKER, "inputs": {"text": MARKER}}}}
    cut_short = marked_job(images={f"{MARKER}.png": base64_of(marked_png()[:-9])})
    too_long = marked_job(60, timeout_s=0.5)
    unsent = {**marked_job(), "images": {}}
    by_url = marked_job(images={f"{MARKER}.png": f"https://127.0.0.1/{MARKER}?{MARKER}={MARKER}"})
    return [
        (marked_job(), "COMPLETED"),
        (failing, "EXECUTION_FAILED"),
        (refused, "PROMPT_REJECTED"),
        (by_socket, "COMPLETED"),
        (photograph, "COMPLETED"),
        (unknown, "PROMPT_REJECTED"),
        (cut_short, "MEDIA_INVALID"),
        (too_long, "JOB_TIMEOUT"),
        (unsent, "WORKFLOW_INVALID"),
        (by_url, "INPUT_INVALID"),
        (marked_job(output_format="jpeg"), "COMPLETED"),
        ({**refused, "debug": True}, "PROMPT_REJECTED"),
        (marked_job(debug=True), "COMPLETED"),
    ]


@pytest.mark.fault("V3")
@pytest.mark.xdist_group("test_privacy.py")
def test_after_mixed_jobs_the_marker_is_nowhere(row: Row, driver: Driver) -> None:
    answers = []
    for job, ending in mixed_jobs():
        answers.append(driver.run(job))
        row.ends(answers[-1], ending)
    kept = [Path(path) for path in answers[-1]["output"]["debug"]["files"]]
    assert kept == driver.job_files()
    assert {*kept} <= {*files_with_marker(driver.ramdisk)}  # it can be found where it is
    assert has_marker(str(driver.comfyui("/history")))
    job_id = driver.start_job(marked_job(60))
    wait_until(driver.comfyui_runs, "the job to be cancelled runs")
    driver.cancel(job_id)
    row.next_job_runs(driver)

    assert driver.job_files() == []
    assert files_with_marker(driver.ramdisk) == []
    assert not has_marker(driver.log())
    paths = ["/history", "/queue"] + ["/api/jobs"] * ("/api/jobs" in served_paths(driver))
    assert [path for path in paths if has_marker(str(driver.comfyui(path)))] == []
    assert has_marker(str(answers))  # the callers were told


def served_paths(driver: Driver) -> list[str]:
    with contextlib.suppress(OSError):  # 404 before 0.18
        driver.comfyui("/api/jobs")
        return ["/api/jobs"]
    return []


def test_a_talkative_sdk_is_told_to_be_silent(driver: Driver) -> None:
    assert "RUNPOD_LOG_LEVEL=DEBUG is taken as INFO" in driver.log()
    assert "DEBUG  |" not in driver.log()


@pytest.mark.fault("V5")
@pytest.mark.xdist_group("test_privacy.py")
def test_comfyui_has_none_of_the_workers_secrets(row: Row, driver: Driver) -> None:
    row.succeeds(driver.run(invert_job()))

    def environ(pid: int) -> dict[str, str]:
        lines = Path(f"/proc/{pid}/environ").read_text().split("\0")
        return dict(line.split("=", 1) for line in lines if "=" in line)

    assert SECRETS.items() <= environ(driver.pid_of("rp_handler.py")).items()
    names = environ(driver.comfyui_pid())
    private = ("RUNPOD_", "BUCKET_", "AWS_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "PUBLIC_KEY")
    assert [name for name in names if name.startswith(private)] == []
    assert not set(names.values()) & set(SECRETS.values())
    row.next_job_runs(driver)


def test_no_crash_leaves_a_core_file(driver: Driver) -> None:
    for pid in (driver.comfyui_pid(), driver.pid_of("rp_handler.py")):
        (limit,) = re.findall(r"Max core file size +(.*?) +bytes", Path(f"/proc/{pid}/limits").read_text())
        assert limit.split() == ["0", "0"]


# --- RESTART_COMFYUI=each-job ---


@pytest.fixture(scope="module")
def restarting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    log_path = tmp_path_factory.mktemp("restarting") / "log"
    settings = {"RESTART_COMFYUI": "each-job", "COMFYUI_MAX_DEATHS": "1", "ALLOW_URL_INPUTS": "1"}
    with boot(log_path, **settings, INTERRUPT_GRACE_S="1") as driver:
        yield driver


def wait_for_another(driver: Driver, pid: int) -> int:
    """The process of the ComfyUI that came after ``pid``, when it answers."""
    wait_until(lambda: driver.comfyui_pid() != pid and driver.comfyui_answers(), "ComfyUI was started again")
    return driver.comfyui_pid()


def test_comfyuis_memory_keeps_a_jobs_words_until_it_ends(driver: Driver) -> None:
    assert driver.run(marked_job())["status"] == "COMPLETED"
    assert driver.run(invert_job())["status"] == "COMPLETED"
    found = count_in_memory(driver.comfyui_pid())
    print(
        f"the marker in memory a job later: ComfyUI {found}, handler {count_in_memory(driver.pid_of('rp_handler.py'))}"
    )
    assert found > 0


def restarts(driver: Driver) -> int:
    return driver.log().count("Starting ComfyUI anew")


@pytest.mark.fault("V4")
@pytest.mark.xdist_group("test_privacy.py")
def test_a_comfyui_that_is_restarted_after_each_job_has_nothing_of_it(row: Row, restarting: Driver) -> None:
    before = restarts(restarting)
    for job, ending in (
        (marked_job(), "COMPLETED"),
        (refused_job(), "PROMPT_REJECTED"),
        (marked_job(60, timeout_s=3), "JOB_TIMEOUT"),
    ):
        pid = restarting.comfyui_pid()
        job_id = restarting.start_job(job)
        found = 0
        if ending == "JOB_TIMEOUT":
            wait_until(restarting.comfyui_runs, "the job runs")
            found = count_in_memory(pid)
            assert found > 0
        row.ends(restarting.finish(job_id), ending)
        left = count_in_memory(wait_for_another(restarting, pid))
        print(
            f"{ending}: the marker in ComfyUI's memory {found or 'not counted'} times during the job, {left} after it"
        )
        assert left == 0
    assert "ComfyUI ended with code" not in restarting.log()  # with COMFYUI_MAX_DEATHS=1 it would be the end
    assert restarts(restarting) == before + 3
    row.next_job_runs(restarting)


def test_a_job_that_does_not_reach_comfyui_leaves_it_as_it_is(restarting: Driver) -> None:
    wait_until(restarting.comfyui_answers, "ComfyUI is up")
    before = restarts(restarting)
    by_url = marked_job(images={f"{MARKER}.png": "https://127.0.0.1/a.png"})
    answers = [restarting.run(by_url), restarting.run({**marked_job(), "images": {}})]
    assert [answer["output"]["error_code"] for answer in answers] == ["INPUT_INVALID", "WORKFLOW_INVALID"]
    assert restarts(restarting) == before


def test_the_next_job_waits_for_the_new_comfyui(restarting: Driver) -> None:
    pid = restarting.comfyui_pid()
    restarting.fault("slow_boot", seconds=3)
    answers = [restarting.finish(job_id) for job_id in [restarting.start_job(invert_job()) for _ in range(2)]]
    assert [answer["status"] for answer in answers] == ["COMPLETED", "COMPLETED"]
    wait_for_another(restarting, pid)
    restarting.disarm()


def test_debug_puts_the_restart_off_until_the_next_job(restarting: Driver) -> None:
    pid, before = restarting.comfyui_pid(), restarts(restarting)
    result = restarting.run(marked_job(debug=True))["output"]
    assert restarting.comfyui_pid() == pid
    kept = [Path(path) for path in result["debug"]["files"]]
    assert {path.parent.name for path in kept} >= {"input", "temp"}
    held = [path.open("rb") for path in kept]
    assert has_marker(str(restarting.comfyui("/history")))
    assert restarting.run(invert_job())["status"] == "COMPLETED"
    assert [is_zeros(stream) for stream in held] == [True] * len(held)
    wait_until(lambda: restarts(restarting) == before + 2, "ComfyUI is started again before and after the job")
    assert count_in_memory(wait_for_another(restarting, pid)) == 0


def test_sigterm_while_comfyui_is_restarted_ends_the_worker(platform: Platform, tmp_path: Path) -> None:
    with boot_worker(platform, tmp_path / "log", RESTART_COMFYUI="each-job") as worker:
        worker.fault("slow_boot", seconds=60)
        assert worker.run(invert_job())["status"] == "COMPLETED"
        wait_until(lambda: "Starting ComfyUI anew" in worker.log(), "ComfyUI is started again")
        assert not worker.comfyui_answers()
        worker.worker.process.send_signal(signal.SIGTERM)
        assert worker.worker.process.wait(10) == 0
        assert not worker.ramdisk.exists()


def test_another_value_is_one_sentence_and_exit_code_2(platform: Platform, tmp_path: Path) -> None:
    with start_worker(platform, tmp_path / "log", RESTART_COMFYUI="always") as worker:
        assert worker.worker.process.wait(20) == 2
        assert "RESTART_COMFYUI is 'always'; set it to each-job, or not at all." in worker.log()


# --- the network ---


@contextlib.contextmanager
def two_namespaces() -> Iterator[tuple[str, str, str]]:
    """Two network namespaces with a cable between them: their names, and the address of the first."""
    name = f"ce{os.getpid()}"
    here, there = f"{name}a", f"{name}b"
    commands = [
        f"netns add {here}",
        f"netns add {there}",
        f"-n {here} link set lo up",
        f"-n {here} link add {here} type veth peer name {there} netns {there}",
        f"-n {here} addr add 198.18.0.1/30 dev {here}",  # RFC 2544: for tests, routed nowhere
        f"-n {there} addr add 198.18.0.2/30 dev {there}",
        f"-n {here} link set {here} up",
        f"-n {there} link set {there} up",
    ]
    try:
        for command in commands:
            try:
                finished = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
            except FileNotFoundError:
                pytest.skip("ip (iproute2) is not installed")
            if finished.returncode:
                pytest.skip(f"needs the right to make network namespaces: {finished.stderr.strip()}")
        yield here, there, "198.18.0.1"
    finally:
        for namespace in (here, there):
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)


def connects(namespace: str, address: str, port: int) -> str:
    """What becomes of a TCP connection that is tried from a namespace: "open", or the exception's name."""
    program = (
        f"import socket\ntry:\n  socket.create_connection(({address!r}, {port}), 5)\n  print('open')\n"
        "except OSError as error:\n  print(type(error).__name__)"
    )
    command = ["ip", "netns", "exec", namespace, sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()


def test_comfyui_is_not_reached_from_another_network_namespace(tmp_path: Path) -> None:
    port, control_port = free_port(), free_port()
    ramdisk = tmp_path / "ramdisk"
    settings = {
        "PATH": os.environ["PATH"],
        "COMFYUI_DIR": os.environ.get("COMFYUI_DIR", str(ROOT / "local" / "comfyui")),
        "COMFYUI_PYTHON": os.environ.get("COMFYUI_PYTHON", sys.executable),
        "COMFYUI_ARGS": "--cpu",
        "COMFYUI_PORT": str(port),
        "WORKER_PYTHON": sys.executable,
        "MODE": "pod",
        "RAMDISK_DIR": str(ramdisk),
    }
    with two_namespaces() as (here, there, address), (tmp_path / "log").open("w") as log:
        inside = ["ip", "netns", "exec", here]
        serve = [sys.executable, "-m", "http.server", "--bind", "0.0.0.0", "-d", str(tmp_path), str(control_port)]
        control = subprocess.Popen([*inside, *serve], stderr=log)
        pod = subprocess.Popen([*inside, "bash", ROOT / "start.sh"], env=settings, stderr=log)
        try:
            wait_until((ramdisk / "run" / "listened").exists, "ComfyUI listens")
            wait_until(lambda: connects(here, "127.0.0.1", control_port) == "open", "the control listens")
            assert connects(here, "127.0.0.1", port) == "open"
            assert connects(there, address, control_port) == "open"
            assert connects(there, address, port) == "ConnectionRefusedError"
        finally:
            for process in (pod, control):
                process.terminate()
                process.wait(20)
