"""One player's connection: reads controls, runs the source at its pace, sends the newest picture.

Three tasks share a few variables of one event loop. The reader keeps the controls; the maker runs the source, and
compresses, on the worker thread; the sender sends what the maker made last. A slow client costs dropped frames, never
a growing queue: at most `IN_FLIGHT` frames are on their way without being acknowledged. A client that has drawn
nothing for `UNSEEN_SECONDS` (a hidden page, a dead link) stops the source until it draws again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from aiohttp import WSCloseCode, WSMsgType, web

from owl_wms.game.world import BUTTONS
from owl_wms.inference.messages import CommandMessage, InputMessage, MessageError, pack_frame, parse_message
from owl_wms.inference.pixels import ImageFormat, encode_image
from owl_wms.inference.source import Source

_LOG = logging.getLogger("owl_wms.inference")
# Two: one being drawn while the next is on the wire. More would only add latency.
IN_FLIGHT = 2
STATUS_SECONDS = 0.5
UNSEEN_SECONDS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How pictures are made.

    Attributes:
        fps: most frames a second; the source may be slower.
        kind: jpeg or webp.
        quality: 1 to 95.
    """

    fps: float = 60.0
    kind: ImageFormat = "jpeg"
    quality: int = 85


class Session:
    """A connection that plays; `run` returns when it is over."""

    def __init__(
        self, socket: web.WebSocketResponse, source: Source, worker: Executor, turn: asyncio.Lock, pace: Pace
    ) -> None:
        self._socket, self._source, self._worker, self._turn, self._pace = socket, source, worker, turn, pace
        self._held: frozenset[str] = frozenset()
        self._tapped: set[str] = set()
        self._moved = [0.0, 0.0]
        self._sent = 0.0
        self._commands: list[str] = []
        self._newest: dict[str, Any] | None = None
        self._fresh = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._waiting: list[int] = []
        self._drawn = time.perf_counter()
        self._dropped = 0

    async def run(self) -> None:
        """Play until the client leaves, breaks the rules, or the source fails."""
        tasks = [asyncio.create_task(part()) for part in (self._read, self._make, self._send, self._report)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        failures = [r for r in results if isinstance(r, Exception) and not isinstance(r, ConnectionError)]
        if failures and not self._socket.closed:
            await self._fail(failures[0])

    async def _fail(self, error: Exception) -> None:
        if isinstance(error, MessageError):
            code, reason = WSCloseCode.POLICY_VIOLATION, str(error)
            _LOG.warning("a client was disconnected: %s", reason)
        else:
            code, reason = WSCloseCode.INTERNAL_ERROR, f"the source failed: {type(error).__name__}"
            _LOG.error("the source failed: %s", error, exc_info=error)
        with suppress(ConnectionError):
            await self._socket.send_json({"type": "error", "reason": reason})
            await self._socket.close(code=code, message=reason.encode()[:120])

    async def _read(self) -> None:
        async for message in self._socket:
            if message.type != WSMsgType.TEXT:
                raise MessageError("bad message: only text is understood")
            parsed = parse_message(message.data)
            if isinstance(parsed, InputMessage):
                self._held = frozenset(parsed.buttons)
                # A tap that begins and ends between two frames still counts for one.
                self._tapped |= self._held
                self._moved = [a + b for a, b in zip(self._moved, parsed.mouse, strict=True)]
                self._sent = parsed.sent
            elif isinstance(parsed, CommandMessage):
                self._commands = [*self._commands, parsed.name][-8:]
            else:
                self._drawn = time.perf_counter()
                self._waiting = [index for index in self._waiting if index > parsed.index]
                if len(self._waiting) < IN_FLIGHT:
                    self._room.set()

    def _take_controls(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        down = self._held | self._tapped
        buttons = torch.tensor([name in down for name in BUTTONS])
        mouse = torch.tensor(self._moved).clamp(-1, 1)
        self._tapped.clear()
        self._moved = [0.0, 0.0]
        return mouse, buttons, self._sent

    async def _make(self) -> None:
        loop = asyncio.get_running_loop()
        due = time.perf_counter()
        while True:
            if not self._room.is_set() and time.perf_counter() - self._drawn > UNSEEN_SECONDS:
                self._newest = None  # too old to be seen by a client that comes back
                await self._room.wait()
            # In the worker's queue, behind other players' frames, controls would age: they are taken when it is free.
            async with self._turn:
                commands, self._commands = self._commands, []
                mouse, buttons, sent = self._take_controls()
                made = await loop.run_in_executor(self._worker, self._work, commands, mouse, buttons)
            if self._newest is not None:
                self._dropped += 1
            self._newest = {**made, "sent": sent}
            self._fresh.set()
            # Behind schedule, start afresh: catching up would play the game too fast.
            due = max(due + 1 / self._pace.fps, time.perf_counter())
            await asyncio.sleep(max(0.0, due - time.perf_counter()))

    def _work(self, commands: list[str], mouse: torch.Tensor, buttons: torch.Tensor) -> dict[str, Any]:
        """On the worker thread: obey, make a frame, compress it."""
        for name in commands:
            if name == "restart":
                self._source.restart()
            else:
                self._source.change_steps(1 if name == "more_steps" else -1)
        frame = self._source(mouse, buttons)
        began = time.perf_counter()
        picture = encode_image(frame.image, self._pace.kind, self._pace.quality)
        return {
            "picture": picture,
            "index": frame.index,
            "model_ms": frame.model_ms,
            "decode_ms": frame.decode_ms,
            "encode_ms": (time.perf_counter() - began) * 1e3,
        }

    async def _send(self) -> None:
        number = 0
        while True:
            await self._room.wait()
            await self._fresh.wait()
            self._fresh.clear()
            newest, self._newest = self._newest, None
            if newest is None:
                continue
            # Numbered anew: a restart of the source must not confuse acknowledgements.
            self._waiting.append(number)
            if len(self._waiting) >= IN_FLIGHT:
                self._room.clear()
            await self._socket.send_bytes(pack_frame(**{**newest, "index": number}, dropped=self._dropped))
            number += 1

    async def _report(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            described = await loop.run_in_executor(self._worker, self._source.describe)
            await self._socket.send_json({"type": "status", **described})
            await asyncio.sleep(STATUS_SECONDS)
