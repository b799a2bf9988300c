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
import re
from typing import NamedTuple
from urllib.parse import urlsplit

_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")  # so no wildcard, which no browser sends
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
    name = one_form(host)
    return None if name is None else Origin(scheme, name, DEFAULT_PORTS[scheme] if port is None else port)


def one_form(host: str) -> str | None:
    """Returns an IP address in its shortest form, and a name as browsers send it; None if it is neither.

    So letters are small and in ASCII (`xn--...`, IDNA of 2003), and the last dot of a full name is left out.
    """
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    name = host.lower().removesuffix(".")
    if not name.isascii():
        try:
            name = name.encode("idna").decode("ascii")
        except UnicodeError:
            return None
    return name if _NAME.fullmatch(name) else None


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
