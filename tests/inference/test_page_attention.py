"""The page in headless Chromium as it loses focus, sight, the mouse or the server; and what its read-out measures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from owl_wms.inference import session
from owl_wms.inference.server import PlayServer
from tests.inference.chromium import BINARY, Page, click_to_play, open_page
from tests.inference.serving import TOKEN, serve

pytestmark = pytest.mark.skipif(BINARY is None, reason="no Chromium here; install Debian's package chromium")

FRAMES = "Number(document.body.dataset.frames)"
SENT = """((act) => {
  const sent = [], real = socket.send;
  socket.send = (text) => sent.push(JSON.parse(text));
  act();
  socket.send = real;
  return JSON.stringify(sent);
})"""
PRESS = "(code, repeat = false) => dispatchEvent(new KeyboardEvent('keydown', { code, repeat }))"


def on_page(test: Callable[[Page, list[Any]], Awaitable[None]]) -> None:
    async def run() -> None:
        async with serve() as (_, address, made), open_page(f"{address}/{TOKEN}/") as page:
            await click_to_play(page)
            await page.until(f"{FRAMES} > 3")
            await test(page, made)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_lost_focus_releases_every_key_in_one_message() -> None:
    """Timers of a hidden page are slow: a second message would come up to a second later, the key down until then."""

    async def test(page: Page, made: list[Any]) -> None:
        press = f"({PRESS})('KeyW'); ({PRESS})('KeyD'); dispatchEvent(new Event('blur'));"
        sent = json.loads(await page.value(f"{SENT}(() => {{ {press} }})"))
        assert sent[0]["buttons"] == ["W"]
        assert sent[-1]["buttons"] == []

    on_page(test)


def test_a_held_backspace_restarts_once() -> None:
    async def test(page: Page, made: list[Any]) -> None:
        press = f"({PRESS})('Backspace'); ({PRESS})('Backspace', true); ({PRESS})('Backspace', true);"
        sent = json.loads(await page.value(f"{SENT}(() => {{ {press} }})"))
        assert sent == [{"type": "command", "name": "restart"}]

    on_page(test)


def test_an_input_is_measured_by_the_first_picture_that_has_seen_it() -> None:
    """Every picture carries the time of the last input, and nothing is pressed here: measured again, it only ages."""

    async def test(page: Page, made: list[Any]) -> None:
        await page.value("measured = []; delays.push = (e) => measured.push(Math.round((e.now - e.ms) * 100));")
        await page.until("measured.length > 8")
        assert await page.value("new Set(measured).size === measured.length"), await page.value("String(measured)")

    on_page(test)


def test_a_hidden_page_draws_nothing_and_the_source_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "UNSEEN_SECONDS", 0.2)

    async def test(page: Page, made: list[Any]) -> None:
        turn = "Object.defineProperty(document, 'hidden', { configurable: true, get: () => %s });"
        turn += "document.dispatchEvent(new Event('visibilitychange'));"
        await page.value(turn % "true")
        before = -1
        while before != made[0].index:  # until it rests for a second: a hundred frames at this pace
            before = made[0].index
            await asyncio.sleep(1)
        drawn = await page.value(FRAMES)
        await page.value(turn % "false")
        await page.until(f"{FRAMES} > {drawn} + 10")
        assert made[0].index > before

    on_page(test)


def test_the_mouse_is_given_back_when_the_game_ends() -> None:
    async def test(page: Page, made: list[Any]) -> None:
        await page.until("document.pointerLockElement !== null && document.body.dataset.state === 'playing'")
        made[0].fail_at = made[0].index + 50
        await page.until("document.body.dataset.state === 'closed'")
        assert await page.value("document.getElementById('hint').textContent") == "the source failed: RuntimeError"
        await page.until("document.pointerLockElement === null")

    on_page(test)


def test_a_page_that_may_not_connect_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlayServer, "_same_origin", lambda _self, _request: False)

    async def run() -> None:
        async with serve() as (_, address, _made), open_page(f"{address}/{TOKEN}/") as page:
            await page.until("document.body.dataset.state === 'closed'")
            assert await page.value("document.getElementById('title').textContent") == "No connection"
            assert "--origin" in await page.value("document.getElementById('hint').textContent")

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_narrow_window_shows_everything() -> None:
    async def test(page: Page, made: list[Any]) -> None:
        await page.ask("Emulation.setDeviceMetricsOverride", width=320, height=568, deviceScaleFactor=2, mobile=False)
        await page.until("innerWidth === 320")
        assert await page.value("document.documentElement.scrollWidth") <= 320
        heights = "new Set([...document.querySelectorAll('.numbers label')].map((label) => label.offsetHeight)).size"
        assert await page.value(heights) == 1, "no label is broken into lines"

    on_page(test)


@pytest.mark.parametrize("width", [320, 360])
def test_on_a_narrow_phone_no_button_lies_on_the_stick(width: int) -> None:
    async def test(page: Page, made: list[Any]) -> None:
        await page.ask("Emulation.setDeviceMetricsOverride", width=width, height=568, deviceScaleFactor=2, mobile=True)
        await page.value("document.body.classList.add('touch')")
        await page.until(f"innerWidth === {width} && document.getElementById('stick').offsetWidth > 0")
        edges = "[...document.querySelectorAll('#taps button')].map((b) => b.getBoundingClientRect().left)"
        assert await page.value(
            f"Math.min(...{edges}) >= document.getElementById('stick').getBoundingClientRect().right"
        )

    on_page(test)


def test_a_lost_page_whose_token_is_no_more_says_what_to_open() -> None:
    async def test(page: Page, made: list[Any]) -> None:
        gone = json.dumps("gone, and another is in its place")
        await page.value(f"fetch = async () => ({{ ok: false, status: 403 }}); closed({{ reason: {gone} }})")
        await page.until("document.body.dataset.state === 'closed'")
        assert "new address" in await page.value("document.getElementById('title').textContent")

    on_page(test)
