#!/usr/bin/env python3
"""Model manager: puts the models that MODELS names where ComfyUI finds them.

In order: already in place and whole; linked from RunPod's host cache, a network volume or the local Hugging Face cache
(0 bytes); downloaded from Hugging Face, several at a time. `start.sh` runs it; a person can run it by hand. Results go
to stdout, one line per model; errors and progress to stderr.
"""

import argparse
import contextlib
import glob
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import FrameType

from worker.models import ModelError
from worker.models.grammar import ModelEntry, each_once, parse_models
from worker.models.manifest import ModelRecord, write_manifest
from worker.models.sources import Places, Source, expand_in_cache, expand_in_folders, link, plan, volume_path

EPILOG = """\
environment:
  MODELS             RepoID[@revision]:Filename:Target[:LocalName], separated by commas or newlines
  MODELS_FILE        a file with more of them, a line each
  COMFYUI_DIR        the ComfyUI checkout (default /ComfyUI)
  HF_TOKEN           for gated and private repositories
  HOST_CACHE_DIR     cache in Hugging Face's layout (default /runpod-volume/huggingface-cache/hub)
  VOLUME_DIRS        where network volumes are mounted (default /runpod-volume:/workspace)
  DOWNLOAD_TO        container or volume: where downloads are stored (default container)
  PREFETCH_FRACTION  share of the free memory that --prefetch fills, 0 to 1 (default 0.5)
  RAMDISK_DIR        where a worker runs: what became of each model is noted in run/models.json there

exit code: 0 all models are there, 1 some are missing, 2 bad configuration
"""


class ExitCode(IntEnum):
    ALL_THERE = 0
    SOME_MISSING = 1
    BAD_CONFIGURATION = 2


@dataclass(frozen=True, slots=True)
class Settings:
    """The environment, read once."""

    models: str
    models_file: Path | None
    comfyui_dir: Path
    places: Places
    download_to: str
    prefetch_fraction: str
    token: str | None
    run_dir: Path | None
    """where a worker's handler looks for the manifest; None: there is no worker"""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "Settings":
        """Unset and empty are the same."""
        run_dir = Path(environ.get("RAMDISK_DIR") or "/dev/shm/comfyui", "run")
        comfyui_dir = Path(environ.get("COMFYUI_DIR") or "/ComfyUI").absolute()
        volumes = (environ.get("VOLUME_DIRS") or "/runpod-volume:/workspace").split(":")
        cache_home = environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME") or "/root", ".cache")
        hf_home = environ.get("HF_HOME") or Path(cache_home, "huggingface")
        hf_cache = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or Path(hf_home, "hub")
        return cls(
            models=environ.get("MODELS", ""),
            models_file=Path(environ["MODELS_FILE"]) if environ.get("MODELS_FILE") else None,
            comfyui_dir=comfyui_dir,
            places=Places(
                models_dir=comfyui_dir / "models",
                host_cache_dir=Path(environ.get("HOST_CACHE_DIR") or "/runpod-volume/huggingface-cache/hub").absolute(),
                volume_dirs=tuple(Path(volume, "models").absolute() for volume in volumes if volume),
                local_cache_dir=Path(hf_cache).absolute(),
            ),
            download_to=environ.get("DOWNLOAD_TO") or "container",
            prefetch_fraction=environ.get("PREFETCH_FRACTION") or "0.5",
            token=environ.get("HF_TOKEN", "").strip() or None,
            run_dir=run_dir if run_dir.is_dir() else None,
        )


