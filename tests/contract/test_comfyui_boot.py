"""The process: its flags, its folders, its signals; and the history race, widened until it can be seen."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from comfyui_client import ComfyUI, boot, command, directory, empty, fault_arguments, free_port, save
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


# --- custom nodes, and --quick-test-for-ci, with which image/custom_nodes.sh looks at them ---

NODE = "class PassedOn:\n    pass\n\n\nNODE_CLASS_MAPPINGS = {'PassedOn': PassedOn}\n"
PACKAGES = {
    "good/__init__.py": "from .nodes import NODE_CLASS_MAPPINGS\n",
    "good/nodes.py": NODE,
    "good/prestartup_script.py": "print('before the rest')\n",
    "dots.in.name/__init__.py": NODE,
    "raises/__init__.py": "raise RuntimeError('no luck')\n",
    "raises/prestartup_script.py": "print('before the rest, too')\n",
    "dots.in.name/prestartup_script.py": "raise RuntimeError('no luck before')\n",
    "lacks_a_package/__init__.py": "import no_such_package\n",
    "wrong_syntax/__init__.py": "def\n",
    "no_mappings/__init__.py": "",
    "mappings_of_none/__init__.py": "NODE_CLASS_MAPPINGS = None\n",
    "no_init/nodes.py": NODE,
    "single.py": NODE,
    "single_raises.py": "raise RuntimeError('no luck either')\n",
    "switched_off.disabled/__init__.py": "raise RuntimeError('imported nevertheless')\n",
    "switched_off.py.disabled": "raise RuntimeError('imported nevertheless')\n",
    "notes.txt": "no module",
    "__pycache__/left.py": "raise RuntimeError('imported nevertheless')\n",
}
IMPORTED = {"good", "dots.in.name", "single.py"}
FAILED = {
    "raises",
    "lacks_a_package",
    "wrong_syntax",
    "no_mappings",
    "mappings_of_none",
    "no_init",
    "single_raises.py",
}


def with_packages(tmp_path: Path) -> Path:
    """A base directory with these custom nodes."""
    folder = tmp_path / "base" / "custom_nodes"
    for name, content in PACKAGES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def quick_test(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "user").mkdir()
    # No faults: they are a package of custom nodes, too.
    arguments = [word for word in command(tmp_path, free_port()) if word not in fault_arguments(tmp_path)]
    arguments += ["--base-directory", str(tmp_path / "base"), "--quick-test-for-ci", *flags]
    environ = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        arguments, cwd=directory(), env=environ, capture_output=True, text=True, timeout=120, check=False
    )


def import_times(log: str, folder: Path, what: str = "Import") -> dict[str, str]:
    """What is said of each name below `folder`: "" or " (IMPORT FAILED)". A name must not be listed twice."""
    _, _, listed = log.partition(f"\n{what} times for custom nodes:\n")
    listed = listed.partition("\n\n")[0]
    pattern = rf"^ *\d+\.\d seconds(.*): {re.escape(str(folder))}/(.+)$"
    found = [(name, outcome) for outcome, name in re.findall(pattern, listed, re.MULTILINE)]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_a_quick_test_imports_custom_nodes_says_which_failed_and_ends_with_0(tmp_path: Path) -> None:
    folder = with_packages(tmp_path)
    process = quick_test(tmp_path)
    assert process.returncode == 0, process.stderr
    outcomes = dict.fromkeys(IMPORTED, "") | dict.fromkeys(FAILED, " (IMPORT FAILED)")
    assert import_times(process.stderr, folder) == outcomes
    before = {"good": "", "raises": "", "dots.in.name": " (PRESTARTUP FAILED)"}
    assert import_times(process.stderr, folder, "Prestartup") == before
    assert set(process.stdout.splitlines()) >= {"before the rest", "before the rest, too"}
    script = folder / "dots.in.name" / "prestartup_script.py"
    assert f"\nFailed to execute startup-script: {script} / no luck before\n" in process.stderr
    for name, reason in (
        ("raises", "no luck"),
        ("single_raises.py", "no luck either"),
        ("lacks_a_package", "No module named 'no_such_package'"),
    ):
        assert f"\nCannot import {folder}/{name} module for custom nodes: {reason}\n" in process.stderr
    for name in ("no_mappings", "mappings_of_none"):
        reason = "due to the lack of NODE_CLASS_MAPPINGS or NODES_LIST (need one)."
        assert f"\nSkip {folder}/{name} module for custom nodes {reason}\n" in process.stderr
    assert "Traceback (most recent call last):" in process.stderr
    assert f'File "{folder}/raises/__init__.py", line 1, in <module>' in process.stderr
    assert "RuntimeError: no luck\n" in process.stderr
    assert f"Cannot import {folder}/no_init module" in process.stderr
    assert "imported nevertheless" not in process.stderr
    assert not (tmp_path / "temp").exists()


def test_all_but_named_custom_nodes_can_be_left_out(tmp_path: Path) -> None:
    folder = with_packages(tmp_path)
    process = quick_test(tmp_path, "--disable-all-custom-nodes", "--whitelist-custom-nodes", "good", "raises")
    assert process.returncode == 0, process.stderr
    assert import_times(process.stderr, folder) == {"good": "", "raises": " (IMPORT FAILED)"}
    reason = "due to disable_all_custom_nodes and whitelist_custom_nodes"
    assert f"\nSkipping lacks_a_package {reason}\n" in process.stderr
    assert f"\nPrestartup Skipping dots.in.name {reason}\n" in process.stderr


def test_without_custom_nodes_there_are_no_import_times(tmp_path: Path) -> None:
    (tmp_path / "base" / "custom_nodes").mkdir(parents=True)
    process = quick_test(tmp_path, "--disable-all-custom-nodes")
    assert process.returncode == 0, process.stderr
    assert "Import times for custom nodes:" not in process.stderr


def test_custom_nodes_of_more_folders_are_imported(tmp_path: Path) -> None:
    folder = with_packages(tmp_path)
    (tmp_path / "others" / "more").mkdir(parents=True)
    (tmp_path / "others" / "more" / "__init__.py").write_text(NODE)
    config = tmp_path / "others.yaml"
    config.write_text(f"others:\n  base_path: {tmp_path}\n  custom_nodes: others\n")
    process = quick_test(tmp_path, "--extra-model-paths-config", str(config))
    assert process.returncode == 0, process.stderr
    assert import_times(process.stderr, tmp_path / "others") == {"more": ""}
    assert set(import_times(process.stderr, folder)) == IMPORTED | FAILED
    assert "before the rest" in process.stdout
    assert "Prestartup times" not in process.stderr  # ComfyUI tells only those of its last folder


def test_the_stand_in_does_not_run_the_nodes_that_it_imports(tmp_path: Path, standin_only: None) -> None:
    with_packages(tmp_path)
    with boot(tmp_path, "--base-directory", str(tmp_path / "base")) as server:
        assert "IMPORT FAILED" in (tmp_path / "log").read_text()
        assert "PassedOn" not in server.get("/object_info").json()
        refusal = server.post("/prompt", {"prompt": {"1": {"class_type": "PassedOn", "inputs": {}}}})
    assert refusal.status_code == 400
