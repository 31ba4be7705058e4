"""ComfyUI's websocket as a feed of messages that may break at any time."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import websocket

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
RECONNECT_S = 0.5


class Feed:
    """ComfyUI's websocket, which may be down at any time; nobody's job fails for it."""

    def __init__(self, port: int, client_id: str, clock: Callable[[], float]) -> None:
        self.client_id = client_id
        self._port = port
        self._url = f"ws://127.0.0.1:{port}/ws?clientId={client_id}"
        self._clock = clock
        self._socket: websocket.WebSocket | None = None
        self._tried_at = 0.0
        self.was_down = False
        """whether messages can have been lost"""

    @property
    def is_open(self) -> bool:
        return self._socket is not None

    def open(self) -> None:
        self._tried_at = self._clock()
        with _socket_trouble():
            # Checking UTF-8 in Python costs seconds on a 17 MiB progress_state flood; json.loads checks what is parsed.
            # A socket of our own: websocket-client 1.9.2 sends even loopback through an HTTP_PROXY of the environment.
            self._socket = websocket.create_connection(
                self._url,
                timeout=CONNECT_TIMEOUT_S,
                socket=socket.create_connection(("127.0.0.1", self._port), CONNECT_TIMEOUT_S),
                skip_utf8_validation=True,
                enable_multithread=False,
            )

    def reopen_if_due(self) -> None:
        """Connect again after a break. The old one is closed by then: with two sockets of one clientId, the closing
        of the first makes the second go silent (0.18.1, 0.3.x)."""
        if not self.is_open and self._clock() - self._tried_at >= RECONNECT_S:
            self.open()

    def receive(self, timeout_s: float) -> bytes | dict[str, Any] | None:
        """The next message that matters: JSON as a dict, binary as bytes; None after ``timeout_s`` or a break."""
        if self._socket is None:
            self.was_down = True
            time.sleep(timeout_s)
            return None
        try:
            self._socket.settimeout(timeout_s)
            opcode, content = self._socket.recv_data()
        except websocket.WebSocketTimeoutException:
            return None
        except (websocket.WebSocketException, OSError) as error:
            self._lose(type(error).__name__)
            return None
        if opcode == websocket.ABNF.OPCODE_CLOSE:
            self._lose("closed by ComfyUI")
            return None
        return bytes(content) if opcode == websocket.ABNF.OPCODE_BINARY else _parse_message(content)

    def _lose(self, reason: str) -> None:
        log.warning("the websocket broke (%s); asking the queue and the history", reason)
        self.was_down = True
        self.close()

    def close(self) -> None:
        with _socket_trouble():
            if self._socket is not None:
                self._socket.shutdown()
        self._socket = None


def _parse_message(content: bytes) -> dict[str, Any]:
    # progress_state repeats every node's state in every message; nothing of it is needed.
    if content.startswith(b'{"type": "progress_state"'):
        return {}
    try:
        message = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


@contextlib.contextmanager
def _socket_trouble() -> Iterator[None]:
    try:
        yield
    except (websocket.WebSocketException, OSError) as error:
        log.debug("websocket: %s", type(error).__name__)
