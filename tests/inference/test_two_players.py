"""Two players of one server, whose frames one thread makes in turn."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from owl_wms.inference import server, session
from owl_wms.inference.source import Frame
from tests.inference.serving import BarSource, connect, is_refusal, next_frame, serve
from tests.inference.test_server import INPUT


class GatedSource(BarSource):
    """Works while the gate is open."""

    gate = threading.Event()
    inside = False

    def __call__(self, mouse: Any, buttons: Any) -> Frame:
        self.inside = True
        self.gate.wait(30)
        self.inside = False
        return super().__call__(mouse, buttons)


def test_a_player_who_vanished_gives_the_place_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEARTBEAT_SECONDS", 1.0)

    async def test() -> None:
        async with serve() as (client, address, _):
            gone = await connect(client, address, autoping=False)  # answers no ping, as if its cable were pulled
            await next_frame(gone)
            refused = await connect(client, address)
            assert is_refusal(await refused.receive(timeout=30))
            for _ in range(50):
                await asyncio.sleep(0.1)
                player = await connect(client, address)
                if not is_refusal(await player.receive(timeout=30)):
                    break
                await player.close()
            else:
                pytest.fail("the place was never given up")
            await next_frame(player)
            await player.close()

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_frame_that_waited_for_its_turn_hears_the_newest_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "UNSEEN_SECONDS", 1000)

    async def test() -> None:
        GatedSource.gate.set()
        async with serve(kind=GatedSource, max_clients=2) as (client, address, sources):
            players = [await connect(client, address) for _ in range(2)]
            for player in players:
                await next_frame(player)
            GatedSource.gate.clear()
            await asyncio.sleep(1)  # one is at work, the other waits
            waits = next(source for source in sources if not source.inside)
            before = len(waits.heard)
            for player in players:
                await player.send_json({**INPUT, "buttons": ["W"]})
            await asyncio.sleep(1)
            GatedSource.gate.set()
            while len(waits.heard) == before:
                await asyncio.sleep(0.02)
            assert waits.heard[before][0] == ["W"]
            for player in players:
                await player.close()

    asyncio.run(asyncio.wait_for(test(), 60))
