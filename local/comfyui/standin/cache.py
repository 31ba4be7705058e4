"""The result cache (comfy_execution/caching.py of ComfyUI 0.18.1, class HierarchicalCache).

A node's key is made of its class, its literal inputs, its fingerprint and the keys of everything that it depends on;
node ids do not count. Only what the newest prompt contains stays: the next, different workflow throws the rest out.
Cached are results, never files, so a cached SaveImage names a file that somebody may have removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import uuid
from dataclasses import dataclass
from typing import Any

from .catalogue import NODE_CLASSES
from .folders import Folders
from .node import Node
from .workflow import Workflow, is_link, links

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cached:
    """The outputs of a node that ran, and what it adds to a history (None: nothing)."""

    outputs: tuple[Any, ...]
    ui: dict[str, Any] | None


class ResultCache:
    """Results and node objects; `start` comes first for every prompt."""

    def __init__(self, folders: Folders) -> None:
        self._folders = folders
        self._keys: dict[str, str] = {}
        self._fingerprints: dict[str, Any] = {}
        self._results: dict[str, Cached] = {}
        self._objects: dict[tuple[str, str], Node] = {}

    def start(self, workflow: Workflow) -> None:
        """Take on a workflow: work out its keys and drop what it does not contain."""
        self._keys, self._fingerprints = {}, {}
        for node_id in workflow:
            self._add_key(workflow, node_id)
        used = set(self._keys.values())
        self._results = {key: result for key, result in self._results.items() if key in used}
        places = {(node_id, node["class_type"]) for node_id, node in workflow.items()}
        self._objects = {place: node for place, node in self._objects.items() if place in places}

    def clear(self) -> None:
        """Forget everything (POST /free with free_memory)."""
        self._results, self._objects = {}, {}

    def get(self, node_id: str) -> Cached | None:
        """The result of a node of the current workflow."""
        return self._results.get(self._keys[node_id])

    def put(self, node_id: str, result: Cached) -> None:
        """Keep the result of a node of the current workflow."""
        self._results[self._keys[node_id]] = result

    def with_fingerprints(self, workflow: Workflow) -> Workflow:
        """The current workflow as saved files hold it: ComfyUI writes the fingerprints into its nodes before
        they run (execution.py 0.18.1, IsChangedCache). The queue and the history have a copy from before that."""
        told = {node_id: {"is_changed": fingerprint} for node_id, fingerprint in self._fingerprints.items()}
        return {node_id: {**node, **told.get(node_id, {})} for node_id, node in workflow.items()}

    def node_object(self, node_id: str, class_type: str) -> Node:
        """The object that runs this node: the same one from prompt to prompt while its id and class stay."""
        place = (node_id, class_type)
        if place not in self._objects:
            self._objects[place] = NODE_CLASSES[class_type]()
        return self._objects[place]

    def _add_key(self, workflow: Workflow, node_id: str) -> str:
        if node_id not in workflow:
            return uuid.uuid4().hex  # a link into nowhere, in a branch that does not run: never cached
        if node_id in self._keys:
            return self._keys[node_id]
        self._keys[node_id] = uuid.uuid4().hex  # what a cycle would see
        node = workflow[node_id]
        inputs = [[name, value] for name, value in sorted(node["inputs"].items()) if not is_link(value)]
        sources = [[name, self._add_key(workflow, source), slot] for name, source, slot in links(workflow, node_id)]
        fingerprint = self._fingerprint(node)
        if fingerprint is not None:
            self._fingerprints[node_id] = fingerprint
        state = uuid.uuid4().hex if fingerprint is math.nan else fingerprint  # NaN equals no other: the node runs
        signature = [node["class_type"], state, inputs, sorted(sources)]
        self._keys[node_id] = hashlib.sha256(json.dumps(signature, sort_keys=True).encode()).hexdigest()
        return self._keys[node_id]

    def _fingerprint(self, node: dict[str, Any]) -> Any:
        """A list of the one fingerprint, None for a class that has none, NaN where it cannot be taken."""
        literals = {name: value for name, value in node["inputs"].items() if not is_link(value)}
        try:
            fingerprint = NODE_CLASSES[node["class_type"]].fingerprint(self._folders, literals)
        except (OSError, LookupError, TypeError, ValueError) as failure:
            log.warning("WARNING: %s", failure)
            return math.nan
        return None if fingerprint is None else [fingerprint]
