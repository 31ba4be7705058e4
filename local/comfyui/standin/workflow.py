"""Reading a workflow in API format: `{node id: {"class_type": str, "inputs": {name: literal or link}}}`."""

from __future__ import annotations

from typing import Any

Workflow = dict[str, dict[str, Any]]


def is_link(value: Any) -> bool:
    """Whether an input value is `[node id, output slot]` (comfy_execution/graph_utils.py 0.18.1)."""
    return (
        isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], (int, float))
    )


def links(workflow: Workflow, node_id: str) -> list[tuple[str, str, int]]:
    """(input name, source node id, source slot) of every linked input of a node."""
    inputs = workflow[node_id]["inputs"]
    return [(name, value[0], int(value[1])) for name, value in inputs.items() if is_link(value)]
