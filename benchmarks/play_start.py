"""Seconds from starting `owl-wms play` to its page, to a game that can begin, and to the first picture after a click.

A process is started as a user starts it. As soon as the command prints its address, the page and its files are asked
for, which is `page_seconds`; then, as the page does, how far the loading is, until the game is ready, which is
`ready_seconds`. The click is a WebSocket, which is what the page opens. `slowest_answer_seconds` is the longest time
that a page waited for an answer meanwhile: importing torch holds Python's lock. The first start of a machine may build
the decoder's program; those behind it find it in the cache.

Usage:
    python -m benchmarks.play_start --times 3 --out build/play_start.json
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from aiohttp import ClientSession, WSMsgType

from benchmarks import harness

SILENCE = 120.0
ASK_SECONDS = 0.05
FILES = ("", "play.css", "controls.js", "play.js")


async def start(device: str, seconds: float) -> dict[str, Any]:
    """Starts the command once; returns what the module's text names, and the second at which each step began.

    Raises:
        RuntimeError: it ended before it said its address, the loading failed, or the player was refused.
        TimeoutError: it was not ready after `seconds`.
    """
    command = (sys.executable, "-m", "owl_wms", "play", "--port", "0", "--device", device)
    row: dict[str, Any] = {"device": device, "load_average": os.getloadavg()[0], "steps": {}}
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, start_new_session=True
    )
    try:
        async with asyncio.timeout(seconds):
            address = await _address(process)
            row["address_seconds"] = time.perf_counter() - began
            async with ClientSession() as client:
                for name in FILES:
                    async with client.get(f"{address}{name}") as answer:
                        answer.raise_for_status()
                        await answer.read()
                row["page_seconds"] = time.perf_counter() - began
                await _wait_until_ready(client, address, began, row)
                origin = "/".join(address.split("/", 3)[:3])
                async with client.ws_connect(f"{address}ws", origin=origin) as socket:
                    clicked = time.perf_counter()
                    while (message := await socket.receive(timeout=SILENCE)).type != WSMsgType.BINARY:
                        if message.type != WSMsgType.TEXT:
                            raise RuntimeError(f"the server ended the connection: {message.data}")
                    row["picture_after_click_seconds"] = time.perf_counter() - clicked
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                await asyncio.wait_for(process.communicate(), 10)
            except TimeoutError:
                os.killpg(process.pid, signal.SIGKILL)
    return row


async def _address(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    said: list[str] = []
    while not (line := (await process.stderr.readline()).decode()).startswith("play at "):
        if not line:
            raise RuntimeError(f"the command ended with status {await process.wait()}: {' '.join(said)[-300:]}")
        said.append(line.strip())
    return line.removeprefix("play at ").strip()


async def _wait_until_ready(client: ClientSession, address: str, began: float, row: dict[str, Any]) -> None:
    slowest = 0.0
    while True:
        asked = time.perf_counter()
        async with client.get(f"{address}loading") as answer:
            state = await answer.json()
        now = time.perf_counter()
        slowest = max(slowest, now - asked)
        if "failed" in state:
            raise RuntimeError(f"loading failed: {state['failed']}")
        if state["ready"]:
            break
        row["steps"].setdefault(state["what"], round(now - began, 2))
        await asyncio.sleep(ASK_SECONDS)
    row |= {"ready_seconds": now - began, "slowest_answer_seconds": slowest}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=120.0, help="for one start")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    result = harness.document("play_start", None, rows)
    for number in range(args.times):
        try:
            rows.append(asyncio.run(start(args.device, args.seconds)))
        except (RuntimeError, TimeoutError, OSError) as error:
            rows.append({"failed": f"{type(error).__name__}: {error}"})
        rows[-1]["start"] = number
        if args.out is not None:
            harness.write(result, args.out)
        print(rows[-1], flush=True)
    done = [row for row in rows if "ready_seconds" in row]
    for name in ("page", "ready"):
        values = [row[f"{name}_seconds"] for row in done]
        if values:
            median = statistics.median(values)
            print(f"{name} after {median:.2f} s (median of {len(values)}; first {values[0]:.2f})")
    sys.exit(len(done) < args.times)


if __name__ == "__main__":
    main()
