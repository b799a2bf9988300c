"""Adapters between the runtime and TensorRT, imported when a CUDA decoder first needs it.

`TensorRT` builds in a process of its own and stores what it made. `Jit` compiles in this process and stores nothing.

Usage:
    decode = VideoDecode(decoder, batch_size=8, toolchain=Jit())
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from owl_wms.cache import Key
from owl_wms.errors import FastPathError, NoDeviceError
from owl_wms.files import WINDOWS
from owl_wms.request import Request
from owl_wms.runtime import turns
from owl_wms.runtime.programs import Loaded, Program, Progress, Stored, first_run, staged, without_autocast
from owl_wms.settings import TensorRTConfig


def cannot_compile(request: Request) -> FastPathError | None:
    """Returns why nothing can be compiled or loaded for the request's device; None when it is a GPU, under Linux."""
    if WINDOWS and request.device.startswith("cuda"):
        reason = "programs are neither built nor loaded on Windows itself, where nothing of this was ever run"
        return FastPathError("import", reason, "run in WSL, which works as Linux does")
    if request.device.startswith("cuda"):
        return None
    if torch.cuda.is_available():
        return NoDeviceError("the decoder is on the CPU, which is no CUDA device", "move the decoder to a GPU")
    reason = "the decoder is on the CPU, and this machine has no CUDA device"
    return NoDeviceError(reason, "run on a machine with an NVIDIA GPU")


class TensorRT(Stored):
    """Torch-TensorRT, either flavour."""

    name = "tensorrt"

    def ready(self, request: Request) -> FastPathError | None:
        from owl_wms import trt

        unready = cannot_compile(request)
        if unready is not None:
            return unready
        if trt.without_library(request):  # a plan of ours may do, and the build process finds out which
            return None
        status = trt.run_status()  # a stored program needs no more; a build imports the rest in a process of its own
        return None if status.available else FastPathError("import", status.reason, status.remedy)

    def key_material(self, decoder: nn.Module, request: Request) -> Mapping[str, Any]:
        from owl_wms import trt

        return trt.key_material(decoder, request)

    def build(
        self,
        decoder: nn.Module,
        request: Request,
        key: Key,
        folder: Path,
        progress: Progress | None,
        meanwhile: Callable[[], None],
    ) -> Mapping[str, Any]:
        from owl_wms import trt

        graph = key.material["graph"]
        return trt.build_program(decoder, request, folder, graph=graph, progress=progress, meanwhile=meanwhile)

    def prepare(self) -> None:
        from owl_wms import trt

        trt.prepare_to_load()

    def load(self, data: bytes, request: Request, report: Mapping[str, Any]) -> Program:
        from owl_wms import trt

        program = trt.load_program(data, request.device, library=bool(report.get("library", True)))
        if not report.get("cuda_graph"):
            return program
        if request.state:
            shapes = (request.input_shape, *request.state)
            inputs = [torch.zeros(shape, dtype=program.input_dtype, device=program.device) for shape in shapes]
            return trt.GraphedStep.attempt(program, inputs)[0] or program
        example = torch.zeros(request.input_shape, dtype=program.input_dtype, device=program.device)
        return trt.GraphedProgram(program, example)


class Jit:
    """Torch-TensorRT through `torch.compile`: built in this process at the first decode, not isolated, not stored."""

    name = "tensorrt-jit"
    background = False  # torch.compile in one thread may meet torch.compile in another

    def ready(self, request: Request) -> FastPathError | None:
        """Returns why nothing can be compiled here; None when it can."""
        from owl_wms import trt

        unready = cannot_compile(request)
        if unready is not None:
            return unready
        status = trt.status()  # all of it is needed here, for this process builds
        return None if status.available else FastPathError("import", status.reason, status.remedy)

    @without_autocast
    def obtain(
        self, decoder: nn.Module, request: Request, settings: TensorRTConfig, progress: Progress | None
    ) -> Loaded:
        """Compile for this request. Raises FastPathError only."""
        from owl_wms import trt

        with turns.tracing():
            unready = staged("import", self.ready, request)
            if unready is not None:
                raise unready
            begin = time.perf_counter()
            # `auto` would build twice inside the caller's process; bf16 has the range that fp16 lacks.
            precision = "bf16" if request.precision == "auto" else request.precision
            program = trt.compile_for_training(
                decoder,
                precision=precision,
                plan=request.plans[0] if request.plans else "",
                workspace_size=request.workspace_size,
                strict=True,
            )
            staged("build", first_run, program, request)
        return Loaded(
            program=program,
            built=True,
            name="in memory",
            not_kept=f"{self.name} stores nothing on disk",
            report={
                "precision": precision,
                "plan": program.plan,
                "latency_ms": program.latency_ms,
                "relative_error": program.relative_error,
            },
            file_bytes=0,
            build_seconds=time.perf_counter() - begin,
            load_seconds=0.0,
        )
