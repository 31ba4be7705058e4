"""Where a model may already lie: at its destination, in a cache, on a network volume. All without huggingface_hub."""

import json
import logging
import os
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from worker.models.grammar import RENAMED_FOLDERS, ModelEntry

SAFETENSORS_HEADER_LIMIT_BYTES = 100_000_000  # the format's own limit (safetensors/src/tensor.rs, MAX_HEADER_SIZE)

log = logging.getLogger(__name__)


class Source(StrEnum):
    """Where a model comes from, in the order of preference."""

    IN_PLACE = "in place"
    HOST_CACHE = "host cache"
    VOLUME = "network volume"
    LOCAL_CACHE = "local cache"
    DOWNLOAD = "download"


@dataclass(frozen=True, slots=True)
class Places:
    """Where copies of models may lie; none of them needs to exist. All absolute."""

    models_dir: Path
    """ComfyUI's"""
    host_cache_dir: Path
    """of RunPod, with huggingface_hub's layout"""
    volume_dirs: tuple[Path, ...] = ()
    """the `models` folders of network volumes: below them the same folders as below ComfyUI's"""
    local_cache_dir: Path | None = None
    """huggingface_hub's own"""

    @property
    def caches(self) -> list[tuple[Source, Path]]:
        local = [(Source.LOCAL_CACHE, self.local_cache_dir)] if self.local_cache_dir else []
        return [(Source.HOST_CACHE, self.host_cache_dir), *local]


@dataclass(frozen=True, slots=True)
class Plan:
    """What has to be done for one entry."""

    source: Source
    file: Path | None = None
    """the real file to link to, absolute; None: there is nothing to link"""

    @property
    def sha256(self) -> str | None:
        """Of a large file in a cache, whose name it is there (huggingface_hub 2.4.0, file_download.py)."""
        return self.file.name if self.file and re.fullmatch("[0-9a-f]{64}", self.file.name) else None


def plan(entry: ModelEntry, places: Places) -> Plan:
    """Find the nearest whole copy of a model. Changes nothing.

    Raises OSError where the destination cannot be read; a cache or volume that cannot be read is a logged warning.
    """
    if entry.path.is_file():
        flaw = find_flaw(entry.path)
        if flaw is None:
            return _linked(entry.path, places) or Plan(Source.IN_PLACE)
        log.warning("%s will be replaced: it %s", entry.path, flaw)
    for source in (Source.HOST_CACHE, Source.VOLUME, Source.LOCAL_CACHE):
        try:
            if file := _find(entry, source, places):
                return Plan(source, file)
        except OSError as error:
            log.warning("the %s cannot be read: %s", source, error)
    return Plan(Source.DOWNLOAD)


def _linked(path: Path, places: Places) -> Plan | None:
    """What a link that is there already leads to; None: it is no link of ours."""
    if not path.is_symlink():
        return None
    file = path.resolve()
    volumes = [(Source.VOLUME, volume_dir) for volume_dir in places.volume_dirs]
    for source, folder in (*places.caches, *volumes):
        if file.is_relative_to(folder.resolve()):
            return Plan(source, file)
    return None


def expand_in_folders(pattern: ModelEntry, places: Places) -> list[ModelEntry]:
    """The entries of a pattern whose files are in place or on a network volume; whether those are all, only the hub
    can say."""
    folders = [pattern.path.parent]
    for volume_dir in places.volume_dirs:
        folders += [path.parent for path in _volume_paths(pattern, places.models_dir, volume_dir)]
    names: set[str] = set()
    for folder in folders:
        try:
            names |= {path.name for path in folder.iterdir() if path.is_file()}
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            log.warning("%s cannot be read: %s", folder, error)
    prefix = pattern.filename.rpartition("/")[0]
    return pattern.matching(f"{prefix}/{name}" if prefix else name for name in names)


def _find(entry: ModelEntry, source: Source, places: Places) -> Path | None:
    if source is Source.VOLUME:
        return find_on_volumes(entry, places)
    cache_dir = dict(places.caches).get(source)
    return find_in_cache(entry, cache_dir) if cache_dir else None


