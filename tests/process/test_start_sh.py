"""start.sh as a program and, sourced, function by function."""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from local.__main__ import free_port
from tests.process.stack import DEADLINE_S, ROOT, boot, boot_platform, invert_job, start_worker, wait_until
from worker.models.grammar import parse_models

STANDIN = ROOT / "local" / "comfyui"


@pytest.fixture
def ramdisk(tmp_path: Path) -> Path:
    return tmp_path / "ramdisk"


@pytest.fixture
def settings(ramdisk: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "COMFYUI_DIR": str(STANDIN),
        "COMFYUI_PYTHON": sys.executable,
        "COMFYUI_PORT": str(free_port()),
        "WORKER_PYTHON": sys.executable,
        "RAMDISK_DIR": str(ramdisk),
        "RAMDISK_MIN_MB": "0",
    }


def run_start_sh(settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", ROOT / "start.sh"], env=settings, capture_output=True, text=True, timeout=30, check=False
    )


def sourced(settings: dict[str, str], commands: str) -> subprocess.CompletedProcess[str]:
    script = f"source {ROOT / 'start.sh'}; {commands}"
    return subprocess.run(["bash", "-c", script], env=settings, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("COMFYUI_DIR", "/nowhere", "There is no ComfyUI in COMFYUI_DIR=/nowhere"),
        ("COMFYUI_PYTHON", "/nowhere/python", "COMFYUI_PYTHON=/nowhere/python is no program"),
        ("WORKER_PYTHON", "/nowhere/python", "WORKER_PYTHON=/nowhere/python is no program"),
        ("MODE", "both", "set it to serverless or pod"),
        ("COMFYUI_PORT", "http", "COMFYUI_PORT is 'http'; set it to a whole number"),
        ("COMFYUI_ARGS", "--fast --listen 0.0.0.0", "ComfyUI binds 127.0.0.1 only"),
        ("COMFYUI_ARGS", "--cpu\t--listen\n0.0.0.0", "ComfyUI binds 127.0.0.1 only"),
        ("COMFYUI_MAX_DEATHS", "few", "COMFYUI_MAX_DEATHS is 'few'; set it to a whole number"),
        ("COMFYUI_MAX_DEATHS", "08", "COMFYUI_MAX_DEATHS is '08'; set it to a whole number"),
        ("COMFYUI_PORT", "99999", "COMFYUI_PORT is 99999; set it to a port, 1 to 65535."),
        ("SSH_PORT", "0", "SSH_PORT is 0; set it to a port, 1 to 65535."),
        ("RAMDISK_MIN_MB", "1e3", "RAMDISK_MIN_MB is '1e3'; set it to a whole number"),
        ("COMFYUI_ARGS", "--listen=0.0.0.0", "ComfyUI binds 127.0.0.1 only"),
        ("RAMDISK_DIR", str(STANDIN), "set it to a directory of its own"),
        ("REQUIRE_GPU", "yes", "REQUIRE_GPU is 'yes'; set it to 0 or 1."),
        ("REQUIRE_GPU", "10", "REQUIRE_GPU is '10'; set it to 0 or 1."),
        ("SSH_PERMIT_OPEN", "localhost", "SSH_PERMIT_OPEN is 'localhost'; set it to HOST:PORT, several with a blank"),
        ("SSH_PERMIT_OPEN", "127.0.0.1:http", "set it to HOST:PORT, several with a blank between, or to any."),
        ("SSH_PERMIT_OPEN", "127.0.0.1:80, 127.0.0.1:81", "set it to HOST:PORT"),
        ("SSH_PERMIT_OPEN", "any 127.0.0.1:80", "set it to HOST:PORT"),
    ],
)
def test_a_wrong_setting_is_one_sentence_and_exit_code_2(
    settings: dict[str, str], name: str, value: str, sentence: str
) -> None:
    finished = run_start_sh({**settings, name: value})
    assert finished.returncode == 2
    assert len(finished.stderr.splitlines()) == 1
    assert sentence in finished.stderr


def test_no_other_setting_of_sshd_gets_in_with_where_it_may_forward_to(settings: dict[str, str]) -> None:
    places = "127.0.0.1:80\nPasswordAuthentication yes"
    finished = sourced({**settings, "SSH_PERMIT_OPEN": places}, "setup_environment")
    assert finished.returncode == 2
    assert "set it to HOST:PORT" in finished.stderr


@pytest.mark.parametrize(
    "places",
    ["any", "127.0.0.1:8188", "localhost:80 my-host.example:*", "*:8188", "[::1]:8188", "[fe80::1]:80 any.host:1"],
)
def test_where_ssh_may_forward_to_is_taken_as_sshd_takes_it(settings: dict[str, str], places: str) -> None:
    shown = sourced({**settings, "SSH_PERMIT_OPEN": places}, 'setup_environment; echo "$SSH_PERMIT_OPEN"')
    assert shown.stdout == f"{places}\n", shown.stderr


