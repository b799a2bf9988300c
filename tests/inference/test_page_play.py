"""The page in headless Chromium, large and as a phone: begin, pause, worlds, touch, clips, a server that comes back."""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import av
import pytest
import torch
from aiohttp import ClientSession

from owl_wms.errors import ConfigError
from owl_wms.game.buttons import BUTTONS
from owl_wms.inference.controls import GAME_CONTROLS, Button
from owl_wms.inference.loading import Loading, Progress
from tests.inference.chromium import BINARY, Page, click_to_play, open_page
from tests.inference.serving import TOKEN, BarSource, connect, serve

pytestmark = pytest.mark.skipif(BINARY is None, reason="no Chromium here; install Debian's package chromium")

FRAMES = "Number(document.body.dataset.frames)"
STATE = "document.body?.dataset.state"
WORLD = "document.getElementById('world').textContent"
TITLE = "document.getElementById('title').textContent"


def on_page(test: Callable[[Page, Any, str], Awaitable[None]], hash: str = "", **options: Any) -> None:
    async def run() -> None:
        async with serve(**options) as (_, address, made), open_page(f"{address}/{TOKEN}/{hash}") as page:
            await page.until(f"{STATE} === 'ready'")
            await test(page, made, address)

    asyncio.run(asyncio.wait_for(run(), 90))


async def settled(made: Any) -> int:
    """Returns how many frames the source has made once it rests for half a second."""
    before = -1
    while before != made.index:
        before = made.index
        await asyncio.sleep(0.5)
    return before


async def as_phone(page: Page, width: int = 390, height: int = 844) -> None:
    await page.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=True)
    await page.ask("Emulation.setTouchEmulationEnabled", enabled=True, maxTouchPoints=5)
    await page.until(f"innerWidth === {width}")


async def touch(page: Page, kind: str, *points: tuple[float, float]) -> None:
    named = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(points)]
    await page.ask("Input.dispatchTouchEvent", type=f"touch{kind}", touchPoints=named)


