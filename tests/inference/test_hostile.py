"""The play server against clients that speak HTTP and WebSocket badly, or stop speaking at all."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import WSServerHandshakeError

from tests.inference.serving import connect, serve


async def answer(address: str, request: bytes) -> bytes:
    """The first line that comes back for these bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rsplit(":", 1)[1]))
    writer.write(request)
    line = await asyncio.wait_for(reader.readline(), 10)
    writer.close()
    return line


@pytest.mark.parametrize("target", ["OPTIONS *", "GET http://x", "CONNECT x:80"])
def test_a_target_without_a_path_is_refused_as_one_without_a_token(target: str) -> None:
    async def test() -> None:
        async with serve() as (_client, address, made):
            assert b" 403 " in await answer(address, f"{target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert made == []

    asyncio.run(asyncio.wait_for(test(), 20))


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "//", ""])
def test_an_origin_that_is_no_address_is_refused(origin: str) -> None:
    async def test() -> None:
        async with serve() as (client, address, _):
            with pytest.raises(WSServerHandshakeError) as caught:
                await connect(client, address, origin=origin)
            assert caught.value.status == 403

    asyncio.run(asyncio.wait_for(test(), 20))
