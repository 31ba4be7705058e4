"""A release: one version in one place, the changelog's form, and what the files in .github rely on."""

import itertools
import os
import re
import shutil
import subprocess
import tomllib
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.documents import build_arguments

ROOT = Path(__file__).resolve().parents[2]
VERSION = (ROOT / "VERSION").read_text().strip()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


# --- the version ---


def test_the_version_stands_in_one_file() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)
    assert "version" not in PROJECT["project"]
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"file": "VERSION"}


# --- CHANGELOG.md ---


def parts(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def faults(changelog: str, version: str) -> list[str]:
    """What is wrong with a changelog by keepachangelog.com 1.1.0, and by the version that is built."""
    found = []
    headings = re.findall(r"^## (.*)$", changelog, re.MULTILINE)
    if headings[:1] == ["[Unreleased]"]:
        del headings[0]
    else:
        found.append("does not begin with [Unreleased]")
    released = []
    for heading in headings:
        match = re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})", heading)
        if match is None:
            found.append(f"has the heading {heading}")
            continue
        date.fromisoformat(match[2])
        released.append(match[1])
    found += [f"has {old} above {new}" for old, new in itertools.pairwise(released) if parts(old) <= parts(new)]
    if released and parts(version) < parts(released[0]):
        found.append(f"has released {released[0]}, but VERSION says {version}")
    unreleased = changelog.partition("## [Unreleased]")[2].partition("\n## ")[0]
    if version not in released and "\n- " not in unreleased:
        found.append(f"says nothing of {version}")
    found += [
        f"has changes of the kind {kind}"
        for kind in re.findall(r"^### (.*)$", changelog, re.MULTILINE)
        if kind not in KINDS
    ]
    return found


def test_the_changelog_has_its_form_and_agrees_with_the_version() -> None:
    assert faults(CHANGELOG, VERSION) == []


NEWS = "### Added\n\n- News.\n\n"
OLD = "## [0.2.0] - 2026-10-02\n\n### Fixed\n\n- It.\n\n## [0.1.0] - 2026-09-01\n\n### Added\n\n- All.\n"


@pytest.mark.parametrize(
    ("changelog", "version", "said"),
    [
        (f"## [Unreleased]\n\n{OLD}", "0.2.0", []),
        (f"## [Unreleased]\n\n{NEWS}{OLD}", "0.2.0", []),
        (f"## [Unreleased]\n\n{NEWS}{OLD}", "0.3.0", []),
        (f"## [Unreleased]\n\n{OLD}", "0.3.0", ["says nothing of 0.3.0"]),
        (f"## [Unreleased]\n\n{NEWS}{OLD}", "0.1.0", ["has released 0.2.0, but VERSION says 0.1.0"]),
        (OLD, "0.2.0", ["does not begin with [Unreleased]"]),
        (f"## [Unreleased]\n\n{OLD.replace('0.1.0', '0.9.0')}", "0.2.0", ["has 0.2.0 above 0.9.0"]),
        (f"## [Unreleased]\n\n{NEWS}## 0.1.0\n", "0.1.0", ["has the heading 0.1.0"]),
        (f"## [Unreleased]\n\n{NEWS.replace('Added', 'New')}", "0.1.0", ["has changes of the kind New"]),
    ],
)
def test_a_changelog_that_does_not_agree_is_found_out(changelog: str, version: str, said: list[str]) -> None:
    assert faults(changelog, version) == said


