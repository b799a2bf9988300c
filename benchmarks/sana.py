"""Times AutoencoderDC of the Sana pipelines (f32c32) in bf16: eager, torch.compile and ours, with errors and power.

    python -m benchmarks.sana --check     # one minute: every operator against its reference, then whole decoders
    python -m benchmarks.sana --out benchmarks/results/sana_h200.json      # some six minutes; writes .md beside it
    python -m benchmarks.sana --isolate   # TensorRT alone: which modules it cannot run, found by itself

Weights are random and seeded, nothing is downloaded. Errors are relative L2 distances from the fp32 decoder on the same
latents. Exit status 1: a wrong result, an error above 1.2 times that of eager bf16, or no program of ours.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.accuracy import relative_l2
from benchmarks.baselines import time_limit
from benchmarks.harness import (
    console,
    document,
    finish,
    measure_ceilings,
    measure_interleaved,
    require_gpu,
    show,
)
from benchmarks.ops_sana import checks
from benchmarks.ours import build_ours
from benchmarks.sana_forms import FORMS, PIXELS, latents, make, reference
from benchmarks.sana_isolation import isolate
from owl_wms.fused.sana import fuse
from owl_wms.power import under_load

# name -> batch, side of the latents, milliseconds wanted
SIZES = {"1 x 1024x1024": (1, 32, 19.0), "8 x 512x512": (8, 16, 31.0), "1 x 2048x2048": (1, 64, 63.0)}
LAYOUTS = {"default": torch.contiguous_format, "channels_last": torch.channels_last}
MOST_ERROR = 1.2  # times that of eager bf16
COMPILE_SECONDS = 150
Run = Callable[[Tensor], Tensor]


def compiled(decoder: nn.Module, layout: torch.memory_format) -> Run:
    """Returns the decoder under torch.compile in its default mode."""
    module = torch.compile(decoder.to(memory_format=layout), dynamic=False)  # type: ignore[call-overload]

    def run(z: Tensor) -> Tensor:
        frames: Tensor = module(z.contiguous(memory_format=layout))
        return frames

    return run


@torch.no_grad()
def measure(
    form: str,
    name: str,
    precision: str,
    plans: tuple[str, ...],
    layouts: tuple[str, ...],
    cache: Path | None = None,
    compile_seconds: int = COMPILE_SECONDS,
    emit: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> tuple[list[dict[str, Any]], bool]:
    """Returns one size: a row per candidate, and whether ours ran and is right.

    Args:
        cache: directory of our programs; None builds one and drops it.
        compile_seconds: most for a rival to compile.
        emit: receives the rows once eager and ours were timed, before the rivals are compiled, and at the end.
    """
    batch, side, wanted_ms = SIZES[name]
    fp32, z = make(form), latents(form, batch, side)
    wanted = reference(fp32, z)
    eager = copy.deepcopy(fp32).bfloat16()
    runs: dict[str, Run] = {}
    rows: dict[str, dict[str, Any]] = {}

    def add(candidate: str, prepare: Callable[[], tuple[Run, dict[str, Any]]]) -> None:
        row = rows[candidate] = {"form": form, "size": name, "candidate": candidate, "reason": ""}
        row["commit"] = harness.commit()
        begin = time.perf_counter()
        try:
            run, extra = prepare()
            with time_limit(compile_seconds):
                got = run(z)
            row |= {"prepared_seconds": time.perf_counter() - begin, "error": relative_l2(got, wanted), **extra}
            row["finite"] = bool(got.isfinite().all())
            runs[candidate] = run
        except Exception as error:  # a candidate that cannot run is a row that says so
            row["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            console.print(f"{name}, {candidate}: {row['reason']}", markup=False)
        torch.cuda.empty_cache()

    def clock(*, power: bool) -> None:
        for candidate, timing in measure_interleaved(runs, [z, z.flip(0)], rounds=15, warmup=2).items():
            rows[candidate] |= {"median_ms": timing.median_ms, "p20_ms": timing.p20_ms, "p80_ms": timing.p80_ms}
            drawn = under_load(functools.partial(runs[candidate], z), z.device)["watts"] if power else math.nan
            rows[candidate]["watts"] = drawn
        emit(list(rows.values()))

    add("eager", lambda: (eager, {}))
    add("ours", lambda: build_ours(eager, tuple(z.shape), precision, plans, cache))  # type: ignore[arg-type]
    del fp32
    ours = rows["ours"]
    ours["wanted_ms"] = wanted_ms
    if layouts:
        clock(power=False)
    for layout in layouts:
        add(f"torch.compile {layout}", lambda layout=layout: (compiled(copy.deepcopy(eager), LAYOUTS[layout]), {}))  # type: ignore[misc]
    rows["ours"] = rows.pop("ours")  # the last line of the table
    clock(power=True)
    fine = not ours["reason"] and ours["finite"] and ours["error"] <= MOST_ERROR * rows["eager"]["error"]
    if not fine and not ours["reason"]:
        console.print(f"{name}: error {ours['error']:.2e} of ours, {rows['eager']['error']:.2e} of eager")
    return list(rows.values()), bool(fine)


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table, also printed."""
    titles = ("size", "candidate", "ms", "p20-p80", "eager / this", "error", "W", "plan", "commit")
    lines = []
    eager = {row["size"]: row.get("median_ms") for row in rows if row["candidate"] == "eager"}
    for row in rows:
        if "median_ms" not in row:
            cells = [row["size"], row["candidate"], "-", "-", "-", "-", "-", row["reason"][:80], row.get("commit", "")]
        else:
            base = eager.get(row["size"])
            goal = f" (wanted {row['wanted_ms']:.0f})" if "wanted_ms" in row else ""
            report = row.get("report", {})
            cells = [
                row["size"],
                row["candidate"],
                f"{row['median_ms']:.2f}{goal}",
                f"{row['p20_ms']:.2f}-{row['p80_ms']:.2f}",
                f"{base / row['median_ms']:.2f}x" if base else "-",
                f"{row['error']:.2e}",
                f"{row['watts']:.0f}",
                str(report.get("plan", "")),
                row.get("commit", ""),
            ]
        lines.append(cells)
    return show(titles, lines)


