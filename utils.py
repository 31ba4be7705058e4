#!/usr/bin/env python3
"""Model manager: puts the models that MODELS names where ComfyUI finds them.

In order: already in place and whole; linked from RunPod's host cache (0 bytes); downloaded from Hugging Face.
`start.sh` runs it; a person can run it by hand. Results go to stdout, one line per model; errors to stderr.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import FrameType

from worker.models import ModelError
from worker.models.grammar import ModelEntry, parse_models
from worker.models.manifest import ModelRecord, write_manifest
from worker.models.sources import Plan, Source, link, plan

EPILOG = """\
environment:
  MODELS          RepoID[@revision]:Filename:Target[:LocalName], separated by commas or newlines
  COMFYUI_DIR     the ComfyUI checkout (default /ComfyUI)
  HF_TOKEN        for gated and private repositories
  HOST_CACHE_DIR  cache in Hugging Face's layout (default /runpod-volume/huggingface-cache/hub)
  RAMDISK_DIR     where a worker runs: what became of each model is noted in run/models.json there

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
    comfyui_dir: Path
    host_cache_dir: Path
    token: str | None
    run_dir: Path | None
    """where a worker's handler looks for the manifest; None: there is no worker"""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "Settings":
        """Unset and empty are the same."""
        run_dir = Path(environ.get("RAMDISK_DIR") or "/dev/shm/comfyui", "run")
        return cls(
            models=environ.get("MODELS", ""),
            comfyui_dir=Path(environ.get("COMFYUI_DIR") or "/ComfyUI").absolute(),
            host_cache_dir=Path(environ.get("HOST_CACHE_DIR") or "/runpod-volume/huggingface-cache/hub").absolute(),
            token=environ.get("HF_TOKEN", "").strip() or None,
            run_dir=run_dir if run_dir.is_dir() else None,
        )


def main(arguments: list[str], environ: Mapping[str, str]) -> ExitCode:
    """The story: read MODELS, then bring every good entry to its place."""
    options = _parse_arguments(arguments)
    settings = Settings.from_environment(environ)
    if not settings.comfyui_dir.is_dir():
        _complain(f"COMFYUI_DIR={settings.comfyui_dir} is not a folder: set it to the ComfyUI checkout")
        return ExitCode.BAD_CONFIGURATION
    entries, errors = parse_models(settings.models, settings.comfyui_dir)
    for error in errors:
        _complain(str(error))
    records = [_provide(entry, settings, options) for entry in entries]
    if settings.run_dir is not None and not options.check:
        _note(records, settings.run_dir / "models.json")
    if errors:
        return ExitCode.BAD_CONFIGURATION
    missing = [r for r in records if r.error is not None or (r.source is None and not options.link_only)]
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
    return parser.parse_args(arguments)


def _provide(entry: ModelEntry, settings: Settings, options: argparse.Namespace) -> ModelRecord:
    """One model, from look-up to its line on stdout."""
    started_s = time.monotonic()
    source, size_bytes, error = None, None, None
    try:
        step = plan(entry, settings.host_cache_dir)
        if step.source is not Source.DOWNLOAD or not (options.link_only or options.check):
            if not options.check:
                _carry_out(step, entry, settings.token)
            source, size_bytes = step.source, (step.blob or entry.path).stat().st_size
    except (ModelError, OSError) as failure:
        error = str(failure).removeprefix(f"{entry.source}: ")
        _complain(f"{entry.source}: {error}")
    seconds = time.monotonic() - started_s
    if size_bytes is not None:
        _report(entry, str(source), f"{size_bytes / 1e6:.1f} MB", f"{seconds:.2f} s")
    else:
        _report(entry, "missing" if error else "to download")
    return ModelRecord(
        name=entry.path.name,
        entry=entry.source,
        path=str(entry.path),
        source=source,
        size_bytes=size_bytes,
        seconds=round(seconds, 3),
        error=error,
    )


def _carry_out(step: Plan, entry: ModelEntry, token: str | None) -> None:
    if step.blob:
        link(step.blob, entry.path)
    if step.source is Source.DOWNLOAD:
        from worker.models.download import download  # linking does without it, and starts the faster

        print(f"downloading {entry.source}", file=sys.stderr, flush=True)
        download(entry, token=token)


def _note(records: list[ModelRecord], path: Path) -> None:
    try:
        write_manifest(path, records)
    except OSError as error:  # a full RAM disk is no reason to go without the models
        _complain(f"{path} cannot be written: {error.strerror}")


def _report(entry: ModelEntry, source: str, *details: str) -> None:
    print(entry.source, source, entry.path, *details, sep="  ", flush=True)


def _complain(sentence: str) -> None:
    print(f"utils.py: {sentence}", file=sys.stderr, flush=True)


def _stop(signum: int, _frame: FrameType | None) -> None:
    """Unwind, so that a download in progress takes its partial file away."""
    sys.exit(128 + signum)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    sys.exit(main(sys.argv[1:], os.environ))
