"""Input, output and temp folder, and the names of the files in them (folder_paths.py of ComfyUI 0.18.1)."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_MODEL_ENDINGS = {".ckpt", ".pt", ".pt2", ".bin", ".pth", ".safetensors", ".pkl", ".sft"}  # supported_pt_extensions


class OutsideFolderError(Exception):
    """A file name prefix that leads out of the folder it should be saved in."""


@dataclass(frozen=True)
class SavePlace:
    """Where the files of one save go: `{folder}/{stem}_{counter:05}_.png`, counting up."""

    folder: Path
    subfolder: str
    stem: str
    counter: int


@dataclass(frozen=True)
class Folders:
    """The folders, absolute and with symbolic links as they were given (ComfyUI does not resolve them)."""

    input: Path
    output: Path
    temp: Path
    models: Path
    extra_models: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    """beside those below `models`, by kind"""

    def of_type(self, kind: str) -> Path | None:
        """The folder that a `type` on the wire names: "input", "output" or "temp"."""
        return {"input": self.input, "output": self.output, "temp": self.temp}.get(kind)

    def model_files(self, kind: str) -> list[str]:
        """The names of the models of a kind ("checkpoints"), relative to its folders, as they are at this moment."""
        names = set()
        for folder in (self.models / kind, *self.extra_models.get(kind, ())):
            for place, _, files in os.walk(folder, followlinks=True):
                names |= {os.path.relpath(Path(place, file), folder) for file in files}
        return sorted(name for name in names if Path(name).suffix.lower() in _MODEL_ENDINGS)

    def split_annotation(self, name: str) -> tuple[str, Path | None]:
        """`"a.png [output]"` -> `("a.png", output folder)`; a name without such a tail -> `(name, None)`."""
        for kind in ("output", "input", "temp"):
            tail = f"[{kind}]"
            if name.endswith(tail):
                return name[: -len(tail) - 1], self.of_type(kind)
        return name, None

    def input_file(self, name: str) -> Path:
        """The file that an input value names. It may lie outside the input folder: ComfyUI does not check."""
        bare, folder = self.split_annotation(name)
        return (folder or self.input) / bare


def save_place(folder: Path, prefix: str, width: int, height: int) -> SavePlace:
    """Where a save node writes: `prefix` may hold subfolders and %width%, %height%, %year% ... %second%.

    The counter is one more than the highest among the files of that name. Makes the folder if it is missing.
    Raises OutsideFolderError when the prefix leads out of `folder`.
    """
    normal = os.path.normpath(_fill_in(prefix, width, height))
    subfolder, stem = os.path.split(normal)
    target = Path(os.path.normpath(folder / subfolder))
    if not target.is_relative_to(folder):
        raise OutsideFolderError(f"Saving outside the output folder is not allowed: {target} is not below {folder}")
    target.mkdir(parents=True, exist_ok=True)
    counters = [_counter_of(entry.name, stem) for entry in target.iterdir()]
    return SavePlace(target, subfolder, stem, max(counters, default=0) + 1)


def _fill_in(prefix: str, width: int, height: int) -> str:
    now = time.localtime()
    values = {"width": str(width), "height": str(height), "year": str(now.tm_year)}
    for name, number in (
        ("month", now.tm_mon),
        ("day", now.tm_mday),
        ("hour", now.tm_hour),
        ("minute", now.tm_min),
        ("second", now.tm_sec),
    ):
        values[name] = f"{number:02}"
    for name, value in values.items():
        prefix = prefix.replace(f"%{name}%", value)
    return prefix


def _counter_of(name: str, stem: str) -> int:
    """The number N of a file named `{stem}_N_...`, 0 for every other file."""
    if not name.startswith(f"{stem}_"):
        return 0
    digits = name[len(stem) + 1 :].split("_")[0]
    return int(digits) if digits.isdecimal() else 0
