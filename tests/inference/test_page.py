"""The page itself in headless Chromium: frames are drawn, keys change them, and a second player is told why not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, WSMsgType

from owl_wms.inference.source import GameSource
from tests.inference.chromium import BINARY, Page, click_to_play, open_page
from tests.inference.serving import TOKEN, BarSource, connect, is_refusal, next_frame, serve

pytestmark = pytest.mark.skipif(BINARY is None, reason="no Chromium here; install Debian's package chromium")

PIXEL = "(x, y) => [...document.getElementById('view').getContext('2d').getImageData(x, y, 1, 1).data].slice(0, 3)"


def test_frames_arrive_and_keys_change_them() -> None:
    async def test() -> None:
        async with serve() as (client, address, made), open_page(f"{address}/{TOKEN}/") as page:
            await click_to_play(page)
            await page.until("Number(document.body.dataset.frames) > 10")
            assert await page.value("document.body.dataset.state") == "playing"
            assert max(await page.value(f"({PIXEL})(4, 4)")) < 40
            await page.key("KeyW", "w", True)
            await page.until(f"({PIXEL})(4, 4)[0] > 200")
            assert await page.value("document.querySelector('[data-button=W]').classList.contains('held')")
            await page.key("KeyW", "w", False)
            await page.until(f"({PIXEL})(4, 4)[0] < 40")
            # The read-out: rate, time of flight, the source's own times, the backend, the steps.
            await page.until("Number(document.getElementById('fps').value) > 5")
            await page.until("Number(document.getElementById('latency').value) >= 0")
            assert await page.value("document.getElementById('model').value") == "1.5"
            assert await page.value("document.getElementById('decode').value") == "2.5"
            assert await page.value("document.getElementById('backend').textContent") == "nothing decoded"
            await page.value("document.querySelector('[data-command=more_steps]').click()")
            await page.until("document.getElementById('steps').value === '5'")
            await page.key("Backspace", "Backspace", True)
            for _ in range(100):
                if made[0].restarts:
                    break
                await asyncio.sleep(0.05)
            assert made[0].restarts == 1
            # A second player over the same address.
            second = await connect(client, address)
            assert is_refusal(await second.receive(timeout=30))
            await second.close()

    asyncio.run(asyncio.wait_for(test(), 60))


@asynccontextmanager
async def refused_page(client: ClientSession, address: str, words: str) -> AsyncIterator[tuple[Any, Page]]:
    """The connection of a player, and the page of another who came later and is told so in these words."""
    first = await connect(client, address)
    await next_frame(first)
    async with open_page(f"{address}/{TOKEN}/") as page:
        await page.until("document.body.dataset.state === 'refused'")
        assert words in await page.value("document.getElementById('hint').textContent")
        yield first, page


def test_a_refused_player_reads_the_reason(tmp_path: Path) -> None:
    async def test() -> None:
        async with serve() as (client, address, _):
            async with refused_page(client, address, "somebody is playing") as (first, page):
                assert await page.value("document.body.dataset.frames") == "0"
            assert not first.closed
            async with open_page(f"{address}/{TOKEN[:-1]}x/") as page:
                await page.until("document.body && document.body.innerText.includes('wrong or missing token')")
            while (message := await first.receive(timeout=30)).type == WSMsgType.TEXT:
                assert "refused" not in message.data
            await first.close()

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_refused_page_joins_once_the_place_is_free(tmp_path: Path) -> None:
    async def test() -> None:
        async with serve() as (client, address, made):
            async with refused_page(client, address, "tries again") as (first, page):
                await first.close()
                await page.until("document.body && document.body.dataset.state === 'ready'")
                await click_to_play(page)
                await page.until("document.body && Number(document.body.dataset.frames) > 1")
            assert len(made) == 1

    asyncio.run(asyncio.wait_for(test(), 60))


def test_the_rendered_game_is_seen(tmp_path: Path) -> None:
    """The game itself through page, codec and network; the picture is real and turns when told to."""

    async def test() -> None:
        source = GameSource(3, height=180, width=320)
        async with serve(source) as (_, address, _made), open_page(f"{address}/{TOKEN}/") as page:
            await click_to_play(page)
            await page.until("Number(document.body.dataset.frames) > 3")
            assert await page.value("document.getElementById('view').width") == 320
            before = float(source._world.state.position.sum())
            await page.key("KeyW", "w", True)
            await page.key("KeyD", "d", True)
            shown = int(await page.value("document.body.dataset.frames"))
            await page.until(f"Number(document.body.dataset.frames) > {shown + 10}")
            await page.screenshot(tmp_path / "page.png")
            assert (tmp_path / "page.png").stat().st_size > 20_000
            assert abs(float(source._world.state.position.sum()) - before) > 0.01

    asyncio.run(asyncio.wait_for(test(), 60))


async def heard(source: BarSource, wanted: Callable[[list[str], float], bool]) -> None:
    """Wait until the source was given controls like that."""
    for _ in range(200):
        if any(wanted(held, move) for held, move in source.heard):
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"never heard; the last were {source.heard[-5:]}")


def test_the_captured_mouse_looks_and_shoots() -> None:
    async def test() -> None:
        async with serve() as (_, address, made), open_page(f"{address}/{TOKEN}/") as page:
            await click_to_play(page)
            await page.until("Number(document.body.dataset.frames) > 3")
            x, y = 500, 300
            click = {"x": x, "y": y, "button": "left", "clickCount": 1}
            await page.until("document.pointerLockElement !== null")
            assert not any(held for held, _ in made[0].heard), "the click that captures is not a shot"
            # The browser swallows movements while it captures the pointer, for as long as it takes.
            for step in range(1, 200):
                await page.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x + 2 * step, y=y)
                await asyncio.sleep(0.02)
                if any(move > 0 for _, move in made[0].heard):
                    break
            await heard(made[0], lambda held, move: move > 0)
            await page.ask("Input.dispatchMouseEvent", type="mousePressed", **click)
            await page.until("document.querySelector('[data-button=LMB]').classList.contains('held')")
            await page.ask("Input.dispatchMouseEvent", type="mouseReleased", **click)
            await heard(made[0], lambda held, move: held == ["LMB"])

    asyncio.run(asyncio.wait_for(test(), 60))
