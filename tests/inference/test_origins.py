"""Origins are compared by scheme, host and port; hosts that the public DNS could give away are refused."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import WSServerHandshakeError

from owl_wms.errors import ConfigError
from owl_wms.inference.origins import is_local_name, parse_origin
from owl_wms.inference.server import ServerSettings
from tests.inference.serving import TOKEN, connect, next_frame, serve

SAME = (
    ("https://play.example.org", "https://play.example.org:443", "HTTPS://Play.Example.ORG/", "https://play.example.org."),
    ("http://[::1]", "http://[::1]:80/", "http://[0:0:0:0:0:0:0:1]"),
    ("http://127.0.0.1:8080", "http://127.0.0.1:8080/"),
    ("https://bücher.example", "https://BÜCHER.example:443/", "https://xn--bcher-kva.example"),
)  # fmt: skip
NONE = (
    *("", "null", "//", "http://", "http://[", "http://[::1", "ftp://a", "a", "http://a:b", "http://a:99999"),
    *("https://*", "https://*.example.org", "http://a..b", "http://a b", "http://\udc80"),
    *("http://a/path", "http://a?x", "http://a#x", "http://user@a", "http://@a", "http://a ", " http://a"),
)


def test_equal_origins_are_equal() -> None:
    for forms in SAME:
        assert len({parse_origin(form) for form in forms}) == 1
    assert len({parse_origin(forms[0]) for forms in SAME}) == len(SAME)
    assert parse_origin("https://a") != parse_origin("http://a")


@pytest.mark.parametrize("text", NONE)
def test_what_is_no_origin_is_none(text: str) -> None:
    assert parse_origin(text) is None
    with pytest.raises(ConfigError, match="scheme, host and port"):
        ServerSettings(token=TOKEN, origins=(text,))


def test_names_that_dns_cannot_give_away_are_local() -> None:
    assert all(is_local_name(name) for name in ("localhost", "gpu-box", "127.0.0.1", "::1", "a.localhost", "box.local"))
    assert not any(is_local_name(name) for name in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io"))


@pytest.mark.parametrize(
    ("host", "origin", "allowed", "status"),
    [
        ("evil.example", "http://evil.example", (), 403),  # DNS rebinding: the page is "same-origin" with us
        ("127.0.0.1.nip.io", "http://127.0.0.1.nip.io", (), 403),
        ("play.example.org", "https://play.example.org", ("https://play.example.org/",), 200),
        ("play.example.org", "https://evil.example", ("https://play.example.org",), 403),
        ("gpu-box:80", "http://GPU-box", (), 200),
        ("localhost", "http://localhost:81", (), 403),
    ],
)
def test_who_may_connect_under_which_name(host: str, origin: str, allowed: tuple[str, ...], status: int) -> None:
    async def test() -> None:
        async with serve(origins=allowed) as (client, address, _):
            if status == 200:
                socket = await connect(client, address, headers={"Host": host}, origin=origin)
                await next_frame(socket)
                await socket.close()
                return
            with pytest.raises(WSServerHandshakeError) as caught:
                await connect(client, address, headers={"Host": host}, origin=origin)
            assert caught.value.status == status

    asyncio.run(asyncio.wait_for(test(), 60))


@pytest.mark.parametrize("named", ["Play.Example.org", "play.example.org."])
def test_the_host_may_be_named_in_any_form(named: str) -> None:
    """Browsers take the page's address from the terminal, and send the host in their own form."""

    async def test() -> None:
        async with serve(host=named) as (client, address, _):
            for host in (named, "play.example.org:8080"):
                response = await client.get(f"{address}/{TOKEN}/", headers={"Host": host})
                assert response.status == 200

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_page_under_a_foreign_name_is_refused_too() -> None:
    async def test() -> None:
        async with serve() as (client, address, _):
            response = await client.get(f"{address}/{TOKEN}/", headers={"Host": "evil.example"})
            assert response.status == 403
            assert "--origin" in await response.text()

    asyncio.run(asyncio.wait_for(test(), 60))