async def middle(page: Page, selector: str) -> tuple[float, float]:
    box = f"document.querySelector({selector!r}).getBoundingClientRect()"
    x, y = await page.value(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({box})")
    return x, y


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(400):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it never became true")


def test_nothing_is_made_before_the_click() -> None:
    async def test(page: Page, made: Any, address: str) -> None:
        await page.until("document.getElementById('source').textContent === 'bars'")
        await asyncio.sleep(1)
        assert made[0].index == 0
        assert await page.value(FRAMES) == 0
        assert await page.value(TITLE) == "Click to play"
        assert "W A S D walk" in await page.value("document.getElementById('legend').textContent")
        await click_to_play(page)
        await page.until(f"{FRAMES} > 3")

    on_page(test)


@pytest.mark.parametrize("way", ["key", "button", "hidden"])
def test_a_pause_stops_the_source_and_the_way_back_goes_on(way: str) -> None:
    async def test(page: Page, made: Any, address: str) -> None:
        await click_to_play(page)
        await page.until(f"{FRAMES} > 3")
        if way == "key":
            await page.key("KeyP", "p", True)
            await page.key("KeyP", "p", False)
        elif way == "button":
            await page.value("document.getElementById('pause').click()")
        else:
            hide = "Object.defineProperty(document, 'hidden', { configurable: true, get: () => true });"
            await page.value(hide + "document.dispatchEvent(new Event('visibilitychange'));")
        await page.until(f"{STATE} === 'paused'")
        assert await page.value("document.pointerLockElement === null")
        before = await settled(made[0])
        if way == "hidden":
            await page.value("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'));")
            await page.until(f"{STATE} === 'playing'")
        else:
            await click_to_play(page)
        shown = await page.value(FRAMES)
        await page.until(f"{FRAMES} > {shown} + 3")
        assert made[0].index > before

    on_page(test)


def test_a_held_key_does_not_stay_down_over_a_pause() -> None:
    async def test(page: Page, made: Any, address: str) -> None:
        await click_to_play(page)
        await page.key("KeyW", "w", True)
        await until(lambda: made[0].heard and made[0].heard[-1][0] == ["W"])
        await page.value("document.getElementById('pause').click()")
        await settled(made[0])
        await click_to_play(page)
        await until(lambda: made[0].heard[-1][0] == [])

    on_page(test)


def test_a_new_world_has_a_link_and_the_link_leads_there() -> None:
    async def test(page: Page, made: Any, address: str) -> None:
        await click_to_play(page)
        await until(lambda: made[0].seed == 77)
        await page.until("location.hash === '#world=77'")
        await page.key("KeyN", "n", True)
        await page.until("location.hash !== '' && location.hash !== '#world=77'")
        assert await page.value("location.hash") == f"#world={made[0].seed}"
        assert await page.value(WORLD) == f"world {made[0].seed}"
        await page.value("location.hash = '#world=5'")
        await until(lambda: made[0].seed == 5)

    on_page(test, "#world=77")


@pytest.mark.parametrize("hash", ["#world=-1", "#world=99999999999", "#world=1e3", "#x"])
def test_a_link_that_names_no_world_begins_the_usual_one(hash: str) -> None:
    async def test(page: Page, made: Any, address: str) -> None:
        await click_to_play(page)
        await page.until(f"{FRAMES} > 3")
        assert made[0].seed == 0

    on_page(test, hash)


def test_a_saved_clip_is_a_clip_of_what_was_seen() -> None:
    async def test(page: Page, made: Any, address: str) -> None:
        await page.until("Boolean(about.session)")
        async with ClientSession() as client:
            empty = await client.get(f"{address}/{TOKEN}/clip.mp4?session={await page.value('about.session')}")
            assert empty.status == 409
            assert (await client.get(f"{address}/{TOKEN}/clip.mp4?session=x")).status == 404
            await click_to_play(page)
            await page.until(f"{FRAMES} > 30")
            await page.value("document.getElementById('record').click()")
            await page.until("document.getElementById('record').textContent === 'saved'")
            answer = await client.get(f"{address}/{TOKEN}/clip.mp4?session={await page.value('about.session')}")
            data = await answer.read()
            assert (answer.status, answer.content_type) == (200, "video/mp4")
        with av.open(io.BytesIO(data)) as clip:
            stream = clip.streams.video[0]
            pictures = [frame.to_ndarray(format="gray") for frame in clip.decode(stream)]
        assert (stream.width, stream.height) == (88, 36)
        assert len(pictures) > 25
        assert pictures[-1][:16].mean() < 40, "no button was held"
        assert abs(float(pictures[-1][20:].mean()) - 127) < 15, "the mouse was still"

    on_page(test)


def test_a_phone_walks_looks_and_leaves() -> None:
    async def test(page: Page, made: Any, address: str) -> None:
        await as_phone(page)
        await page.value("location.reload()")
        await page.until(f"{STATE} === 'ready' && document.body?.classList.contains('touch')")
        assert await page.value(TITLE) == "Tap to play"
        at = await middle(page, "#start")
        await touch(page, "Start", at)
        await touch(page, "End")
        await page.until(f"{STATE} === 'playing' && {FRAMES} > 3")
        assert await page.value("document.documentElement.scrollWidth <= innerWidth")
        x, y = await middle(page, "#stick")
        await touch(page, "Start", (x, y - 50))
        await until(lambda: made[-1].heard[-1][0] == ["W"])
        await touch(page, "Move", (x + 50, y))
        await until(lambda: made[-1].heard[-1][0] == ["D"])
        await touch(page, "End")
        await until(lambda: made[-1].heard[-1][0] == [])
        x, y = await middle(page, "#look")
        y -= 150
        await touch(page, "Start", (x, y))
        for step in range(1, 6):
            await touch(page, "Move", (x + 10 * step, y))
        await until(lambda: any(move > 0 for _, move in made[-1].heard))
        await touch(page, "End")
        await touch(page, "Start", await middle(page, "[data-tap=LMB]"))
        await until(lambda: made[-1].heard[-1][0] == ["LMB"])
        await touch(page, "End")
        await until(lambda: made[-1].heard[-1][0] == [])
        await touch(page, "Start", await middle(page, "#leave"))
        await touch(page, "End")
        await page.until(f"{STATE} === 'paused'")
        await settled(made[-1])

    on_page(test)


def test_a_gamepad_begins_walks_turns_and_pauses() -> None:
    async def test(page: Page, made: Any, address: str) -> None:
        fake = "pad = { axes: [0, 0, 0, 0], buttons: Array.from({ length: 17 }, () => ({ pressed: false })) };"
        await page.value(fake + "navigator.getGamepads = () => [pad];")
        await page.value("pad.buttons[0] = { pressed: true }")
        await page.until(f"{STATE} === 'playing'")
        await until(lambda: bool(made[0].heard) and made[0].heard[-1][0] == ["SPACE"])
        await page.value("pad.buttons[0] = { pressed: false }; pad.axes = [0, -1, 0.9, 0]")
        await until(lambda: made[0].heard[-1][0] == ["W"] and made[0].heard[-1][1] > 0)
        await page.value("pad.axes = [0, 0, 0, 0]; pad.buttons[9] = { pressed: true }")
        await page.until(f"{STATE} === 'paused'")

    on_page(test)


class SlowSource(BarSource):
    """A model on a CPU."""

    def __call__(self, mouse: Any, buttons: Any) -> Any:
        time.sleep(0.6)
        return super().__call__(mouse, buttons)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "device": "cpu", "backend": "pytorch"}


