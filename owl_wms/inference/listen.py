"""Takes a port before there is anything to serve: models load for long, and a port in use should be reported at once.

Usage:
    sockets = bind("127.0.0.1", 8080)
    ...                                     # load
    let_listen(sockets)
    sites = [web.SockSite(runner, bound) for bound in sockets]
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket

from owl_wms.errors import ConfigError


def bind(host: str, port: int) -> list[socket.socket]:
    """Returns sockets bound to `port` of every address of `host` that this machine has; they do not listen yet.

    Args:
        host: name or address; `localhost` is two addresses on most machines.
        port: 0 takes a free one, the same for all addresses.

    Raises:
        ConfigError: nothing has this name, none of its addresses is this machine's, or the port is in use.
    """
    bound: list[socket.socket] = []
    try:
        listed = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        found = list(dict.fromkeys(listed))
        for number, (family, kind, protocol, _, address) in enumerate(found, 1):
            shared = bound[0].getsockname()[1] if bound else port
            place = (address[0], shared, *address[2:])
            taken = _bind(family, kind, protocol, place, may_be_absent=bool(bound) or number < len(found))
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
        _may_be_reused(made, True)  # the port of a server that stopped a moment ago
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # IPv4 has a socket of its own
        made.bind(address)
        # Or Linux would let another such socket bind the port too, and listen first.
        _may_be_reused(made, False)
    except OSError as error:
        if made is not None:
            made.close()
        # A machine without IPv6 has a name for its loopback address all the same.
        if may_be_absent and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            return None
        raise
    return made


def _may_be_reused(made: socket.socket, reused: bool) -> None:
    if os.name == "posix":
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reused))


def let_listen(sockets: list[socket.socket]) -> None:
    """Prepares sockets to listen at the next moment, also on a port where connections of the last server linger."""
    for bound in sockets:
        _may_be_reused(bound, True)


def close(sockets: list[socket.socket]) -> None:
    """Give the port back; sockets that are closed already stay so."""
    for bound in sockets:
        with contextlib.suppress(OSError):
            bound.close()


def cannot_listen(host: str, port: int, error: Exception) -> ConfigError:
    """Returns the error that says in one line why nobody can listen there."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return ConfigError(f"cannot listen on {host}:{port}: {reason}; choose another host or port", key="port")
