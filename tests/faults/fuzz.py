"""Fuzzes every reader of outside files: a value, or one of our errors, in one line that names the file.

Inputs are mutations of a committed corpus (`corpus/`, one folder per reader). An input joins the seeds if it ends in a
way not seen before (another refusal, digits and names left out) or, from Python 3.12 on, runs a line of Python that no
input ran before, so the search moves on from what it has reached.

A failing input is written to the folder that is given, at once, and the exit status is 1. Failures of one kind count as
one. If an input ends the process, it still lies in the folder of temporary files, as `input` with its reader's ending.

Run: python -m tests.faults.fuzz --minutes 60 [--reader yaml] [--failures DIR] [--seed 1] [--rows FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any

from owl_wms.cache.manifest import parse as parse_manifest
from owl_wms.configs import load_vae_config, load_world_config
from owl_wms.configs.strict import read_yaml
from owl_wms.data.npy_table import NpyTable
from owl_wms.data.s3 import read_clips
from owl_wms.errors import OwlError
from owl_wms.inference.messages import MessageError, parse_message
from owl_wms.media.arrays import load_latents
from owl_wms.media.latents import LatentFile
from owl_wms.media.read_facts import read_facts
from owl_wms.media.stills import read_picture
from owl_wms.media.watch import read_video
from owl_wms.vae.weight_files import read_content
from tests.faults.test_fuzz import mutations

CORPUS = Path(__file__).parent / "corpus"
FEWEST = 10
SLOW_SECONDS = 2.0
"""Of the CPU, for one input of a few KiB; more is a failure."""


def _yaml(path: Path) -> None:
    read_yaml(path)
    load_vae_config(path)


def _table(path: Path) -> None:
    folder = path.parent / "table"
    folder.mkdir(exist_ok=True)
    head, _, rest = path.read_bytes().partition(b"\n---\n")
    manifest, _, array = rest.partition(b"\n---\n")
    for name, data in (("schema.json", head), ("manifest.json", manifest), ("z_0.npy", array)):
        (folder / name).write_bytes(data)
    table = NpyTable(folder)
    for row in range(len(table.rows)):
        for column in table.columns:
            table.slice(row, column, 0, 1)


def _message(path: Path) -> None:
    parse_message(path.read_bytes().decode("utf-8", "replace"))


def _pieces(path: Path) -> None:
    """Reads the first and the last frame, where they lie in the file."""
    source = LatentFile(path)
    frames = source.shape[0] * source.shape[1]
    source.read(0, 1), source.read(frames - 1, frames)


# Name -> (ending of its files, readers).
READERS: dict[str, tuple[str, tuple[Callable[[Path], object], ...]]] = {
    "yaml": (".yml", (_yaml, load_world_config)),
    "pt": (".pt", (load_latents, _pieces, read_facts)),
    "npy": (".npy", (load_latents, _pieces)),
    "safetensors": (".safetensors", (load_latents, _pieces, read_facts)),
    "weights": (".pt", (read_content,)),
    "table": (".table", (_table,)),
    "tar": (".tar", (lambda path: read_clips(path.read_bytes(), source=str(path), members=("latent", "mouse")),)),
    "picture": (".png", (read_picture,)),
    "clip": (".mp4", (lambda path: list(read_video(path)), read_facts)),
    "manifest": (".json", (lambda path: parse_manifest(path.read_bytes(), str(path)),)),
    "message": (".json", (_message,)),
}
# Readers whose errors name another file than the input, or carry it in `.path` alone.
_UNNAMED = ("table", "message", "manifest")


@dataclass
class Found:
    """What fuzzing one reader came to."""

    tried: int = 0
    read: int = 0
    seeds: int = 0
    ways: set[str] = field(default_factory=set)
    lines: int = 0
    slowest: float = 0.0
    failures: list[tuple[bytes, str]] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)

    def fail(self, data: bytes, why: str) -> None:
        """Keep a failure, if there was none of its kind."""
        kind = _without_names(why)
        if kind not in self.kinds:
            self.kinds.add(kind)
            self.failures.append((data, why))

    def told(self) -> dict[str, Any]:
        """Its numbers."""
        numbers = {name: getattr(self, name) for name in ("tried", "read", "seeds", "lines")}
        more = {"ways": len(self.ways), "slowest_ms": round(self.slowest * 1e3), "failures": len(self.failures)}
        return {**numbers, **more}


def _without_names(text: str) -> str:
    return re.sub(r"[0-9]+|'[^']*'|\S*/\S*", "", text)


@contextlib.contextmanager
def counted_lines(found: Found) -> Iterator[None]:
    """Counts lines of Python that run for the first time; before Python 3.12 none: it took most of the time."""
    if sys.version_info < (3, 12):
        yield
        return
    watch, tool = sys.monitoring, 3  # a number that no kind of tool has

    def on_line(code: CodeType, line: int) -> Any:
        found.lines += 1
        return watch.DISABLE  # so it is told once, and costs nothing after that

    watch.use_tool_id(tool, "fuzz")
    watch.restart_events()
    watch.register_callback(tool, watch.events.LINE, on_line)
    watch.set_events(tool, watch.events.LINE)
    try:
        yield
    finally:
        watch.set_events(tool, 0)
        watch.free_tool_id(tool)


def seeds_of(reader: str) -> list[bytes]:
    """The committed inputs of a reader."""
    return [path.read_bytes() for path in sorted((CORPUS / reader).iterdir())]


def _endless(seeds: list[bytes], chance: random.Random) -> Iterator[bytes]:
    yield from list(seeds)
    while True:
        yield from mutations(seeds, 50, chance)


def fuzz(reader: str, seconds: float, seed: int, place: Path, told: Callable[[Found], None] | None = None) -> Found:
    """Feed one reader for so many seconds, and at least `FEWEST` inputs; failures are collected, not raised.

    Args:
        told: called once a minute, and for each failure.
    """
    suffix, reads = READERS[reader]
    path, found = place / f"input{suffix}", Found()
    seeds, ending, minute = seeds_of(reader), time.monotonic() + seconds, time.monotonic() + 60
    with counted_lines(found):
        for data in _endless(seeds, random.Random(f"{reader}/{seed}")):
            path.write_bytes(data)
            failures, lines, ways = len(found.failures), found.lines, len(found.ways)
            for read in reads:
                began = time.thread_time()
                found.ways.add(_once(read, path, data, found, named=reader not in _UNNAMED))
                took = time.thread_time() - began
                found.slowest = max(found.slowest, took)
                if took > SLOW_SECONDS:
                    found.fail(data, f"took {took:.1f} s of the CPU")
            if (found.lines, len(found.ways)) > (lines, ways) and len(seeds) < 2000 and len(data) < 1 << 16:
                seeds.append(data)
            found.tried += 1
            found.seeds = len(seeds)
            if told is not None and (time.monotonic() > minute or len(found.failures) > failures):
                minute = time.monotonic() + 60
                told(found)
            if (time.monotonic() > ending and found.tried >= FEWEST) or len(found.failures) > 20:
                return found
    return found


def _once(read: Callable[[Path], object], path: Path, data: bytes, found: Found, *, named: bool) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(path)
        found.read += 1
        return "read"
    except (OwlError, MessageError) as error:
        said = str(error)
    except Exception:
        found.fail(data, traceback.format_exc(limit=-4))
        return "failure"
    if len(said.splitlines()) > 1 or "weights_only" in said or (named and str(path) not in said):
        found.fail(data, f"the message is not ours: {said!r}")
    return _without_names(said)[:80]


def main() -> int:
    """Fuzz the readers that are asked for, in turn; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="for each reader")
    parser.add_argument("--reader", choices=sorted(READERS), action="append")
    parser.add_argument("--failures", type=Path, default=Path("fuzz_failures"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=Path, help="file for a line of counts each minute")
    arguments = parser.parse_args()
    bad = 0
    for reader in arguments.reader or sorted(READERS):
        began, written = time.monotonic(), 0

        def tell(found: Found, reader: str = reader, began: float = began) -> None:
            nonlocal written
            for number in range(written, len(found.failures)):
                data, why = found.failures[number]
                arguments.failures.mkdir(parents=True, exist_ok=True)
                (arguments.failures / f"{reader}_{arguments.seed}_{number}").write_bytes(data)
                print(f"  {reader}_{arguments.seed}_{number}: {why}", flush=True)
            written = len(found.failures)
            if arguments.rows is not None:
                row = {"reader": reader, "seed": arguments.seed, "seconds": round(time.monotonic() - began)}
                with arguments.rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**row, **found.told()}) + "\n")

        with tempfile.TemporaryDirectory() as place:
            found = fuzz(reader, arguments.minutes * 60, arguments.seed, Path(place), tell)
        tell(found)
        print(f"{reader}: {', '.join(f'{name} {value}' for name, value in found.told().items())}", flush=True)
        bad += len(found.failures)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
