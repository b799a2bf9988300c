"""Measures what a call of an accelerated decoder (AutoencoderDC f32c32) costs beside its program.

    python -m benchmarks.wrapper --cache FOLDER --out build/wrapper.json     # a program from the cache, or built there

Calls of the wrapper and of the program alternate in a drawn order, and the figures are medians. Host times are
wall-clock times of the calling thread with nothing queued on the GPU. The wrapper compares the decoder's weights after
the launch, so most of its own time passes while the GPU works: what it adds to a call that is waited for is another
figure. At the power limit the GPU's own time varies by more than that, so it is measured apart, with events around the
program.

Exit status 1: other frames than the program's, or more than 30 us added to a call that is waited for.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import owl_wms
from benchmarks.harness import commit, document, finish, origin, require_gpu, show, write
from benchmarks.sana import SIZES
from benchmarks.sana_forms import latents, make
from benchmarks.stamp import microseconds
from owl_wms.runtime.accelerated import AcceleratedDecoder

MOST_US = 30.0
QUEUED = 20
WRAPPER, PROGRAM = "wrapper", "program"
Call = Callable[[Tensor], Tensor]


class Watched:
    """A program that notes when it was called, how long the call took, and how long the GPU worked."""

    def __init__(self, program: Any, z: Tensor) -> None:
        self.program = program
        self.graphed = getattr(program, "graphed", False)  # the wrapper looks at it
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if z.is_cuda else []
        self.entered = self.left = 0.0

    def __call__(self, z: Tensor) -> Tensor:
        self.entered = time.perf_counter()
        for event in self._events[:1]:
            event.record()
        frames: Tensor = self.program(z)
        for event in self._events[1:]:
            event.record()
        self.left = time.perf_counter()
        return frames

    def gpu_us(self) -> float:
        """Returns the GPU's time for the last call, which was waited for."""
        return self._events[0].elapsed_time(self._events[1]) * 1e3 if self._events else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Waited:
    """One call that was waited for, in microseconds; `again`: the call before it was of the same kind."""

    whole: float
    before_launch: float
    launch: float
    gpu: float
    again: bool


def drawn(names: list[str], rounds: int) -> list[str]:
    """Returns every name `rounds` times, in a drawn order that is the same each time."""
    order = names * rounds
    random.Random(rounds).shuffle(order)
    return order


def waited(calls: dict[str, Call], watched: Watched, z: Tensor, rounds: int) -> dict[str, list[Waited]]:
    """Returns what each call took until its frames were there, by kind of call."""
    found: dict[str, list[Waited]] = {name: [] for name in calls}
    last = ""
    for name in drawn(list(calls), rounds):
        call = calls[name]
        begin = time.perf_counter()
        call(z)
        torch.cuda.synchronize()
        end = time.perf_counter()
        found[name].append(
            Waited(
                whole=(end - begin) * 1e6,
                before_launch=(watched.entered - begin) * 1e6,
                launch=(watched.left - watched.entered) * 1e6,
                gpu=watched.gpu_us(),
                again=name == last,
            )
        )
        last = name
    return found


def returned(call: Call, z: Tensor) -> float:
    """Microseconds until one call returns; then waits."""
    begin = time.perf_counter()
    call(z)
    end = time.perf_counter()
    torch.cuda.synchronize()
    return (end - begin) * 1e6


def queued(call: Call, z: Tensor) -> float:
    """Microseconds per call of `QUEUED` calls that are waited for together."""
    begin = time.perf_counter()
    for _ in range(QUEUED):
        call(z)
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / QUEUED * 1e6


