"""Measures what a call of an accelerated decoder (AutoencoderDC f32c32) costs beside its program.

    python -m benchmarks.wrapper --cache FOLDER --out build/wrapper.json     # a program from the cache, or built there

Host times are wall-clock times of the calling thread with nothing queued on the GPU. The wrapper compares the decoder's
weights after the launch, so most of its own time passes while the GPU works: what it adds to a call that is waited for
is another figure. Calls of the wrapper and of the program alternate, and differences are medians over such pairs.

Exit status 1: other frames than the program's, or more than 30 us added to a call that is waited for.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
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
Call = Callable[[Tensor], Tensor]


def waited(call: Call, z: Tensor) -> float:
    """Microseconds of one call until its frames are there."""
    begin = time.perf_counter()
    call(z)
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e6


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


def pairs(
    time_of: Callable[[Call, Tensor], float], wrapper: Call, program: Call, z: Tensor, rounds: int
) -> list[float]:
    """Medians over `rounds`: the wrapper's time, the program's, and their difference."""
    found = [(time_of(wrapper, z), time_of(program, z)) for _ in range(rounds)]
    ours, alone = zip(*found, strict=True)
    return [statistics.median(ours), statistics.median(alone), statistics.median(a - b for a, b in found)]


def before_launch(fast: AcceleratedDecoder, z: Tensor, rounds: int) -> float:
    """Median microseconds from the call of the wrapper to the call of its program."""
    slot = _lane(fast)[1]
    assert slot.loaded is not None
    loaded, entered = slot.loaded, [0.0]

    def program(latents: Tensor) -> Any:
        entered[0] = time.perf_counter()
        return loaded.program(latents)

    slot.loaded = dataclasses.replace(loaded, program=program)
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        fast(z)
        found.append((entered[0] - begin) * 1e6)
        torch.cuda.synchronize()
    slot.loaded = loaded
    return statistics.median(found)


def _lane(fast: AcceleratedDecoder) -> Any:
    (lane,) = (lane for decode in fast._state.decodes.values() for lane in decode._lanes.values())
    return lane


@torch.no_grad()
def measure(fast: AcceleratedDecoder, z: Tensor, rounds: int) -> dict[str, Any]:
    """Returns the row of one accelerated decoder; `wrong` says what is not as it should be."""
    row: dict[str, Any] = {"latents": list(z.shape), "commit": commit(), "wrong": ""}
    frames = fast(z)
    generation, slot, _ = _lane(fast)
    program = slot.loaded.program
    row |= {key: slot.loaded.report.get(key) for key in ("precision", "plan", "cuda_graph")}
    if not torch.equal(frames, program(z).to(frames.dtype)):
        row["wrong"] = "other frames than the program's"
    for _ in range(40):  # past the calls that are all looked at, and warm
        fast(z)
        program(z)
    torch.cuda.synchronize()
    # The wait of a call that looks at its frames would be counted as the wrapper's: fp16 looks always, bf16 seldom.
    row["waited_us"] = pairs(waited, fast, program, z, rounds)
    row["returned_us"] = pairs(returned, fast, program, z, rounds)
    row["queued_us"] = pairs(queued, fast, program, z, max(3, rounds // QUEUED))
    row["before_launch_us"] = before_launch(fast, z, rounds)
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
        "returned",
        "queued",
        "before launch",
        "weights compared",
        "remark",
    )
    lines = []
    for row in rows:
        added = [f"{row[key][2]:.1f} ({row[key][1]:.0f})" for key in ("waited_us", "returned_us", "queued_us")]
        size = "x".join(map(str, row["latents"]))
        lines.append(
            [size, row["precision"], *added, f"{row['before_launch_us']:.1f}", f"{row['stamp_us']:.1f}", row["wrong"]]
        )
    return show(titles, lines)


def markdown(result: dict[str, Any]) -> str:
    """Returns the document as Markdown; its table is printed too."""
    title = "# What a call of an accelerated decoder adds to its program (AutoencoderDC f32c32)"
    remark = (
        "Microseconds, medians over pairs of calls; in brackets the program alone. `waited for`: until the frames are "
        "there. `returned`: until the call returns, nothing queued before. `queued`: per call, 20 calls waited for "
        "together. `before launch`: until the program is called. `weights`: one comparison, processor time."
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
