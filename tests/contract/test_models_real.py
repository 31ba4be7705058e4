"""What `utils.py` links and `start.sh` tells of volumes, as a ComfyUI that runs already sees it.

The checkout is left alone: ComfyUI gets a base directory of the test's own. The stand-in lists the models; the jobs
that load them need a real checkout, whose Python makes the weights, of random numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from comfyui_client import ComfyUI, Run, boot, directory
from PIL import Image

from worker.models.grammar import parse_models

REPO = Path(__file__).resolve().parents[2]
TINY_CHECKPOINT = Path(__file__).parent / "tiny_checkpoint.py"
WORKFLOWS = REPO / "workflows"
RUN_LIMIT_S = 60


@pytest.fixture
def real_only() -> None:
    """For what only real ComfyUI has: models that compute."""
    if "COMFYUI_DIR" not in os.environ:
        pytest.skip("needs real ComfyUI: COMFYUI_DIR and COMFYUI_PYTHON name none")


def safetensors(tensors: dict[str, list[int]], seed: int = 1) -> bytes:
    """A file with float32 tensors of these shapes, filled with small random numbers."""
    dice, header, data = random.Random(seed), {}, b""
    for name, shape in tensors.items():
        count = 1
        for length in shape:
            count *= length
        values = struct.pack(f"<{count}f", *(dice.uniform(-0.1, 0.1) for _ in range(count)))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + data


def upscaler(scale: int) -> bytes:
    """A network of the SRVGG kind ("Compact"), as small as can be: it enlarges by `scale`."""
    return safetensors(
        {
            "body.0.weight": [8, 3, 3, 3],
            "body.0.bias": [8],
            "body.1.weight": [8],
            "body.2.weight": [8, 8, 3, 3],
            "body.2.bias": [8],
            "body.3.weight": [8],
            "body.4.weight": [3 * scale**2, 8, 3, 3],
            "body.4.bias": [3 * scale**2],
        }
    )


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@dataclass
class Worker:
    """A ComfyUI that runs, and the folders that a worker has on RunPod."""

    server: ComfyUI
    root: Path

    @property
    def checkout(self) -> Path:
        """What COMFYUI_DIR is in a worker; here it has models and no code."""
        return self.root / "base"

    @property
    def volume(self) -> Path:
        return self.root / "volume"

    def listed(self, node: str, name: str) -> list[str]:
        """The files that a loader offers now."""
        choices = self.server.get(f"/object_info/{node}").json()[node]["input"]["required"][name]
        return list(choices[1]["options"] if choices[0] == "COMBO" else choices[0])

    def checkpoints(self) -> list[str]:
        return self.listed("CheckpointLoaderSimple", "ckpt_name")

    def cache(self, repo_id: str, filename: str, file: Path) -> Path:
        """Move a file into the host cache, as huggingface_hub lays it out; returns the blob."""
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        repository = self.root / "hub" / f"models--{repo_id.replace('/', '--')}"
        pointer = repository / "snapshots" / "abc" / filename
        for folder in (repository / "blobs", repository / "refs", pointer.parent):
            folder.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text("abc")
        blob = file.rename(repository / "blobs" / digest)
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
        return blob

    def link(self, models: str) -> None:
        """`utils.py` as start.sh runs it first; no network."""
        done = subprocess.run(
            [sys.executable, REPO / "utils.py", "--link-only"],
            env={
                "PATH": os.environ["PATH"],
                "COMFYUI_DIR": str(self.checkout),
                "HOST_CACHE_DIR": str(self.root / "hub"),
                "VOLUME_DIRS": str(self.volume),
                "HOME": str(self.root),
                "MODELS": models,
            },
            capture_output=True,
            text=True,
            timeout=RUN_LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "to download" not in done.stdout


def model_paths(root: Path, volume: Path) -> Path:
    """extra_model_paths.yaml as start.sh writes it."""
    (root / "ramdisk" / "run").mkdir(parents=True)
    subprocess.run(
        ["bash", "-c", f"source {REPO / 'start.sh'}; write_model_paths"],
        env={"PATH": os.environ["PATH"], "RAMDISK_DIR": str(root / "ramdisk"), "VOLUME_DIRS": str(volume)},
        timeout=RUN_LIMIT_S,
        check=True,
    )
    return root / "ramdisk" / "run" / "extra_model_paths.yaml"


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    root = tmp_path_factory.mktemp("models")
    volume = root / "volume"
    put(volume / "models/checkpoints/mine/by_hand.safetensors", safetensors({"w": [1]}))
    put(volume / "models/upscale_models/tiny_x2.safetensors", upscaler(2))
    put(volume / "models/custom_nodes/bomb/__init__.py", f"open({str(root / 'bomb')!r}, 'w')".encode())
    for name in (
        "2024",
        "null",
        "-",
        "is_default",
        "base_path",
        "two words",
    ):  # each has ended a boot, or hidden a volume
        (volume / "models" / name).mkdir()
    (root / "base" / "custom_nodes").mkdir(parents=True)
    config = model_paths(root, volume)
    with boot(root, "--base-directory", str(root / "base"), "--extra-model-paths-config", str(config)) as server:
        yield Worker(server, root)


def picture_of(worker: Worker, workflow: dict[str, Any], node: str) -> Image.Image:
    run: Run = worker.server.run(workflow)
    assert run.history["status"]["completed"] is True, run.history["status"]
    with Image.open(worker.server.output / run.files(node)[0]["filename"]) as picture:
        return picture.convert("RGB")


def colours_in(picture: Image.Image) -> int:
    return len(picture.getcolors(picture.width * picture.height))


# --- linked while ComfyUI runs ---


def test_a_model_that_is_linked_is_listed_without_a_restart(worker: Worker) -> None:
    assert "a.safetensors" not in worker.checkpoints()
    blob = worker.cache("org/name", "a.safetensors", put(worker.root / "made", safetensors({"w": [2]})))
    worker.link("org/name:a.safetensors:checkpoints")
    assert (worker.checkout / "models/checkpoints/a.safetensors").readlink() == blob
    assert "a.safetensors" in worker.checkpoints()
    worker.link("org/name:a.safetensors:checkpoints/deeper:b.safetensors")
    assert {"a.safetensors", "deeper/b.safetensors"} <= set(worker.checkpoints())


def sampling(checkpoint: str) -> dict[str, Any]:
    sampler = {"seed": 1, "steps": 4, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    links = {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]}
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["1", 1]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "bad", "clip": ["1", 1]}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "5": {"class_type": "KSampler", "inputs": {**sampler, **links}},
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "sampled"}},
    }


def test_a_job_samples_with_a_checkpoint_that_was_linked_while_comfyui_ran(worker: Worker, real_only: None) -> None:
    workflow = sampling("tiny.safetensors")
    refused = worker.server.post("/prompt", {"prompt": workflow}).json()
    assert refused["node_errors"]["1"]["errors"][0]["type"] == "value_not_in_list"
    made = worker.root / "tiny"
    subprocess.run(
        [os.environ["COMFYUI_PYTHON"], TINY_CHECKPOINT, made],
        cwd=directory(),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        timeout=RUN_LIMIT_S,
        check=True,
    )
    blob = worker.cache("org/tiny", "v1/tiny.safetensors", made)
    worker.link("org/tiny:v1/tiny.safetensors:checkpoints")
    picture = picture_of(worker, workflow, "9")
    assert picture.size == (64, 64)
    assert colours_in(picture) > 1000  # neither black nor of one colour
    blob.unlink()  # 280 MB


# --- a network volume ---


def test_files_on_a_volume_are_listed_and_those_that_come_later_too(worker: Worker) -> None:
    assert "mine/by_hand.safetensors" in worker.checkpoints()
    later = put(worker.volume / "models/checkpoints/later.safetensors", safetensors({"w": [3]}))
    assert "later.safetensors" in worker.checkpoints()
    later.unlink()
    assert "later.safetensors" not in worker.checkpoints()


def test_a_folder_that_is_made_later_is_looked_into(worker: Worker, real_only: None) -> None:
    assert worker.listed("VAELoader", "vae_name").count("own.safetensors") == 0
    put(worker.volume / "models/vae/own.safetensors", safetensors({"w": [1]}))
    assert worker.listed("VAELoader", "vae_name").count("own.safetensors") == 1


def test_a_job_uses_a_model_of_the_volume(worker: Worker, real_only: None) -> None:
    Image.effect_noise((24, 16), 90).convert("RGB").save(worker.server.input / "noise.png")
    workflow = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "noise.png"}},
        "2": {"class_type": "UpscaleModelLoader", "inputs": {"model_name": "tiny_x2.safetensors"}},
        "3": {"class_type": "ImageUpscaleWithModel", "inputs": {"upscale_model": ["2", 0], "image": ["1", 0]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "larger"}},
    }
    picture = picture_of(worker, workflow, "9")
    assert picture.size == (48, 32)
    assert colours_in(picture) > 100


def test_code_on_a_volume_is_not_run(worker: Worker) -> None:
    assert not (worker.root / "bomb").exists()


# --- the example workflows ---

# Which folder the loaders of the examples look in.
MODEL_INPUTS = {
    ("CheckpointLoaderSimple", "ckpt_name"): "checkpoints",
    ("UNETLoader", "unet_name"): "diffusion_models",
    ("CLIPLoader", "clip_name"): "text_encoders",
    ("DualCLIPLoader", "clip_name1"): "text_encoders",
    ("DualCLIPLoader", "clip_name2"): "text_encoders",
    ("VAELoader", "vae_name"): "vae",
}
EXAMPLES = sorted(path.name for path in WORKFLOWS.glob("*.json"))


def models_of(workflow: dict[str, Any]) -> dict[tuple[str, str], str]:
    """(node, input) -> folder/file of each model that it names."""
    return {
        (node_id, name): f"{MODEL_INPUTS[node['class_type'], name]}/{value}"
        for node_id, node in workflow.items()
        for name, value in node["inputs"].items()
        if (node["class_type"], name) in MODEL_INPUTS
    }


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_models_line_of_an_example_is_what_its_loaders_name(name: str) -> None:
    sections = (WORKFLOWS / "README.md").read_text().split("\n## ")[1:]
    text = "".join(section for section in sections if f"`{name}`" in section)
    lines = "\n".join(re.findall("^MODELS=(.*)", text, re.MULTILINE))
    entries, errors = parse_models(lines, Path("/ComfyUI"))
    assert errors == []
    placed = sorted(str(entry.path.relative_to("/ComfyUI/models")) for entry in entries)
    assert placed == sorted(set(models_of(json.loads((WORKFLOWS / name).read_text())).values()))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_lacks_nothing_but_its_models(worker: Worker, name: str, real_only: None) -> None:
    """ComfyUI itself says so: each input that is required is there, each link is of its type, each value is allowed."""
    workflow = json.loads((WORKFLOWS / name).read_text())
    for photo in (WORKFLOWS / "photos").iterdir():
        shutil.copy(photo, worker.server.input)
    answer = worker.server.post("/prompt", {"prompt": workflow})
    worker.server.post("/queue", {"clear": True})
    errors = [
        (node_id, error["extra_info"]["input_name"], error["type"])
        for node_id, node in answer.json()["node_errors"].items()
        for error in node["errors"]
    ]
    assert sorted(errors) == sorted((*place, "value_not_in_list") for place in models_of(workflow))
    assert answer.status_code == (400 if errors else 200)
