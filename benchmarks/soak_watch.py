"""Watches a soak from beside it: rows every half minute, processes that were left over, memory that grew.

Usage:
    write_rows(folder / "worker0.jsonl", worker.found)
    left_over(mark), used_mib(), growth([(seconds, mib), ...])
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

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
            try:
                row = found()
            except Exception as error:  # the cache cannot be read just now, say; the next row follows
                row = {"error": repr(error)}
            memory = row.pop("memory", {})
            row["memory"] = {name: round(values[-1][1], 1) for name, values in memory.items()}
            row["grew"] = {name: round(growth(values), 1) for name, values in memory.items()}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"seconds": round(time.monotonic() - begin), **row}) + "\n")

    threading.Thread(target=write, daemon=True).start()


def used_mib() -> dict[str, float]:
    """Memory of this process in MiB.

    Returns:
        `host`: resident. On a GPU also `device`: PyTorch's tensors; `reserved`: what its allocator keeps for them; and
        `driver`: all that the driver counts for this process, TensorRT's own memory and code included, if it tells.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    used = {"host": pages * os.sysconf("SC_PAGE_SIZE") / 2**20}
    if torch.cuda.is_available():
        used |= {"device": torch.cuda.memory_allocated() / 2**20, "reserved": torch.cuda.memory_reserved() / 2**20}
        command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        try:
            rows = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
        except (OSError, subprocess.SubprocessError):
            return used
        for pid, mib in (row.split(",") for row in rows if row.count(",") == 1):
            if pid.strip() == str(os.getpid()) and mib.strip().isdigit():
                used["driver"] = float(mib)
    return used


def growth(samples: Sequence[tuple[float, float]]) -> float:
    """MiB by which memory grew from the end of a run's first third, in which programs are loaded, to its end.

    By the median of the slopes of all pairs of samples (Theil and Sen), which a few high samples do not move.

    Args:
        samples: seconds and MiB, in order.
    """
    later = samples[len(samples) // 3 :]
    later = later[:: 1 + len(later) // 400]  # the pairs are many
    slopes = [
        (b - a) / (later_s - first_s) for (first_s, a), (later_s, b) in combinations(later, 2) if later_s > first_s
    ]
    return statistics.median(slopes) * (later[-1][0] - later[0][0]) if slopes else 0.0
