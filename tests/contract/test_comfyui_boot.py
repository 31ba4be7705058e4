"""The process: its flags, its folders, its signals; and the history race, widened until it can be seen."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from comfyui_client import ComfyUI, boot, command, directory, empty, free_port, save
from PIL import Image

WORKFLOW = {"1": empty(), "2": save("1")}


def refused(tmp_path: Path, port: int, *flags: str) -> subprocess.CompletedProcess[str]:
    """Start a server that should not start."""
    (tmp_path / "user").mkdir()
    arguments = command(tmp_path, port, *flags)
    return subprocess.run(arguments, cwd=directory(), capture_output=True, text=True, timeout=60, check=False)


def test_an_unknown_flag_is_refused(tmp_path: Path) -> None:
    process = refused(tmp_path, free_port(), "--no-such-flag")
    assert process.returncode == 2
    assert "--no-such-flag" in process.stderr


def test_flags_that_exclude_each_other_are_refused(tmp_path: Path) -> None:
    process = refused(tmp_path, free_port(), "--lowvram")  # --cpu is given as well
    assert process.returncode == 2
    assert "--lowvram" in process.stderr


def test_a_missing_user_directory_is_refused(tmp_path: Path) -> None:
    process = refused(tmp_path, free_port(), "--user-directory", str(tmp_path / "missing"))
    assert process.returncode == 2
    assert "--user-directory" in process.stderr


@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.1,192.0.2.1", "::"])
def test_only_loopback_addresses_are_served(tmp_path: Path, standin_only: None, address: str) -> None:
    process = refused(tmp_path, free_port(), "--listen", address)
    assert process.returncode == 2
    assert "loopback" in process.stderr


def test_a_taken_port_is_one_sentence(tmp_path: Path, standin_only: None) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = refused(tmp_path, taken.getsockname()[1], "--verbose", "WARNING")
    assert process.returncode == 1
    assert process.stderr.startswith("cannot start: ")
    assert len(process.stderr.splitlines()) == 1


def test_it_says_that_it_is_a_stand_in(tmp_path: Path, standin_only: None) -> None:
    with boot(tmp_path, "--log-stdout") as server:
        system = server.get("/system_stats").json()["system"]
    assert (system["comfyui_version"], system["stand_in"]) == ("0.18.1+standin", True)
    assert "stand-in" in (tmp_path / "log").read_text().splitlines()[0]


def test_temp_is_a_folder_of_its_own_emptied_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "temp" / "old").mkdir(parents=True)
    (tmp_path / "keep.txt").write_text("beside it")
    with boot(tmp_path) as server:
        assert list(server.temp.iterdir()) == []
    assert (tmp_path / "keep.txt").read_text() == "beside it"


def test_without_metadata_on_request(tmp_path: Path) -> None:
    with boot(tmp_path, "--disable-metadata") as server:
        name = server.run(WORKFLOW).files("2")[0]["filename"]
        with Image.open(server.output / name) as picture:
            assert picture.info == {}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 0)])
def test_signals_end_it_while_a_prompt_runs(tmp_path: Path, standin_only: None, number: int, code: int) -> None:
    sleep = {"class_type": "StandinSleep", "inputs": {"image": ["1", 0], "seconds": 600.0, "steps": 1}}
    with boot(tmp_path) as server, server.listen("me") as listener:
        server.post("/prompt", {"prompt": {"1": empty(), "2": sleep, "3": save("2")}, "client_id": "me"})
        listener.read_until(lambda message: message.get("type") == "executing" and message["data"]["node"] == "2")
        os.kill(server.process.pid, number)
        assert server.process.wait(timeout=10) == code


def test_at_execution_success_the_history_is_still_empty(tmp_path: Path, standin_only: None) -> None:
    # A minute, so that a slow machine cannot miss the gap; nobody waits for its end.
    with boot(tmp_path, env={"STANDIN_HISTORY_DELAY_MS": "60000"}) as server, server.listen("me") as listener:
        prompt_id = server.post("/prompt", {"prompt": WORKFLOW, "client_id": "me"}).json()["prompt_id"]
        listener.read_until(lambda message: message.get("type") == "execution_success")
        assert server.history(prompt_id) == {}
        assert [item[1] for item in server.get("/queue").json()["queue_running"]] == [prompt_id]


def test_a_checkout_is_left_as_it_was(tmp_path: Path) -> None:
    before = listing(directory())
    with boot(tmp_path) as server:
        run_everything(server)
    assert listing(directory()) == before


def run_everything(server: ComfyUI) -> None:
    preview = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
    run = server.run({**WORKFLOW, "3": preview})
    assert run.history["status"]["completed"] is True


def listing(folder: Path) -> set[tuple[str, int]]:
    """All files but Python's compiled ones, with their sizes."""
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {(str(path), path.stat().st_size) for path in files}
