"""Connections that have not shown the token cost little: they are closed in time, and never crowd a player out."""

from __future__ import annotations

import asyncio
import errno
import logging

import pytest

from owl_wms.inference import limits
from tests.inference.serving import TOKEN, connect, next_frame, serve


async def open_silent(address: str, sent: bytes = b"GET / HT") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rsplit(":", 1)[1]))
    writer.write(sent)
    return reader, writer


async def is_closed(reader: asyncio.StreamReader, seconds: float) -> bool:
    try:
        return await asyncio.wait_for(reader.read(), seconds) is not None
    except (asyncio.TimeoutError, ConnectionError) as error:
        return isinstance(error, ConnectionError)


@pytest.mark.parametrize("sent", [b"", b"G", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: "])
def test_a_connection_without_a_whole_request_is_closed_in_time(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEADER_SECONDS", 0.5)

    async def test() -> None:
        async with serve() as (client, address, _):
            player = await connect(client, address)
            reader, writer = await open_silent(address, sent)
            assert await is_closed(reader, 3)
            writer.close()
            await next_frame(player)  # older than half a second by now, and not touched
            await player.close()

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_wrong_token_does_not_keep_its_connection() -> None:
    async def test() -> None:
        async with serve() as (_, address, _made):
            reader, writer = await open_silent(address, b"GET /wrong/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = await asyncio.wait_for(reader.read(), 20)
            assert b" 403 " in answer.splitlines()[0]
            assert b"Connection: close" in answer
            writer.close()

    asyncio.run(asyncio.wait_for(test(), 60))


def test_too_many_connections_push_out_the_oldest_that_said_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "most_connections", lambda: 8)

    async def test() -> None:
        async with serve() as (client, address, _):
            player = await connect(client, address)
            silent = [await open_silent(address) for _ in range(20)]
            assert await is_closed(silent[0][0], 3)
            await asyncio.sleep(2 * limits.LOOK_SECONDS)
            assert not await is_closed(silent[-1][0], 0.2), "the newest may still send its request"
            async with client.get(f"{address}/{TOKEN}/") as page:
                assert page.status == 200
            await next_frame(player)
            for _, writer in silent:
                writer.close()
            await player.close()

    asyncio.run(asyncio.wait_for(test(), 60))


def test_missing_descriptors_are_logged_once_and_other_errors_as_ever(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with serve():
            loop = asyncio.get_running_loop()
            accept = "socket.accept() out of system resource"
            for number in (errno.EMFILE, errno.ENFILE) * 50:
                loop.call_exception_handler({"message": accept, "exception": OSError(number, "Too many open files")})
            loop.call_exception_handler({"message": "another fault", "exception": OSError(errno.EIO, "broken")})

    with caplog.at_level(logging.WARNING):
        asyncio.run(asyncio.wait_for(test(), 60))
    assert [record.name for record in caplog.records] == ["owl_wms.inference", "asyncio"]
    assert "ulimit -n" in caplog.records[0].message
    assert "another fault" in caplog.records[1].message
