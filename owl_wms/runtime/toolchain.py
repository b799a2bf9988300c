"""What turns a decoder into a program: the seam between the runtime and TensorRT.

Why a protocol: the runtime's promises (cached, then built, then PyTorch; never wrong; never down) do not depend on
TensorRT, and are tested on a machine without a GPU with a toolchain that stores ordinary ExportedPrograms.
`TensorRTToolchain` is the adapter to `owl_wms.trt`.

Usage:
    toolchain = TensorRTToolchain()
    toolchain.ready(torch.device("cuda", 0))        # None, or a FastPathError that says why not
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from owl_wms.errors import FastPathError, NoDeviceError
from owl_wms.runtime import turns

Program = Callable[[Tensor], Tensor]
Progress = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProgramRequest:
    """One program that the runtime wants.

    Attributes:
        shape: static `(B, c, h, w)` of its input.
        device: where it will run.
        precision, plans, workspace_size, calibration: as in TensorRTConfig.
        calibration_digest: what the key says of the calibration file; the build refuses another file.
    """

    shape: tuple[int, int, int, int]
    device: torch.device
    precision: str
    plans: tuple[str, ...]
    workspace_size: int
    calibration: Path | None = None
    calibration_digest: str = ""


class Toolchain(Protocol):
    """Builds and loads programs. Every method may raise anything; the runtime turns it into a FastPathError of that
    stage.

    All but `build` are called inside `turns.tracing()`; a `build` that exports or imports in this process enters it for
    that time. A toolchain may also have `prepare()`: what `load` imports, imported ahead; it never raises.
    """

    name: str

    def ready(self, device: torch.device) -> FastPathError | None:
        """Why nothing can be built or loaded for `device`; None when it can."""

    def key_material(self, decoder: nn.Module, request: ProgramRequest) -> Mapping[str, Any]:
        """Everything the program depends on, JSON-ready."""

    def build(
        self, decoder: nn.Module, request: ProgramRequest, folder: Path, progress: Progress | None
    ) -> Mapping[str, Any]:
        """Write `folder/program.pt2`, checked for parity; return a report."""

    def load(self, data: bytes, request: ProgramRequest, report: Mapping[str, Any]) -> Program:
        """The callable behind verified bytes: takes `request.shape` in any real dtype on `request.device`."""


class TensorRTToolchain:
    """Torch-TensorRT, either flavour, imported when a CUDA decoder first needs it."""

    name = "tensorrt"

    def ready(self, device: torch.device) -> FastPathError | None:
        if device.type != "cuda":
            remedy = "move the decoder to a GPU" if torch.cuda.is_available() else "run on a machine with an NVIDIA GPU"
            return NoDeviceError("no CUDA device: the decoder is on the CPU", remedy)
        from owl_wms import trt

        status = trt.run_status()  # a cached program needs no more; a build imports the rest in a process of its own
        return None if status.available else FastPathError("import", status.reason, status.remedy)

    def key_material(self, decoder: nn.Module, request: ProgramRequest) -> Mapping[str, Any]:
        from owl_wms import trt

        return trt.key_material(decoder, self._spec(request))

    def build(
        self, decoder: nn.Module, request: ProgramRequest, folder: Path, progress: Progress | None
    ) -> Mapping[str, Any]:
        from owl_wms import trt

        # While the building process works, this one has nothing to do, and then a program to read.
        return trt.build_program(decoder, self._spec(request), folder, progress=progress, meanwhile=self.prepare)

    def prepare(self) -> None:
        """Import what reading a program takes. Never raises."""
        from owl_wms import trt

        with turns.tracing():
            trt.prepare_to_load()

    def load(self, data: bytes, request: ProgramRequest, report: Mapping[str, Any]) -> Program:
        from owl_wms import trt

        program = trt.load_program(data, request.device)
        if not report.get("cuda_graph"):
            return program
        dtype = program.input_dtype
        graphed = trt.GraphedProgram(program, torch.zeros(request.shape, dtype=dtype, device=program.device))
        return lambda z: graphed(z.to(dtype))  # the graph's input has one dtype; another would run without the graph

    @staticmethod
    def _spec(request: ProgramRequest) -> Any:
        from owl_wms import trt

        return trt.BuildSpec(
            input_shape=request.shape,
            precision=request.precision,
            plans=request.plans,
            device_index=request.device.index or 0,
            workspace_size=request.workspace_size,
            calibration="" if request.calibration is None else str(request.calibration.absolute()),
            calibration_digest=request.calibration_digest,
        )


class JitToolchain(TensorRTToolchain):
    """Torch-TensorRT through `torch.compile`: built in this process at the first decode, nothing kept, no isolation."""

    name = "tensorrt-jit"

    def ready(self, device: torch.device) -> FastPathError | None:
        from owl_wms import trt

        unready = super().ready(device)
        status = trt.status() if unready is None else None  # it builds in this process
        return unready if status is None or status.available else FastPathError("import", status.reason, status.remedy)

    def compile(self, decoder: nn.Module, request: ProgramRequest) -> Program:
        """The compiled decoder; builds at its first call and raises there."""
        from owl_wms import trt

        # `auto` would build twice inside the caller's process; bf16 has the range that fp16 lacks.
        precision = "bf16" if request.precision == "auto" else request.precision
        plan = request.plans[0] if request.plans else "tensorrt"
        return trt.compile_for_training(
            decoder, precision=precision, plan=plan, workspace_size=request.workspace_size, strict=True
        )
