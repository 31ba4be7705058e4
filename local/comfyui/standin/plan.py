"""In which order the nodes of a prompt run (comfy_execution/graph.py of ComfyUI 0.18.1)."""

from __future__ import annotations

from collections.abc import Callable

from .catalogue import NODE_CLASSES
from .workflow import Workflow, links


class Plan:
    """The nodes that are still to run. Cached sources are left out; an output node is listed even when cached."""

    def __init__(self, workflow: Workflow, outputs: list[str], is_cached: Callable[[str], bool]) -> None:
        self._workflow = workflow
        self._is_cached = is_cached
        self._waits_for: dict[str, set[str]] = {}
        self._feeds: dict[str, list[str]] = {}
        for node_id in outputs:
            self._add(node_id)

    def _add(self, output: str) -> None:
        stack = [output]
        while stack:
            node_id = stack.pop()
            if node_id in self._waits_for:
                continue
            sources = [source for _, source, _ in links(self._workflow, node_id) if not self._is_cached(source)]
            self._waits_for[node_id] = set(sources)
            self._feeds.setdefault(node_id, [])
            for source in sources:
                self._feeds.setdefault(source, []).append(node_id)
            stack += sources

    def next(self) -> str | None:
        """The node to run now: an output node if one is ready, else one that is close to an output. None: all done."""
        ready = [node_id for node_id, sources in self._waits_for.items() if not sources]
        if not ready:
            return None
        return min(ready, key=self._distance_to_output)  # of equals, min takes the first

    def done(self, node_id: str) -> None:
        """Strike out a node that ran."""
        del self._waits_for[node_id]
        for consumer in self._feeds.pop(node_id):
            self._waits_for[consumer].discard(node_id)

    def _distance_to_output(self, node_id: str) -> int:
        """0 for an output node, 1 where one is fed, 2 where one is fed through one node more, 3 for the rest."""
        layer = [node_id]
        for distance in range(3):
            if any(NODE_CLASSES[self._workflow[name]["class_type"]].output_node for name in layer):
                return distance
            layer = [consumer for name in layer for consumer in self._feeds[name]]
        return 3