class Manager:
    """Brings every entry to its place; has a record of each afterwards."""

    def __init__(self, settings: Settings, options: argparse.Namespace) -> None:
        self._settings = settings
        self._options = options
        self._is_online = not (options.link_only or options.prefetch)
        self.records: list[ModelRecord] = []

    def provide(self, entries: Sequence[ModelEntry]) -> None:
        """Links at once what can be linked; then downloads the rest, or says what would be."""
        to_download = []
        for entry in self._expanded(entries):
            started_s = time.monotonic()
            try:
                step = plan(entry, self._settings.places)
                if step.source is Source.DOWNLOAD:
                    to_download.append(entry)
                    continue
                if step.file and not self._options.check:
                    link(step.file, entry.path)
                size_bytes = (step.file or entry.path).stat().st_size
                self._note(entry, step.source, size_bytes, time.monotonic() - started_s, sha256=step.sha256)
            except OSError as failure:
                self._note(entry, error=f"{failure.filename}: {failure.strerror}")
        if not self._is_online:
            for entry in to_download:
                self._note(entry)
        elif to_download:
            self._download(to_download)

    def _expanded(self, entries: Sequence[ModelEntry]) -> list[ModelEntry]:
        """Patterns as the entries that they stand for, where anybody can say which."""
        expanded: list[ModelEntry] = []
        for entry in entries:
            try:
                found = self._files_of(entry) if entry.is_pattern else [entry]
                expanded, clashes = each_once([*expanded, *found])
                if clashes:
                    raise ModelError(f"{entry.source}: one of its files {clashes[0]}")
            except ModelError as failure:
                self._note(entry, error=str(failure).removeprefix(f"{entry.source}: "))
                continue
            if not found:
                self._note(entry)
        return expanded

    def _files_of(self, pattern: ModelEntry) -> list[ModelEntry]:
        """By the host cache, which holds whole repositories; by the hub's list; else by what is there."""
        places = self._settings.places
        if found := expand_in_cache(pattern, places.host_cache_dir):
            return found
        there = places.local_cache_dir and expand_in_cache(pattern, places.local_cache_dir)
        there = there or expand_in_folders(pattern, places)
        if not self._is_online:
            return there
        from worker.models.hub import expand_on_hub

        try:
            return expand_on_hub(pattern, self._settings.token)
        except ModelError as failure:
            if not there:
                raise
            _complain(f"{failure}; taking the {len(there)} that are there")
            return there

    def _download(self, entries: Sequence[ModelEntry]) -> None:
        from worker.models.download import Download, ask_all, run_downloads  # linking does without, and is faster

        volume_dir = self.volume_dir()
        downloads = []
        for entry in entries:
            shared = volume_dir and volume_path(entry, self._settings.places.models_dir, volume_dir)
            downloads.append(Download(entry, shared or entry.path, is_shared=shared is not None))
        if self._options.check:
            ask_all(downloads, self._settings.token)
        else:
            run_downloads(downloads, token=self._settings.token, say=_say)
        for one in downloads:
            if one.error is not None:
                self._note(one.entry, error=str(one.error).removeprefix(f"{one.entry.source}: "))
            elif self._options.check:
                self._note(one.entry, size_bytes=one.size_bytes)
            else:
                size_bytes = one.place.stat().st_size
                self._note(one.entry, Source.DOWNLOAD, size_bytes, one.seconds, sha256=one.sha256)

    def volume_dir(self) -> Path | None:
        """The models folder of the network volume that downloads go to; None: they go to ComfyUI's own."""
        if self._settings.download_to != "volume":
            return None
        for models_dir in self._settings.places.volume_dirs:
            with contextlib.suppress(OSError):  # a volume that cannot be looked at
                if os.access(models_dir if models_dir.exists() else models_dir.parent, os.W_OK):
                    return models_dir
        _complain("DOWNLOAD_TO=volume, but no network volume can be written to: models go to the container's disk")
        return None

    def _note(
        self,
        entry: ModelEntry,
        source: Source | None = None,
        size_bytes: int | None = None,
        seconds: float = 0.0,
        *,
        sha256: str | None = None,
        error: str | None = None,
    ) -> None:
        """A record, and its line on stdout."""
        if error:
            _complain(f"{entry.source}: {error}")
        words = str(source or ("missing" if error else "to download"))
        size = [] if size_bytes is None else [f"{size_bytes / 1e6:.1f} MB"]
        took = [f"{seconds:.2f} s"] if source else []
        print(entry.source, words, entry.path, *size, *took, sep="  ", flush=True)
        self.records.append(
            ModelRecord(
                name=entry.path.name,
                entry=entry.source,
                path=str(entry.path),
                source=source,
                size_bytes=size_bytes,
                seconds=round(seconds, 3),
                sha256=sha256,
                error=error,
            )
        )


