"""What the nodes of ComfyUI's newer interface that save a file have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .folders import Folders, save_place
from .node import Context, Node

HIDDEN = {"prompt": ("PROMPT",), "extra_pnginfo": ("EXTRA_PNGINFO",)}


class SaveNode(Node):
    v3 = True
    output_node = True

    @staticmethod
    def metadata(context: Context, inputs: Mapping[str, Any]) -> dict[str, str]:
        """Name and JSON text of all that is written into the file beside the pictures."""
        if not context.metadata:
            return {}
        values = {"prompt": inputs["prompt"], **(inputs["extra_pnginfo"] or {})}
        return {name: json.dumps(value) for name, value in values.items()}


def write_output(
    folders: Folders, prefix: str, suffix: str, content: bytes, size: tuple[int, int] = (0, 0), kind: str = "output"
) -> dict[str, str]:
    """Write a file into the output or temp folder and give the entry of the history that names it."""
    place = save_place(folders.temp if kind == "temp" else folders.output, prefix, *size)
    name = f"{place.stem}_{place.counter:05}_.{suffix}"
    (place.folder / name).write_bytes(content)
    return {"filename": name, "subfolder": place.subfolder, "type": kind}
