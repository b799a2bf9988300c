"""Compares web addresses as browsers do: by scheme, host and port, not letter by letter.

A browser sends `Host`, the name that it looked up, and with a WebSocket `Origin`, the address of the page that opens
it. A page from elsewhere must not drive the game, so its Origin must be the address that was asked, or one that was
allowed at start. A name that others can point at this machine (DNS rebinding) is refused as Host.

Usage:
    parse_origin("https://Play.example.org/")       # Origin("https", "play.example.org", 443)
    is_local_name("gpu-box")                        # True: no dots, so the public DNS has no such name
"""

from __future__ import annotations

import ipaddress
from typing import NamedTuple
from urllib.parse import urlsplit

DEFAULT_PORTS = {"http": 80, "https": 443}


class Origin(NamedTuple):
    """One origin; equal origins compare equal."""

    scheme: str
    host: str
    port: int


def parse_origin(text: str) -> Origin | None:
    """Returns the origin that `text` names, or None if it names none.

    Args:
        text: `scheme://host`, with or without port and last slash; capitals do not matter. A path, a user name, a
            query and schemes other than http and https are refused.
    """
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:  # an IPv6 address without its bracket, a port that is no number
        return None
    scheme = parts.scheme.lower()
    bare = parts.path in ("", "/") and not (parts.query or parts.fragment or parts.username or parts.password)
    if scheme not in DEFAULT_PORTS or not host or not bare or text != text.strip() or "@" in text:
        return None
    return Origin(scheme, _one_form(host), DEFAULT_PORTS[scheme] if port is None else port)


def _one_form(host: str) -> str:
    """Returns an IP address in its shortest form and a name in small letters, without the last dot of a full name."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host.lower().removesuffix(".")


def is_local_name(host: str) -> bool:
    """Returns whether the public DNS cannot point `host` at this machine.

    So it is for IP addresses, for names without a dot, and below `localhost` and `local` (RFC 6761, RFC 6762).

    Args:
        host: of an `Origin`.
    """
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.rsplit(".", 1)[1] in ("localhost", "local")
    return True