def test_a_taken_port_is_one_sentence_and_exit_code_2(settings: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        finished = run_start_sh({**settings, "COMFYUI_PORT": str(taken.getsockname()[1])})
    assert finished.returncode == 2
    assert "is taken by another program; set COMFYUI_PORT" in finished.stderr


def test_a_ram_disk_that_cannot_be_written_is_one_sentence(settings: dict[str, str]) -> None:
    finished = run_start_sh({**settings, "RAMDISK_DIR": "/proc/nowhere"})
    assert finished.returncode == 1
    assert "cannot be written" in finished.stderr
    assert len(finished.stderr.splitlines()) == 1


def test_two_workers_never_share_a_ram_disk(settings: dict[str, str], ramdisk: Path) -> None:
    claimed = sourced(
        settings, "setup_environment; claim_ramdisk; code=0; bash $WORKER_DIR/start.sh || code=$?; exit $code"
    )
    assert claimed.returncode == 2
    assert "Another worker uses RAMDISK_DIR" in claimed.stderr
    assert (ramdisk / "input").is_dir()


def test_the_ram_disk_is_private_and_has_its_marker(settings: dict[str, str], ramdisk: Path) -> None:
    assert sourced(settings, "setup_environment; claim_ramdisk").returncode == 0
    assert (ramdisk / ".comfy-endpoint-ramdisk").is_file()
    for name in ("input", "output", "temp", "run", "user"):
        assert (ramdisk / name).stat().st_mode & 0o777 == 0o700


def test_relative_paths_are_taken_from_the_callers_directory(settings: dict[str, str]) -> None:
    relative = {"COMFYUI_DIR": "./here", "RAMDISK_DIR": "../ram", "COMFYUI_PYTHON": "bin/python"}
    commands = "die() { :; }; setup_environment; echo $COMFYUI_DIR $RAMDISK_DIR $COMFYUI_PYTHON $WORKER_PYTHON"
    shown = sourced({**settings, **relative, "WORKER_PYTHON": "python3"}, commands).stdout.split()
    here = Path.cwd()
    assert shown == [f"{here}/./here", f"{here}/../ram", f"{here}/bin/python", "python3"]


def test_no_flag_of_the_user_moves_comfyui_or_its_files(
    settings: dict[str, str], ramdisk: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    settings["COMFYUI_ARGS"] = f"--liste 127.0.0.2 --output-directory {elsewhere} --temp-dir {elsewhere}"
    worker = subprocess.Popen(["bash", ROOT / "start.sh"], env=settings, stderr=subprocess.DEVNULL)
    wait_until(lambda: (ramdisk / "run" / "listened").exists(), "ComfyUI listens")
    port = int(settings["COMFYUI_PORT"])
    assert can_get(port)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", port), timeout=1)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(10) == 0
    assert not elsewhere.exists()


@pytest.mark.parametrize(
    ("extra", "mode"),
    [({}, "pod"), ({"RUNPOD_WEBHOOK_GET_JOB": "http://x"}, "serverless"), ({"MODE": "serverless"}, "serverless")],
)
def test_the_mode_follows_the_environment(settings: dict[str, str], extra: dict[str, str], mode: str) -> None:
    assert sourced({**settings, **extra}, "setup_environment; echo $MODE").stdout.strip() == mode


@pytest.mark.parametrize(
    ("extra", "required"),
    [
        ({}, "0"),
        ({"MODE": "pod"}, "0"),
        ({"MODE": "serverless"}, "1"),
        ({"RUNPOD_WEBHOOK_GET_JOB": "http://x"}, "1"),
        ({"MODE": "serverless", "REQUIRE_GPU": ""}, "1"),
        ({"MODE": "serverless", "REQUIRE_GPU": "0"}, "0"),
        ({"MODE": "pod", "REQUIRE_GPU": "1"}, "1"),
    ],
)
def test_a_gpu_is_required_of_a_serverless_worker_unless_something_else_is_set(
    settings: dict[str, str], extra: dict[str, str], required: str
) -> None:
    commands = "setup_environment; bash -c 'echo $REQUIRE_GPU'"  # what the handler gets
    assert sourced({**settings, **extra}, commands).stdout.strip() == required


# --- a ComfyUI that does not start, or without a GPU ---


def checkout_that(tmp_path: Path, program: str) -> str:
    """A checkout whose main.py is this program."""
    checkout = tmp_path / "ComfyUI"
    checkout.mkdir()
    (checkout / "main.py").write_text(program)
    return str(checkout)


NO_GPU = "It found no GPU: choose one for the endpoint, or set REQUIRE_GPU=0 to compute on the processor."
OLD_DRIVER = (
    "RuntimeError: The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by "
    "downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)
NEWER_HOSTS = "Allow only hosts with a newer CUDA version in the settings of the endpoint."


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        (OLD_DRIVER, NEWER_HOSTS),
        ("RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU", NO_GPU),
        ("RuntimeError: No CUDA GPUs are available", NO_GPU),
        ("AssertionError: Torch not compiled with CUDA enabled", NO_GPU),
        ("main.py: error: unrecognized arguments: --no-such-flag", "It does not take a flag of COMFYUI_ARGS."),
        ("ModuleNotFoundError: No module named 'torch'", f"COMFYUI_PYTHON={sys.executable} lacks a package."),
        ("OSError: [Errno 5] Input/output error", ""),
    ],
    ids=["old driver", "no driver", "no GPU", "torch without CUDA", "a flag", "a package", "something else"],
)
def test_a_comfyui_that_dies_while_booting_ends_the_worker_with_its_log_and_with_what_to_do(
    settings: dict[str, str], ramdisk: Path, tmp_path: Path, message: str, advice: str
) -> None:
    program = f"print('Total VRAM 0 MB')\nraise SystemExit({message!r})"
    finished = run_start_sh({**settings, "COMFYUI_DIR": checkout_that(tmp_path, program), "REQUIRE_GPU": "1"})
    assert finished.returncode == 1
    lines = finished.stderr.splitlines()
    assert message in lines
    sentence = "ERROR start.sh ComfyUI died while booting; the end of its log is above."
    assert [line[9:] for line in lines if "died while booting" in line] == [f"{sentence} {advice}".rstrip()]
    assert not ramdisk.exists()


def test_what_the_last_start_but_one_said_gives_no_advice(settings: dict[str, str], ramdisk: Path) -> None:
    (ramdisk / "run").mkdir(parents=True)
    (ramdisk / "run" / "comfyui.log").write_text("RuntimeError: No CUDA GPUs are available\n")
    settings["REQUIRE_GPU"] = "1"
    assert NO_GPU in sourced(settings, "boot_advice").stdout
    assert sourced(settings, "log_start=42; boot_advice").stdout == ""


def test_where_no_gpu_is_required_one_that_cannot_be_used_is_told(settings: dict[str, str], ramdisk: Path) -> None:
    (ramdisk / "run").mkdir(parents=True)
    (ramdisk / "run" / "comfyui.log").write_text("RuntimeError: No CUDA GPUs are available\n")
    said = sourced({**settings, "REQUIRE_GPU": "0"}, "boot_advice").stdout
    assert said == " It cannot use the GPU that is there; set COMFYUI_ARGS=--cpu to compute on the processor."


def test_flags_for_a_gpus_memory_do_not_stop_a_comfyui_that_computes_on_the_processor(
    settings: dict[str, str], ramdisk: Path
) -> None:
    settings |= {"REQUIRE_GPU": "0", "COMFYUI_ARGS": "--lowvram --reserve-vram 1 --highvram"}
    argv, _ = flags_and_log(settings, ramdisk, is_gpu_there=False)
    assert argv[1:3] == ["--reserve-vram", "1"]
    assert {"--lowvram", "--highvram"}.isdisjoint(argv)


def flags_and_log(settings: dict[str, str], ramdisk: Path, *, is_gpu_there: bool) -> tuple[list[str], str]:
    """ComfyUI's command line, and the log of the pod until it has been stopped."""
    script = f"source {ROOT / 'start.sh'}; has_gpu() {{ {'true' if is_gpu_there else 'false'}; }}; _main"
    with subprocess.Popen(["bash", "-c", script], env=settings, stderr=subprocess.PIPE, text=True) as worker:
        try:
            wait_until(lambda: (ramdisk / "run" / "listened").exists(), "ComfyUI listens")
            with urllib.request.urlopen(f"http://127.0.0.1:{settings['COMFYUI_PORT']}/system_stats") as answer:
                argv = json.load(answer)["system"]["argv"]
        finally:
            worker.send_signal(signal.SIGTERM)
            _, log = worker.communicate(timeout=10)
    return argv, log


def test_a_flag_that_comfyui_does_not_know_is_named_as_the_reason(settings: dict[str, str]) -> None:
    finished = run_start_sh({**settings, "COMFYUI_ARGS": "--no-such-flag"})
    assert finished.returncode == 1
    assert "main.py: error: unrecognized arguments: --no-such-flag" in finished.stderr
    assert "It does not take a flag of COMFYUI_ARGS." in finished.stderr.splitlines()[-1]


def test_a_package_that_comfyuis_python_lacks_is_named_as_the_reason(settings: dict[str, str], tmp_path: Path) -> None:
    finished = run_start_sh({**settings, "COMFYUI_DIR": checkout_that(tmp_path, "import no_such_package")})
    assert finished.returncode == 1
    assert "No module named 'no_such_package'" in finished.stderr
    assert f"COMFYUI_PYTHON={sys.executable} lacks a package." in finished.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("required", "is_there", "on_the_processor"), [("0", False, True), ("0", True, False), ("1", False, False)]
)
def test_comfyui_computes_on_the_processor_only_where_no_gpu_is_there_or_required(
    settings: dict[str, str], ramdisk: Path, required: str, is_there: bool, on_the_processor: bool
) -> None:
    argv, log = flags_and_log({**settings, "REQUIRE_GPU": required}, ramdisk, is_gpu_there=is_there)
    assert ("--cpu" in argv) == on_the_processor
    assert ("There is no GPU; ComfyUI computes on the processor." in log) == on_the_processor