def test_without_a_gpu_the_page_says_so_and_shows_parts_of_a_frame_per_second() -> None:
    async def test(page: Page, made: Any, address: str) -> None:
        await page.until("document.getElementById('notice').textContent.includes('--game')")
        await click_to_play(page)
        await page.until(f"{FRAMES} > 4")
        rate = await page.value("document.getElementById('fps').value")
        assert re.fullmatch(r"1\.\d", rate), rate
        await page.until("/about 1\\.\\d frames/.test(document.getElementById('notice').textContent)")

    on_page(test, kind=SlowSource)


class PlainSource(BarSource):
    """No steps, no worlds, two buttons of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.controls = (Button(name="UP", key="KeyU", label="up"), Button(name="TURN", key="KeyX", label="turn"))

    def __call__(self, mouse: Any, buttons: Any) -> Any:
        assert len(buttons) == 2
        self.heard.append(([b.name for b, down in zip(self.controls, buttons.tolist(), strict=True) if down], 0.0))
        heard = self.heard
        frame = super().__call__(mouse, torch.zeros(len(BUTTONS)))
        self.heard = heard
        return frame

    def describe(self) -> dict[str, Any]:
        return {"source": "plain", "backend": "none", "reason": "a test", "steps": 0}


def test_other_buttons_are_played_and_dead_controls_are_hidden() -> None:
    async def test(page: Page, made: Any, address: str) -> None:
        await page.until("document.querySelectorAll('#pad kbd').length === 2")
        assert await page.value("document.getElementById('pad').innerText.replace(/\\s+/g, ' ')") == "U up X turn"
        hidden = "['stepping', 'worlds', 'stick'].map((id) => document.getElementById(id).hidden)"
        assert await page.value(hidden) == [True, True, True]
        await click_to_play(page)
        await page.key("KeyX", "x", True)
        await until(lambda: ["TURN"] in [names for names, _ in made[0].heard])

    on_page(test, kind=PlainSource)


def start_server(port: int, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from owl_wms.cli import main; main()", "play", "--game", "--device", "cpu"]
    given = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment}
    return subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.PIPE, text=True, env=given)


def address_of(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"http://127\.0\.0\.1:\d+/[\w-]{32}/", line):
            return found[0]
    raise AssertionError("it ended before it listened")


def test_the_page_comes_back_after_the_server_was_killed_and_started_again(tmp_path: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = {"XDG_RUNTIME_DIR": str(tmp_path)}
    running = [start_server(port, **place)]

    async def test() -> None:
        loop = asyncio.get_running_loop()
        address = await loop.run_in_executor(None, address_of, running[0])
        async with open_page(address) as page:
            await click_to_play(page)
            await page.until(f"{FRAMES} > 3", 30)
            await page.value("location.hash = '#world=77'")
            await page.until(f"{WORLD} === 'world 77'", 30)
            running[0].send_signal(signal.SIGKILL)
            running[0].wait()
            await page.until(f"{STATE} === 'lost'")
            assert await page.value("document.pointerLockElement === null")
            running.append(start_server(port, **place))
            assert await loop.run_in_executor(None, address_of, running[1]) == address, "the token is kept"
            await page.until(f"{STATE} === 'paused'", 30)
            assert await page.value(TITLE) == "Connected again"
            shown = await page.value(FRAMES)
            await click_to_play(page)
            await page.until(f"{FRAMES} > {shown} + 3", 30)
            await page.until(f"{WORLD} === 'world 77'", 30)
            assert await page.value("location.hash") == "#world=77"

    try:
        asyncio.run(asyncio.wait_for(test(), 150))
    finally:
        for process in running:
            process.kill()
            process.wait()


HINT = "document.getElementById('hint').textContent"
PICTURE = "(r => [r.top, r.bottom])(document.getElementById('view').getBoundingClientRect())"
BUTTON = "getComputedStyle(document.querySelector('.commands')).visibility === 'visible'"
BAR = "(b => [b.hidden, b.value, b.max])(document.getElementById('progress'))"


@pytest.mark.parametrize("fails", [False, True])
def test_the_page_shows_how_far_the_loading_is(fails: bool) -> None:
    goes_on, ends = threading.Event(), threading.Event()

    def load(progress: Progress) -> Any:
        progress("PyTorch", 0, 0)
        assert goes_on.wait(60)
        progress("first frames", 3, 12)
        assert ends.wait(60)
        if fails:
            raise ConfigError("world.yml: the model has 4 buttons")
        return BarSource()

    async def test() -> None:
        loading = Loading(load, controls=GAME_CONTROLS)
        async with serve(loading=loading) as (client, address, _), open_page(f"{address}/{TOKEN}/") as page:
            loading.begin()
            await page.until(f"{STATE} === 'loading' && {HINT}.startsWith('PyTorch')")
            assert await page.value("document.querySelectorAll('kbd').length") == len(GAME_CONTROLS)
            assert await page.value("getComputedStyle(document.querySelector('.commands')).visibility") == "hidden"
            before = await page.value(PICTURE)
            early = await connect(client, address)
            assert "still being loaded" in (await early.receive_json(timeout=30))["reason"]
            await early.close()
            await page.click("start")  # not yet
            goes_on.set()
            await page.until(f"{HINT}.startsWith('first frames, 3 of 12')")
            assert await page.value(BAR) == [False, 3, 12]
            ends.set()
            if fails:
                await page.until(f"{STATE} === 'failed'")
                assert await page.value(HINT) == "world.yml: the model has 4 buttons"
            else:
                await page.until(f"{STATE} === 'ready' && {BUTTON}")
                assert await page.value(PICTURE) == before, "nothing jumps"
                assert (await page.value("document.getElementById('said').textContent")).startswith("Click to play")
                await click_to_play(page)
                await page.until(f"{FRAMES} > 3")
            assert (await page.value(BAR))[0]

    try:
        asyncio.run(asyncio.wait_for(test(), 90))
    finally:
        goes_on.set()
        ends.set()
