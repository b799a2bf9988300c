"""Makes our candidate as the runtime does: built in a child process, parity-checked, saved, loaded from bytes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from owl_wms import trt
from owl_wms.request import Request
from owl_wms.trt.check.parity import PSNR_GATE_DB


def build_ours(
    decoder: nn.Module, input_shape: tuple[int, int, int, int], precision: str, plans: tuple[str, ...] = ()
) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """Build and load a program for latents of `input_shape` [B, c, h, w] on the current GPU.

    Args:
        decoder: any float dtype and device; not changed.
        input_shape: static shape of the latents.
        precision: as `Request` takes it.
        plans: names of the plans to build and compare; empty means every plan that applies.

    Returns:
        The program as a function of bf16 latents, and what its build report says (plan, seconds,
        file size).

    Raises:
        FastPathError: when no plan builds or passes parity.
    """
    request = Request(
        input_shape=input_shape, precision=precision, plans=plans, device=f"cuda:{torch.cuda.current_device()}"
    )
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        report = trt.build_program(decoder, request, Path(folder))
        built = time.perf_counter()
        data = (Path(folder) / "program.pt2").read_bytes()
        program = trt.load_program(data, torch.device("cuda"))
        run: Callable[[Tensor], Tensor] = program
        if report.get("cuda_graph"):
            run = trt.GraphedProgram(program, torch.randn(input_shape, device="cuda", dtype=program.input_dtype))
        loaded = time.perf_counter()
    extra = {
        "build_seconds": built - begin,
        "load_seconds": loaded - built,
        "file_mib": len(data) / 2**20,
        "report": report,
        "psnr_gate_db": PSNR_GATE_DB.get(precision),
    }
    return lambda z_BCHW: run(z_BCHW.to(program.input_dtype)), extra