@pytest.mark.parametrize(
    ("device", "code"), [("", 1), ("nvidiactl", 0), ("dxg", 0), ("kfd", 0), ("null", 1)], ids=lambda value: str(value)
)
def test_a_gpu_is_there_where_the_containers_runtime_has_put_its_device(device: str, code: int) -> None:
    # An empty /dev, in a mount namespace.
    script = f"source {ROOT / 'start.sh'}; mount -t tmpfs tmpfs /dev 2>&4 || exit 77; "
    script += f"{f'touch /dev/{device}; ' if device else ''}has_gpu"
    command = ["unshare", "--map-root-user", "--mount", "bash", "-c", f"exec 4>&2; {script}"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if finished.returncode == 77 or finished.stderr.startswith("unshare:"):
        pytest.skip(f"needs the right to mount a tmpfs in a namespace: {finished.stderr.strip()}")
    assert finished.returncode == code, finished.stderr


def test_a_worker_that_must_have_a_gpu_and_has_none_takes_no_job_and_ends_with_one_sentence(tmp_path: Path) -> None:
    with (
        boot_platform(tmp_path / "platform-log") as platform,
        start_worker(platform, tmp_path / "log", REQUIRE_GPU="1") as driver,
    ):
        assert driver.worker.process.wait(DEADLINE_S) == 1
        log = driver.log()
    assert "no GPU: choose one for the endpoint, or set REQUIRE_GPU=0 to compute on the processor." in log
    assert "Starting Serverless Worker" not in log
    assert 'rp_handler.py", line' not in log  # a sentence, not a traceback


def test_a_worker_that_must_have_a_gpu_and_has_one_takes_jobs(tmp_path: Path) -> None:
    checkout = tmp_path / "ComfyUI"
    shutil.copytree(STANDIN, checkout, ignore=shutil.ignore_patterns("__pycache__"))
    routes = checkout / "standin" / "routes.py"
    assert routes.read_text().count('"type": "cpu"') == 1
    routes.write_text(routes.read_text().replace('"type": "cpu"', '"type": "cuda"'))
    its = {"COMFYUI_DIR": str(checkout), "COMFYUI_PYTHON": sys.executable, "COMFYUI_ARGS": ""}
    with boot(tmp_path / "log", REQUIRE_GPU="1", **its) as driver:
        assert driver.run(invert_job())["status"] == "COMPLETED"


# --- the HEALTHCHECK ---


def is_healthy(port: int) -> bool:
    """As the image calls it. Nothing on stdout: Docker keeps what a check prints."""
    finished = sourced({"PATH": os.environ["PATH"], "COMFYUI_PORT": str(port)}, "is_healthy")
    assert finished.stdout == ""
    return finished.returncode == 0


@contextlib.contextmanager
def server_that(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port of 127.0.0.1 where ``answer`` gets the first connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError), server.accept()[0] as connection:
                answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)  # one that nobody has come to
            thread.join()


