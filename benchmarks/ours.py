"""Makes our candidate as the runtime does: built in a child process, parity-checked, saved, loaded from bytes.

And apart from that: what the plan `ops` runs, without the build, also as an older GPU would run it.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from owl_wms import trt
from owl_wms.ops.codes import FORMATS
from owl_wms.ops.common import gpu, machine_code, nvrtc
from owl_wms.request import Request
from owl_wms.runtime.toolchain import TensorRT
from owl_wms.settings import TensorRTConfig
from owl_wms.trt.check.parity import PSNR_GATE_DB
from owl_wms.trt.graph.recording import Recording
from owl_wms.trt.plans import PLANS
from owl_wms.trt.spec import dtype_of
from owl_wms.vae import fold_weight_norm


def build_ours(
    decoder: nn.Module,
    input_shape: tuple[int, int, int, int],
    precision: str,
    plans: tuple[str, ...] = (),
    cache: Path | None = None,
    device: str = "",
) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """Build and load a program for latents of `input_shape` [B, c, h, w] on a GPU.

    Args:
        decoder: any float dtype and device; not changed.
        input_shape: static shape of the latents.
        precision: as `Request` takes it.
        plans: names of the plans to build and compare; empty means every plan that applies.
        cache: directory of stored programs, in which a program is looked for and put; None builds one and drops it.
        device: where it is built and run; the current GPU if empty. A CPU runs our operators' references, and stores
            no program.

    Returns:
        The program as a function of bf16 latents, and what its build report says (plan, seconds,
        file size).

    Raises:
        FastPathError: when no plan builds or passes parity.
    """
    device = device or f"cuda:{torch.cuda.current_device()}"
    request = Request(input_shape=input_shape, precision=precision, plans=plans, device=device)
    extra: dict[str, Any] = {"psnr_gate_db": PSNR_GATE_DB.get(precision)}
    if cache is not None:
        settings = TensorRTConfig(precision=precision, plans=plans, cache_dir=cache)
        stored = TensorRT().obtain(decoder, Request.of(settings, input_shape, request.device), settings, None)
        extra |= {"build_seconds": stored.build_seconds, "load_seconds": stored.load_seconds, "report": stored.report}
        dtype = getattr(torch, stored.report["input_dtype"])
        return lambda z_BCHW: stored.program(z_BCHW.to(dtype)), {**extra, "file_mib": stored.file_bytes / 2**20}
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        report = trt.build_program(decoder, request, Path(folder))
        built = time.perf_counter()
        data = (Path(folder) / "program.pt2").read_bytes()
        program = trt.load_program(data, device, library=report.get("library", True))
        run: Callable[[Tensor], Tensor] = program
        if report.get("cuda_graph"):
            run = trt.GraphedProgram(program, torch.randn(input_shape, device=device, dtype=program.input_dtype))
        loaded = time.perf_counter()
    extra |= {
        "build_seconds": built - begin,
        "load_seconds": loaded - built,
        "file_mib": len(data) / 2**20,
        "report": report,
    }
    return lambda z_BCHW: run(z_BCHW.to(program.input_dtype)), extra


def build_graph(
    decoder: nn.Module,
    input_shape: tuple[int, int, int, int],
    precision: str,
    older: gpu.Capability | None = None,
    device: str = "cuda",
) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """The fused form of `decoder` as one CUDA graph, made in this process: what the program of plan `ops` runs.

    Args:
        decoder: weight norm live or folded, any float dtype and device; not changed.
        input_shape: static shape of the latents [B, c, h, w].
        precision: fp16, bf16, or 8-bit products with borders in bf16: fp8, int8.
        older: the kernels that a GPU of this compute capability gets, compiled to its intermediate code, which this
            GPU's driver translates; at most this GPU's. Matrix products of the libraries are those of this GPU.
        device: `cuda` for the current GPU. A `cpu` runs our operators' references, and captures nothing.

    Returns:
        The graph as a function of latents, the targets that our CUDA kernels were compiled for, and in 8 bits the least
        PSNR that passes.

    Raises:
        FastPathError: the decoder has no fused form.
        ValueError: it has none with 8-bit products.
        RuntimeError: no graph could be captured: without one, a later call of an older GPU's kernels would run this
            GPU's own.
    """
    plan = PLANS["tensorrt+ops8" if precision in FORMATS else "ops"]
    index = torch.cuda.current_device() if device == "cuda" else None
    request = Request(input_shape=input_shape, precision=precision, device=device if index is None else f"cuda:{index}")
    as_older = contextlib.nullcontext() if older is None else gpu.treated_as(older)
    with as_older, torch.no_grad(), machine_code.watched() as used:
        # Neither plan looks at the recorded forward.
        unread = Recording(text="", shapes=None, input_shape=input_shape, dtype=torch.float32)
        folded = fold_weight_norm(decoder).float()
        module, _ = plan.lower(folded if index is None else folded.cuda(), request, precision, unread)
        graphed = trt.GraphedProgram(module, torch.randn(input_shape, device=device, dtype=dtype_of(precision)))
        targets = sorted(
            {f"{kernel.op} {nvrtc.architecture_of(kernel, index)}" for kernel in used if index is not None}
        )
    if not graphed.graphed and index is not None:
        raise RuntimeError(f"no CUDA graph: {graphed.reason}")
    return graphed, {"plan": "ops", "targets": targets, "psnr_gate_db": PSNR_GATE_DB.get(precision)}
