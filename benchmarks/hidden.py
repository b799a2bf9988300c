"""Times the plan `ops` where Torch-TensorRT is missing: beside the same plan and the default one where it is installed.

Two processes share one GPU and take turns. In the second one, and in the build that it starts, `import torch_tensorrt`
fails, as it does beside a torch that has none. While one of them measures, the other waits and has nothing queued. Each
round has one turn of every candidate, in a drawn order; a turn is a few untimed calls and the timed ones behind them.

Usage:
    python -m benchmarks.hidden --decoder dist base --cache DIR --prepare       # builds and compiles, times nothing
    python -m benchmarks.hidden --decoder dist base --cache DIR --out result.json
    python -m benchmarks.hidden --toy       # a small decoder on a CPU: both processes run, and the times say nothing
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import baselines, harness
from benchmarks.accuracy import accuracy
from benchmarks.aside import Aside
from benchmarks.decoder import INPUTS, MAX_ERROR_OVER_EAGER, Row, capability, finish_rows, fp32_reference, show
from benchmarks.decoders import gigaflop, subject
from benchmarks.ours import build_graph, build_ours

OPS = "ours bf16 ops"
HIDDEN = f"{OPS}, Torch-TensorRT hidden"
PLANS = {"ours bf16": (), OPS: ("ops",), HIDDEN: ()}
"""Candidate -> the plans that are named; none means those that are built by default."""
UNTIMED, TIMED = 2, 4
PASSES = 3
"""The result is written after each of so many parts of the rounds."""


class Side:
    """One decoder in one process: its candidates, and the same seeded latents in both processes."""

    def __init__(self, name: str, batch: int, cache: Path | None, device: str) -> None:
        torch._dynamo.reset()  # earlier decoders would count against its limit, past which it runs eagerly
        chosen = subject(name)
        self.decoder, self.cache, self.device = chosen.make(), cache, torch.device(device)
        self.shape = (batch, *chosen.latent_shape)
        seeded = torch.Generator().manual_seed(1)
        self.inputs = [torch.randn(self.shape, generator=seeded).bfloat16().to(self.device) for _ in range(INPUTS)]
        self.runs: dict[str, Callable[[Tensor], Tensor]] = {}

    def add(self, candidate: str) -> tuple[dict[str, Any], Any]:
        """Make a candidate ready; returns figures, and its frames of the first latents as an array of float32."""
        begin = time.perf_counter()
        extra: dict[str, Any] = {}
        if candidate in PLANS:
            run, extra = build_ours(
                self.decoder, self.shape, "bf16", PLANS[candidate], self.cache, device=str(self.device)
            )
        elif candidate.startswith("ours bf16 as "):
            run, extra = build_graph(self.live("cpu"), self.shape, "bf16", capability(candidate.split()[-1]))
        else:
            run, _ = baselines.candidates(self.live(self.device), 0)[candidate]()
        with torch.no_grad():
            frames = run(self.inputs[0]).float().cpu().numpy()
        self.runs[candidate] = run
        return {"ready_seconds": time.perf_counter() - begin, **extra}, frames

    def live(self, device: torch.device | str) -> nn.Module:
        """A copy of the fp32 decoder on that device."""
        return copy.deepcopy(self.decoder).to(device)

    @torch.no_grad()
    def turn(self, candidate: str, first: int) -> list[float]:
        """Milliseconds of each timed call; the first one has the latents number `first`."""
        run, took = self.runs[candidate], []
        calls = [self.inputs[(first + at) % INPUTS] for at in range(UNTIMED + TIMED)]
        if self.device.type == "cpu":
            for z in calls:
                begin = time.perf_counter()
                run(z)
                took.append(1e3 * (time.perf_counter() - begin))
            return took[UNTIMED:]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        for z, event in zip(calls, events, strict=False):
            event.record()
            run(z)
        events[-1].record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(events[UNTIMED:], events[UNTIMED + 1 :], strict=False)]


class Hidden(Aside):
    """The side without Torch-TensorRT, in a process of its own."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        module = Path(self._folder.name) / "torch_tensorrt" / "__init__.py"
        module.parent.mkdir()
        module.write_text('raise ImportError("hidden for this measurement")\n', encoding="utf-8")
        super().__init__(Side, self._folder.name)

    def close(self, seconds: float = 20) -> None:
        """End the process."""
        super().close(seconds)
        self._folder.cleanup()


@dataclasses.dataclass(kw_only=True, slots=True)
class Measured:
    """The rows of one decoder, and what `finish_rows` needs besides."""

    rows: dict[str, Row]
    floor_ms: float
    work_gflop: float


