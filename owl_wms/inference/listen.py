"""A port taken before there is anything to serve: models load for long, and a port in use should be said at once.

Usage:
    sockets = bind("127.0.0.1", 8080)
    ...                                     # load
    sites = [web.SockSite(runner, bound) for bound in sockets]
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket

from owl_wms.errors import ConfigError


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to `port` of every address of `host` that this machine has; they listen to nobody yet.

    Args:
        host: name or address; `localhost` is two addresses on most machines.
        port: 0 takes a free one.

    Raises:
        ConfigError: the name is none, no address is this machine's, or somebody has the port.
    """
    bound: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for number, (family, kind, protocol, _, address) in enumerate(dict.fromkeys(found), 1):
            last = number == len(found)
            taken = _bind(family, kind, protocol, address, may_be_absent=bool(bound) or not last)
            bound += [] if taken is None else [taken]
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no host can have
        close(bound)
        raise cannot_listen(host, port, error) from error
    return bound


def _bind(
    family: int, kind: int, protocol: int, address: tuple[object, ...], *, may_be_absent: bool
) -> socket.socket | None:
    made: socket.socket | None = None
    try:
        made = socket.socket(family, kind, protocol)
        if os.name == "posix":
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that stopped a moment ago
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # IPv4 has a socket of its own
        made.bind(address)
    except OSError as error:
        if made is not None:
            made.close()
        # A machine without IPv6 has a name for its loopback address all the same.
        if may_be_absent and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            return None
        raise
    return made


def close(sockets: list[socket.socket]) -> None:
    """Give the port back; sockets that are closed already stay so."""
    for bound in sockets:
        with contextlib.suppress(OSError):
            bound.close()


def cannot_listen(host: str, port: int, error: Exception) -> ConfigError:
    """What is said of it, in one line."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return ConfigError(f"cannot listen on {host}:{port}: {reason}", key="port")