def main(arguments: list[str], environ: Mapping[str, str]) -> ExitCode:
    """The story: read MODELS, then bring every good entry to its place."""
    options = _parse_arguments(arguments)
    settings = Settings.from_environment(environ)
    if not settings.comfyui_dir.is_dir():
        _complain(f"COMFYUI_DIR={settings.comfyui_dir} is not a folder: set it to the ComfyUI checkout")
        return ExitCode.BAD_CONFIGURATION
    entries, errors = _read_entries(settings)
    if options.prefetch:
        return _prefetch(entries, settings)
    if settings.download_to not in ("container", "volume"):
        errors.append(f"DOWNLOAD_TO={settings.download_to} is taken as container: set it to container or volume")
    for error in errors:
        _complain(error)
    manager = Manager(settings, options)
    manager.provide(entries)
    if options.check and entries:
        _summarise(manager.records, manager.volume_dir() or settings.places.models_dir)
    if settings.run_dir is not None and not options.check:
        _write(manager.records, settings.run_dir / "models.json")
    if errors:
        return ExitCode.BAD_CONFIGURATION
    missing = [r for r in manager.records if r.error is not None or (r.source is None and not options.link_only)]
    return ExitCode.SOME_MISSING if missing else ExitCode.ALL_THERE


def _parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Put the models that MODELS names where ComfyUI finds them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--link-only", action="store_true", help="no network: leave out what must be downloaded (it does not count)"
    )
    mode.add_argument("--check", action="store_true", help="say where each model is or would come from, do nothing")
    mode.add_argument("--prefetch", action="store_true", help="read the models that are there into the page cache")
    return parser.parse_args(arguments)


def _read_entries(settings: Settings) -> tuple[list[ModelEntry], list[str]]:
    """The good entries of MODELS and MODELS_FILE, and a sentence for each bad one."""
    text, problems = "", []
    if settings.models_file is not None:
        try:
            text = settings.models_file.read_text(encoding="utf-8-sig", errors="replace")
        except OSError as error:
            problems.append(f"MODELS_FILE={settings.models_file} cannot be read: {error.strerror}")
    entries, errors = parse_models(settings.models, settings.comfyui_dir, text)
    return entries, [*problems, *map(str, errors)]


def _summarise(records: Sequence[ModelRecord], models_dir: Path) -> None:
    """What --check says at the end: what is there, what would come, and what room there is."""
    there = sum(record.size_bytes or 0 for record in records if record.source)
    to_come = sum(record.size_bytes or 0 for record in records if not record.source)
    folder = next(path for path in (models_dir, *models_dir.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    print(f"{there / 1e9:.2f} GB are there, {to_come / 1e9:.2f} GB to download; {folder} has {free / 1e9:.2f} GB free")


def _prefetch(entries: Sequence[ModelEntry], settings: Settings) -> ExitCode:
    """Reads what is there, in the order of MODELS, while the memory lasts."""
    from worker.models.prefetch import fraction_of, free_memory_bytes, lower_priority, prefetch

    try:
        fraction = fraction_of(settings.prefetch_fraction)
    except ValueError:
        _complain(f"PREFETCH_FRACTION={settings.prefetch_fraction} is no number from 0 to 1")
        return ExitCode.BAD_CONFIGURATION
    lower_priority()
    started_s = time.monotonic()
    found = [path for entry in entries for path in sorted(entry.path.parent.glob(glob_name(entry))) if path.is_file()]
    paths = list(dict.fromkeys(found))
    limit_bytes = int(fraction * free_memory_bytes())
    read_bytes = [size for _, size in prefetch(paths, limit_bytes)]
    if read_bytes:
        amount = f"{sum(read_bytes) / 1e9:.2f} GB in {time.monotonic() - started_s:.1f} s"
        _say(f"read {len(read_bytes)} of {len(paths)} models into memory: {amount}")
    return ExitCode.ALL_THERE


def glob_name(entry: ModelEntry) -> str:
    """The name of an entry's file as a pattern for glob."""
    return entry.path.name.replace("[", "[[]") if entry.is_pattern else glob.escape(entry.path.name)


def _write(records: list[ModelRecord], path: Path) -> None:
    try:
        write_manifest(path, records)
    except OSError as error:  # a full RAM disk is no reason to go without the models
        _complain(f"{path} cannot be written: {error.strerror}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _complain(sentence: str) -> None:
    _say(f"utils.py: {sentence}")


def _stop(signum: int, _frame: FrameType | None) -> None:
    """Unwind, so that a download in progress takes its partial file away."""
    sys.exit(128 + signum)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    try:
        sys.exit(main(sys.argv[1:], os.environ))
    except SystemExit as end:
        if threading.active_count() > 1:  # downloads that were given up still wait for the network
            os._exit(end.code if isinstance(end.code, int) else ExitCode.SOME_MISSING)
        raise
