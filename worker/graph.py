"""A workflow as a graph: which nodes a node links from, and what a node is called."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worker.payload import Workflow

MAX_TITLE_CHARS = 80


def sources_of(workflow: Workflow, node_id: str) -> list[str]:
    """The nodes that a node links from."""
    values = workflow[node_id]["inputs"].values() if node_id in workflow else ()
    return [
        value[0]
        for value in values
        if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[0] in workflow
    ]


def upstream_of(workflow: Workflow, node_ids: Iterable[str]) -> set[str]:
    """All nodes on which these depend, without recursion: a chain can have 100,000 links."""
    found: set[str] = set()
    pending = [source for node_id in node_ids for source in sources_of(workflow, node_id)]
    while pending:
        source = pending.pop()
        if source not in found:
            found.add(source)
            pending += sources_of(workflow, source)
    return found


def title_of(workflow: Workflow, node_id: Any) -> str | None:
    """What the node is called in ComfyUI's editor, where the export tells."""
    meta = workflow.get(str(node_id), {}).get("_meta")
    title = meta.get("title") if isinstance(meta, dict) else None
    return title[:MAX_TITLE_CHARS] if isinstance(title, str) and title else None


def shown_node(node_id: Any, title: str | None, class_type: Any) -> str:
    """A node as sentences name it: ``Node 1 "Photo" (LoadImage)``."""
    shown_title = f' "{title}"' if title else ""
    return f"Node {node_id}{shown_title} ({class_type})"
