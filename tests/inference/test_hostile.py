"""The play server against clients that speak HTTP and WebSocket badly, or stop speaking at all."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import numpy as np
import pytest
from aiohttp import WSCloseCode, WSMsgType, WSServerHandshakeError

from owl_wms.inference import session
from owl_wms.inference.messages import unpack_header
from owl_wms.inference.source import Frame
from tests.inference.serving import TOKEN, BarSource, connect, next_frame, serve


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

    asyncio.run(asyncio.wait_for(test(), 60))


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "//", ""])
def test_an_origin_that_is_no_address_is_refused(origin: str) -> None:
    async def test() -> None:
        async with serve() as (client, address, _):
            with pytest.raises(WSServerHandshakeError) as caught:
                await connect(client, address, origin=origin)
            assert caught.value.status == 403

    asyncio.run(asyncio.wait_for(test(), 60))


class NoisySource(BarSource):
    """Pictures of about 2 MB, which the buffers of a connection do not swallow."""

    def __call__(self, mouse: Any, buttons: Any) -> Frame:
        noise = np.random.default_rng(0).integers(0, 255, (1200, 1600, 3), dtype=np.uint8)
        return Frame(image=noise, index=super().__call__(mouse, buttons).index, model_ms=0, decode_ms=0)


def test_a_client_that_reads_nothing_neither_breaks_off_stopping_nor_delays_it() -> None:
    async def test() -> None:
        source = NoisySource()
        async with serve(source) as (_, address, _made):
            port = int(address.rsplit(":", 1)[1])
            lines = [f"GET /{TOKEN}/ws HTTP/1.1", f"Host: 127.0.0.1:{port}", f"Origin: {address}", "Upgrade: websocket"]
            lines += ["Connection: Upgrade", "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {'A' * 22}=="]
            silent = socket.socket()
            silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            silent.connect(("127.0.0.1", port))
            silent.sendall("\r\n".join([*lines, "", ""]).encode())
            while source.index < 5:
                await asyncio.sleep(0.05)
            stopped = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - stopped < 15
        silent.close()

    asyncio.run(asyncio.wait_for(test(), 60))


def test_nothing_is_made_for_a_client_that_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr(session, "UNSEEN_SECONDS", 0.2)
        async with serve() as (client, address, made):
            player = await connect(client, address)
            frames = [unpack_header(await next_frame(player)) for _ in range(session.IN_FLIGHT)]
            before = -1
            while before != made[0].index:  # until it rests for a second: a hundred frames at this pace
                before = made[0].index
                await asyncio.sleep(1)
            await player.send_json({"type": "ack", "index": int(frames[-1]["index"])})
            await next_frame(player)
            while made[0].index == before:
                await asyncio.sleep(0.05)
            await player.close()

    asyncio.run(asyncio.wait_for(test(), 60))


@pytest.mark.parametrize("name", ["\u001b[2J\n", "\u65e5\u672c" * 60])
def test_what_a_client_wrote_reaches_log_and_close_frame_escaped(name: str, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with serve() as (client, address, _):
            player = await connect(client, address)
            await player.send_json({"type": "ack", "index": 0, name: 1})
            errors = [m.json()["reason"] async for m in player if m.type == WSMsgType.TEXT and "error" in m.data]
            assert player.close_code == WSCloseCode.POLICY_VIOLATION
            assert [text.isascii() and text.isprintable() for text in errors] == [True]
        assert errors[0] in caplog.text
        assert "\x1b" not in caplog.text

    asyncio.run(asyncio.wait_for(test(), 60))


@pytest.mark.parametrize("others", ["https://evil.example", "null"])
def test_one_origin_of_two_is_not_enough(others: str) -> None:
    async def test() -> None:
        async with serve() as (_client, address, made):
            lines = [
                f"GET /{TOKEN}/ws HTTP/1.1", f"Host: {address.removeprefix('http://')}", f"Origin: {address}",
                f"Origin: {others}", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
                "Sec-WebSocket-Key: MDEyMzQ1Njc4OTAxMjM0NQ==", "", "",
            ]  # fmt: skip
            assert b" 403 " in await answer(address, "\r\n".join(lines).encode())
            assert made == []

    asyncio.run(asyncio.wait_for(test(), 60))


def test_what_is_no_http_leaves_no_traceback_and_no_token_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with serve() as (_client, address, _made):
            for request in (
                f"GET /{TOKEN}/\xff HTTP/1.1\r\nHost: x\r\n\r\n",
                f"GET /{TOKEN}/{'a' * 9000} HTTP/1.1\r\nHost: x\r\n\r\n",
                "GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
                "GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -3\r\n\r\n",
            ):
                assert b" 400 " in await answer(address, request.encode("latin1"))

    asyncio.run(asyncio.wait_for(test(), 60))
    assert "Traceback" not in caplog.text
    assert TOKEN not in caplog.text


def test_a_damaged_body_leaves_no_traceback_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with serve() as (_client, address, _made):
            for body in (
                "Content-Encoding: gzip\r\nContent-Length: 20\r\n\r\n\x1f\x8b" + 18 * "\0",
                "Content-Encoding: deflate\r\nContent-Length: 3\r\n\r\nabc",
                "Transfer-Encoding: chunked\r\n\r\n3\r\nabcdef\r\n",
                "Transfer-Encoding: gzip, chunked\r\n\r\nzz\r\n",
            ):
                for token in ("", f"{TOKEN}/"):
                    request = f"POST /{token} HTTP/1.1\r\nHost: {address.removeprefix('http://')}\r\n{body}"
                    status = (await answer(address, request.encode("latin1"))).split()[1]
                    assert status in (b"400", b"403", b"405")
            await asyncio.sleep(0.05)  # the answer goes out before the body is read to its end

    asyncio.run(asyncio.wait_for(test(), 60))
    assert "Traceback" not in caplog.text
