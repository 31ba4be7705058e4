"""`run/models.json` on the RAM disk: what became of each entry of MODELS; by `utils.py`, for the handler."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """One entry of MODELS after the last run of `utils.py`."""

    name: str
    """the file's own name, without folders"""
    entry: str
    """`org/name[@revision]:filename`"""
    path: str
    source: str | None
    """where it came from (a value of `sources.Source`); None: it is not there"""
    size_bytes: int | None
    seconds: float
    sha256: str | None
    """where it is known: of a download that was held against it, of a large file of a Hugging Face cache"""
    error: str | None
    """why it is not there, as one sentence without its full stop; None also while it is still to be downloaded"""


def write_manifest(path: Path, records: Sequence[ModelRecord]) -> None:
    """Replace the manifest in one step. Raises OSError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({"models": [asdict(record) for record in records]}, indent=1))
    partial.replace(path)


def read_manifest(path: Path) -> list[ModelRecord]:
    """The records; none where there is no manifest, or no readable one."""
    try:
        return [ModelRecord(**record) for record in json.loads(path.read_text())["models"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def sentence_about(name: str, records: Sequence[ModelRecord], *, settled: bool) -> str | None:
    """What MODELS has to do with a file that ComfyUI does not list; None: it is not named there.

    ``settled``: nothing is being downloaded any more.
    """
    wanted = name.rpartition("/")[2].casefold()
    named = [record for record in records if record.name.casefold() == wanted]
    for record in named:  # of several files of one name, one that is missing is the likelier cause
        if record.error is not None:
            return f"MODELS names {record.name}, but it is missing: {record.error.rstrip('.')}."
        if record.source is None:
            then = "was not downloaded; the container's log says why" if settled else "is still being downloaded"
            return f"MODELS names {record.name}, and it {then}."
    for record in named:
        return f"MODELS has put {record.name} at {record.path}, where this node does not look."
    return None
