"""start.sh as a program and, sourced, function by function."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from local.__main__ import free_port
from tests.process.stack import ROOT, boot, invert_job, wait_until

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
        ("RAMDISK_MIN_MB", "1e3", "RAMDISK_MIN_MB is '1e3'; set it to a whole number"),
        ("COMFYUI_ARGS", "--listen=0.0.0.0", "ComfyUI binds 127.0.0.1 only"),
        ("RAMDISK_DIR", str(STANDIN), "set it to a directory of its own"),
    ],
)
def test_a_wrong_setting_is_one_sentence_and_exit_code_2(
    settings: dict[str, str], name: str, value: str, sentence: str
) -> None:
    finished = run_start_sh({**settings, name: value})
    assert finished.returncode == 2
    assert len(finished.stderr.splitlines()) == 1
    assert sentence in finished.stderr


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


def test_a_comfyui_that_dies_while_booting_ends_the_worker_with_its_log(
    settings: dict[str, str], ramdisk: Path, tmp_path: Path
) -> None:
    checkout = tmp_path / "ComfyUI"
    checkout.mkdir()
    (checkout / "main.py").write_text("raise SystemExit('no such CUDA driver')")
    finished = run_start_sh({**settings, "COMFYUI_DIR": str(checkout)})
    assert finished.returncode == 1
    assert "no such CUDA driver" in finished.stderr
    assert "ComfyUI died while booting" in finished.stderr
    assert not ramdisk.exists()


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


@pytest.fixture
def ssh_dir() -> Iterator[Path]:
    """sshd refuses keys below a directory that others may write, such as /tmp."""
    folder = Path.home() / f".comfy-endpoint-test-{os.getpid()}"
    folder.mkdir(mode=0o700)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(not (Path("/usr/sbin/sshd").exists() and os.geteuid() == 0), reason="needs root and /usr/sbin/sshd")
def test_ssh_takes_the_key_copies_files_refuses_passwords_and_forwards_to_comfyui_only(
    settings: dict[str, str], ramdisk: Path, ssh_dir: Path
) -> None:
    key, port, forwarded = ssh_dir / "id", free_port(), free_port()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    public_key = key.with_suffix(".pub").read_text().strip() + "\r\n"
    settings |= {"PUBLIC_KEY": public_key, "SSH_PORT": str(port), "SSH_DIR": str(ssh_dir / "server")}
    options = ["-p", str(port), "-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={ssh_dir}/known"]
    options += ["-o", "BatchMode=yes", "root@127.0.0.1"]
    with subprocess.Popen(["bash", ROOT / "start.sh"], env=settings, stderr=subprocess.PIPE, text=True) as worker:
        try:
            wait_until(lambda: (ramdisk / "run" / "listened").exists(), "ComfyUI listens")
            login = subprocess.run(
                ["ssh", "-i", key, *options, "echo hello"], capture_output=True, text=True, timeout=20, check=False
            )
            refused = subprocess.run(
                ["ssh", "-o", "PubkeyAuthentication=no", *options, "echo hello"],
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
            copied = subprocess.run(
                ["sftp", "-i", key, "-b", "-", "-P", str(port), *options[2:]],
                input=f"get {ramdisk}/run/comfyui {ssh_dir}/copied\n",
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
            elsewhere = subprocess.run(
                ["ssh", "-i", key, "-W", f"127.0.0.1:{port}", *options],
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
            tunnel_to = f"{forwarded}:127.0.0.1:{settings['COMFYUI_PORT']}"
            with subprocess.Popen(["ssh", "-i", key, "-N", "-L", tunnel_to, *options]) as tunnel:
                wait_until(lambda: can_get(forwarded), "the tunnel carries HTTP")
                tunnel.terminate()
        finally:
            worker.send_signal(signal.SIGTERM)
            worker.communicate(timeout=10)
    assert login.stdout.strip() == "hello", login.stderr
    assert copied.returncode == 0, copied.stderr
    assert (ssh_dir / "copied").read_text().endswith(" 1\n")
    assert "administratively prohibited" in elsewhere.stderr
    assert refused.returncode == 255
    assert "Permission denied (publickey)" in refused.stderr


def test_ssh_that_cannot_start_is_a_warning(settings: dict[str, str], ramdisk: Path) -> None:
    commands = "setup_environment; start_sshd; echo goes on"
    finished = sourced({**settings, "PUBLIC_KEY": "ssh-ed25519 AAAA", "SSH_DIR": "/proc/nowhere"}, commands)
    assert finished.stdout == "goes on\n"
    assert "no SSH." in finished.stderr


def can_get(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"GET /system_stats HTTP/1.0\r\n\r\n")
            return connection.recv(64).startswith(b"HTTP/1.")
    except OSError:
        return False
