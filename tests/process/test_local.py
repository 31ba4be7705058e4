"""`make demo` and `make up` as a newcomer meets them; each failure is one sentence and leaves nothing behind."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.process.stack import ROOT, processes_with, wait_until

JOB = ["--workflow", "workflows/one_image.json", "--img", "workflows/photos/coffee.jpg"]
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def local_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "local", *arguments]


def run_local(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        local_command(*arguments),
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_two_demos_at_once_each_save_their_picture_and_leave_no_process(tmp_path: Path) -> None:
    mark = f"demo-{tmp_path.name}-{os.getpid()}"
    demos = [
        subprocess.Popen(
            local_command("--", sys.executable, "client.py", "--url", "{url}", *JOB, "--out", str(tmp_path / name)),
            cwd=ROOT,
            env={**os.environ, "DEMO_MARK": mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for name in ("one", "two")
    ]
    for demo, name in zip(demos, ("one", "two"), strict=True):
        printed, _ = demo.communicate(timeout=60)
        assert demo.returncode == 0
        assert [Path(line) for line in printed.splitlines()] == [tmp_path / name / "one_image_00001_.png"]
    assert (tmp_path / "one/one_image_00001_.png").stat().st_size > 10_000
    assert processes_with(f"DEMO_MARK={mark}") == []


def test_a_command_that_does_not_exist_is_one_sentence() -> None:
    finished = run_local("--", "/no/such/command")
    assert finished.returncode == 1
    assert "ERROR: /no/such/command cannot be started: No such file or directory." in finished.stderr
    assert "Traceback" not in finished.stderr


def test_children_can_be_interrupted_although_the_shell_ignores_sigint_in_the_background() -> None:
    script = (
        "import os, subprocess, sys; from local.__main__ import start;"
        "child = [sys.executable, '-c', 'import signal; print(signal.getsignal(signal.SIGINT).__name__)'];"
        "print(start(child, os.environ, sys.stderr, subprocess.PIPE).communicate()[0])"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert finished.stdout.strip() == "default_int_handler"


def test_the_commands_exit_code_is_passed_on() -> None:
    assert run_local("--", sys.executable, "-c", "raise SystemExit(7)").returncode == 7


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"RAMDISK_DIR": "/proc/nowhere"}, "RAMDISK_DIR=/proc/nowhere cannot be written"),
        ({"COMFYUI_DIR": "/nowhere"}, "There is no ComfyUI in COMFYUI_DIR=/nowhere"),
        ({"JOB_TIMEOUT_S": "soon"}, "JOB_TIMEOUT_S is 'soon'; it must be a number."),
    ],
)
def test_a_stack_that_cannot_start_says_why_and_ends_the_command(settings: dict[str, str], sentence: str) -> None:
    mark = f"fail-{os.getpid()}"
    finished = run_local("--", *SLEEP, DEMO_MARK=mark, **settings)
    assert finished.returncode == 1
    assert sentence in finished.stderr
    assert "Traceback" not in finished.stderr
    assert processes_with(f"DEMO_MARK={mark}") == []


@pytest.mark.parametrize("which", ["platform", "comfyui"])
def test_a_taken_port_is_one_sentence(which: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        arguments = ("--platform-port", port) if which == "platform" else ()
        settings = {"COMFYUI_PORT": port} if which == "comfyui" else {}
        finished = run_local(*arguments, "--", *SLEEP, **settings)
    assert finished.returncode == 1
    assert port in finished.stderr
    assert "Traceback" not in finished.stderr


def test_up_prints_a_client_command_that_works_as_it_stands_until_ctrl_c(tmp_path: Path) -> None:
    mark = f"up-{os.getpid()}"
    with subprocess.Popen(
        local_command(),
        cwd=ROOT,
        env={**os.environ, "DEMO_MARK": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's background ignores it
    ) as stack:
        assert stack.stdout is not None
        printed: list[str] = []
        while "Ctrl-C stops everything.\n" not in printed:
            printed.append(stack.stdout.readline())
            assert printed[-1], "make up ended"
        start = next(position for position, line in enumerate(printed) if line.startswith("RUNPOD_API_KEY="))
        command = "".join(printed[start : start + 2]).rstrip() + f" --out {tmp_path}"
        client = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert client.returncode == 0, client.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["one_image_00001_.png"]
        stack.send_signal(signal.SIGINT)
        assert stack.wait(20) == 0
    wait_until(lambda: processes_with(f"DEMO_MARK={mark}") == [], "every process has ended", timeout_s=5)
    assert processes_with(f"DEMO_MARK={mark}") == []


def make(folder: Path, target: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": os.environ["PATH"], "HOME": str(folder), **settings}
    return subprocess.run(
        ["make", target], cwd=folder, env=environ, capture_output=True, text=True, timeout=100, check=False
    )


@pytest.fixture
def bare_checkout(tmp_path: Path) -> Path:
    """What `make demo` needs up to the installation."""
    (tmp_path / "local").mkdir()
    for name in ("Makefile", "requirements.txt", "local/venv.sh"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
        (tmp_path / name).chmod(0o755)
    return tmp_path


def fake_python(folder: Path, body: str) -> str:
    program = folder / "python-for-test"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("exit 1", "Python 3.11 or newer is needed"),
        ('[ "$1" = -c ] && exit 0; exit 1', "cannot make a virtual environment"),
    ],
)
def test_demo_without_a_fit_python_says_what_to_install(bare_checkout: Path, body: str, sentence: str) -> None:
    finished = make(bare_checkout, "demo", PYTHON=fake_python(bare_checkout, body))
    assert finished.returncode != 0
    assert [line for line in finished.stderr.splitlines() if line.startswith("ERROR:") and sentence in line]


def test_demo_without_a_network_says_so(bare_checkout: Path) -> None:
    # A proxy that nobody listens at: every connection is refused at once.
    offline = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "PIP_RETRIES": "0"}
    finished = make(bare_checkout, "demo", PYTHON=sys.executable, PIP_CONFIG_FILE="/dev/null", **offline)
    assert finished.returncode != 0
    assert "ERROR: pip could not install requirements.txt; is there a network?" in finished.stderr
    assert not (bare_checkout / ".venv/.installed").exists()
