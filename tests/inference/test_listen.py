"""A port that is taken before anybody listens on it."""

from __future__ import annotations

import errno
import socket
from typing import Any

import pytest

from owl_wms.errors import ConfigError
from owl_wms.inference import listen


def addresses(*hosts: tuple[int, str]) -> list[tuple[Any, ...]]:
    return [(family, socket.SOCK_STREAM, 6, "", (host, 0)) for family, host in hosts]


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


def test_nobody_else_gets_a_port_that_is_bound() -> None:
    """Whatever the other asks for: two sockets that may both be reused could share a port until one of them listens."""
    (bound,) = listen.bind("127.0.0.1", 0)
    port = bound.getsockname()[1]
    for reused in (0, 1):
        with socket.socket() as rival:
            rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reused)
            with pytest.raises(OSError, match="in use"):
                rival.bind(("127.0.0.1", port))
    with pytest.raises(ConfigError, match="in use"):
        listen.bind("127.0.0.1", port)
    listen.let_listen([bound])
    bound.listen()
    listen.close([bound])


def test_the_port_of_a_server_that_stopped_a_moment_ago_is_free() -> None:
    """Its connections linger; the server closed them first, as it does when it stops with players."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port), timeout=5)
        accepted, _ = server.accept()
        accepted.close()
        assert client.recv(1) == b""
        client.close()
    with socket.socket() as plain, pytest.raises(OSError, match="in use"):
        plain.bind(("127.0.0.1", port))  # so it does linger
    bound = listen.bind("127.0.0.1", port)
    listen.let_listen(bound)
    bound[0].listen()
    listen.close(bound)


def test_two_addresses_have_one_port(monkeypatch: pytest.MonkeyPatch) -> None:
    found = addresses((socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "127.0.0.2"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_a, **_k: found)
    bound = listen.bind("both", 0)
    names = [made.getsockname() for made in bound]
    assert [name[0] for name in names] == ["127.0.0.1", "127.0.0.2"]
    assert names[0][1] == names[1][1] > 0
    listen.close(bound)


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_both_families_of_any_address_are_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket for all of IPv6 would take IPv4 too, and its port from the other."""
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("0.0.0.0", 0)),
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::", 0, 0, 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_a, **_k: found)
    bound = listen.bind("any", 0)
    if len(bound) == 1:
        pytest.skip("this machine has no IPv6")
    assert bound[0].getsockname()[1] == bound[1].getsockname()[1]
    listen.close(bound)


def test_a_taken_port_and_a_name_that_is_none_are_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            listen.bind("127.0.0.1", port)
    for name in ("a..b", "no.such.host.invalid"):
        with pytest.raises(ConfigError, match=f"cannot listen on {name}:8080: "):
            listen.bind(name, 8080)


@pytest.mark.parametrize("order", [1, -1])
def test_an_address_that_the_machine_lacks_is_left_out(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """192.0.2.1 (RFC 5737) is nobody's: it stands for ::1 on a machine without IPv6."""
    found = addresses((socket.AF_INET, "192.0.2.1"), (socket.AF_INET, "127.0.0.1"))[::order]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_a, **_k: found)
    bound = listen.bind("both", 0)
    assert [made.getsockname()[0] for made in bound] == ["127.0.0.1"]
    listen.close(bound)
    absent = addresses((socket.AF_INET, "192.0.2.1"), (socket.AF_INET, "192.0.2.1"))  # a name listed twice
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_a, **_k: absent)
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
