"""Fixtures of the contract suite: one ComfyUI a module, the stand-in or (COMFYUI_DIR, COMFYUI_PYTHON) the real one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfyui_client import ComfyUI, boot

REPO = Path(__file__).resolve().parents[2]


def is_real() -> bool:
    """Whether this run faces a real checkout."""
    return "COMFYUI_DIR" in os.environ


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    """A running server with folders of its own, shared by the tests of a module."""
    with boot(tmp_path_factory.mktemp("comfyui")) as server:
        yield server


@pytest.fixture
def fresh(comfyui: ComfyUI) -> ComfyUI:
    """The module's server with nothing cached, queued, remembered or saved by the tests before."""
    comfyui.forget_everything()
    return comfyui


@pytest.fixture
def standin_only() -> None:
    """For what only the stand-in has: its own models, its description of itself."""
    if is_real():
        pytest.skip("about the stand-in only; COMFYUI_DIR names a real checkout")
