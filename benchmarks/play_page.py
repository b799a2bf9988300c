"""Plays through the real server with a recorded client: rate, key to picture and memory, minute by minute.

The client is on loopback, in the server's own process and event loop, which a browser is not: the figures are those of
a busier machine than a player's. It presses keys at recorded times; a key's time ends when the first picture that has
seen it has arrived.

Usage:
    row = asyncio.run(page(pipeline, 300.0, 240.0, tell=write))     # `write` gets the row as it grows
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import statistics
import time
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from aiohttp import ClientSession, WSMsgType
from aiohttp.test_utils import TestServer

from benchmarks.soak_watch import growth
from owl_wms.inference.messages import unpack_header
from owl_wms.inference.pipeline import InteractivePipeline
from owl_wms.inference.server import ServerSettings, make_app
from owl_wms.inference.session import Pace

SETTLED = 1.0
FIRST_PART = 20.0
PART = 60.0
MEMORY_EVERY = 2.0
LONGEST_SILENCE = 30.0
Tell = Callable[[dict[str, Any]], None]


def key_times(seconds: float) -> list[float]:
    """Returns the recorded client's keys: a press or release every 30 to 120 ms, the same in every run."""
    drawn, at, times = random.Random(7), 0.5, []
    while at < seconds:
        times.append(at)
        at += drawn.uniform(0.03, 0.12)
    return times


class Record:
    """What the client saw: when pictures came, their sizes, each key's delay, and the process's memory.

    Plain arrays: two lists of 40,000 floats would themselves be memory that grows.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self.arrived, self.sizes, self.delays, self.pressed = array("d"), array("L"), array("d"), array("d")
        self.memory: dict[str, list[float]] = {"rss": []}
        self.measured = 0.0

    def picture(self, at: float, size: int) -> None:
        """A picture arrived `at` seconds after the beginning."""
        self.arrived.append(at)
        self.sizes.append(size)
        if at - self.measured >= MEMORY_EVERY:
            self.measured = at
            self._measure_memory()

    def key(self, at: float, delay_ms: float) -> None:
        """A key was answered by a picture, `at` seconds after the beginning."""
        self.pressed.append(at)
        self.delays.append(delay_ms)

    def _measure_memory(self) -> None:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        self.memory["rss"].append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        if self._cuda is not None:
            free, total = torch.cuda.mem_get_info(self._cuda)
            self.memory.setdefault("gpu_allocated", []).append(torch.cuda.memory_allocated(self._cuda) / 2**20)
            self.memory.setdefault("gpu_whole", []).append((total - free) / 2**20)

    def between(self, first: float, last: float) -> dict[str, Any]:
        """Returns rate, its worst second and slowest hundredth, and key to picture, of a part of the run.

        The rate of the slowest hundredth is 1 / (99th percentile of the time between two pictures). This runs while
        the game is played: it looks at the part alone.
        """
        times = self.arrived[bisect_left(self.arrived, first) : bisect_left(self.arrived, last)]
        gaps = [b - a for a, b in itertools.pairwise(times)]
        seconds = Counter(int(at - first) for at in times)
        keys = self.delays[bisect_left(self.pressed, first) : bisect_left(self.pressed, last)]
        ranks = statistics.quantiles(keys, n=20) if len(keys) > 1 else [float("nan")] * 19
        return {
            "page_fps": len(times) / (last - first),
            "worst_second_fps": min((seconds[second] for second in range(int(last - first))), default=0),
            "slowest_hundredth_fps": 1 / percentile(gaps, 0.99),
            "key_ms_p50": ranks[9],
            "key_ms_p95": ranks[18],
            **{f"{name}_mib": round(values[-1], 1) for name, values in self.memory.items() if values},
        }

    def whole(self, seconds: float, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the row of a run of `seconds` so far, without its first second, in which the player connects.

        Memory's slope is that of the last two thirds, for 1000 frames.
        """
        frames = len(self.arrived)
        slopes = {
            f"{name}_mib_per_1000_frames": round(growth(list(enumerate(values))) / max(1, frames) * 1500, 4)
            for name, values in self.memory.items()
        }
        counts = {"page_seconds": seconds, "page_frames": frames, "frame_bytes": statistics.median(self.sizes or [0])}
        return {**self.between(SETTLED, seconds), **counts, **slopes, "parts": list(parts)}


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the value that `share` of the values do not exceed; infinity if there are none."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("inf")


async def page(
    pipeline: InteractivePipeline, seconds: float, fps: float, tell: Tell = lambda row: None
) -> dict[str, Any]:
    """Plays for `seconds` at most `fps` pictures a second; returns the row.

    Args:
        tell: gets the row so far after 20 seconds and after every minute: what is known if the run is cut.
    """
    pipeline.restart()
    settings = ServerSettings(pace=Pace(fps=fps))
    server = TestServer(make_app(lambda: pipeline, settings), host="127.0.0.1")
    await server.start_server()
    address = f"http://127.0.0.1:{server.port}"
    record, parts = Record(pipeline.device), []
    waiting: list[float] = []
    try:
        async with (
            ClientSession() as client,
            client.ws_connect(f"{address}/{settings.token}/ws", origin=address) as socket,
        ):
            began = time.perf_counter()

            async def press() -> None:
                for number, at in enumerate(key_times(seconds)):
                    await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
                    now = time.perf_counter() * 1e3
                    waiting.append(now)
                    held = [pipeline.controls[0].name] if number % 2 else []
                    await socket.send_json({"type": "input", "buttons": held, "mouse": [0.02, 0.0], "sent": now})

            keys = asyncio.create_task(press())
            writing: list[asyncio.Task[None]] = []
            part_began, part_ends = SETTLED, FIRST_PART
            try:
                while (passed := time.perf_counter() - began) < seconds:
                    if passed >= part_ends:
                        parts.append({"second": part_ends, **record.between(part_began, part_ends)})
                        # On a thread: writing it here would be a second in which nothing is played.
                        writing.append(asyncio.create_task(asyncio.to_thread(tell, record.whole(part_ends, parts))))
                        part_began, part_ends = part_ends, PART * len(parts)
                    message = await socket.receive(timeout=LONGEST_SILENCE)
                    if message.type == WSMsgType.TEXT:
                        continue
                    if message.type != WSMsgType.BINARY:
                        raise RuntimeError(f"the server ended the connection: {message.data or message.type.name}")
                    now = time.perf_counter()
                    header = unpack_header(message.data)
                    await socket.send_json({"type": "ack", "index": int(header["index"])})
                    record.picture(now - began, len(message.data))
                    while waiting and waiting[0] <= header["sent"]:
                        record.key(now - began, now * 1e3 - waiting.pop(0))
            finally:
                keys.cancel()
                await asyncio.gather(keys, return_exceptions=True)
            await asyncio.gather(*writing)
    finally:
        await server.close()
    if seconds > part_began + 1 and parts:
        parts.append({"second": seconds, **record.between(part_began, seconds)})
    return record.whole(seconds, parts)