@torch.no_grad()
def check() -> bool:
    """Checks every operator of the family and then whole decoders on the GPU; True if all are right."""
    fine = True
    shown = Table("operator", "dtype", "relative error", "largest error", "verdict")
    for dtype, limit in ((torch.bfloat16, 1.2e-2), (torch.float16, 2e-3)):
        for name, run, wanted in checks(dtype):
            try:
                # What was freed before the call is full of NaN: an output element that is not written shows.
                torch.full((1 << 26,), math.nan, device="cuda", dtype=dtype)
                got = run().float()
                error = relative_l2(got, wanted)
                largest = float((got - wanted).abs().max() / wanted.abs().max())
                right = error <= limit and largest <= 10 * limit and bool(got.isfinite().all())
                cells = [f"{error:.1e}", f"{largest:.1e}", "right" if right else "WRONG"]
            except Exception as raised:
                right, cells = False, ["-", "-", f"{type(raised).__name__}: {str(raised).splitlines()[0][:80]}"]
            fine &= right
            shown.add_row(name, str(dtype).removeprefix("torch."), *cells)
    for form in FORMS:
        fp32, z = make(form), latents(form, 1, 512 // PIXELS[form])
        wanted = reference(fp32, z)
        for dtype in (torch.bfloat16, torch.float16):
            eager = relative_l2(copy.deepcopy(fp32).to(dtype)(z.to(dtype)), wanted)
            got = fuse(fp32, dtype, tuple(z.shape))(z.to(dtype))
            error = relative_l2(got, wanted)
            right = error <= MOST_ERROR * eager and bool(got.isfinite().all())
            fine &= right
            cells = [f"{error:.1e}", f"eager {eager:.1e}", "right" if right else "WRONG"]
            shown.add_row(f"{form} 512x512, fused", str(dtype).removeprefix("torch."), *cells)
        torch.cuda.empty_cache()
    console.print(shown)
    return fine


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare with references")
    parser.add_argument("--isolate", action="store_true", help="only build with TensorRT alone")
    parser.add_argument("--size", action="append", choices=list(SIZES), help="only these sizes")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp16", "auto"], help="of our program")
    parser.add_argument("--form", action="append", choices=list(FORMS), help="of --isolate: only these forms")
    parser.add_argument("--plan", action="append", help="of our program; every plan that applies: all")
    parser.add_argument("--cache", type=Path, help="directory of our programs; left out: built for this run alone")
    parser.add_argument("--compile-seconds", type=int, default=COMPILE_SECONDS, help="most for a rival to compile")
    parser.add_argument("--seconds", type=float, default=420.0, help="of --isolate: time limit of one form")
    parser.add_argument("--compile", action="append", choices=[*LAYOUTS, "none"], help="rivals; both if left out")
    parser.add_argument("--out", type=Path, help="JSON file; a table in Markdown is written beside it")
    given = parser.parse_args(arguments)
    require_gpu(parser)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if given.check:
        return 0 if check() else 1
    if given.isolate:
        found = [isolate(form, given.seconds) for form in given.form or reversed(FORMS)]
        finish(document("sana_isolation", None, [row for row, _ in found]), given.out)
        return 0 if all(fine for _, fine in found) else 1
    plans = () if given.plan == ["all"] else tuple(given.plan or ["tensorrt+ops"])
    layouts = tuple(layout for layout in given.compile or LAYOUTS if layout != "none")
    ceilings = measure_ceilings(torch.bfloat16)
    done, fine = list[dict[str, Any]](), True

    def write(rows: list[dict[str, Any]]) -> None:
        result = document("sana", ceilings, [*done, *rows])
        if given.out is not None:
            harness.write(result, given.out)
            given.out.with_suffix(".md").write_text(markdown(result), encoding="utf-8")

    for name in given.size or SIZES:
        measured, right = measure(
            "f32c32", name, given.precision, plans, layouts, given.cache, given.compile_seconds, write
        )
        done += measured
        fine &= right
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    result = document("sana", ceilings, done)
    console.print(harness.origin(result))
    finish(result, given.out)
    return 0 if fine else 1


def markdown(result: dict[str, Any]) -> str:
    """Returns the document as Markdown; its table is printed too."""
    return f"# AutoencoderDC f32c32 (Sana), bf16, random weights\n\n{harness.origin(result)}\n\n{table(result['rows'])}"


if __name__ == "__main__":
    sys.exit(main())
