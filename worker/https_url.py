"""What may be fetched: the form of a URL, and the addresses that its name may stand for."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from urllib.parse import urljoin

from worker.errors import InputInvalid

_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_FORM = re.compile(
    rf"https://(?P<host>\[[0-9a-f:.]+\]|{_LABEL}(?:\.{_LABEL})*)(?::(?P<port>[0-9]{{1,5}}))?(?P<target>[/?][!-~]*)?",
    re.IGNORECASE,
)
# Of IPv6 only what is given out to the world (RFC 4291, 2.4): loopback, private, link-local, mapped (::ffff:0:0/96) and
# NAT64 (64:ff9b::/96, 64:ff9b:1::/48) addresses all lie outside.
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
# Inside it, or of IPv4, and no place to fetch from; not all known to `is_global` of Python 3.11.
_SPECIAL = tuple(
    ipaddress.ip_network(block)
    for block in (
        *("192.0.0.0/24", "192.88.99.0/24", "224.0.0.0/4"),  # protocol assignments, 6to4 relays, multicast
        *("2001::/23", "2002::/16", "3fff::/20"),  # protocols and Teredo, 6to4 (both hold an IPv4 address), documents
    )
)


@dataclass(frozen=True)
class HttpsUrl:
    """A URL that is safe to ask for, once its addresses are. ``target`` is path and query: often a secret, as in a
    presigned URL, so neither ``repr`` nor an error has it."""

    host: str
    """In lower case; an IPv6 address without its brackets."""
    port: int
    target: str = field(repr=False)

    @classmethod
    def parse(cls, text: str, name: str) -> HttpsUrl:
        """Raise InputInvalid, which speaks of the file ``name``, for anything but plain https to a host.

        One strict pattern, not a parser that mends what it is given: what is checked is what is connected to.
        """
        if text[:5].lower() == "http:":
            raise InputInvalid(f"The URL of {name!r} is http; only https is fetched.", name=name)
        authority = re.split(r"[/?#\\]", text[8:], maxsplit=1)[0]
        if "@" in authority:
            raise InputInvalid(f"The URL of {name!r} has a user name or a password; send a presigned URL.", name=name)
        match = _FORM.fullmatch(text.partition("#")[0])
        if match is None or not _host_is_valid(match["host"]) or not 0 < int(match["port"] or 443) < 65536:
            raise InputInvalid(
                f"The URL of {name!r} is not of the form https://host/path, with all but ASCII percent-encoded.",
                name=name,
            )
        target = match["target"] or "/"
        return cls(
            host=match["host"].lower().strip("[]"),
            port=int(match["port"] or 443),
            target=target if target.startswith("/") else f"/{target}",
        )

    def redirected(self, location: str, name: str) -> HttpsUrl:
        """Where a redirect leads; held to the same rules. Raises InputInvalid."""
        try:
            return self.parse(urljoin(str(self), location), name)
        except ValueError:  # from urljoin, for half an IPv6 address
            raise InputInvalid(f"The URL of {name!r} leads to another that cannot be read.", name=name) from None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == 443 else f":{self.port}"
        return f"https://{host}{port}{self.target}"


def _host_is_valid(host: str) -> bool:
    """What looks like an address must be one in its usual form: no 2130706433, 0x7f.1 or 0177.0.0.1."""
    if not host.startswith("[") and not re.fullmatch(r"[0-9]+|0x[0-9a-f]*", host.rpartition(".")[2], re.IGNORECASE):
        return len(host) <= 253
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def is_public(address: str) -> bool:
    """Whether ``address``, as the resolver wrote it, belongs to the world: no loopback, private network, link, metadata
    service, carrier's network, multicast, or IPv6 form of an IPv4 address."""
    parsed = ipaddress.ip_address(address)
    if parsed.version == 6 and parsed not in _GLOBAL_UNICAST:
        return False
    return parsed.is_global and not any(parsed.version == block.version and parsed in block for block in _SPECIAL)
