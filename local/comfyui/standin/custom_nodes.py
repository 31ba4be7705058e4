"""Custom nodes: packages below custom_nodes/ are imported as by ComfyUI 0.18.1 (main.py, nodes.py), which logs as much.

Only the import is the same. Their nodes compute on torch tensors, so they are not registered: a workflow that names one
is refused.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

log = logging.getLogger(__name__)

_Finished = tuple[float, str, bool]  # seconds, path, success


def run_prestartup_scripts(folders: Iterable[Path], wanted: frozenset[str] | None) -> None:
    """Run `prestartup_script.py` of each package: before the rest, and whatever becomes of it."""
    finished: list[_Finished] = []
    for folder in folders:
        finished = []  # as there: only what is in the last folder gets into the table
        for entry in _entries(folder):
            script = entry / "prestartup_script.py"
            if not script.exists():
                continue
            if wanted is not None and entry.name not in wanted:
                _say_skipped(entry, "Prestartup Skipping")
                continue
            started = time.perf_counter()
            try:
                _execute(os.path.splitext(script)[0], script)  # noqa: PTH122
                success = True
            except Exception as error:  # noqa: BLE001 - whatever it raises, ComfyUI starts
                log.error("Failed to execute startup-script: %s / %s", script, error)
                success = False
            finished.append((time.perf_counter() - started, str(entry), success))
    _say_times("Prestartup", " (PRESTARTUP FAILED)", finished)


def import_custom_nodes(folders: Iterable[Path], wanted: frozenset[str] | None) -> None:
    """Import what lies in these folders, but only names in `wanted`, if given; a module that fails is left out."""
    finished: list[_Finished] = []
    for folder in folders:
        for entry in _entries(folder):
            if entry.is_file() and entry.suffix != ".py":
                continue
            if wanted is not None and entry.name not in wanted:
                _say_skipped(entry, "Skipping")
                continue
            started = time.perf_counter()
            success = _import(entry)
            finished.append((time.perf_counter() - started, str(entry), success))
    _say_times("Import", " (IMPORT FAILED)", finished)


def _entries(folder: Path) -> Iterator[Path]:
    """What may be a package or a module; nothing where there is no folder (there ComfyUI does not start)."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name != "__pycache__" and entry.suffix != ".disabled":
            yield entry


def _import(path: Path) -> bool:
    """Whether the module was imported and has NODE_CLASS_MAPPINGS. What a V3 package (`comfy_entrypoint`) imports of
    ComfyUI is not here, so it fails."""
    try:
        if path.is_file():
            mappings = _execute(os.path.splitext(path)[0], path)  # noqa: PTH122
        else:
            mappings = _execute(str(path).replace(".", "_x_"), path / "__init__.py")
    except Exception as error:  # noqa: BLE001 - whatever a package raises, ComfyUI starts without it
        log.warning(traceback.format_exc())
        log.warning("Cannot import %s module for custom nodes: %s", path, error)
        return False
    if mappings is not None:
        return True
    reason = "due to the lack of NODE_CLASS_MAPPINGS or NODES_LIST (need one)."
    log.warning("Skip %s module for custom nodes %s", path, reason)
    return False


def _execute(name: str, path: Path) -> object:
    """Run a file as the module `name`; returns its NODE_CLASS_MAPPINGS."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return getattr(module, "NODE_CLASS_MAPPINGS", None)


def _say_skipped(entry: Path, what: str) -> None:
    log.info("%s %s due to disable_all_custom_nodes and whitelist_custom_nodes", what, entry.name)


def _say_times(what: str, failed: str, finished: list[_Finished]) -> None:
    if finished:
        log.info("\n%s times for custom nodes:", what)
        for seconds, path, success in sorted(finished):
            log.info("%6.1f seconds%s: %s", seconds, "" if success else failed, path)
        log.info("")
