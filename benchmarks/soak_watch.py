"""Watches a soak from beside it: rows every half minute, processes that were left over, memory that grew.

Usage:
    write_rows(folder / "worker0.jsonl", worker.found)
    left_over(mark), growth(mib_samples)
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVERY_SECONDS = 30.0
MARK = "SOAK_RUN"  # a variable in the environment of every process of one soak


def left_over(mark: str) -> int:
    """Returns how many processes of the soak are still there, but for this one."""
    wanted, count = f"{MARK}={mark}".encode(), 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            count += wanted in (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it ended, or is another user's
            continue
    return count


def write_rows(path: Path, found: Callable[[], dict[str, Any]]) -> None:
    """Appends what `found` returns to a file, one line of JSON every 30 seconds, in a daemon thread."""
    begin = time.monotonic()

    def write() -> None:
        while True:
            time.sleep(EVERY_SECONDS)
            row = found()
            row["memory"] = {name: round(values[-1], 1) for name, values in row.get("memory", {}).items() if values}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"seconds": round(time.monotonic() - begin), **row}) + "\n")

    threading.Thread(target=write, daemon=True).start()


def growth(memory: list[float]) -> float:
    """MiB that the last third of a run has more than the middle third; the first one loads programs."""
    third = len(memory) // 3
    return statistics.median(memory[-third:]) - statistics.median(memory[third : 2 * third]) if third else 0.0
