"""Where a model may already lie: at its destination, or in the host cache. No network, no huggingface_hub."""

import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from worker.models.grammar import ModelEntry

SAFETENSORS_HEADER_LIMIT_BYTES = 100_000_000  # the format's own limit (safetensors/src/tensor.rs, MAX_HEADER_SIZE)

log = logging.getLogger(__name__)


class Source(StrEnum):
    """Where a model comes from, in the order of preference."""

    IN_PLACE = "in place"
    HOST_CACHE = "host cache"
    DOWNLOAD = "download"


@dataclass(frozen=True, slots=True)
class Plan:
    """What has to be done for one entry."""

    source: Source
    blob: Path | None = None
    """HOST_CACHE: the real file there, absolute"""


def plan(entry: ModelEntry, host_cache_dir: Path) -> Plan:
    """Find the nearest whole copy of a model. Changes nothing.

    Raises OSError where the destination cannot be read; a host cache that cannot be read is a logged warning.
    """
    if entry.path.is_file():
        flaw = find_flaw(entry.path)
        if flaw is None:
            return Plan(Source.IN_PLACE)
        log.warning("%s will be replaced: it %s", entry.path, flaw)
    try:
        blob = find_in_host_cache(entry, host_cache_dir)
    except OSError as error:
        log.warning("the host cache cannot be read: %s", error)
        blob = None
    return Plan(Source.HOST_CACHE, blob) if blob else Plan(Source.DOWNLOAD)


def find_in_host_cache(entry: ModelEntry, host_cache_dir: Path) -> Path | None:
    """The real, whole file behind an entry in a cache with huggingface_hub's layout, or None.

    A revision that was asked for is that one or none; without one it is refs/main, else the first snapshot by name
    that has the file: RunPod fills the cache with one revision and does not promise the ref. Some hosts have the
    repository's folder in lower case.
    """
    folder = "models--" + entry.repo_id.replace("/", "--")
    for name in dict.fromkeys((folder, folder.lower())):
        for snapshot in _snapshots(host_cache_dir / name, entry.revision):
            candidate = snapshot / entry.filename
            if not candidate.is_file():
                continue
            flaw = find_flaw(candidate)
            if flaw is None:
                return candidate.resolve(strict=True)
            log.warning("%s is not used: it %s", candidate, flaw)
    return None


def _snapshots(repo_dir: Path, revision: str | None) -> Iterator[Path]:
    """The snapshot folders that may serve a revision, the best one first; not all need to exist."""
    snapshots_dir = repo_dir / "snapshots"
    commit = _read_ref(repo_dir / "refs" / (revision or "main"))
    if commit:
        yield snapshots_dir / commit
    if revision:
        yield snapshots_dir / revision
    elif snapshots_dir.is_dir():
        yield from sorted(snapshots_dir.iterdir())


def _read_ref(path: Path) -> str | None:
    try:
        commit = path.read_text("ascii", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    return commit if re.fullmatch("[0-9A-Za-z]+", commit) else None


def find_flaw(path: Path) -> str | None:
    """Why an existing model file cannot be whole: the rest of a sentence; None: nothing speaks against it.

    Only `.safetensors` say how long they are: 8 bytes little-endian length of the header, the header (JSON) with
    each tensor's `data_offsets`, the data to the highest offset and not a byte more.
    """
    if path.suffix.lower() != ".safetensors":
        return None
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > min(size_bytes - 8, SAFETENSORS_HEADER_LIMIT_BYTES):
            return f"ends within its header, at {size_bytes} bytes"
        try:
            data_bytes = _data_length(json.loads(file.read(header_bytes)))
        except (ValueError, RecursionError):
            return "has a header that is not of the safetensors format"
    whole_bytes = 8 + header_bytes + data_bytes
    return None if size_bytes == whole_bytes else f"has {size_bytes} bytes, but its header says {whole_bytes}"


def _data_length(header: object) -> int:
    """Bytes of tensor data that a safetensors header promises. Raises ValueError."""
    if not isinstance(header, dict):
        raise ValueError("not an object")
    length = 0
    for name, tensor in header.items():
        match tensor:
            case {"data_offsets": [int(), int(end)]}:
                length = max(length, end)
            case _ if name != "__metadata__":
                raise ValueError("a tensor without offsets")
    return length


def link(blob: Path, path: Path) -> None:
    """Make `path` a symlink to `blob`, in one step: a dangling link or a broken file there is replaced.

    Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".link-{os.getpid()}")
    temporary.unlink(missing_ok=True)  # of a killed run: in a container the same pid comes again
    temporary.symlink_to(blob)
    try:
        temporary.replace(path)
    except OSError:
        temporary.unlink()
        raise
