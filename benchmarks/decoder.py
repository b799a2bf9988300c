"""Times the decoders: eager, compiled PyTorch and ours, interleaved in one process, with the error beside the speed.

Usage:
    python -m benchmarks.decoder                                # dist and base, batch 8
    python -m benchmarks.decoder --decoder sana --batch 1 4 8 --out result.json --plot result.png
    python -m benchmarks.decoder --precision bf16 fp16 fp8 --max-autotune-seconds 120
    python -m benchmarks.decoder --plans tensorrt+ops ops --each-plan       # a row for each
    python -m benchmarks.decoder --precision --older 8.0 8.9                # only the kernels of older GPUs
    python -m benchmarks.decoder --in-process --precision bf16 fp16 fp8 int8    # fused forms, nothing built: fast

A row whose parity test is red, or whose output is not finite, is refused: it gets its reason in place of its time.
The last line of standard output is one JSON document with everything.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from benchmarks import baselines, harness, report
from benchmarks.accuracy import accuracy
from benchmarks.decoders import SUBJECTS, Subject, eight_bit_gigaflop, gigaflop, saved_gigaflop, subject
from benchmarks.ours import build_graph, build_ours
from owl_wms.ops.codes import FORMATS
from owl_wms.power import under_load
from owl_wms.trt.check.parity import reference_arithmetic

# "Error no worse than eager's at the same precision", with room for a different order of summation.
MAX_ERROR_OVER_EAGER = 2.0
INPUTS = 4


@dataclasses.dataclass(kw_only=True, slots=True)
class Row:
    """One candidate at one batch size; `refused` says why a time is missing."""

    decoder: str
    batch: int
    candidate: str
    refused: str = ""
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)


def fp32_reference(decoder: nn.Module, z_BCHW: Tensor) -> Tensor:
    """Output of the fp32 decoder on the GPU, one latent at a time to bound memory; kept on the CPU."""
    with torch.no_grad(), reference_arithmetic():
        return torch.cat([decoder(z.unsqueeze(0)).cpu() for z in z_BCHW.float()])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A decoder on the GPU, weight norm live, with latents and their fp32 frames for the largest batch."""

    subject: Subject
    live: nn.Module
    inputs: list[Tensor]
    reference: Tensor

    @classmethod
    def of(cls, name: str, largest: int, device: str = "cuda") -> Prepared:
        chosen = subject(name)
        live = chosen.make().to(device)
        generator = torch.Generator(device).manual_seed(1)
        shape = (largest, *chosen.latent_shape)
        inputs = [torch.randn(shape, device=device, generator=generator).bfloat16() for _ in range(INPUTS)]
        return cls(subject=chosen, live=live, inputs=inputs, reference=fp32_reference(live, inputs[0]))


def measure(prepared: Prepared, batch: int, args: argparse.Namespace, ceilings: harness.Ceilings) -> list[Row]:
    """Returns all candidates of one decoder at one batch size."""
    # Earlier decoders would count against dynamo's recompile limit, past which it runs eagerly without a word.
    torch._dynamo.reset()
    chosen, live, name = prepared.subject, prepared.live, prepared.subject.name
    shape = (batch, *chosen.latent_shape)
    inputs, reference = [z[:batch].contiguous() for z in prepared.inputs], prepared.reference[:batch]
    work_gflop = gigaflop(copy.deepcopy(live).to("meta"), torch.empty(shape, device="meta"))
    floor_ms = work_gflop / ceilings.matmul_tflops
    saved, eight_bits = (count(live, batch, shape[-1]) for count in (saved_gigaflop, eight_bit_gigaflop))
    device = inputs[0].device

    candidates: dict[str, Callable[[Tensor], Tensor]] = {}
    rows: dict[str, Row] = {}

    def add(candidate: str, make: Callable[[], tuple[Callable[[Tensor], Tensor], dict[str, Any]]]) -> None:
        row = rows[candidate] = Row(decoder=name, batch=batch, candidate=candidate)
        gc.collect()
        torch.cuda.empty_cache()
        begin = time.perf_counter()
        try:
            run, extra = make()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with torch.no_grad():
                output = run(inputs[0])
            harness.wait(device)
        except Exception as error:  # one candidate's failure, whatever it is, must not take the others' rows along
            row.refused = f"{type(error).__name__}: {error}".splitlines()[0]
            harness.console.print(f"  {candidate}: {row.refused}")
            return
        row.figures = {
            "ready_seconds": time.perf_counter() - begin,
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
            **dataclasses.asdict(accuracy(output.cpu(), reference)),
            **extra,
        }
        limit = MAX_ERROR_OVER_EAGER * rows["eager bf16"].figures["relative_l2"] if "eager bf16" in rows else None
        row.refused = why_refused(row.figures, extra.get("psnr_gate_db"), limit)
        if not row.refused:
            candidates[candidate] = run
        harness.console.print(f"  {candidate}: ready in {row.figures['ready_seconds']:.1f} s {row.refused}")

    for candidate, make in baselines.candidates(live, args.max_autotune_seconds).items():
        if not args.baselines or candidate in args.baselines:
            add(candidate, make)
    for older in args.older:
        add(f"ours bf16 as {older}", lambda older=older: build_graph(live, shape, "bf16", capability(older)))
    for candidate, precision, plans in built(args):
        if args.in_process:
            add(candidate, lambda at=precision: build_graph(live, shape, at, device=device.type))
        else:
            add(candidate, lambda at=precision, plans=plans: build_ours(chosen.make(), shape, at, plans))

    with torch.no_grad():
        timings = harness.measure_interleaved(candidates, inputs, rounds=args.rounds)
        for candidate, run in candidates.items():
            rows[candidate].figures |= under_load(functools.partial(run, inputs[0]), device, args.load_seconds)
    finish_rows(rows, timings, batch, floor_ms, work_gflop)
    for row in rows.values():
        if row.candidate.startswith("ours") and "median_ms" in row.figures:
            executed = work_gflop - saved - (eight_bits / 2 if row.candidate.split()[1] in FORMATS else 0)
            row.figures["percent_of_executed"] = 100 * executed / ceilings.matmul_tflops / row.figures["median_ms"]
    return list(rows.values())