def ready(name: str, args: argparse.Namespace, side: Side, hidden: Hidden, tflops: float) -> Measured:
    """Make every candidate ready and compare its frames with the fp32 decoder's and with those of the plan `ops`."""
    older = [f"ours bf16 as {older}" for older in args.older]
    known = [*([] if args.toy else ["eager bf16", "torch.compile bf16", "ours bf16", *older]), OPS, HIDDEN]
    wanted = [each for each in known if not args.only or each in args.only]
    rows = {each: Row(decoder=name, batch=args.batch, candidate=each) for each in wanted}
    if HIDDEN in rows:
        # A key says what is installed, not what can be imported: in one cache, each would find the other's program.
        apart = None if side.cache is None else side.cache.with_name(f"{side.cache.name}_hidden")
        hidden.ask("new", name, args.batch, apart, str(side.device))
        hidden.begin("add", HIDDEN)
    reference = None if args.prepare else fp32_reference(side.live(side.device), side.inputs[0])
    frames: dict[str, Any] = {}
    for candidate, row in rows.items():
        try:
            figures, frames[candidate] = hidden.end() if candidate == HIDDEN else side.add(candidate)
            row.figures = figures
            if reference is None:
                continue
            row.figures |= dataclasses.asdict(accuracy(torch.from_numpy(frames[candidate]), reference))
            limit = rows["eager bf16"].figures.get("relative_l2") if "eager bf16" in rows else None
            if not row.figures["finite"]:
                row.refused = "output is not finite"
            elif limit is not None and row.figures["relative_l2"] > MAX_ERROR_OVER_EAGER * limit:
                row.refused = f"relative error {row.figures['relative_l2']:.2e} exceeds 2x eager's {limit:.2e}"
        except Exception as error:  # one candidate's failure must not take the others' rows along
            row.refused = f"{type(error).__name__}: {error}".splitlines()[0]
        finally:
            harness.console.print(f"  {candidate}: {row.figures.get('ready_seconds', 0):.1f} s {row.refused}")
    if OPS in frames and HIDDEN in frames:
        rows[HIDDEN].figures["same_bits_as"] = {OPS: bool((frames[OPS] == frames[HIDDEN]).all())}
        harness.console.print(f"  the same bits: {rows[HIDDEN].figures['same_bits_as']}")
    work = gigaflop(side.live("meta"), torch.empty(side.shape, device="meta"))
    return Measured(rows=rows, floor_ms=work / tflops, work_gflop=work)


def time_in_turns(
    found: Measured, rounds: int, batch: int, side: Side, hidden: Hidden, write: Callable[[], None]
) -> None:
    """Put the times into the rows, and write them, after every part of the rounds."""
    samples: dict[str, list[float]] = {name: [] for name, row in found.rows.items() if not row.refused}
    drawn = random.Random(0)
    for index in range(rounds):
        for name in drawn.sample(list(samples), len(samples)):
            samples[name] += hidden.ask("turn", name, index) if name == HIDDEN else side.turn(name, index)
        if (index + 1) % max(1, rounds // PASSES) == 0 or index + 1 == rounds:
            timings = {name: harness.timing_of(took) for name, took in samples.items()}
            finish_rows(found.rows, timings, batch, found.floor_ms, found.work_gflop)
            write()


def main() -> None:
    """Parse arguments, measure, print tables and the JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", nargs="+", default=["dist", "base"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--older", nargs="*", default=[], help="also the kernels of GPUs of these compute capabilities")
    parser.add_argument("--only", nargs="+", default=[], help="names of rows; all when left out")
    parser.add_argument("--cache", type=Path, help="folder of programs: built ones are kept there and taken from there")
    parser.add_argument("--prepare", action="store_true", help="time nothing")
    parser.add_argument("--toy", action="store_true", help="on a CPU: no baseline, and times that say nothing")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not args.toy:
        harness.require_gpu(parser)
    ceilings = None if args.toy or args.prepare else harness.measure_ceilings()
    device = "cpu" if args.toy else f"cuda:{torch.cuda.current_device()}"
    rows: list[Row] = []
    hidden = Hidden()

    result = harness.document("decoder", ceilings, [])

    def write() -> None:
        result["rows"] = [dataclasses.asdict(row) for row in rows]
        if args.out is not None:
            harness.write(result, args.out)

    for name in ["small"] if args.toy else args.decoder:
        harness.console.print(f"{name}, batch {args.batch}")
        side = Side(name, args.batch, None if args.toy else args.cache, device)
        found = ready(name, args, side, hidden, ceilings.matmul_tflops if ceilings else float("nan"))
        rows += found.rows.values()
        write()
        if not args.prepare:
            time_in_turns(found, args.rounds, args.batch, side, hidden, write)
            show(list(found.rows.values()))
    hidden.close()
    harness.finish(result, args.out)


if __name__ == "__main__":
    main()
