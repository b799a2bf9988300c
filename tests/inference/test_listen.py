"""A port that is taken before anybody listens on it."""

from __future__ import annotations

import errno
import socket
from typing import Any

import pytest

from owl_wms.errors import ConfigError
from owl_wms.inference import listen


def test_a_free_port_is_bound_and_nobody_listens() -> None:
    (bound,) = listen.bind("127.0.0.1", 0)
    port = bound.getsockname()[1]
    assert port > 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    bound.listen()
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    listen.close([bound])
    listen.close([bound])


def test_a_taken_port_and_a_name_that_is_none_are_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            listen.bind("127.0.0.1", port)
    for name in ("a..b", "no.such.host.invalid"):
        with pytest.raises(ConfigError, match=f"cannot listen on {name}:8080: "):
            listen.bind(name, 8080)


def addresses(*hosts: tuple[int, str]) -> list[tuple[Any, ...]]:
    return [(family, socket.SOCK_STREAM, 6, "", (host, 0)) for family, host in hosts]


@pytest.mark.parametrize("order", [1, -1])
def test_an_address_that_the_machine_lacks_is_left_out(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """192.0.2.1 (RFC 5737) is nobody's: it stands for ::1 on a machine without IPv6."""
    found = addresses((socket.AF_INET, "192.0.2.1"), (socket.AF_INET, "127.0.0.1"))[::order]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_a, **_k: found)
    bound = listen.bind("both", 0)
    assert [made.getsockname()[0] for made in bound] == ["127.0.0.1"]
    listen.close(bound)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_a, **_k: found[::order][:1])
    with pytest.raises(ConfigError, match="Cannot assign requested address"):
        listen.bind("absent", 0)


def test_what_was_bound_before_a_failure_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        both = addresses((socket.AF_INET, "127.0.0.2"), (socket.AF_INET, "127.0.0.1"))
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda *_a, **_k: [(*entry[:4], (entry[4][0], port)) for entry in both]
        )
        original = listen.close
        monkeypatch.setattr(listen, "close", lambda sockets: (closed.extend(sockets), original(sockets)))
        with pytest.raises(ConfigError, match="in use"):
            listen.bind("both", port)
    assert len(closed) == 1
    with pytest.raises(OSError, match=str(errno.EBADF)):
        closed[0].getsockname()
