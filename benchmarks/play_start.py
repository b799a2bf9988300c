"""Seconds from starting `owl-wms play` to its page, and to the first picture after the player's click.

A process is started as a user starts it; the page is asked for as soon as the command prints its address, and the
click is a WebSocket, which is what the page opens. The first start of a machine may build the decoder's program; those
behind it find it in the cache.

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


async def start(device: str, seconds: float) -> dict[str, Any]:
    """Starts the command once; returns seconds to its address, to the page and to the first picture, and its steps.

    Raises:
        RuntimeError: it ended before it said its address, or the player was refused.
        TimeoutError: it said nothing for two minutes.
    """
    command = (sys.executable, "-m", "owl_wms", "play", "--port", "0", "--device", device)
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, start_new_session=True
    )
    row: dict[str, Any] = {"device": device, "steps": {}}
    try:
        assert process.stderr is not None
        async with asyncio.timeout(seconds):
            while not (line := (await process.stderr.readline()).decode()).startswith("play at "):
                if not line:
                    raise RuntimeError(f"the command ended with status {await process.wait()}")
                row["steps"][line.strip()] = round(time.perf_counter() - began, 2)
            row["address_seconds"] = time.perf_counter() - began
            address = line.removeprefix("play at ").strip()
            async with ClientSession() as client:
                async with client.get(address) as page:
                    page.raise_for_status()
                    await page.read()
                row["page_seconds"] = time.perf_counter() - began
                origin = address.split("/", 3)
                async with client.ws_connect(f"{address}ws", origin="/".join(origin[:3])) as socket:
                    clicked = time.perf_counter()
                    while (message := await socket.receive(timeout=SILENCE)).type != WSMsgType.BINARY:
                        if message.type != WSMsgType.TEXT:
                            raise RuntimeError(f"the server ended the connection: {message.data}")
                    row["picture_after_click_seconds"] = time.perf_counter() - clicked
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), 10)
            except TimeoutError:
                os.killpg(process.pid, signal.SIGKILL)
    return row


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
    pages = [row["page_seconds"] for row in rows if "page_seconds" in row]
    if pages:
        print(f"page after {statistics.median(pages):.2f} s (median of {len(pages)}; first {pages[0]:.2f})")
    sys.exit(len(pages) < args.times)


if __name__ == "__main__":
    main()