# --- .github/image_names.sh ---


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in (".github/image_names.sh", "Dockerfile", "VERSION", "CHANGELOG.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "image", tmp_path / "image")
    (tmp_path / "VERSION").write_text("1.2.3\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2026-11-24\n")
    return tmp_path


def names(checkout: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    environ = {
        "PATH": os.environ["PATH"],
        "GITHUB_REF_TYPE": "branch",
        "GITHUB_REF_NAME": "main",
        "GITHUB_REPOSITORY": "Somebody/Comfy-Endpoint",
        "TORCH": "torch-cuda-12.8",
        "COMFYUI_REF": "",
    }
    script = checkout / ".github/image_names.sh"
    return subprocess.run([script], env=environ | settings, capture_output=True, text=True, timeout=20, check=False)


@pytest.mark.parametrize(
    ("settings", "suffix"),
    [
        ({}, ""),
        ({"GITHUB_REF_TYPE": "tag", "GITHUB_REF_NAME": "v1.2.3"}, ""),
        ({"TORCH": "torch-cuda-13.0"}, "-cuda-13.0"),
        ({"COMFYUI_REF": "v0.19.0"}, "-comfyui-v0.19.0"),
        ({"COMFYUI_REF": "some/branch", "TORCH": "torch-cuda-13.0"}, "-comfyui-some-branch-cuda-13.0"),
    ],
)
def test_the_image_has_the_repositorys_name_and_a_suffix_for_what_is_not_the_dockerfiles(
    checkout: Path, settings: dict[str, str], suffix: str
) -> None:
    finished = names(checkout, **settings)
    assert (finished.returncode, finished.stderr) == (0, "")
    said = ["version=1.2.3", "image=ghcr.io/somebody/comfy-endpoint", f"suffix={suffix}"]
    assert finished.stdout.splitlines() == said


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"GITHUB_REF_TYPE": "tag", "GITHUB_REF_NAME": "v1.2.4"}, "The tag is v1.2.4, but VERSION says 1.2.3."),
        ({"TORCH": "torch-cuda-1.0"}, "There is no image/torch-cuda-1.0.txt."),
        ({"COMFYUI_REF": "v1\nsuffix=-other"}, "COMFYUI_REF is no name"),
        ({"COMFYUI_REF": "v1,value=latest"}, "COMFYUI_REF is no name"),
    ],
)
def test_nothing_is_named_that_does_not_agree(checkout: Path, settings: dict[str, str], sentence: str) -> None:
    finished = names(checkout, **settings)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert sentence in finished.stderr


def test_a_tag_whose_changes_are_not_in_the_changelog_is_refused(checkout: Path) -> None:
    (checkout / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n\n## [1x2.3] - 2026-11-24\n")
    finished = names(checkout, GITHUB_REF_TYPE="tag", GITHUB_REF_NAME="v1.2.3")
    assert (finished.returncode, finished.stdout) == (1, "")
    assert "CHANGELOG.md has no heading '## [1.2.3] - YYYY-MM-DD'" in finished.stderr


# --- .github ---


def parsed(name: str) -> dict[Any, Any]:
    return dict(yaml.safe_load((ROOT / ".github" / name).read_text()))


def test_the_tests_are_run_on_the_pythons_that_are_supported() -> None:
    named = [text.rsplit(" ", 1)[1] for text in PROJECT["project"]["classifiers"]]
    rows = parsed("workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]["include"]
    assert [row["python"] for row in rows] == named
    assert PROJECT["project"]["requires-python"] == f">={named[0]}"
    image = re.match(r"python:(\d+\.\d+)-", build_arguments()["BASE_IMAGE"])
    assert image is not None
    assert image[1] in named


def test_the_image_is_built_with_every_torch_that_there_is() -> None:
    lists = sorted(path.stem for path in (ROOT / "image").glob("torch-*.txt"))
    workflow = parsed("workflows/build-base.yml")
    assert workflow[True]["workflow_dispatch"]["inputs"]["torch"]["options"] == lists  # YAML 1.1: `on` is true
    matrix = workflow["jobs"]["image"]["strategy"]["matrix"]["torch"]
    assert re.findall(r"torch-cuda-[\d.]+", matrix) == lists


def test_every_action_is_pinned_and_each_of_them_to_one_commit() -> None:
    text = "".join(path.read_text() for path in (ROOT / ".github/workflows").iterdir())
    pins: dict[str, set[tuple[str, str]]] = {}
    for action, commit, version in re.findall(r"uses: (\S+?)@(\S+) # (v[\d.]+)\n", text):
        assert re.fullmatch("[0-9a-f]{40}", commit)
        pins.setdefault(action, set()).add((commit, version))
    assert sum(len(found) for found in pins.values()) == len(pins) == 6
    assert text.count("uses: ") == len(re.findall(r"uses: \S+@[0-9a-f]{40} # v\d+\.\d+\.\d+\n", text))


def test_dependabot_proposes_what_pyproject_names() -> None:
    updates = {update["package-ecosystem"]: update for update in parsed("dependabot.yml")["updates"]}
    direct = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["dev"]]
    assert [entry["dependency-name"] for entry in updates["pip"]["allow"]] == [
        re.split(r"[=\[]", requirement)[0] for requirement in direct
    ]


@pytest.mark.parametrize("extra", [None, "dev"])
def test_the_requirements_have_what_pyproject_pins(extra: str | None) -> None:
    wanted = list(PROJECT["project"]["dependencies"])
    wanted += PROJECT["project"]["optional-dependencies"][extra] if extra else []
    name = "requirements-dev.txt" if extra else "requirements.txt"
    compiled = set(re.findall(r"^([a-z0-9.-]+==\S+)", (ROOT / name).read_text(), re.MULTILINE))
    pins = {re.sub(r"\[.*\]", "", pin).lower().replace("_", "-") for pin in wanted}
    assert pins - compiled == set(), "run make lock"
