"""What RunPod's Hub reads, .runpod/hub.json and .runpod/tests.json: their keys, and that the worker knows the values.

The keys and their values are those of RunPod's publishing guide (docs.runpod.io/hub/publishing-guide). That the jobs of
tests.json run is shown by tests/process/test_main_job.py.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.documents import build_arguments, first_names, text_of
from worker.config import Config
from worker.models.grammar import parse_models
from worker.payload import parse_job_input

ROOT = Path(__file__).resolve().parents[2]
HUB = json.loads((ROOT / ".runpod/hub.json").read_text())
TESTS = json.loads((ROOT / ".runpod/tests.json").read_text())
CONFIG = HUB["config"]
INPUTS = {entry["key"]: entry["input"] for entry in CONFIG["env"] if "input" in entry}
FIXED = {entry["key"]: entry["value"] for entry in CONFIG["env"] if "value" in entry}
PRESETS = {preset["name"]: preset["defaults"] for preset in CONFIG["presets"]}
IMAGE_GB = 9  # unpacked, without models


def environment(preset: str) -> dict[str, str]:
    """What a worker finds whose owner chose ``preset`` and left the rest as it was."""
    chosen = {**{key: entry["default"] for key, entry in INPUTS.items()}, **PRESETS[preset]}
    return {**FIXED, **{key: str(value) for key, value in chosen.items()}}


def cuda_versions(names: list[str]) -> list[tuple[int, int]]:
    return [(int(major), int(minor)) for major, minor in (name.split(".") for name in names)]


def test_the_hub_finds_every_key_that_it_requires() -> None:
    assert HUB.keys() == {"title", "description", "type", "category", "config"}
    assert (HUB["type"], HUB["category"], CONFIG["runsOn"], CONFIG["gpuCount"]) == ("serverless", "image", "GPU", 1)
    optional = {"allowedCudaVersions", "env", "presets"}
    assert CONFIG.keys() == {"runsOn", "containerDiskInGb", "gpuIds", "gpuCount", *optional}
    assert re.fullmatch(r"[A-Z0-9_]+(,[A-Z0-9_]+)*", CONFIG["gpuIds"])  # pools, which are no names of GPUs
    assert len(INPUTS) + len(FIXED) == len(CONFIG["env"])  # each once


def test_every_input_says_what_it_is_and_its_default_is_one_of_its_options() -> None:
    for key, entry in INPUTS.items():
        assert entry.keys() - {"options", "min", "max"} == {"name", "type", "description", "default", "advanced"}, key
        assert entry["type"] == ("number" if isinstance(entry["default"], int) else "string"), key
        if "options" in entry:
            assert entry["default"] in [option["value"] for option in entry["options"]], key


def test_every_variable_is_documented() -> None:
    readme = (ROOT / "README.md").read_text()
    assert INPUTS.keys() <= set(first_names(text_of("docs/configuration.md")))
    assert FIXED.keys() == {"RUNPOD_INIT_TIMEOUT"}  # RunPod's own
    assert f"RUNPOD_INIT_TIMEOUT={FIXED['RUNPOD_INIT_TIMEOUT']}" in readme


@pytest.mark.parametrize("preset", PRESETS)
def test_a_worker_starts_with_each_preset(preset: str, tmp_path: Path) -> None:
    assert PRESETS[preset].keys() <= INPUTS.keys()
    environ = environment(preset)
    assert Config.from_env(environ) == Config.from_env({})  # the defaults shown are those of the worker
    needed = {
        "PATH": os.environ["PATH"],
        "COMFYUI_DIR": str(ROOT / "local/comfyui"),
        "COMFYUI_PYTHON": sys.executable,
        "WORKER_PYTHON": sys.executable,
        "COMFYUI_PORT": "1",  # nobody listens there
        "RAMDISK_DIR": str(tmp_path),
    }
    script = f"source {ROOT / 'start.sh'}; setup_environment; echo $MODELS"
    said = subprocess.run(["bash", "-c", script], env=needed | environ, capture_output=True, text=True, check=False)
    assert (said.returncode, said.stderr, said.stdout.strip()) == (0, "", environ["MODELS"])


@pytest.mark.parametrize("preset", PRESETS)
def test_the_models_of_each_preset_are_those_of_an_example_and_fit_the_disk(preset: str) -> None:
    models = PRESETS[preset]["MODELS"]
    entries, errors = parse_models(models, Path("/ComfyUI"))
    assert errors == []
    assert len(entries) == len([entry for entry in models.split(",") if entry])
    if entries:
        assert f"\nMODELS={models}\n" in (ROOT / "workflows/README.md").read_text()
        size = re.search(r"\(([\d.]+) GB\)$", preset)
        assert size is not None
        assert IMAGE_GB + float(size[1]) < CONFIG["containerDiskInGb"]


def test_hosts_have_the_cuda_version_of_the_image_or_a_newer_one() -> None:
    built = re.fullmatch(r"torch-cuda-([\d.]+)", build_arguments()["TORCH"])
    assert built is not None
    assert min(cuda_versions(CONFIG["allowedCudaVersions"])) == cuda_versions([built[1]])[0]
    assert TESTS["config"]["allowedCudaVersions"] == CONFIG["allowedCudaVersions"]


def test_the_hubs_tests_have_the_keys_that_it_requires() -> None:
    assert TESTS.keys() == {"tests", "config"}
    assert TESTS["config"].keys() == {"gpuTypeId", "gpuCount", "env", "allowedCudaVersions"}
    names = [case["name"] for case in TESTS["tests"]]
    assert len(set(names)) == len(names) >= 1
    for case in TESTS["tests"]:
        assert case.keys() == {"name", "input", "timeout"}
        assert 10_000 <= case["timeout"] <= 600_000  # milliseconds


@pytest.mark.parametrize("case", TESTS["tests"], ids=lambda case: str(case["name"]))
def test_the_inputs_of_the_hubs_tests_are_understood_without_a_warning(case: dict[str, Any]) -> None:
    request = parse_job_input(case["input"])
    assert request.warnings == ()
    # No model is downloaded for them.
    assert {node["class_type"] for node in request.workflow.values()} <= {
        "EmptyImage",
        "ImageInvert",
        "LoadImage",
        "SaveImage",
    }
