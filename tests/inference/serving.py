"""A server around a quick source, on a free port, for tests that speak to it as a browser does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from aiohttp import ClientSession, WSMsgType
from aiohttp.test_utils import TestServer

from owl_wms.game.buttons import BUTTONS
from owl_wms.inference.controls import GAME_CONTROLS
from owl_wms.inference.loading import Loading
from owl_wms.inference.server import ServerSettings, make_app
from owl_wms.inference.session import Pace
from owl_wms.inference.source import Frame

TOKEN = "test-token-of-twenty-four"


class BarSource:
    """Every held button is a white column of the picture, the mouse a grey level below it: what was heard is seen."""

    controls = GAME_CONTROLS

    def __init__(self) -> None:
        self.seed = 0
        self.index, self.steps, self.restarts, self.fail_at = 0, 4, 0, -1
        self.heard: list[tuple[list[str], float]] = []

    def __call__(self, mouse: Any, buttons: Any) -> Frame:
        if self.index == self.fail_at:
            raise RuntimeError("the source broke")
        held = [name for name, down in zip(BUTTONS, buttons.tolist(), strict=True) if down]
        self.heard.append((held, float(mouse[0])))
        image = np.zeros((36, 88, 3), dtype=np.uint8)
        for i, name in enumerate(BUTTONS):
            image[:18, 8 * i : 8 * i + 8] = 255 if name in held else 0
        image[18:] = round((float(mouse[0]) + 1) * 127)
        self.index += 1
        return Frame(image=image, index=self.index - 1, model_ms=1.5, decode_ms=2.5)

    def restart(self) -> None:
        self.restarts += 1

    def new_world(self, seed: int) -> None:
        self.seed = seed

    def change_steps(self, by: int) -> int:
        self.steps += by
        return self.steps

    def describe(self) -> dict[str, Any]:
        return {"source": "bars", "backend": "none", "reason": "a test", "steps": self.steps, "seed": self.seed}


@asynccontextmanager
async def serve(
    source: Any = None, kind: type[BarSource] = BarSource, loading: Loading | None = None, **changes: Any
) -> AsyncIterator[tuple[ClientSession, str, list[Any]]]:
    """A client session, the server's address and the sources made so far."""
    made: list[Any] = []

    def new_source() -> Any:
        made.append(kind() if source is None else source)
        return made[-1]

    settings = ServerSettings(token=TOKEN, **{"pace": Pace(fps=100), **changes})
    given = new_source if loading is None else loading.new_source
    server = TestServer(make_app(given, settings, loading), host="127.0.0.1")
    await server.start_server()
    try:
        async with ClientSession() as client:
            yield client, f"http://127.0.0.1:{server.port}", made
    finally:
        await server.close()


async def connect(client: ClientSession, address: str, **options: Any) -> Any:
    """A WebSocket as the page opens it."""
    return await client.ws_connect(f"{address}/{TOKEN}/ws", **{"origin": address, **options})


async def next_frame(socket: Any) -> bytes:
    """The next binary message; fails if the connection ends first."""
    while True:
        message = await socket.receive(timeout=30)
        if message.type == WSMsgType.BINARY:
            return message.data
        assert message.type == WSMsgType.TEXT, message


def is_refusal(message: Any) -> bool:
    """Tells whether a player's first message says that there is no place; else it is a status or already a picture."""
    return message.type == WSMsgType.TEXT and message.json()["type"] == "refused"