def read_request(connection: socket.socket) -> bytes:
    """Whole: what is left unread when a connection is closed would take the answer with it."""
    request = b""
    while not request.endswith(b"\r\n\r\n") and (more := connection.recv(1000)):
        request += more
    return request


def test_a_comfyui_that_answers_is_healthy(settings: dict[str, str], ramdisk: Path) -> None:
    with subprocess.Popen(["bash", ROOT / "start.sh"], env=settings, stderr=subprocess.DEVNULL) as worker:
        try:
            wait_until(lambda: (ramdisk / "run" / "listened").exists(), "ComfyUI listens")
            assert is_healthy(int(settings["COMFYUI_PORT"]))
        finally:
            worker.send_signal(signal.SIGTERM)


def test_nothing_there_is_not_healthy() -> None:
    assert not is_healthy(free_port())


@pytest.mark.parametrize(
    ("status_line", "healthy"),
    [("HTTP/1.1 200 OK", True), ("HTTP/1.0 200 OK", True), ("HTTP/1.1 500 Internal Server Error", False), ("", False)],
)
def test_health_is_the_status_of_the_answer(status_line: str, healthy: bool) -> None:
    requests = []

    def answer(connection: socket.socket) -> None:
        requests.append(read_request(connection))
        if status_line:
            connection.sendall(f"{status_line}\r\nContent-Length: 9\r\n\r\n 200 OK \n".encode())

    with server_that(answer) as port:
        assert is_healthy(port) == healthy
    assert requests == [b"GET /system_stats HTTP/1.0\r\n\r\n"]


@pytest.mark.parametrize("sent", [b"", b"H"], ids=["is silent", "sends a byte now and then"])
def test_a_comfyui_that_accepts_and_does_not_answer_is_not_healthy_and_is_not_waited_for(sent: bytes) -> None:
    def answer(connection: socket.socket) -> None:
        # Much longer than `sourced` waits; the check has gone away before.
        for _ in range(1000):
            connection.sendall(sent)
            if select.select([connection], [], [], 0.1)[0] and not connection.recv(1000):
                return

    with server_that(answer) as port:
        assert not is_healthy(port)


def test_a_pod_runs_comfyui_without_a_handler_until_sigterm(settings: dict[str, str], ramdisk: Path) -> None:
    worker = subprocess.Popen(["bash", ROOT / "start.sh"], env=settings, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: (ramdisk / "run" / "listened").exists(), "ComfyUI listens")
    pid = int((ramdisk / "run" / "comfyui").read_text().split()[0])
    worker.send_signal(signal.SIGTERM)
    _, log = worker.communicate(timeout=10)
    assert worker.returncode == 0
    assert "rp_handler" not in log
    assert not Path(f"/proc/{pid}").exists()
    assert not ramdisk.exists()


def test_comfyui_sees_no_secret_of_the_worker(tmp_path: Path) -> None:
    secrets = {"HF_TOKEN": "hf_secret", "AWS_SECRET_ACCESS_KEY": "aws-secret", "RUNPOD_TEST": "rp-secret"}
    bucket = {"BUCKET_ENDPOINT_URL": "http://127.0.0.1:1", "BUCKET_ACCESS_KEY_ID": "s3-key"}
    bucket |= {"BUCKET_SECRET_ACCESS_KEY": "s3-secret", "BUCKET_NAME": "results", "BUCKET_REGION": "s3-region"}
    with boot(tmp_path / "log", **secrets, **bucket) as driver:
        environ = Path(f"/proc/{driver.comfyui_pid()}/environ").read_bytes().decode()
        handler = Path(f"/proc/{driver.pid_of('rp_handler.py')}/environ").read_bytes().decode()
    assert "hf_secret" in handler
    names = [line.partition("=")[0] for line in environ.split("\0")]
    assert [name for name in names if name.startswith(("RUNPOD_", "BUCKET_", "AWS_", "HF_TOKEN", "PUBLIC_KEY"))] == []


