"""All figures: each script of this folder, its table, and what it measured in one file.

    python -m benchmarks                             all, about six minutes on two cores
    python -m benchmarks overhead wipe               these
    python -m benchmarks --full --json FILE          with the scripts' own defaults, which take longer
    COMFYUI_DIR=... COMFYUI_PYTHON=... python -m benchmarks        with real ComfyUI in the stand-in's place

The scripts run one after the other, each in processes of its own. `benchmarks/latest.json` has no date: it is compared
with its former self.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.common import which_comfyui, write_json

HERE = Path(__file__).resolve().parent
PROGRAM = 'if __name__ == "__main__":'  # what has it is a script, the rest is shared
# Fewer runs than the scripts' own defaults have.
QUICK = {
    "memory": ("--runs", "1"),
    "models": ("--runs", "1", "--read-gb", "1"),
    "overhead": ("--runs", "9"),
    "wipe": ("--runs", "3"),
}
PACKAGES = ("runpod", "websocket-client", "aiohttp", "Pillow")


def scripts() -> list[str]:
    return sorted(path.stem for path in HERE.glob("[!_]*.py") if PROGRAM in path.read_text())


def machine() -> str:
    """The kind of it, and no name of it."""
    processor = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores of {processor[1] if processor else platform.machine()}, {memory_gb:.0f} GB of memory"


def run(name: str, arguments: tuple[str, ...]) -> tuple[bool, Any]:
    """Whether the script met its limits, and what it measured."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder, "figures.json")
        command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(figures), *arguments]
        done = subprocess.run(command, cwd=HERE.parent, check=False)
        return done.returncode == 0, json.loads(figures.read_text()) if figures.exists() else None


def main() -> int:
    """Returns 1 where a script has missed a limit, or failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="All figures.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(scripts())}; default: all")
    parser.add_argument("--full", action="store_true", help="as many runs as each script has by itself")
    parser.add_argument("--json", type=Path, metavar="FILE", default=HERE / "latest.json", help="default: latest.json")
    options = parser.parse_args()
    if unknown := set(options.names) - set(scripts()):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(scripts())}")
    measured, missed = {}, []
    print(f"{machine()}; {which_comfyui()}")
    for name in options.names or scripts():
        print(f"\n--- {name} ---", flush=True)
        met, measured[name] = run(name, () if options.full else QUICK.get(name, ()))
        if not met:
            missed.append(name)
    versions = {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
    content = {"machine": machine(), "comfyui": which_comfyui(), "versions": versions, "missed": missed, **measured}
    write_json(options.json, content)
    print(f"\n{'all within their limits' if not missed else 'over a limit: ' + ', '.join(missed)}; see {options.json}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