def expand_in_cache(pattern: ModelEntry, cache_dir: Path) -> list[ModelEntry]:
    """The entries that a pattern stands for, by the first snapshot that has any of its files."""
    try:
        for snapshot in _snapshots_of(pattern, cache_dir):
            files = [str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()]
            if found := pattern.matching(files):
                return found
    except OSError as error:
        log.warning("the cache cannot be read: %s", error)
    return []


def volume_path(entry: ModelEntry, models_dir: Path, volume_dir: Path) -> Path | None:
    """Where a volume has the file of an entry; None for a Target outside ComfyUI's models folder."""
    return volume_dir / entry.path.relative_to(models_dir) if entry.path.is_relative_to(models_dir) else None


def _volume_paths(entry: ModelEntry, models_dir: Path, volume_dir: Path) -> list[Path]:
    """The same, and in a folder of the old name."""
    path = volume_path(entry, models_dir, volume_dir)
    if path is None:
        return []
    folder, *rest = path.relative_to(volume_dir).parts
    older = [old for old, new in RENAMED_FOLDERS.items() if new == folder]
    return [volume_dir.joinpath(name, *rest) for name in (folder, *older)]


def find_on_volumes(entry: ModelEntry, places: Places) -> Path | None:
    """The whole file of an entry on a network volume, also in a folder of the old name, or None."""
    volumes = places.volume_dirs
    return _first_whole(path for volume in volumes for path in _volume_paths(entry, places.models_dir, volume))


def find_in_cache(entry: ModelEntry, cache_dir: Path) -> Path | None:
    """The real, whole file behind an entry in a cache with huggingface_hub's layout, or None."""
    return _first_whole(snapshot / entry.filename for snapshot in _snapshots_of(entry, cache_dir))


def _first_whole(candidates: Iterable[Path]) -> Path | None:
    """The real file behind the first candidate that is there and whole; one that is not whole is a logged warning."""
    for candidate in candidates:
        if not candidate.is_file():
            continue
        flaw = find_flaw(candidate)
        if flaw is None:
            return candidate.resolve(strict=True)
        log.warning("%s is not used: it %s", candidate, flaw)
    return None


def _snapshots_of(entry: ModelEntry, cache_dir: Path) -> Iterator[Path]:
    """The snapshot folders that may serve an entry, the best one first; not all need to exist.

    A revision that was asked for is that one or none; without one it is refs/main, else the first snapshot by name
    that has the file: RunPod fills the cache with one revision and does not promise the ref. Some hosts have the
    repository's folder in lower case.
    """
    folder = "models--" + entry.repo_id.replace("/", "--")
    for name in dict.fromkeys((folder, folder.lower())):
        yield from _snapshots(cache_dir / name, entry.revision)


def _snapshots(repo_dir: Path, revision: str | None) -> Iterator[Path]:
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


def find_flaw(path: Path, suffix: str | None = None) -> str | None:
    """Why an existing model file cannot be whole: the rest of a sentence; None: nothing speaks against it. `suffix`
    where the file will have another than now.

    Only `.safetensors` say how long they are: 8 bytes little-endian length of the header, the header (JSON) with
    each tensor's `data_offsets`, the data to the highest offset and not a byte more.
    """
    if (suffix or path.suffix).lower() != ".safetensors":
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


def link(file: Path, path: Path) -> None:
    """Make `path` a symlink to `file`, in one step: a dangling link or a broken file there is replaced.

    Where they are one file already, also by a folder that is a link, nothing is done. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.samefile(file):
        return
    temporary = path.with_name(f".link-{os.getpid()}-{threading.get_ident()}")
    temporary.unlink(missing_ok=True)  # of a killed run: in a container the same pid comes again
    temporary.symlink_to(file)
    try:
        temporary.replace(path)
    except OSError:
        temporary.unlink()
        raise
