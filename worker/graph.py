"""A workflow as a graph: which nodes a node links from, how long the chains are, and what a node is called."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Workflow = dict[str, dict[str, Any]]
"""ComfyUI's API format: by node id, its ``class_type`` and ``inputs``."""
MAX_SHOWN_CHARS = 80  # of what a caller wrote


def links_of(workflow: Workflow, node_id: str) -> list[tuple[str, str]]:
    """The links of a node, as (its input, the node that is named), which need not exist; see ComfyUI's is_link."""
    named = [(name, link_of(value)) for name, value in workflow[node_id]["inputs"].items()]
    return [(name, source) for name, source in named if source is not None]


def link_of(value: object) -> str | None:
    """The node that an input's value names, where it is a link."""
    match value:
        case [str() as source, int() | float()]:
            return source
    return None


def sources_of(workflow: Workflow, node_id: str) -> list[str]:
    """The nodes that a node links from."""
    if node_id not in workflow:
        return []
    return [source for _, source in links_of(workflow, node_id) if source in workflow]


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


def longest_chain(workflow: Workflow) -> int:
    """How many nodes depend on one another in a row; those of a cycle, and all behind it, count as one row."""
    sources = {node_id: set(sources_of(workflow, node_id)) for node_id in workflow}
    followers: dict[str, list[str]] = {node_id: [] for node_id in workflow}
    for node_id, its_sources in sources.items():
        for source in its_sources:
            followers[source].append(node_id)
    ready = [node_id for node_id in workflow if not sources[node_id]]
    length, done = 0, 0
    while ready:
        done, length = done + len(ready), length + 1
        behind = [(source, follower) for source in ready for follower in followers[source]]
        for source, follower in behind:
            sources[follower].discard(source)
        ready = list({follower for _, follower in behind if not sources[follower]})
    return length + len(workflow) - done


def title_of(workflow: Workflow, node_id: Any) -> str | None:
    """What the node is called in ComfyUI's editor, where the export tells."""
    meta = workflow.get(str(node_id), {}).get("_meta")
    title = meta.get("title") if isinstance(meta, dict) else None
    return title[:MAX_SHOWN_CHARS] if isinstance(title, str) and title else None


def shown_node(node_id: Any, title: str | None, class_type: Any) -> str:
    """A node as sentences name it: ``Node 1 "Photo" (LoadImage)``."""
    shown = [" ".join(str(word)[:MAX_SHOWN_CHARS].split()) for word in (node_id, title, class_type)]
    return f'Node {shown[0]} "{shown[1]}" ({shown[2]})' if title else f"Node {shown[0]} ({shown[2]})"
