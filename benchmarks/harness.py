"""Holds timing, ceilings, machine line and output of all benchmarks, so that every number is taken the same way.

Method: CUDA events; all candidates interleaved in one process, so that clock and temperature drift hits them alike;
inputs rotated, so that no candidate finds its input in the cache; medians with the 20th and 80th percentile. On a CPU,
where the process's clock takes the place of events, the same code runs as a toy: it shows that a benchmark works.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.report import table_lines
from owl_wms.env import describe_machine
from owl_wms.timing import Marks

console = Console(width=170, highlight=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Milliseconds of one call: median, 20th and 80th percentile, and how many calls were timed."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    calls: int


def timing_of(samples_ms: Sequence[float]) -> Timing:
    """Order statistics of per-call times in milliseconds. Raises ValueError when there are none."""
    if not samples_ms:
        raise ValueError("no samples: nothing was timed")
    ordered = sorted(samples_ms)
    last = len(ordered) - 1
    return Timing(
        median_ms=statistics.median(ordered),
        p20_ms=ordered[round(0.2 * last)],
        p80_ms=ordered[round(0.8 * last)],
        calls=len(ordered),
    )


def measure_interleaved(
    candidates: dict[str, Callable[[torch.Tensor], Any]],
    inputs: Sequence[torch.Tensor],
    *,
    rounds: int = 30,
    warmup: int = 3,
    head_start: int = 0,
) -> dict[str, Timing]:
    """Time every candidate on every round, one after the other, each round on the next input and in another order.

    The order is drawn (the same in every run), because at the power limit the candidate before matters: after one that
    draws less power the clock is higher, which was worth 4 % (one H200, base_learned, 2026-11-29).

    Args:
        candidates: name -> function of one tensor.
        inputs: tensors of one shape on one device, rotated from round to round.
        rounds: timed calls per candidate.
        warmup: untimed calls per candidate before the first round.
        head_start: clock cycles for which the GPU is kept busy before each timed call, so that the launch of a graph is
            not timed, whatever ran before it.
    """
    device = inputs[0].device
    for run in candidates.values():
        for index in range(warmup):
            run(inputs[index % len(inputs)])
    wait(device)
    marks: dict[str, list[Marks]] = {name: [] for name in candidates}
    drawn = random.Random(0)
    for index in range(rounds):
        for name, run in drawn.sample(list(candidates.items()), len(candidates)):
            if head_start and device.type == "cuda":
                torch.cuda._sleep(head_start)
            call = Marks(device)
            call.mark()
            run(inputs[index % len(inputs)])
            call.mark()
            marks[name].append(call)
        wait(device)
    return {name: timing_of([call.between(0, 1) for call in calls]) for name, calls in marks.items()}


def wait(device: torch.device) -> None:
    """Until the work that was queued on a GPU is done; a CPU queues none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def require_gpu(parser: argparse.ArgumentParser) -> None:
    """The parser ends the program in one line where there is no GPU; before anything is written."""
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this benchmark measures a GPU; nothing was measured")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """Measures what this card does at best on random data, measured now; a copied byte counts as read and written."""

    matmul_tflops: float
    copy_tbps: float


def measure_ceilings(dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Ceilings:
    """Times an 8192^3 matrix product in `dtype` and a 4 GiB copy on `device`, medians of 10; on a CPU, small ones."""
    size, count = (512, 1 << 24) if device == "cpu" else (8192, 1 << 32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = measure_interleaved({"matmul": lambda left: left @ b}, [a], rounds=10)["matmul"]
    source = torch.randint(0, 255, (count,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = measure_interleaved({"copy": target.copy_}, [source], rounds=10)["copy"]
    return Ceilings(
        matmul_tflops=2 * size**3 / product.median_ms / 1e9,
        copy_tbps=2 * source.numel() / copy.median_ms / 1e9,
    )


def show(titles: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> str:
    """Print rows of cells as a table; returns the table as Markdown."""
    table = Table(*titles, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    return "\n".join(table_lines(titles, rows)) + "\n"


def commit() -> str:
    """Short hash of the checked-out commit, `+` appended when files differ from it.

    The variable OWL_COMMIT says it instead, for hosts that get a copy of the tree without its history; outside a
    checkout and without it, `unknown`.
    """
    if named := os.environ.get("OWL_COMMIT"):
        return named
    root = Path(__file__).resolve().parents[1]
    try:
        name = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=root, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + ("+" if dirty.returncode else "")


def machine_line(machine: dict[str, Any], ceilings: Ceilings | None) -> str:
    """Returns one line that says what the numbers below it were measured on."""
    parts = [f"{key} {value}" for key, value in machine.items() if isinstance(value, str | int | float)]
    if ceilings is not None:
        parts.append(f"matmul {ceilings.matmul_tflops:.0f} TFLOP/s")
        parts.append(f"copy {ceilings.copy_tbps:.2f} TB/s")
    return " · ".join(parts + [f"commit {commit()}"])


def origin(result: dict[str, Any]) -> str:
    """Returns the line of a stored document that says what its numbers were measured on."""
    parts = [f"{key} {value}" for key, value in result["machine"].items()]
    if result.get("ceilings"):
        parts.append(f"matmul {result['ceilings']['matmul_tflops']:.0f} TFLOP/s")
        parts.append(f"copy {result['ceilings']['copy_tbps']:.2f} TB/s")
    return " · ".join([*parts, f"commit {result.get('commit', 'unknown')}"])


def document(theme: str, ceilings: Ceilings | None, rows: list[dict[str, Any]], **extra: Any) -> dict[str, Any]:
    """Returns the JSON document of one benchmark: theme, machine, commit, ceilings and rows."""
    return {
        "theme": theme,
        "machine": describe_machine(),
        "commit": commit(),
        "ceilings": None if ceilings is None else asdict(ceilings),
        "rows": rows,
        **extra,
    }


def write(result: dict[str, Any], out: Path) -> None:
    """Write the document to `out`, making its folder."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def finish(result: dict[str, Any], out: Path | None) -> None:
    """Write the document to `out` when given, and print it as the last line of standard output."""
    if out is not None:
        write(result, out)
    print(json.dumps(result, sort_keys=True), flush=True)