# A custom node that tells of the collector over and over: whether it is on, its thresholds, whether objects are frozen.
COLLECTOR_NODE = """
import gc, json, os, threading, time
NODE_CLASS_MAPPINGS = {{}}
def tell():
    while True:
        with open({file!r} + ".part", "w") as file:
            json.dump([gc.isenabled(), list(gc.get_threshold()), gc.get_freeze_count() > 0], file)
        os.replace({file!r} + ".part", {file!r})
        time.sleep(0.02)
threading.Thread(target=tell, daemon=True).start()
"""


def test_garbage_is_collected_as_ever_once_comfyui_listens(tmp_path: Path) -> None:
    told, package = tmp_path / "told", tmp_path / "nodes" / "collector_node"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(COLLECTOR_NODE.format(file=str(told)))
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"own": {"base_path": str(tmp_path), "custom_nodes": "nodes"}}))  # YAML, too
    with boot(tmp_path / "log", COMFYUI_ARGS=f"--extra-model-paths-config {config}") as driver:
        asked = [driver.worker.settings["COMFYUI_PYTHON"], "-c", "import gc; print(list(gc.get_threshold()))"]
        usual = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
        wait_until(lambda: json.loads(told.read_text()) == [True, usual, True], "the collector is on")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkout_is_byte_identical_after_its_jobs(tmp_path: Path) -> None:
    checkout = tmp_path / "ComfyUI"
    shutil.copytree(STANDIN, checkout, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("input/mine.png", "output/mine.png", "models/vae/mine.safetensors"):
        (checkout / name).parent.mkdir(parents=True)
        (checkout / name).write_bytes(b"mine")
    before = snapshot(checkout)
    with boot(tmp_path / "log", COMFYUI_DIR=str(checkout), COMFYUI_PYTHON=sys.executable) as driver:
        assert driver.run(invert_job())["status"] == "COMPLETED"
    assert snapshot(checkout) == before


def test_models_are_linked_before_comfyui_starts_and_a_missing_one_is_said_aloud(tmp_path: Path) -> None:
    checkout = tmp_path / "ComfyUI"
    shutil.copytree(STANDIN, checkout, ignore=shutil.ignore_patterns("__pycache__"))
    snapshot_dir = tmp_path / "hub" / "models--org--repo" / "snapshots" / "abc" / "vae"
    snapshot_dir.mkdir(parents=True)
    (snapshot_dir / "small.pt").write_bytes(b"weights")
    models = "org/repo:vae/small.pt:vae,org/repo:vae/absent.pt:vae"
    settings = {"MODELS": models, "HOST_CACHE_DIR": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    with boot(tmp_path / "log", COMFYUI_DIR=str(checkout), COMFYUI_PYTHON=sys.executable, **settings) as driver:
        link = checkout / "models" / "vae" / "small.pt"
        assert link.readlink() == snapshot_dir / "small.pt"
        assert "SOME MODELS ARE MISSING" in driver.log()
        assert driver.run(invert_job())["status"] == "COMPLETED"


# --- SSH ---


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A public key of each of these kinds, and as "private" the private one of ed25519."""
    folder = tmp_path_factory.mktemp("keys")
    made = {}
    for kind in ("ed25519", "rsa", "ecdsa"):
        command = ["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", f"{kind} of a test", "-f", folder / kind]
        subprocess.run(command, check=True)
        made[kind] = (folder / f"{kind}.pub").read_text().strip()
    made["private"] = (folder / "ed25519").read_text()
    return made


needs_ssh_keygen = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")


def good_keys(settings: dict[str, str], text: str) -> tuple[list[str], list[str]]:
    """The keys that are taken from PUBLIC_KEY, and what is said about the rest."""
    finished = sourced({**settings, "PUBLIC_KEY": text}, "good_keys")
    assert finished.returncode == 0
    return finished.stdout.splitlines(), [line[9:] for line in finished.stderr.splitlines()]


@needs_ssh_keygen
def test_every_key_is_taken_and_comments_and_blank_lines_are_no_keys(
    settings: dict[str, str], keys: dict[str, str]
) -> None:
    restricted = f'from="10.0.0.0/8,192.168.1.5",no-pty,command="echo # no shell" {keys["ecdsa"]}'
    lines = ["# mine", keys["ed25519"], "", " \t", f"  # {keys['rsa']}", keys["rsa"], restricted, "", ""]
    taken = [keys["ed25519"], keys["rsa"], restricted]
    assert good_keys(settings, "\n".join(lines)) == (taken, [])
    assert good_keys(settings, "\r\n".join(lines)) == (taken, [])


@needs_ssh_keygen
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_that_is_no_key_is_named_by_its_number_and_not_by_what_it_holds(
    settings: dict[str, str], keys: dict[str, str], end: str
) -> None:
    cut = keys["rsa"][:100]
    lines = ["# mine", keys["ed25519"], "secret-word", "", cut, keys["ecdsa"], "-----BEGIN SOMETHING-----"]
    taken, said = good_keys(settings, end.join(lines))
    assert taken == [keys["ed25519"], keys["ecdsa"]]
    assert said == [f"WARNING start.sh Line {at} of PUBLIC_KEY is no public key; it is left out." for at in (3, 5, 7)]


@needs_ssh_keygen
@pytest.mark.parametrize("form", ["{}", "  {}", "{crlf}", "{one_line}", "{public}\n{}", "{}\n{public}"])
def test_nothing_of_a_private_key_is_said_or_taken(settings: dict[str, str], keys: dict[str, str], form: str) -> None:
    private, public = keys["private"], keys["rsa"]
    forms = {"crlf": private.replace("\n", "\r\n"), "one_line": private.replace("\n", " "), "public": public}
    taken, said = good_keys(settings, form.format(private, **forms))
    assert taken == ([public] if form.startswith("{public}") else [])
    assert said == [
        "WARNING start.sh PUBLIC_KEY has a private key; set it to the .pub file beside it, and make a new key pair."
    ]


@needs_ssh_keygen
def test_nothing_of_a_private_key_without_its_first_line_is_said_or_taken(
    settings: dict[str, str], keys: dict[str, str]
) -> None:
    lines = keys["private"].splitlines()[1:-1]
    taken, said = good_keys(settings, "\n".join(lines))
    assert taken == []
    assert len(said) == len(lines)
    assert not any(word in line for line in said for word in lines)


@pytest.fixture
def ssh_dir() -> Iterator[Path]:
    """sshd refuses keys below a directory that others may write, such as /tmp."""
    folder = Path.home() / f".comfy-endpoint-test-{os.getpid()}"
    folder.mkdir(mode=0o700)
    yield folder
    shutil.rmtree(folder)


class Ssh:
    """A client of a pod's sshd."""

    def __init__(self, folder: Path, port: int) -> None:
        self.key, self.known, self.port = folder / "id", folder / "known", port
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "me", "-f", self.key], check=True)
        self.public_key = self.key.with_suffix(".pub").read_text().strip()

    def command(self, program: str, *arguments: str | Path, user: str = "root") -> list[str]:
        """``arguments`` end with what is to be run there, if anything is."""
        options = ["StrictHostKeyChecking=no", f"UserKnownHostsFile={self.known}", "BatchMode=yes", "LogLevel=INFO"]
        options += [f"Port={self.port}", f"User={user}", f"IdentityFile={self.key}", "IdentitiesOnly=yes"]
        flags = [word for option in options for word in ("-o", option)]
        return [program, "-F", os.devnull, *flags, *map(str, arguments)]

    def __call__(self, *arguments: str, text: str = "", user: str = "root") -> subprocess.CompletedProcess[str]:
        return self.run(self.command("ssh", *arguments, user=user), text)

    def run(self, command: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=20, check=False)