def beside(time_of: Callable[[Call, Tensor], float], calls: dict[str, Call], z: Tensor, rounds: int) -> list[float]:
    """Returns the medians of the wrapper and of the program, and their difference."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for name in drawn(list(calls), rounds):
        found[name].append(time_of(calls[name], z))
    return difference(found)


def difference(found: Mapping[str, list[float]]) -> list[float]:
    """Returns the medians of the wrapper and of the program, and their difference; nan where there are none."""
    ours, alone = (statistics.median(found[name] or [math.nan]) for name in (WRAPPER, PROGRAM))
    return [ours, alone, ours - alone]


def _found(fast: AcceleratedDecoder) -> Any:
    (found,) = (found for decode in fast._state.decodes.values() for found in decode._found.values())
    return found


@torch.no_grad()
def measure(fast: AcceleratedDecoder, z: Tensor, rounds: int) -> dict[str, Any]:
    """Returns the row of one accelerated decoder; `wrong` says what is not as it should be."""
    row: dict[str, Any] = {"latents": list(z.shape), "commit": commit(), "wrong": ""}
    frames = fast(z)
    generation, slot, _ = _found(fast)
    loaded = slot.loaded
    row |= {key: loaded.report.get(key) for key in ("precision", "plan", "cuda_graph")}
    if not torch.equal(frames, loaded.program(z).to(frames.dtype)):
        row["wrong"] = "other frames than the program's"
    watched = Watched(loaded.program, z)
    slot.loaded = dataclasses.replace(loaded, program=watched)
    calls: dict[str, Call] = {WRAPPER: fast, PROGRAM: watched}
    for _ in range(20):  # past the calls that are all looked at, and warm
        fast(z)
        watched(z)
    torch.cuda.synchronize()
    # The wait of a call that looks at its frames would be counted as the wrapper's: fp16 looks always, bf16 seldom.
    found = waited(calls, watched, z, rounds)
    row["waited_us"] = difference({name: [one.whole for one in ones] for name, ones in found.items()})
    row["latency_us"] = difference({name: [one.whole - one.gpu for one in ones] for name, ones in found.items()})
    row["latency_again_us"] = difference(
        {name: [one.whole - one.gpu for one in ones if one.again] for name, ones in found.items()}
    )
    row["gpu_us"] = difference({name: [one.gpu for one in ones] for name, ones in found.items()})
    row["launch_us"] = difference({name: [one.launch for one in ones] for name, ones in found.items()})
    row["before_launch_us"] = statistics.median(one.before_launch for one in found[WRAPPER])
    row["before_launch_alone_us"] = statistics.median(one.before_launch for one in found[PROGRAM])
    row["returned_us"] = beside(returned, calls, z, rounds)
    row["queued_us"] = beside(queued, calls, z, max(3, rounds // QUEUED))
    slot.loaded = loaded
    row["stamp_us"] = microseconds(lambda: generation.eager.stamp.matches(fast.original))
    stats = fast.stats()
    if stats.pytorch:
        row["wrong"] = f"PyTorch decoded: {stats.pytorch}"
    if not row["wrong"] and row["waited_us"][2] > MOST_US:
        row["wrong"] = f"more than {MOST_US:.0f} us added to a call that is waited for"
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table, also printed."""
    titles = (
        "latents",
        "precision",
        "us added: waited for",
        "without the GPU's time",
        "returned",
        "queued",
        "before launch",
        "weights compared",
        "commit",
        "remark",
    )
    lines = []
    for row in rows:
        kinds = ("waited_us", "latency_us", "returned_us", "queued_us")
        added = [f"{row[key][2]:.1f} ({row[key][1]:.0f})" if key in row else "-" for key in kinds]
        size = "x".join(map(str, row["latents"]))
        times = [f"{row['before_launch_us']:.1f}", f"{row['stamp_us']:.1f}"]
        lines.append([size, row["precision"], *added, *times, row["commit"], row["wrong"]])
    return show(titles, lines)


def markdown(result: dict[str, Any]) -> str:
    """Returns the document as Markdown; its table is printed too."""
    title = "# What a call of an accelerated decoder adds to its program (AutoencoderDC f32c32)"
    remark = (
        "Microseconds, medians; in brackets the program alone. `waited for`: until the frames are there; `without the "
        "GPU's time`: of that, what is not the program's own time on the GPU. `returned`: until the call returns, "
        "nothing queued before. `queued`: per call, 20 calls waited for together. `before launch`: until the program "
        "is called. `weights`: one comparison, processor time."
    )
    return f"{title}\n\n{origin(result)}\n\n{remark}\n\n{table(result['rows'])}"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="1 x 1024x1024", help="of the pictures")
    parser.add_argument(
        "--precision", choices=["bf16", "auto"], action="append", help="of the program; both if not given"
    )
    parser.add_argument("--cache", type=Path, help="directory of programs; left out: built for this run alone")
    parser.add_argument("--rounds", type=int, default=200, help="calls of each kind")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args(arguments)
    require_gpu(parser)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for precision in given.precision or ["bf16", "auto"]:
            decoder = make("f32c32").bfloat16()
            cache = given.cache or Path(folder)
            fast: Any = owl_wms.accelerate(decoder, precision=precision, cache_dir=cache, strict=True)
            rows.append(measure(fast, latents("f32c32", *SIZES[given.size][:2]), given.rounds))
            if given.out is not None:
                write(document("wrapper", None, rows), given.out)
    table(rows)
    finish(document("wrapper", None, rows), given.out)
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