def why_refused(figures: dict[str, Any], least_psnr: float | None, most_error: float | None) -> str:
    """Returns why a candidate is not timed, by its PSNR in dB if it has a gate, else by its error; empty if it is."""
    if not figures["finite"]:
        return "output is not finite"
    if least_psnr is not None:
        low = figures["psnr_db"] < least_psnr
        return f"PSNR {figures['psnr_db']:.1f} dB is under its gate of {least_psnr} dB" if low else ""
    high = most_error is not None and figures["relative_l2"] > most_error
    return f"relative error {figures['relative_l2']:.2e} exceeds {most_error:.2e} (2x eager bf16)" if high else ""


def built(args: argparse.Namespace) -> list[tuple[str, str, tuple[str, ...]]]:
    """The programs that are built: candidate, precision, plans of which the fastest is taken."""
    if args.each_plan:
        return [(f"ours {at} {plan}", at, (plan,)) for at in args.precision for plan in args.plans]
    return [(f"ours {at}", at, tuple(args.plans)) for at in args.precision]


def capability(text: str) -> tuple[int, int]:
    """`(8, 0)` out of `8.0`. Raises ValueError for a text without two numbers."""
    major, minor = text.split(".")
    return int(major), int(minor)


def finish_rows(
    rows: dict[str, Row], timings: dict[str, harness.Timing], batch: int, floor_ms: float, work_gflop: float
) -> None:
    """Put times and ratios into the rows: over eager with live weight norm, and over the best compiled PyTorch."""
    eager = timings["eager bf16"].median_ms if "eager bf16" in timings else None
    compiled = [timing.median_ms for name, timing in timings.items() if name.startswith("torch.compile")]
    for name, timing in timings.items():
        rows[name].figures |= {
            **dataclasses.asdict(timing),
            "fps": batch * 1000 / timing.median_ms,
            "over_eager": eager / timing.median_ms if eager else None,
            "over_compiled": min(compiled) / timing.median_ms if compiled else None,
            "floor_ms": floor_ms,
            "percent_of_floor": 100 * floor_ms / timing.median_ms,
            "work_gflop": work_gflop,
        }


def cells(row: Row) -> list[str]:
    """Returns a row's table cells after its name; a refused row has its reason first and dashes after."""
    if row.refused:
        return [row.refused] + ["–"] * (len(report.COLUMNS) - 1)
    return [report.cell(row.figures, key, form) for _, key, form in report.COLUMNS]


def show(rows: list[Row]) -> None:
    """Print the rows as one table a decoder and batch size."""
    for name, batch in dict.fromkeys((row.decoder, row.batch) for row in rows):
        own = [row for row in rows if (row.decoder, row.batch) == (name, batch)]
        floor = next((row.figures["floor_ms"] for row in own if "floor_ms" in row.figures), float("nan"))
        table = Table(title=f"{name}, batch {batch}, floor {floor:.2f} ms")
        for title in ("candidate", *(title for title, _, _ in report.COLUMNS)):
            table.add_column(title, justify="left" if title == "candidate" else "right")
        for row in own:
            table.add_row(row.candidate, *cells(row))
        harness.console.print(table)


def main() -> None:
    """Parse arguments, measure, print tables and the JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", nargs="+", default=["dist", "base"], choices=list(SUBJECTS))
    parser.add_argument("--batch", nargs="+", type=int, default=[8])
    parser.add_argument("--baselines", nargs="+", default=[], help="names of rows; all of PyTorch's when left out")
    parser.add_argument("--precision", nargs="*", default=["bf16"], choices=["bf16", "fp16", "auto", "fp8", "int8"])
    parser.add_argument("--plans", nargs="*", default=[], help="plans to build; every one that applies when left out")
    parser.add_argument("--in-process", action="store_true", help="fused forms as CUDA graphs, not built programs")
    parser.add_argument("--each-plan", action="store_true", help="a row for each of --plans, not for the fastest")
    parser.add_argument("--older", nargs="+", default=[], help="also the kernels of GPUs of these compute capabilities")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--load-seconds", type=float, default=1.0, help="of unbroken load before it is measured")
    parser.add_argument("--max-autotune-seconds", type=int, default=0, help="0 leaves max-autotune out")
    parser.add_argument("--theme", default="decoder")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    harness.require_gpu(parser)

    ceilings = harness.measure_ceilings()
    harness.console.print(harness.machine_line(harness.describe_machine(), ceilings))
    rows: list[Row] = []
    for name in args.decoder:
        prepared = Prepared.of(name, max(args.batch))
        for batch in args.batch:
            harness.console.print(f"{name}, batch {batch}")
            rows += measure(prepared, batch, args, ceilings)
            # Written after each decoder, so that a run cut short loses nothing it measured.
            result = harness.document(args.theme, ceilings, [dataclasses.asdict(row) for row in rows])
            if args.out is not None:
                harness.write(result, args.out)
    show(rows)
    if args.plot is not None:
        from benchmarks.plot import plot_rows

        plot_rows(result["rows"], args.plot, harness.machine_line(harness.describe_machine(), ceilings))
    harness.finish(result, args.out)


if __name__ == "__main__":
    main()
