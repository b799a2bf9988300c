"""Headless Chromium through its own debugging protocol: as much of a browser as these tests need."""

from __future__ import annotations

import asyncio
import base64
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from aiohttp import ClientSession

BINARY = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
    "--window-size=1120,760",
)


class Navigated(AssertionError):
    """The page was left before a command was done, as after `location.reload()`."""


class Page:
    """One page; requests are numbered and answered in any order."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._number = socket, 0

    async def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol and its result.

        Raises:
            Navigated: the page was left meanwhile.
        """
        self._number += 1
        number = self._number
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            answer = await self._socket.receive_json(timeout=15)
            if answer.get("id") == number:
                if "navigated" in answer.get("error", {}).get("message", ""):
                    raise Navigated(answer)
                assert "error" not in answer, answer
                return answer["result"]

    async def value(self, expression: str) -> Any:
        """What a JavaScript expression gives."""
        result = await self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, expression: str, seconds: float = 15) -> Any:
        """Wait until an expression is true; a page that is just being left has none."""
        end = asyncio.get_running_loop().time() + seconds
        while True:
            with suppress(Navigated):
                if found := await self.value(expression):
                    return found
            assert asyncio.get_running_loop().time() < end, f"still false after {seconds} s: {expression}"
            await asyncio.sleep(0.05)

    async def key(self, code: str, key: str, down: bool) -> None:
        """Press or release."""
        await self.ask("Input.dispatchKeyEvent", type="keyDown" if down else "keyUp", code=code, key=key)

    async def click(self, element: str) -> None:
        """Presses and releases the left button in the middle of an element, given by its id."""
        box = f"document.getElementById({element!r}).getBoundingClientRect()"
        x, y = await self.value(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({box})")
        for kind in ("mousePressed", "mouseReleased"):
            await self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def screenshot(self, path: Path) -> None:
        """The page as a PNG."""
        path.write_bytes(base64.b64decode((await self.ask("Page.captureScreenshot"))["data"]))


async def click_to_play(page: Page) -> None:
    """Begins the game as a player does; nothing is made before."""
    await page.until("['ready', 'paused'].includes(document.body.dataset.state)")
    await page.click("start")
    await page.until("document.body.dataset.state === 'playing'")


@asynccontextmanager
async def open_page(address: str) -> AsyncIterator[Page]:
    """A fresh browser on that address; it ends with the block."""
    assert BINARY is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            BINARY,
            *FLAGS,
            f"--user-data-dir={profile}",
            address,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            port_file = Path(profile) / "DevToolsActivePort"
            for _ in range(300):
                if port_file.exists() and port_file.read_text().strip():
                    break
                await asyncio.sleep(0.1)
            port = int(port_file.read_text().split()[0])
            async with ClientSession() as client:
                target = await _target(client, port)
                async with client.ws_connect(target, max_msg_size=2**25) as socket:
                    page = Page(socket)
                    # Before the page is there, its scripts' globals and its body are not.
                    await page.until(f"location.href.startsWith({address!r}) && document.readyState === 'complete'")
                    yield page
        finally:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), 10)
            except asyncio.TimeoutError:
                process.kill()
                await process.wait()


async def _target(client: ClientSession, port: int) -> str:
    for _ in range(100):
        async with client.get(f"http://127.0.0.1:{port}/json/list") as response:
            pages = [entry for entry in await response.json() if entry["type"] == "page"]
        if pages:
            return pages[0]["webSocketDebuggerUrl"]
        await asyncio.sleep(0.1)
    raise AssertionError("the browser opened no page")