class Pod:
    """A pod with sshd, and its log once it has ended."""

    def __init__(self, ssh: Ssh, process: subprocess.Popen[str]) -> None:
        self.ssh, self.process, self.log = ssh, process, ""


@contextlib.contextmanager
def pod_with_ssh(settings: dict[str, str], ssh_dir: Path, **more: str) -> Iterator[Pod]:
    ssh = Ssh(ssh_dir, free_port())
    settings = {**settings, "PUBLIC_KEY": ssh.public_key, "SSH_PORT": str(ssh.port), "SSH_DIR": f"{ssh_dir}/server"}
    environ = settings | more
    with subprocess.Popen(["bash", ROOT / "start.sh"], env=environ, stderr=subprocess.PIPE, text=True) as process:
        pod = Pod(ssh, process)
        try:
            wait_until(lambda: Path(environ["RAMDISK_DIR"], "run", "listened").exists(), "ComfyUI listens")
            wait_until(lambda: connects(ssh.port), "sshd listens")
            yield pod
        finally:
            process.send_signal(signal.SIGTERM)
            pod.log = process.communicate(timeout=10)[1]


needs_sshd = pytest.mark.skipif(
    not (Path("/usr/sbin/sshd").exists() and os.geteuid() == 0), reason="needs root and /usr/sbin/sshd"
)


@needs_sshd
def test_ssh_takes_the_key_copies_files_refuses_passwords_and_forwards_to_comfyui_only(
    settings: dict[str, str], ramdisk: Path, ssh_dir: Path
) -> None:
    forwarded = free_port()
    with pod_with_ssh(settings, ssh_dir) as pod:
        ssh = pod.ssh
        login = ssh("127.0.0.1", "echo hello")
        refused = ssh("-o", "PubkeyAuthentication=no", "127.0.0.1", "echo hello")
        copied = ssh.run(ssh.command("sftp", "-b", "-", "127.0.0.1"), f"get {ramdisk}/run/comfyui {ssh_dir}/copied\n")
        elsewhere = ssh("-W", f"127.0.0.1:{ssh.port}", "127.0.0.1")
        tunnel_to = f"{forwarded}:127.0.0.1:{settings['COMFYUI_PORT']}"
        with subprocess.Popen(ssh.command("ssh", "-N", "-L", tunnel_to, "127.0.0.1")) as tunnel:
            wait_until(lambda: can_get(forwarded), "the tunnel carries HTTP")
            tunnel.terminate()
    assert login.stdout.strip() == "hello", login.stderr
    assert copied.returncode == 0, copied.stderr
    assert (ssh_dir / "copied").read_text().endswith(" 1\n")
    assert "administratively prohibited" in elsewhere.stderr
    assert refused.returncode == 255
    assert "Permission denied (publickey)" in refused.stderr


