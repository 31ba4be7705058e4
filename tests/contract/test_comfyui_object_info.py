"""/object_info of every node that the stand-in has, held against ComfyUI 0.18.1's.

`object_info_nodes.json` is its answer for these classes, without tooltips, the lists of choices (which
are files and folders of a machine, or sampler names) and the texts that only its interface shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from comfyui_client import ComfyUI

RECORDED = json.loads((Path(__file__).parent / "object_info_nodes.json").read_text())
COMPARED = ("output", "output_is_list", "output_name", "output_node", "name", "display_name", "category")
OWN_NODES = {f"Standin{name}" for name in ("Checkpoint", "Sleep", "Strict", "Tee", "ToFile", "FromFile", "Files")}


def comparable(info: dict[str, Any]) -> dict[str, Any]:
    """One class of /object_info in the form of the recording."""

    def one_input(schema: list[Any]) -> list[Any]:
        kind = "choices" if isinstance(schema[0], list) else schema[0]
        return [
            kind,
            *({key: value for key, value in option.items() if key != "tooltip"} for option in schema[1:]),
        ]

    groups = {
        group: {name: one_input(schema) for name, schema in inputs.items()}
        for group, inputs in info["input"].items()
        if group != "hidden"
    }
    return {"input": groups, **{key: info.get(key) for key in COMPARED}}


def test_every_node_is_described_as_comfyui_describes_it(comfyui: ComfyUI) -> None:
    described = comfyui.get("/object_info").json()
    assert {name: comparable(described[name]) for name in RECORDED} == RECORDED


def test_the_stand_in_has_no_node_that_comfyui_has_not(comfyui: ComfyUI, standin_only: None) -> None:
    assert set(comfyui.get("/object_info").json()) - OWN_NODES == set(RECORDED)
