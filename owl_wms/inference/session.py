"""Plays one player's connection: reads controls, runs the source at its pace, sends the newest picture.

Five tasks share a few variables of one event loop. The reader stores the controls; the maker runs the source on the
worker thread; the encoder compresses the newest frame on another thread, while the next one is made; the sender
sends the newest picture; the reporter sends the state of the source. A slow client costs dropped frames, never a
growing queue: at most `IN_FLIGHT` frames are on their way without being acknowledged. A client that has drawn nothing
for `UNSEEN_SECONDS` (a hidden page, a dead link) stops the source until it draws again, and so does a pause.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from aiohttp import WSCloseCode, WSMsgType, web

from owl_wms.inference.clip import Recent
from owl_wms.inference.compress import ImageFormat, encode_image
from owl_wms.inference.controls import as_json
from owl_wms.inference.messages import (
    CommandMessage,
    InputMessage,
    MessageError,
    pack_frame,
    parse_message,
)

if TYPE_CHECKING:
    from owl_wms.inference.source import Frame, Source

_LOG = logging.getLogger("owl_wms.inference")
# Two: one being drawn while the next is on the wire. More would only add latency.
IN_FLIGHT = 2
STATUS_SECONDS = 0.5
UNSEEN_SECONDS = 5
# Seeds that the server draws are short enough to read out.
DRAWN_SEEDS = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """The rate and the encoding of pictures.

    Attributes:
        fps: most frames per second; the source may be slower.
        kind: jpeg or webp.
        quality: 1 to 95.
    """

    fps: float = 60.0
    kind: ImageFormat = "jpeg"
    quality: int = 85


@dataclass(frozen=True, kw_only=True, slots=True)
class Threads:
    """The threads that blocking work runs in.

    Attributes:
        source: one thread, which runs the sources of all players.
        turn: held while a player's frame is made there.
        encoder: threads that compress pictures.
    """

    source: Executor
    turn: asyncio.Lock
    encoder: Executor


class Session:
    """A connection that plays; `run` returns when it is over.

    Args:
        socket: the player's connection.
        source: what is played.
        threads: where it runs.
        pace: frame rate and compression.
        paused: True makes no frame before the client sends the command `play`.

    Attributes:
        number: names this session in the page's requests.
        recent: the last pictures that were sent.
    """

    def __init__(
        self, socket: web.WebSocketResponse, source: Source, threads: Threads, pace: Pace, *, paused: bool = False
    ) -> None:
        self._socket, self._source, self._threads, self._pace = socket, source, threads, pace
        self.number = secrets.token_hex(8)
        self.recent = Recent()
        self._names = [button.name for button in source.controls]
        self._held: frozenset[str] = frozenset()
        self._tapped: set[str] = set()
        self._moved = [0.0, 0.0]
        self._sent = 0.0
        self._commands: list[CommandMessage] = []
        self._made: tuple[Frame, float] | None = None
        self._showing: asyncio.Task[None] | None = None
        self._newest: dict[str, Any] | None = None
        self._raw, self._fresh = asyncio.Event(), asyncio.Event()
        self._room, self._running = asyncio.Event(), asyncio.Event()
        self._room.set()
        if not paused:
            self._running.set()
        self._waiting: list[int] = []
        self._drawn = time.perf_counter()
        self._dropped = 0

    async def run(self) -> None:
        """Play until the client leaves, breaks the rules, or the source fails."""
        parts = (self._read, self._make, self._encode, self._send, self._report)
        tasks = [asyncio.create_task(part()) for part in parts]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._stop_showing()
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
                self._take_input(parsed)
            elif isinstance(parsed, CommandMessage):
                self._take_command(parsed)
            else:
                self._drawn = time.perf_counter()
                self._waiting = [index for index in self._waiting if index > parsed.index]
                if len(self._waiting) < IN_FLIGHT:
                    self._room.set()

    def _take_input(self, parsed: InputMessage) -> None:
        held = frozenset(parsed.buttons)
        if not held <= set(self._names) or len(parsed.buttons) > len(self._names):
            raise MessageError("bad message: buttons: a name that this source does not have, or too many")
        self._held = held
        # A tap that begins and ends between two frames still counts for one.
        self._tapped |= held
        self._moved = [a + b for a, b in zip(self._moved, parsed.mouse, strict=True)]
        self._sent = parsed.sent

    def _take_command(self, command: CommandMessage) -> None:
        if command.name == "pause":
            self._running.clear()
        elif command.name == "play":
            self._drawn = time.perf_counter()
            self._running.set()
        else:
            self._commands = [*self._commands, command][-8:]

    def _take_controls(self) -> tuple[list[float], list[bool], float]:
        down = self._held | self._tapped
        buttons = [name in down for name in self._names]
        mouse = [max(-1.0, min(1.0, moved)) for moved in self._moved]
        self._tapped.clear()
        self._moved = [0.0, 0.0]
        return mouse, buttons, self._sent

    async def _make(self) -> None:
        loop = asyncio.get_running_loop()
        due = time.perf_counter()
        while True:
            if not self._running.is_set():
                self._stop_showing()
                self._newest, self._made = None, None  # what was made before the pause would be old when it ends
                await self._running.wait()
                due = time.perf_counter()
            if not self._room.is_set() and time.perf_counter() - self._drawn > UNSEEN_SECONDS:
                self._newest = None  # too old to be seen by a client that comes back
                await self._room.wait()
            # In the worker's queue, behind other players' frames, controls would age: they are taken when it is free.
            async with self._threads.turn:
                commands, self._commands = self._commands, []
                mouse, buttons, sent = self._take_controls()
                frame = await loop.run_in_executor(self._threads.source, self._work, commands, mouse, buttons)
            self._stop_showing()
            self._show(frame, sent)
            if frame.later:
                self._showing = asyncio.create_task(self._show_later(frame, sent))
            # The rate is kept over frames that are late by less than a period. Further behind, the clock starts
            # afresh: catching up would play the game too fast.
            period = (1 + len(frame.later)) / self._pace.fps
            due += period
            if due < time.perf_counter() - period:
                due = time.perf_counter()
            await asyncio.sleep(max(0.0, due - time.perf_counter()))

    def _show(self, frame: Frame, sent: float) -> None:
        self._dropped += self._made is not None
        self._made = frame, sent
        self._raw.set()

    async def _show_later(self, frame: Frame, sent: float) -> None:
        """Shows the further pictures of a frame, each one period after the one before."""
        began = time.perf_counter()
        for number, image in enumerate(frame.later, 1):
            await asyncio.sleep(max(0.0, began + number / self._pace.fps - time.perf_counter()))
            if self._running.is_set():
                self._show(replace(frame, image=image, later=()), sent)

    def _stop_showing(self) -> None:
        """Ends the pictures of the frame before: the newest one counts."""
        if self._showing is not None:
            self._showing.cancel()
            self._showing = None

    def _work(self, commands: list[CommandMessage], mouse: list[float], buttons: list[bool]) -> Frame:
        """On the worker thread: obeys, then makes a frame."""
        import torch  # the page is there before torch is

        for command in commands:
            if command.name == "restart":
                self._source.restart()
            elif command.name == "new_world":
                self._source.new_world(secrets.randbelow(DRAWN_SEEDS) if command.seed is None else command.seed)
            else:
                self._source.change_steps(1 if command.name == "more_steps" else -1)
        return self._source(torch.tensor(mouse), torch.tensor(buttons))

    async def _encode(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._raw.wait()
            self._raw.clear()
            made, self._made = self._made, None
            if made is None:
                continue
            frame, sent = made
            began = time.perf_counter()
            picture = await loop.run_in_executor(
                self._threads.encoder, encode_image, frame.image, self._pace.kind, self._pace.quality
            )
            if not self._running.is_set():
                continue
            self._dropped += self._newest is not None
            self._newest = {
                "picture": picture,
                "sent": sent,
                "model_ms": frame.model_ms,
                "decode_ms": frame.decode_ms,
                "encode_ms": (time.perf_counter() - began) * 1e3,
            }
            self._fresh.set()

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
            self.recent.add(newest["picture"], time.monotonic())
            await self._socket.send_bytes(pack_frame(**newest, index=number, dropped=self._dropped))
            number += 1

    async def _report(self) -> None:
        loop = asyncio.get_running_loop()
        fixed = {"type": "status", "session": self.number, "controls": as_json(self._source.controls)}
        while True:
            described = await loop.run_in_executor(self._threads.source, self._source.describe)
            await self._socket.send_json({**fixed, "fps": self._pace.fps, **described})
            await asyncio.sleep(STATUS_SECONDS)
