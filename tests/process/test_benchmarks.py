"""The scripts of benchmarks/ run, small: their figures decide nothing here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "overhead": ("--runs", "1", "--cases", "small", "picture"),
    "sdk_loop": ("--runs", "1", "--jobs", "2"),
    "websocket": ("--runs", "1", "--nodes", "30"),
    "wipe": ("--runs", "1", "--megabytes", "10"),
}


def figures_of(content: Any) -> list[dict[str, float]]:
    """Wherever they are: each has a number of runs."""
    if not isinstance(content, dict):
        return []
    inner = [figures for value in content.values() for figures in figures_of(value)]
    return [content, *inner] if "runs" in content else inner


@pytest.mark.parametrize(("name", "rows"), [("overhead", 2), ("sdk_loop", 3), ("websocket", 3), ("wipe", 3)])
def test_a_benchmark_measures_and_says_so(name: str, rows: int, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", *SMALL[name], "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=100, check=False)
    assert file.exists(), done.stderr
    measured = figures_of(json.loads(file.read_text()))
    assert len(measured) == rows
    assert all(value > 0 for figures in measured for key, value in figures.items() if key in ("floor", "ours", "cpu_s"))
    assert len(done.stdout.splitlines()) > rows
    assert "Traceback" not in done.stderr


def test_all_of_them_go_into_one_file(tmp_path: Path) -> None:
    file = tmp_path / "latest.json"
    command = [sys.executable, "-m", "benchmarks", "websocket", "--json", str(file)]
    subprocess.run(command, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, timeout=100, check=False)
    content = json.loads(file.read_text())
    assert {"machine", "comfyui", "versions", "missed", "websocket"} == content.keys()
    assert content["websocket"]["the worker"]["cpu_s"] > 0
