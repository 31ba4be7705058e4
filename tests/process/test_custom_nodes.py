"""image/custom_nodes.sh as a program: local git repositories, and the stand-in as the ComfyUI that imports them."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.process.stack import ROOT

SCRIPT = ROOT / "image" / "custom_nodes.sh"
STANDIN = ROOT / "local" / "comfyui"
NODE = "NODE_CLASS_MAPPINGS = {}\n"
# git's settings of this machine do not count; of files, only local ones are read. A repository may have submodules.
GIT = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "protocol.file.allow",
    "GIT_CONFIG_VALUE_0": "always",
    "GIT_TERMINAL_PROMPT": "0",
}
IDENTITY = ["-c", "user.name=test", "-c", "user.email=test@localhost"]


def custom_nodes_sh(*arguments: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", SCRIPT, *arguments],
        env={**os.environ, **GIT, **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def sentences(finished: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines with which the script itself gives up."""
    return re.findall(r"^ERROR: (.*)$", finished.stderr, re.MULTILINE)


# --- fetch ---


def git(repository: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repository), *IDENTITY, *arguments]
    environ = {**os.environ, **GIT}
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout.strip()


def repository(folder: Path, content: str = NODE) -> str:
    """A repository with one commit more that has this `__init__.py`; returns the commit."""
    if not folder.exists():
        folder.mkdir(parents=True)
        git(folder, "init", "-q", "-b", "main")
    (folder / "__init__.py").write_text(content)
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "As it is")
    return git(folder, "rev-parse", "HEAD")