@needs_sshd
@pytest.mark.parametrize(
    ("places", "allowed", "refused"),
    [
        ("", ["comfyui"], ["other", "third"]),
        ("127.0.0.1:{other}", ["other"], ["comfyui", "third"]),
        ("127.0.0.1:{comfyui} 127.0.0.1:{other}", ["comfyui", "other"], ["third"]),
        ("any", ["comfyui", "other", "third"], []),
    ],
    ids=["default", "another", "two", "any"],
)
def test_ssh_forwards_to_where_it_is_permitted_and_nowhere_else(
    settings: dict[str, str], ssh_dir: Path, places: str, allowed: list[str], refused: list[str]
) -> None:
    def greet(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")

    ports = {"comfyui": int(settings["COMFYUI_PORT"])}
    with server_that(greet) as ports["other"], server_that(greet) as ports["third"]:
        places = places.format(**ports)
        with pod_with_ssh(settings, ssh_dir, **({"SSH_PERMIT_OPEN": places} if places else {})) as pod:
            answers = {name: status_through(pod.ssh, port) for name, port in ports.items()}
    for name in allowed:
        assert answers[name][0].startswith("HTTP/1.0 200 OK"), answers[name]
    for name in refused:
        assert answers[name][0] == ""
        assert "administratively prohibited" in answers[name][1]


def status_through(ssh: Ssh, port: int) -> tuple[str, str]:
    """The first line that a server on the pod's 127.0.0.1 answers, and what ssh says."""
    command = ssh.command("ssh", "-W", f"127.0.0.1:{port}", "127.0.0.1")
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as forwarding:
        assert forwarding.stdin is not None and forwarding.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            forwarding.stdin.write("GET /queue HTTP/1.0\r\n\r\n")
            forwarding.stdin.flush()  # and not closed: ComfyUI gives up a connection that its client has half closed
        line = forwarding.stdout.readline()
        forwarding.terminate()
        return line, forwarding.communicate(timeout=10)[1]


@needs_sshd
def test_an_ssh_session_knows_what_utils_py_needs_and_no_secret(
    settings: dict[str, str], ssh_dir: Path, tmp_path: Path
) -> None:
    checkout = tmp_path / "ComfyUI"
    shutil.copytree(STANDIN, checkout, ignore=shutil.ignore_patterns("__pycache__"))
    secrets = {"HF_TOKEN": "hf_secret", "RUNPOD_API_KEY": "rp-secret", "AWS_SECRET_ACCESS_KEY": "aws-secret"}
    models = "org/repo:it's one.pt:vae , org/repo:$HOME#2.pt:vae\r\norg/repo:three.pt:vae\norg/repo:four.pt:vae\n"
    known = {
        "COMFYUI_DIR": str(checkout),
        "RAMDISK_DIR": settings["RAMDISK_DIR"],
        "VOLUME_DIRS": f"{tmp_path}/volume of mine:/workspace",
        "MODELS": "org/repo:it's one.pt:vae , org/repo:$HOME#2.pt:vae,,org/repo:three.pt:vae,org/repo:four.pt:vae",
        "HF_HUB_OFFLINE": "1",
        "HOST_CACHE_DIR": str(tmp_path / "no cache"),
    }
    with pod_with_ssh(settings, ssh_dir, **{**known, **secrets, "MODELS": models}) as pod:
        seen = session_environment(pod.ssh)
        check = pod.ssh("127.0.0.1", f"{sys.executable} {ROOT / 'utils.py'} --check")
    assert {name: seen.get(name) for name in known} == known
    assert [name for name in seen if name.startswith(("HF_TOKEN", "RUNPOD_", "AWS_", "PUBLIC_KEY"))] == []
    assert [value for value in seen.values() if "secret" in value] == []
    for name in ("it's one.pt", "$HOME#2.pt", "three.pt", "four.pt"):
        assert f"org/repo:{name}  missing" in check.stdout, check.stderr


def session_environment(ssh: Ssh) -> dict[str, str]:
    shown = ssh("127.0.0.1", "env -0")
    return dict(entry.split("=", 1) for entry in shown.stdout.split("\0") if entry)


@needs_sshd
def test_comments_in_models_are_the_same_in_an_ssh_session(settings: dict[str, str], ssh_dir: Path) -> None:
    models = "# what it needs most\norg/repo:one.pt:vae # the small one\n\norg/repo:two.pt:vae\n"
    offline = {"HF_HUB_OFFLINE": "1", "HOST_CACHE_DIR": str(ssh_dir / "no-cache")}
    with pod_with_ssh(settings, ssh_dir, MODELS=models, **offline) as pod:
        seen = session_environment(pod.ssh)["MODELS"]
    entries, errors = parse_models(models, STANDIN)
    assert (len(entries), errors) == (2, [])
    assert parse_models(seen, STANDIN) == (entries, errors)


@needs_sshd
def test_a_long_list_of_models_reaches_an_ssh_session(settings: dict[str, str], ssh_dir: Path) -> None:
    folders = "a-long-name/" * 20
    models = ",".join(f"org/repo:{folders}model-{number:05}.safetensors:vae" for number in range(40))
    offline = {"HF_HUB_OFFLINE": "1", "HOST_CACHE_DIR": str(ssh_dir / "no-cache")}
    with pod_with_ssh(settings, ssh_dir, MODELS=models, **offline) as pod:
        assert session_environment(pod.ssh)["MODELS"] == models


@needs_sshd
def test_a_value_that_sshd_cannot_quote_is_left_out_of_the_session_alone(
    settings: dict[str, str], ssh_dir: Path, tmp_path: Path
) -> None:
    odd = {"VOLUME_DIRS": f'{tmp_path}/"quoted"', "MODELS_FILE": f"{tmp_path}/back\\slash"}
    with pod_with_ssh(settings, ssh_dir, **odd) as pod:
        seen = session_environment(pod.ssh)
    assert seen["RAMDISK_DIR"] == settings["RAMDISK_DIR"]
    assert not seen.keys() & odd.keys()


@needs_sshd
def test_only_root_comes_in_and_what_sshd_says_is_in_the_log_as_lines_of_start_sh(
    settings: dict[str, str], ssh_dir: Path
) -> None:
    with pod_with_ssh(settings, ssh_dir) as pod:
        accepted = pod.ssh("127.0.0.1", "true")
        other = pod.ssh("127.0.0.1", "true", user="nobody")
        host_key = fingerprint(ssh_dir / "server" / "host_key.pub")
        seen_key = fingerprint(pod.ssh.known)
    assert accepted.returncode == 0
    assert other.returncode == 255
    assert "Permission denied (publickey)" in other.stderr
    lines = pod.log.splitlines()
    own = f"INFO start.sh SSH on port {pod.ssh.port} for 1 keys, host key {host_key}."
    assert [line[9:] for line in lines if "host key" in line] == [own]
    assert seen_key == host_key
    for said in (
        f"Server listening on 0.0.0.0 port {pod.ssh.port}.",
        f"Accepted publickey for root from 127.0.0.1 port PORT ssh2: ED25519 {fingerprint(pod.ssh.key)}",
        "User nobody from 127.0.0.1 not allowed because not listed in AllowUsers",
    ):
        pattern = r"\d\d:\d\d:\d\d INFO start\.sh sshd: " + re.escape(said).replace("PORT", r"\d+")
        assert [line for line in lines if re.fullmatch(pattern, line)], said
    assert "\r" not in pod.log


def fingerprint(path: Path) -> str:
    """SHA256:..., of a key, or of the only line of known_hosts."""
    shown = subprocess.run(["ssh-keygen", "-l", "-f", path], capture_output=True, text=True, check=True).stdout
    return shown.split()[1]


@needs_sshd
@pytest.mark.parametrize("text", ["no key at all", "# a comment", "{private}"])
def test_without_a_usable_key_there_is_no_ssh_and_that_is_said(
    settings: dict[str, str], ssh_dir: Path, keys: dict[str, str], text: str
) -> None:
    commands = 'setup_environment; start_sshd; echo "pid:$sshd_pid"'
    own = {"PUBLIC_KEY": text.format(**keys), "SSH_DIR": str(ssh_dir / "server"), "SSH_PORT": str(free_port())}
    finished = sourced({**settings, **own}, commands)
    assert finished.stdout == "pid:\n"
    last = "PUBLIC_KEY has no usable key; set it to what ~/.ssh/id_ed25519.pub holds. No SSH."
    assert finished.stderr.splitlines()[-1][9:] == f"WARNING start.sh {last}"
    assert not any(word in finished.stderr for word in keys["private"].splitlines()[1:-1])
    assert not (ssh_dir / "server").exists()


@needs_sshd
def test_sshd_files_that_cannot_be_written_are_a_warning(settings: dict[str, str], keys: dict[str, str]) -> None:
    commands = "setup_environment; start_sshd; echo goes on"
    finished = sourced({**settings, "PUBLIC_KEY": keys["ed25519"], "SSH_DIR": "/proc/nowhere"}, commands)
    assert finished.stdout == "goes on\n"
    sentence = "The files of sshd cannot be written to SSH_DIR=/proc/nowhere and /run/sshd"
    assert [line[9:] for line in finished.stderr.splitlines()] == [
        f"WARNING start.sh {sentence}, or a key in there is broken; no SSH."
    ]


@needs_sshd
@pytest.mark.parametrize("is_whole", [True, False])
def test_a_host_key_of_ones_own_is_used_and_a_broken_one_is_a_warning(
    settings: dict[str, str], keys: dict[str, str], ssh_dir: Path, is_whole: bool
) -> None:
    """A person may mount one, so that it stays the same; without its public part."""
    (ssh_dir / "host_key").write_text(keys["private"] if is_whole else "broken\n")
    (ssh_dir / "host_key").chmod(0o600)
    commands = "setup_environment; trap 'kill $sshd_pid 2>/dev/null' EXIT; start_sshd; echo goes on"
    environ = {**settings, "PUBLIC_KEY": keys["ed25519"], "SSH_DIR": str(ssh_dir), "SSH_PORT": str(free_port())}
    finished = sourced(environ, commands)
    assert finished.stdout == "goes on\n"
    assert ("host key SHA256:" in finished.stderr) == is_whole
    assert ("a key in there is broken; no SSH." in finished.stderr) != is_whole


def test_without_sshd_a_public_key_is_a_warning(settings: dict[str, str]) -> None:
    commands = "setup_environment; command() { return 1; }; start_sshd; echo goes on"
    finished = sourced({**settings, "PUBLIC_KEY": "ssh-ed25519 AAAA"}, commands)
    assert finished.stdout == "goes on\n"
    warning = "WARNING start.sh PUBLIC_KEY is set, but there is no sshd; no SSH."
    assert [line[9:] for line in finished.stderr.splitlines()] == [warning]


def test_without_a_public_key_there_is_no_ssh_and_nothing_is_said(settings: dict[str, str], tmp_path: Path) -> None:
    commands = 'setup_environment; start_sshd; echo "pid:$sshd_pid"'
    finished = sourced({**settings, "SSH_DIR": str(tmp_path / "server")}, commands)
    assert (finished.stdout, finished.stderr) == ("pid:\n", "")
    assert not (tmp_path / "server").exists()


def connects(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def can_get(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"GET /system_stats HTTP/1.0\r\n\r\n")
            return connection.recv(64).startswith(b"HTTP/1.")
    except OSError:
        return False
