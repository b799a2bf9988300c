"""Builds AutoencoderDC with TensorRT alone, which cannot run all of it in bf16, and shows what isolation finds.

Part of `python -m benchmarks.sana --isolate`.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import relative_l2
from benchmarks.harness import console
from benchmarks.sana_forms import PIXELS, latents, make, reference
from owl_wms import trt
from owl_wms.request import Request


@torch.no_grad()
def isolate(form: str, seconds: float) -> tuple[dict[str, Any], bool]:
    """Builds with TensorRT alone in bf16, whose depthwise convolutions have no execution context there, in at most
    `seconds`, and says what isolation found, how long it took and whether the program survives being saved.
    """
    z = latents(form, 1, 512 // PIXELS[form])
    decoder = make(form)
    wanted = reference(decoder, z)
    eager = copy.deepcopy(decoder).bfloat16()
    request = Request(
        input_shape=tuple(z.shape),  # type: ignore[arg-type]
        precision="bf16",
        plans=("tensorrt",),
        timeout_seconds=seconds,
    )
    row: dict[str, Any] = {"form": form, "eager_error": relative_l2(eager(z), wanted)}
    begin = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = trt.build_program(eager, request, Path(folder), progress=_tell(form))
            row["build_seconds"] = time.perf_counter() - begin
            data = (Path(folder) / "program.pt2").read_bytes()
        programs = [trt.load_program(data, torch.device("cuda")) for _ in range(2)]
        first, second = (program(z) for program in programs)
        row |= {"report": report, "bit_equal": torch.equal(first, second), "error": relative_l2(first, wanted)}
    except Exception as error:
        row |= {"reason": f"{type(error).__name__}: {error}", "build_seconds": time.perf_counter() - begin}
        console.print(f"{form}: {row['reason']}", markup=False)
        return row, False
    errors = f"error {row['error']:.2e} (eager {row['eager_error']:.2e})"
    console.print(f"{form}: {row['build_seconds']:.0f} s in all, {errors}, two loads bit-equal: {row['bit_equal']}")
    for candidate in report.get("candidates", []):
        tries = candidate.get("attempts", [])
        seconds = sum(one["seconds"] for one in tries)
        console.print(
            f"  {candidate['plan']}: {candidate.get('engines')} engines; {len(tries)} tries in {seconds:.0f} s"
        )
        for key in ("reason", "failed_alone", "kept_modules", "kept_minimal", "kept_reason", "pytorch_operators"):
            console.print(f"    {key}: {str(candidate.get(key))[:500]}", markup=False)
    return row, bool(row["bit_equal"]) and row["error"] <= 2 * row["eager_error"]


def _tell(form: str) -> Callable[[dict[str, Any]], None]:
    """Returns what prints the steps of a build as they begin, for a run that may be killed."""
    begin = time.perf_counter()

    def tell(event: dict[str, Any]) -> None:
        if event["stage"] != "tensorrt":
            rest = {key: str(value)[:160] for key, value in event.items() if key not in ("stage", "elapsed")}
            console.print(f"{form} {time.perf_counter() - begin:6.1f} s  {event['stage']} {rest or ''}", markup=False)

    return tell