Fetch = Callable[[str], subprocess.CompletedProcess[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "custom_nodes"
    made.mkdir()
    return made


@pytest.fixture
def fetch(tmp_path: Path, folder: Path) -> Fetch:
    """Fetch what a list of this text names into ``folder``."""

    def run(text: str) -> subprocess.CompletedProcess[str]:
        listed = tmp_path / "custom_nodes.txt"
        listed.write_bytes(text.encode())
        return custom_nodes_sh("fetch", listed, folder)

    return run


def test_each_line_is_fetched_at_its_commit_without_its_history(tmp_path: Path, folder: Path, fetch: Fetch) -> None:
    first, second = tmp_path / "First.git", tmp_path / "Second"
    old = repository(first, "# old\n")
    repository(first, "# new\n")
    newest = repository(second)
    # A comment, a blank line, blanks, Windows' line ends, a comment behind, and no line end at the end.
    finished = fetch(
        f"# {first}@main\r\n\r\n   file://{first}@{old} \t\r\n\t# nothing\n\nfile://{second}@{newest}  # it is needed"
    )
    assert finished.returncode == 0, finished.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["First", "Second"]
    assert (folder / "First" / "__init__.py").read_text() == "# old\n"
    assert (folder / "Second" / "__init__.py").read_text() == NODE
    assert [path for path in folder.rglob("*") if path.name.startswith(".git")] == []


def test_a_submodule_is_fetched_too_and_leaves_no_history(tmp_path: Path, folder: Path, fetch: Fetch) -> None:
    inner, outer = tmp_path / "inner", tmp_path / "Outer"
    repository(inner, "# inner\n")
    repository(outer)
    git(outer, "submodule", "--quiet", "add", f"file://{inner}", "vendored")
    finished = fetch(f"file://{outer}@{repository(outer, '# with a submodule')}\n")
    assert finished.returncode == 0, finished.stderr
    assert (folder / "Outer" / "vendored" / "__init__.py").read_text() == "# inner\n"
    assert [path for path in folder.rglob(".git")] == []


def test_a_list_without_a_repository_fetches_nothing(folder: Path, fetch: Fetch) -> None:
    finished = fetch((ROOT / "custom_nodes.txt").read_text())
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "version", ["main", "v1.0", "0123abc", "0123456789ABCDEF" * 2 + "01234567", "0" * 39, "0" * 41, "", "0" * 64]
)
def test_what_is_not_a_whole_commit_is_refused_in_one_sentence(
    tmp_path: Path, folder: Path, fetch: Fetch, version: str
) -> None:
    line = f"file://{tmp_path}/Nodes@{version}" if version else f"file://{tmp_path}/Nodes"
    finished = fetch(f"{line}\n")
    assert finished.returncode == 1
    reason = "is not REPOSITORY@COMMIT with all 40 digits of the commit."
    assert finished.stderr == f"ERROR: Line 1 of custom_nodes.txt {reason}\n"  # not the line: it may have a token
    assert list(folder.iterdir()) == []


def test_a_commit_that_is_not_there_is_named(tmp_path: Path, fetch: Fetch) -> None:
    nodes = tmp_path / "Nodes"
    repository(nodes)
    absent = "0123456789abcdef0123456789abcdef01234567"
    finished = fetch(f"file://{nodes}@{absent}\n")
    assert finished.returncode == 1
    assert sentences(finished) == [f"file://{nodes} has no commit {absent} that can be fetched."]


def test_a_repository_that_is_not_there_is_named(tmp_path: Path, fetch: Fetch) -> None:
    absent = "0123456789abcdef0123456789abcdef01234567"
    finished = fetch(f"file://{tmp_path}/nowhere@{absent}\n")
    assert finished.returncode == 1
    assert sentences(finished) == [f"file://{tmp_path}/nowhere has no commit {absent} that can be fetched."]


def test_two_repositories_of_one_name_are_refused(tmp_path: Path, folder: Path, fetch: Fetch) -> None:
    ours, theirs = tmp_path / "ours" / "Nodes", tmp_path / "theirs" / "Nodes.git"
    lines = [f"file://{path}@{repository(path, f'# {path.parent.name}')}" for path in (ours, theirs)]
    finished = fetch("\n".join(lines))
    assert finished.returncode == 1
    assert finished.stderr == "ERROR: custom_nodes.txt has Nodes twice.\n"
    assert (folder / "Nodes" / "__init__.py").read_text() == "# ours"


# --- install ---


def test_without_requirements_nothing_is_installed(folder: Path) -> None:
    empty = custom_nodes_sh("install", folder, "--no-index")
    (folder / "Nodes").mkdir()
    (folder / "Nodes" / "__init__.py").write_text(NODE)
    (folder / "websocket_image_save.py").write_text(NODE)
    without = custom_nodes_sh("install", folder, "--no-index")
    assert [(one.returncode, one.stdout, one.stderr) for one in (empty, without)] == [(0, "", ""), (0, "", "")]


def test_requirements_that_cannot_be_installed_fail_the_build(folder: Path) -> None:
    # With /ComfyUI and without: the one has no such file to install, the other no pip.
    for name, text in (("Fine", ""), ("Nodes", "/nowhere/absent.whl\n")):
        (folder / name).mkdir()
        if text:
            (folder / name / "requirements.txt").write_text(text)
    finished = custom_nodes_sh("install", folder, "--no-index")
    assert finished.returncode == 1
    assert sentences(finished) == ["The requirements of Nodes cannot be installed (above)."]


# --- check ---


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of ComfyUI, as far as these tests are concerned."""
    made = tmp_path / "ComfyUI"
    shutil.copytree(STANDIN, made, ignore=shutil.ignore_patterns("__pycache__"))
    (made / "input").mkdir()
    (made / "input" / "mine.png").write_bytes(b"mine")
    (made / "custom_nodes").mkdir()
    (made / "custom_nodes" / "websocket_image_save.py").write_text(NODE)
    return made


def put_node(checkout: Path, name: str, content: str) -> None:
    package = checkout / "custom_nodes" / name
    package.mkdir()
    (package / "__init__.py").write_text(content)


def check(checkout: Path) -> subprocess.CompletedProcess[str]:
    """Runs the check; whatever comes of it, the checkout and the folder for temporary files are as before."""
    temporary = checkout.parent / "temporary"
    temporary.mkdir(exist_ok=True)
    before = contents(checkout)
    # Its Python is the one that has the stand-in's packages, and may write bytecode, but for the script.
    environ = {"COMFYUI_PYTHON": sys.executable, "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": ""}
    finished = custom_nodes_sh("check", checkout, **environ)
    assert contents(checkout) == before
    assert list(temporary.iterdir()) == []
    return finished


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_nodes_that_can_be_imported_pass(checkout: Path) -> None:
    put_node(checkout, "Good", NODE)
    put_node(checkout, "comfyui-with.dots_and-dashes", NODE)
    finished = check(checkout)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


def test_no_node_at_all_passes(checkout: Path) -> None:
    assert check(checkout).returncode == 0
    shutil.rmtree(checkout / "custom_nodes")
    finished = check(checkout)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


def test_what_python_and_git_leave_beside_the_nodes_is_no_node(checkout: Path) -> None:
    (checkout / "custom_nodes" / "__pycache__").mkdir()
    (checkout / "custom_nodes" / ".gitkeep").touch()
    assert check(checkout).returncode == 0


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ("raise RuntimeError('no luck')\n", "RuntimeError: no luck"),
        ("import no_such_package\n", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("def\n", "SyntaxError: "),
        ("", "due to the lack of NODE_CLASS_MAPPINGS"),
    ],
    ids=["raises", "lacks a package", "wrong syntax", "no mappings"],
)
def test_a_node_that_cannot_be_imported_fails_the_build_with_its_reason(
    checkout: Path, content: str, shown: str
) -> None:
    put_node(checkout, "Good", NODE)
    put_node(checkout, "Not_Good", content)
    finished = check(checkout)
    assert finished.returncode == 1
    assert sentences(finished) == ["ComfyUI cannot import Not_Good (above)."]
    above, _, _ = finished.stderr.rpartition("ERROR: ")
    assert shown in above
    assert f"{checkout}/custom_nodes/Not_Good" in above


def test_a_node_is_not_taken_for_another_whose_name_ends_as_its_own(checkout: Path) -> None:
    put_node(checkout, "Not_Good", "raise RuntimeError('no luck')\n")
    put_node(checkout, "Really_Not_Good", NODE)
    assert sentences(check(checkout)) == ["ComfyUI cannot import Not_Good (above)."]


def test_a_node_whose_script_runs_before_the_start_is_not_taken_for_imported(checkout: Path) -> None:
    put_node(checkout, "Not_Good", "raise RuntimeError('no luck')\n")
    (checkout / "custom_nodes" / "Not_Good" / "prestartup_script.py").touch()
    assert sentences(check(checkout)) == ["ComfyUI cannot import Not_Good (above)."]


def test_a_folder_that_is_no_package_fails_the_build(checkout: Path) -> None:
    (checkout / "custom_nodes" / "Workflows").mkdir()
    assert sentences(check(checkout)) == ["ComfyUI cannot import Workflows (above)."]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("raise SystemExit(3)\n", "ComfyUI does not start (above)."),
        ("raise SystemExit(0)\n", "ComfyUI cannot import Ends (above)."),
        ("import os, signal\n\nos.kill(os.getpid(), signal.SIGKILL)\n", "ComfyUI does not start (above)."),
    ],
    ids=["exits with 3", "exits with 0", "is killed"],
)
def test_a_node_that_ends_comfyui_fails_the_build(checkout: Path, content: str, sentence: str) -> None:
    put_node(checkout, "Ends", content)
    finished = check(checkout)
    assert finished.returncode == 1
    assert sentences(finished) == [sentence]
    assert "This is a stand-in" in finished.stderr


def test_a_core_node_that_cannot_be_imported_fails_the_build(checkout: Path) -> None:
    """What ComfyUI 0.18.1 logs (nodes.py) where a package of its own requirements does not fit."""
    (checkout / "main.py").write_text("print('IMPORT FAILED: nodes_canny.py')\n")
    finished = check(checkout)
    assert finished.returncode == 1
    assert finished.stderr.endswith("ERROR: ComfyUI cannot import all of its own nodes (above).\n")


def test_a_comfyui_that_does_not_start_fails_the_build_with_its_log(checkout: Path) -> None:
    put_node(checkout, "Good", NODE)
    (checkout / "main.py").write_text("raise SystemExit('torch is not there')\n")
    finished = check(checkout)
    assert finished.returncode == 1
    assert finished.stderr == "torch is not there\nERROR: ComfyUI does not start (above).\n"
