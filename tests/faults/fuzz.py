"""Fuzzes every reader of outside files: a value, or one of our errors, in one line that names the file.

Inputs are mutations of a committed corpus (`corpus/`, one folder per reader). An input that ends in a way not seen
before (another refusal, digits and names left out) joins the seeds, so the search moves on from what it has reached.
A failing input is written to the folder that is given, and the exit status is 1.

Run: python -m tests.faults.fuzz --minutes 60 [--reader yaml] [--failures DIR] [--seed 1]
"""

from __future__ import annotations

import argparse
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

from owl_wms.cache.manifest import parse as parse_manifest
from owl_wms.configs import load_vae_config, load_world_config
from owl_wms.configs.strict import read_yaml
from owl_wms.data.npy_table import NpyTable
from owl_wms.data.s3 import read_clips
from owl_wms.errors import OwlError
from owl_wms.inference.messages import MessageError, parse_message
from owl_wms.media.arrays import load_latents
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


# Name -> (ending of its files, readers).
READERS: dict[str, tuple[str, tuple[Callable[[Path], object], ...]]] = {
    "yaml": (".yml", (_yaml, load_world_config)),
    "pt": (".pt", (load_latents, read_facts)),
    "npy": (".npy", (load_latents,)),
    "safetensors": (".safetensors", (load_latents, read_facts)),
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
    ways: set[str] = field(default_factory=set)
    slowest: float = 0.0
    failures: list[tuple[bytes, str]] = field(default_factory=list)


def seeds_of(reader: str) -> list[bytes]:
    """The committed inputs of a reader."""
    return [path.read_bytes() for path in sorted((CORPUS / reader).iterdir())]


def _endless(seeds: list[bytes], chance: random.Random) -> Iterator[bytes]:
    yield from list(seeds)
    while True:
        yield from mutations(seeds, 50, chance)


def fuzz(reader: str, seconds: float, seed: int, place: Path) -> Found:
    """Feed one reader for so many seconds, and at least `FEWEST` inputs; failures are collected, not raised."""
    suffix, reads = READERS[reader]
    path, found = place / f"input{suffix}", Found()
    seeds, ending = seeds_of(reader), time.monotonic() + seconds
    for data in _endless(seeds, random.Random(f"{reader}/{seed}")):
        path.write_bytes(data)
        for read in reads:
            began = time.thread_time()
            way = _once(read, path, data, found, named=reader not in _UNNAMED)
            took = time.thread_time() - began
            found.slowest = max(found.slowest, took)
            if took > SLOW_SECONDS:
                found.failures.append((data, f"took {took:.1f} s of the CPU"))
            if way not in found.ways:
                found.ways.add(way)
                if len(seeds) < 2000 and len(data) < 1 << 16:
                    seeds.append(data)
        found.tried += 1
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
        found.failures.append((data, traceback.format_exc(limit=-4)))
        return "failure"
    if len(said.splitlines()) > 1 or "weights_only" in said or (named and str(path) not in said):
        found.failures.append((data, f"the message is not ours: {said!r}"))
    return re.sub(r"[0-9]+|'[^']*'|\S*/\S*", "", said)[:80]


def main() -> int:
    """Fuzz the readers that are asked for, in turn; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="for each reader")
    parser.add_argument("--reader", choices=sorted(READERS), action="append")
    parser.add_argument("--failures", type=Path, default=Path("fuzz_failures"))
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    bad = 0
    for reader in arguments.reader or sorted(READERS):
        with tempfile.TemporaryDirectory() as place:
            found = fuzz(reader, arguments.minutes * 60, arguments.seed, Path(place))
        print(
            f"{reader}: {found.tried} inputs, {found.read} read, {len(found.ways)} ways to end, slowest "
            f"{found.slowest * 1e3:.0f} ms, {len(found.failures)} failures",
            flush=True,
        )
        for number, (data, why) in enumerate(found.failures):
            arguments.failures.mkdir(exist_ok=True)
            (arguments.failures / f"{reader}_{number}").write_bytes(data)
            print(f"  {reader}_{number}: {why}", flush=True)
        bad += len(found.failures)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
