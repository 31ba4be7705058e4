"""An internet on loopback; Python loads this from PYTHONPATH.

PUBLIC_NAMES is JSON, ``{name: [answers of the first look-up, of the second, ...]}``; the last stays, and an empty one
never comes. A connection to any other machine leads to 127.0.0.1 instead. Every look-up of such a name and every such
connection is a line in the file PUBLIC_NAMES_LOG.
"""

import json
import os
import socket
import time
from typing import Any

_NAMES = json.loads(os.environ["PUBLIC_NAMES"])
_LOG = os.environ["PUBLIC_NAMES_LOG"]
_real_getaddrinfo = socket.getaddrinfo
_real_connect = socket.socket.connect


def _note(what: str, whom: str) -> None:
    with open(_LOG, "a") as stream:  # noqa: PTH123 - pathlib is slow to import, and this is in every process
        stream.write(f"{what} {whom}\n")


def _getaddrinfo(host: Any, port: Any, *more: Any, **named: Any) -> Any:
    if host not in _NAMES:
        return _real_getaddrinfo(host, port, *more, **named)
    _note("asked", host)
    answers = _NAMES[host].pop(0) if len(_NAMES[host]) > 1 else _NAMES[host][0]
    if not answers:
        time.sleep(3600)
    return [found for answer in answers for found in _real_getaddrinfo(answer, port, *more, **named)]


def _connect(self: socket.socket, address: Any) -> None:
    if self.family == socket.AF_INET and not address[0].startswith("127."):
        _note("connected", address[0])
        address = ("127.0.0.1", address[1])
    _real_connect(self, address)


socket.getaddrinfo = _getaddrinfo
socket.socket.connect = _connect
