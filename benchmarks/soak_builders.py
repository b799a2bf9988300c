"""Kills builders of programs in a soak, and sees that the next one of the same weights gets its program.

Usage:
    killer = Killer(options, end)           # options of benchmarks.soak; `end` by the monotonic clock
    killer.round(0)                         # about half a minute on a GPU
    killer.counts, killer.reasons
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.soak_watch import MARK
from owl_wms.cache import CacheStore

KEEP = 14
"""Programs for which the cache has room: those of the workers (three weights, two shapes), and some of the builders."""


class Killer:
    """Kills a builder at a random moment, and sees that the next one of the same weights succeeds."""

    def __init__(self, options: argparse.Namespace, end: float) -> None:
        self.options, self.random, self.end = options, random.Random(7), end
        self.counts: Counter[str] = Counter()
        self.longest = 2.0 if options.decoder == "tiny" else 20.0
        self.reasons: list[str] = []
        self.most_entries = 0

    def look(self) -> dict[str, Any]:
        """Returns counts, and how large the cache and the folder of temporary files are."""
        sizes = [info.size_bytes for info in CacheStore(Path(self.options.cache)).entries()]
        self.most_entries = max(self.most_entries, len(sizes))
        jobs = list(Path(self.options.temporary).glob("owl_wms_*"))
        told = {"entries": len(sizes), "cache MiB": round(sum(sizes) / 2**20, 1), "folders of builds": len(jobs)}
        return {"counts": dict(self.counts), **told, "room MiB": round(self.options.room / 2**20, 1)}

    def make_room(self) -> None:
        """Lets builders keep `KEEP` programs of the size that they have."""
        sizes = [info.size_bytes for info in CacheStore(Path(self.options.cache)).entries()]
        self.options.room = KEEP * max(sizes, default=0)

    def round(self, number: int) -> None:
        """Kills one builder and lets another end."""
        self.make_room()
        first = start(self.options, "builder", number)
        assert first.stdout is not None
        first.stdout.readline()
        try:
            first.wait(self.random.uniform(0.0, self.longest))
            self.counts["ended before the kill"] += 1
        except subprocess.TimeoutExpired:
            first.kill()  # the process that builds for it must see that and end
            first.wait()
            self.counts["killed"] += 1
        second = start(self.options, "builder", number)
        try:
            text, _ = second.communicate(timeout=max(5.0, self.end - time.monotonic()))
            found = json.loads(text.splitlines()[-1])
        except subprocess.TimeoutExpired:
            second.kill()
            second.wait()
            self.counts["next one not awaited"] += 1  # the soak's time is over
            return
        except (ValueError, IndexError):
            self.counts["next one failed"] += 1
            return
        good = found["right"] and found["program"]
        self.counts["next one right" if good else "next one failed"] += 1
        if not good:
            self.reasons.append(str(found["reason"]))


def start(options: argparse.Namespace, part: str, number: int) -> subprocess.Popen[str]:
    """Starts a process of this file."""
    command = [
        sys.executable,
        "-W",
        "ignore::UserWarning",
        "-m",
        "benchmarks.soak",
        "--part",
        part,
        "--number",
        str(number),
    ]
    for name in ("minutes", "until", "decoder", "cache", "shapes", "states", "clips", "out", "share", "room"):
        command += [f"--{name}", str(getattr(options, name))]
    surroundings = {**os.environ, MARK: options.mark, "TMPDIR": options.temporary}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=surroundings)
