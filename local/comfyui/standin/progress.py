"""What a client hears while nodes run: progress_state, progress and previews (comfy_execution/progress.py 0.18.1)."""

from __future__ import annotations

import io
import json
import struct
import time
from collections.abc import Callable
from typing import Any

from .node import Preview
from .sessions import PREVIEW_IMAGE, PREVIEW_IMAGE_WITH_METADATA, Sessions

# comfy/utils.py 0.18.1: between the first and the last step, at most one `progress` in this time.
_MIN_INTERVAL_S = 0.1
_MIN_CHANGE = 0.005
_FORMATS = {"JPEG": 1, "PNG": 2}


class Progress:
    """The progress of one prompt. Every message names all nodes so far, so their size grows with each of them."""

    def __init__(
        self, sessions: Sessions, prompt_id: str, check_interrupt: Callable[[], None], *, throttled: bool
    ) -> None:
        self._sessions = sessions
        self._prompt_id = prompt_id
        self._check_interrupt = check_interrupt
        self._throttled = throttled
        self._nodes: dict[str, dict[str, Any]] = {}
        self._last_sent = (0.0, -1.0)  # (monotonic time, value)

    def start(self, node_id: str) -> None:
        """A node begins."""
        self._last_sent = (0.0, -1.0)
        self._set(node_id, "running", 0.0, 1.0)

    def finish(self, node_id: str) -> None:
        """A node is done, or its result came from the cache."""
        maximum = self._nodes[node_id]["max"] if node_id in self._nodes else 1
        self._set(node_id, "finished", maximum, maximum)

    def step(self, node_id: str, value: float, maximum: float, preview: Preview | None) -> None:
        """A node is at `value` of `maximum`. Raises InterruptedPromptError when the prompt is to stop."""
        self._check_interrupt()
        if preview is None and not self._is_due(value, maximum):
            return
        self._last_sent = (time.monotonic(), value)
        self._set(node_id, "running", value, maximum)
        client_id = self._sessions.client_id
        rich = self._sessions.supports(client_id, "supports_preview_metadata")
        if preview is not None and rich:
            self._sessions.publish(PREVIEW_IMAGE_WITH_METADATA, self._rich_preview(node_id, preview), client_id)
        data = {"value": value, "max": maximum, "prompt_id": self._prompt_id, "node": node_id}
        self._sessions.publish("progress", data, client_id)
        if preview is not None and not rich:
            frame = struct.pack(">I", _FORMATS[preview[0]]) + _encoded(preview)
            self._sessions.publish(PREVIEW_IMAGE, frame, client_id)

    def _is_due(self, value: float, maximum: float) -> bool:
        sent_at, sent_value = self._last_sent
        if not self._throttled or sent_value < 0 or value >= maximum:
            return True
        changed = (value - sent_value) / maximum >= _MIN_CHANGE
        return changed and time.monotonic() - sent_at >= _MIN_INTERVAL_S

    def _set(self, node_id: str, state: str, value: float, maximum: float) -> None:
        self._nodes[node_id] = {"value": value, "max": maximum, "state": state, **self._identity(node_id)}
        nodes = {name: dict(node) for name, node in self._nodes.items()}
        self._sessions.publish(
            "progress_state", {"prompt_id": self._prompt_id, "nodes": nodes}, self._sessions.client_id
        )

    def _identity(self, node_id: str) -> dict[str, Any]:
        # The four ids differ only for nodes that other nodes made at run time; the stand-in has none such.
        return {
            "node_id": node_id,
            "prompt_id": self._prompt_id,
            "display_node_id": node_id,
            "parent_node_id": None,
            "real_node_id": node_id,
        }

    def _rich_preview(self, node_id: str, preview: Preview) -> bytes:
        kind = f"image/{preview[0].lower()}"
        metadata = json.dumps({**self._identity(node_id), "image_type": kind}).encode()
        return struct.pack(">I", len(metadata)) + metadata + _encoded(preview)


def _encoded(preview: Preview) -> bytes:
    buffer = io.BytesIO()
    preview[1].save(buffer, format=preview[0], compress_level=1, quality=95)
    return buffer.getvalue()
