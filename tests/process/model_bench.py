"""Folders, a hub and utils.py: what the tests of the model manager share.

Most runs take place in this process: the program's own `main`, the real huggingface_hub, real sockets and files; a
process of its own costs a third of a second of CPU. `Bench.process` and `Bench.start` are for what needs one.
"""

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hub_server import MEMBER_TOKEN, STRANGER_TOKEN, HubServer, running_hub
from huggingface_hub import close_session, constants, hf_hub_download
from huggingface_hub.utils import disable_progress_bars

import utils

UTILS = Path(__file__).parents[2] / "utils.py"
ALL_THERE, SOME_MISSING, BAD_CONFIGURATION = 0, 1, 2
RUN_LIMIT_S = 30


def safetensors(seed: int, size_bytes: int = 100_000) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [size_bytes], "data_offsets": [0, size_bytes]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes([seed]) * size_bytes


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def point_library_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does before huggingface_hub is imported, for the library in this process."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + template[template.index("/{repo_id}") :])


@dataclass
class Run:
    code: int
    stdout: str
    stderr: str

    @property
    def columns(self) -> list[list[str]]:
        """stdout: one line a model, its columns two spaces apart."""
        return [line.split("  ") for line in self.stdout.splitlines()]

    @property
    def sources(self) -> dict[str, str]:
        """Entry -> the column behind it."""
        return {line[0]: line[1] for line in self.columns if len(line) > 2}

    @property
    def complaints(self) -> list[str]:
        lines = self.stderr.splitlines()
        return [line.removeprefix("utils.py: ") for line in lines if line.startswith("utils.py: ")]

    def check(self, token: str | None = None) -> "Run":
        """What holds for every run: no bug, and no secret in sight."""
        assert "Traceback" not in self.stderr, self.stderr
        for secret in filter(None, (token, MEMBER_TOKEN, STRANGER_TOKEN)):
            assert secret not in self.stdout + self.stderr
        return self


@dataclass
class Bench:
    """A ComfyUI folder, a host cache, a network volume, a local cache and a hub."""

    folder: Path
    hub: HubServer

    @property
    def models(self) -> Path:
        return self.folder / "ComfyUI" / "models"

    @property
    def cache(self) -> Path:
        return self.folder / "host-cache" / "hub"

    @property
    def local_cache(self) -> Path:
        return self.folder / ".cache" / "huggingface" / "hub"

    @property
    def volume(self) -> Path:
        """The models folder of the network volume; it is mounted at its parent."""
        return self.folder / "volume" / "models"

    @property
    def ramdisk(self) -> Path:
        return self.folder / "ramdisk"

    def environment(self, models: str, token: str | None = None, **more: str) -> dict[str, str]:
        ours = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "MODELS": models,
            "COMFYUI_DIR": str(self.folder / "ComfyUI"),
            "HOST_CACHE_DIR": str(self.cache),
            "VOLUME_DIRS": str(self.volume.parent),
            "RAMDISK_DIR": str(self.ramdisk),
            "HF_ENDPOINT": self.hub.url,
            **({"HF_TOKEN": token} if token else {}),
        }
        return ours | more

    def utils(self, models: str, *arguments: str, token: str | None = None, **more: str) -> Run:
        """The program in this process."""
        stdout, stderr = io.StringIO(), io.StringIO()
        log, handler = logging.getLogger("worker.models"), logging.StreamHandler(stderr)
        log.addHandler(handler)
        try:
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                code = utils.main(list(arguments), self.environment(models, token, **more))
        finally:
            log.removeHandler(handler)
        return Run(code, stdout.getvalue(), stderr.getvalue()).check(token)

    def process(
        self, models: str, *arguments: str, token: str | None = None, python: tuple[str, ...] = (), **more: str
    ) -> Run:
        """The program as start.sh runs it; `python`: options of the interpreter."""
        done = subprocess.run(
            [sys.executable, *python, str(UTILS), *arguments],
            cwd="/",
            env=self.environment(models, token, **more),
            capture_output=True,
            text=True,
            timeout=RUN_LIMIT_S,
        )
        return Run(done.returncode, done.stdout, done.stderr).check(token)

    @contextlib.contextmanager
    def start(self, models: str, **more: str) -> Iterator[subprocess.Popen[str]]:
        """The program in the background; ended with the block. What it writes to stdout and stderr comes as one."""
        process = subprocess.Popen(
            [sys.executable, str(UTILS)],
            cwd="/",
            env=self.environment(models, **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def cache_by_library(
        self, repo_id: str, filename: str, cache: Path | None = None, revision: str | None = None
    ) -> Path:
        """Have huggingface_hub itself fill a cache (the host's); returns the blob. Its requests are forgotten."""
        pointer = hf_hub_download(
            repo_id,
            filename,
            revision=revision,
            cache_dir=cache or self.cache,
            endpoint=self.hub.url,
            token=MEMBER_TOKEN,
        )
        self.hub.requests.clear()
        return Path(pointer).resolve()

    def put(self, path: Path, content: bytes) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def files_below_models(self) -> list[str]:
        return files_below(self.models)

    def records(self) -> dict[str, dict[str, Any]]:
        """The manifest, by the files' names. Only written where `ramdisk`/run is there."""
        manifest = json.loads((self.ramdisk / "run" / "models.json").read_text())
        return {record["name"]: record for record in manifest["models"]}


def output_until(process: subprocess.Popen[str], word: str) -> str:
    """The process's output up to the line with the word."""
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if word in line:
            return output
    raise AssertionError(f"{word!r} was never said: {output}")


@contextlib.contextmanager
def running_bench(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """With the library in this process pointed at the hub, and at nothing that is this machine's own."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / ".cache/huggingface/hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # no request by the test process itself
    disable_progress_bars()
    (folder / "ComfyUI").mkdir()
    with running_hub() as hub:
        point_library_at(hub.url, monkeypatch)
        try:
            yield Bench(folder, hub)
        finally:
            close_session()
