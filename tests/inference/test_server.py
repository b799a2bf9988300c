"""The play server as a browser meets it: frames, controls, and everybody who is turned away."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from aiohttp import WSCloseCode, WSMsgType, WSServerHandshakeError
from PIL import Image

from owl_wms.errors import ConfigError
from owl_wms.inference.messages import HEADER_BYTES, unpack_header
from owl_wms.inference.server import ServerSettings, new_token, page_address
from owl_wms.inference.session import IN_FLIGHT, Pace
from owl_wms.inference.source import Frame
from tests.inference.serving import TOKEN, BarSource, connect, is_refusal, next_frame, serve

INPUT = {"type": "input", "buttons": [], "mouse": [0.0, 0.0], "sent": 1.0}


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def picture(message: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(message[HEADER_BYTES:])).convert("L"))


async def play(socket: Any, frames: int, **changes: Any) -> bytes:
    """Send an input, take and acknowledge some frames; the last one."""
    await socket.send_json({**INPUT, **changes})
    data = b""
    for _ in range(frames):
        data = await next_frame(socket)
        await socket.send_json({"type": "ack", "index": int(unpack_header(data)["index"])})
    return data


async def frames_within(socket: Any, seconds: float) -> int:
    """Frames that arrive in that time; none of them is acknowledged."""
    count, end = 0, asyncio.get_running_loop().time() + seconds
    while (left := end - asyncio.get_running_loop().time()) > 0:
        try:
            count += (await socket.receive(timeout=left)).type == WSMsgType.BINARY
        except asyncio.TimeoutError:
            break
    return count


def test_keys_and_mouse_change_the_stream() -> None:
    async def test() -> None:
        async with serve() as (client, address, made):
            socket = await connect(client, address)
            still = picture(await play(socket, 4))
            walking = await play(socket, 6, buttons=["W", "D"], mouse=[0.5, 0.0], sent=77.0)
            header = unpack_header(walking)
            assert header["sent"] == 77.0
            assert (header["model_ms"], header["decode_ms"]) == (1.5, 2.5)
            columns = picture(walking)[:18].reshape(18, 11, 8).mean(axis=(0, 2)) > 128
            assert columns.tolist() == [i in (0, 3) for i in range(11)]
            assert still[:18].max() < 40
            # Movement is spent in one frame, held buttons stay.
            assert [x for _, x in made[0].heard if x != 0] == [0.5]
            await socket.close()

    run(test)


def test_a_tap_between_two_frames_counts() -> None:
    async def test() -> None:
        async with serve(pace=Pace(fps=20)) as (client, address, made):
            socket = await connect(client, address)
            await play(socket, 2)
            await socket.send_json({**INPUT, "buttons": ["LMB"]})
            await socket.send_json(INPUT)
            await play(socket, 3)
            assert [held for held, _ in made[0].heard].count(["LMB"]) == 1
            await socket.close()

    run(test)


def test_commands_reach_the_source_and_the_read_out() -> None:
    async def test() -> None:
        async with serve() as (client, address, made):
            socket = await connect(client, address)
            for name in ("more_steps", "more_steps", "fewer_steps", "restart"):
                await socket.send_json({"type": "command", "name": name})
            while True:
                message = await socket.receive(timeout=30)
                if message.type == WSMsgType.TEXT:
                    status = json.loads(message.data)
                    if status["steps"] == 5:
                        break
                else:
                    await socket.send_json({"type": "ack", "index": int(unpack_header(message.data)["index"])})
            assert (status["type"], status["backend"], made[0].restarts) == ("status", "none", 1)
            await socket.close()

    run(test)


class Bursts(BarSource):
    """Four pictures for each set of controls. Picture k is 16 (k mod 16) on the left and 16 (k / 16) on the right."""

    EACH = 4

    def __call__(self, mouse: Any, buttons: Any) -> Frame:
        frame = super().__call__(mouse, buttons)
        images = []
        for number in range(self.EACH * frame.index, self.EACH * (frame.index + 1)):
            images.append(np.full((32, 64, 3), 16 * (number % 16), np.uint8))
            images[-1][:, 32:] = 16 * (number // 16 % 16)
        return replace(frame, image=images[0], later=tuple(images[1:]))


def number_of(shown: np.ndarray) -> int:
    return round(float(shown[:, :24].mean()) / 16) + 16 * round(float(shown[:, 40:].mean()) / 16)


def test_all_pictures_of_a_frame_are_shown_in_order_at_their_rate() -> None:
    """Controls are taken a fourth as often as pictures are shown."""

    async def test() -> None:
        async with serve(kind=Bursts, pace=Pace(fps=40)) as (client, address, made):
            began = time.perf_counter()
            socket = await connect(client, address)
            shown = [number_of(picture(await play(socket, 1))) for _ in range(16)]
            taken, seconds = len(made[0].heard), time.perf_counter() - began
            # A busy machine leaves out what it shows too late. Nothing is shown twice or backwards.
            assert shown == sorted(set(shown))
            assert any(number % Bursts.EACH for number in shown)
            assert shown[-1] // Bursts.EACH < taken <= seconds * 40 / Bursts.EACH + 2
            await socket.close()

    run(test)


def test_a_slow_client_loses_frames_not_time() -> None:
    async def test() -> None:
        async with serve(pace=Pace(fps=200)) as (client, address, made):
            socket = await connect(client, address)
            got = [unpack_header(await next_frame(socket)) for _ in range(IN_FLIGHT)]
            await asyncio.sleep(0.5)
            assert made[0].index > 20, "the game goes on"
            assert await frames_within(socket, 0.2) == 0, "nothing more without an acknowledgement"
            await socket.send_json({"type": "ack", "index": int(got[-1]["index"])})
            late = unpack_header(await next_frame(socket))
            assert late["index"] == IN_FLIGHT
            assert late["dropped"] > 10
            await socket.close()

    run(test)


def test_a_second_client_is_told_why_and_the_place_is_freed() -> None:
    async def test() -> None:
        async with serve() as (client, address, made):
            first = await connect(client, address)
            await next_frame(first)
            second = await connect(client, address)
            message = await second.receive_json(timeout=30)
            assert (message["type"], message["reason"]) == (
                "refused",
                "somebody is playing: this server takes 1 at a time",
            )
            assert (await second.receive(timeout=30)).type == WSMsgType.CLOSE
            assert second.close_code == WSCloseCode.TRY_AGAIN_LATER
            await play(first, 3)
            await first.close()
            for _ in range(50):
                third = await connect(client, address)
                if not is_refusal(await third.receive(timeout=30)):
                    break
                await asyncio.sleep(0.05)
            await next_frame(third)
            assert len(made) == 1, "the next player takes over the loaded source"
            assert made[0].restarts == 1
            await third.close()

    run(test)


@pytest.mark.parametrize(
    "path", ["/", "/ws", "/wrong-token/", f"/{TOKEN[:-1]}/", f"/{TOKEN}x/play.js", "/%ff/", "/../"]
)
def test_a_wrong_token_opens_nothing(path: str) -> None:
    async def test() -> None:
        async with serve() as (client, address, made), client.get(address + path) as response:
            assert response.status == 403
            assert made == []

    run(test)


def test_the_page_and_its_parts_are_served_with_strict_headers() -> None:
    async def test() -> None:
        async with serve() as (client, address, _):
            for name, kind in (("", "text/html"), ("play.js", "text/javascript"), ("play.css", "text/css")):
                async with client.get(f"{address}/{TOKEN}/{name}") as response:
                    assert (response.status, response.content_type) == (200, kind)
                    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
                    assert response.headers["Referrer-Policy"] == "no-referrer"
            async with client.get(f"{address}/{TOKEN}/server.py") as response:
                assert response.status == 404

    run(test)


@pytest.mark.parametrize("origin", [None, "http://evil.example", "null", "https://127.0.0.1"])
def test_another_origin_may_not_connect(origin: str | None) -> None:
    async def test() -> None:
        async with serve() as (client, address, made):
            with pytest.raises(WSServerHandshakeError) as caught:
                await connect(client, address, origin=origin)
            assert caught.value.status == 403
            assert made == []

    run(test)


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ("not json", WSCloseCode.POLICY_VIOLATION),
        ("[]", WSCloseCode.POLICY_VIOLATION),
        ({**INPUT, "type": "shout"}, WSCloseCode.POLICY_VIOLATION),
        ({**INPUT, "extra": 1}, WSCloseCode.POLICY_VIOLATION),
        ({**INPUT, "buttons": ["Q"]}, WSCloseCode.POLICY_VIOLATION),
        ({**INPUT, "buttons": ["W"] * 12}, WSCloseCode.POLICY_VIOLATION),
        ({**INPUT, "mouse": [0.0]}, WSCloseCode.POLICY_VIOLATION),
        ({**INPUT, "mouse": ["0", "0"]}, WSCloseCode.POLICY_VIOLATION),
        ({**INPUT, "mouse": [1e9, 0.0]}, WSCloseCode.POLICY_VIOLATION),
        ('{"type":"input","buttons":[],"mouse":[NaN,0],"sent":1}', WSCloseCode.POLICY_VIOLATION),
        ({"type": "command", "name": "__class__"}, WSCloseCode.POLICY_VIOLATION),
        ({"type": "ack", "index": -1}, WSCloseCode.POLICY_VIOLATION),
        (b"\x00\x01", WSCloseCode.POLICY_VIOLATION),
        ("x" * 5000, WSCloseCode.MESSAGE_TOO_BIG),
    ],
)
def test_bad_messages_end_the_connection_and_nothing_else(sent: Any, code: int) -> None:
    async def test() -> None:
        async with serve() as (client, address, _):
            socket = await connect(client, address)
            await next_frame(socket)
            if isinstance(sent, bytes):
                await socket.send_bytes(sent)
            else:
                await socket.send_str(sent if isinstance(sent, str) else json.dumps(sent))
            async for _message in socket:
                pass
            assert socket.close_code == code
            for _ in range(50):
                again = await connect(client, address)
                if not is_refusal(await again.receive(timeout=30)):
                    break
                await asyncio.sleep(0.05)
            await next_frame(again)
            await again.close()

    run(test)


def test_a_source_that_breaks_is_reported_and_the_server_lives() -> None:
    async def test() -> None:
        source = BarSource()
        source.fail_at = 3
        async with serve(source) as (client, address, _):
            socket = await connect(client, address)
            reasons = []
            async for message in socket:
                if message.type == WSMsgType.BINARY:
                    await socket.send_json({"type": "ack", "index": int(unpack_header(message.data)["index"])})
                elif "error" in message.data:
                    reasons.append(message.json()["reason"])
            assert reasons == ["the source failed: RuntimeError"]
            assert socket.close_code == WSCloseCode.INTERNAL_ERROR
            async with client.get(f"{address}/{TOKEN}/") as response:
                assert response.status == 200

    run(test)


def test_stopping_the_server_says_goodbye() -> None:
    async def test() -> None:
        async with serve() as (client, address, _):
            socket = await connect(client, address)
            await next_frame(socket)
        # Leaving the block stops the server, while the client was still connected.
        assert socket.closed or (await socket.receive(timeout=30)).type in (WSMsgType.CLOSE, WSMsgType.CLOSED)

    run(test)


def test_settings_are_safe_by_default_and_checked() -> None:
    settings = ServerSettings()
    assert settings.host == "127.0.0.1"
    assert settings.max_clients == 1
    assert len(settings.token) >= 32
    assert new_token() != new_token()
    assert page_address(ServerSettings(host="0.0.0.0", token=TOKEN), 9) == f"http://127.0.0.1:9/{TOKEN}/"
    assert page_address(ServerSettings(host="::", token=TOKEN), 9) == f"http://[::1]:9/{TOKEN}/"
    bad_tokens = [{"token": "short"}, {"token": "with/slash/in/it/0000"}]
    for bad in ({"host": ""}, *bad_tokens, {"max_clients": 0}, {"pace": Pace(fps=0)}):
        with pytest.raises(ConfigError):
            ServerSettings(**bad)


def test_the_address_without_its_last_slash_leads_to_the_page() -> None:
    async def test() -> None:
        async with serve() as (client, address, _):
            answer = await client.get(f"{address}/{TOKEN}", allow_redirects=False)
            assert (answer.status, answer.headers["Location"]) == (308, f"{TOKEN}/")
            assert answer.headers["Cache-Control"] == "no-store"
            page = await client.get(f"{address}/{TOKEN}")
            assert (page.status, page.url.path) == (200, f"/{TOKEN}/")
            assert "play.js" in await page.text()
            for path in (TOKEN[:-1], f"{TOKEN}x", ""):
                wrong = await client.get(f"{address}/{path}", allow_redirects=False)
                assert wrong.status == 403
                assert TOKEN not in str(wrong.headers) + await wrong.text()

    run(test)
