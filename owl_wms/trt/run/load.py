"""From verified bytes to a callable program.

Why bytes: `torch.export.load` runs code from a crafted file and does not notice half of all flipped bits, so whoever
reads the file hashes it first and hands over those same bytes. Never `torch_tensorrt.load`, which tries other
unpicklers when the first one fails.

A program counts as loaded when it has repeated the output of its build (`check/output.py`).

Usage:
    program = load_program(entry.read("program.pt2"), "cuda:0")
    x = program(z)        # z of program.input_shape; cast to program.input_dtype
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.export import ExportedProgram

from owl_wms.errors import FastPathError
from owl_wms.interrupts import raise_interrupt
from owl_wms.trt.check import output
from owl_wms.trt.check.parity import example
from owl_wms.trt.library import engines, jit_kernels
from owl_wms.trt.run import calls, kernels

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


class LoadedProgram:
    """A loaded program: `[B, c, h, w] -> [B, C, H, W]`, one static shape, no gradients.

    The program of a streaming decoder takes a state after the latents and returns the next one after the frames.

    Attributes:
        input_shape, input_dtype: of the latents it takes; another dtype is cast, another shape refused.
        state: shapes of the state that it takes, none for other decoders.
        device: where it runs.
    """

    def __init__(
        self,
        module: Callable[..., Any],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        state: tuple[tuple[int, ...], ...] = (),
    ) -> None:
        self._module = module
        self.input_shape = shape
        self.input_dtype = dtype
        self.device = device
        self.state = state

    def __call__(self, z: Tensor, *state: Tensor) -> Any:
        if tuple(z.shape) != self.input_shape:
            raise FastPathError(
                "run", f"this program takes latents {list(self.input_shape)}; got {list(z.shape)}", "pad to that shape"
            )
        if tuple(tuple(tensor.shape) for tensor in state) != self.state:
            raise FastPathError("run", f"this program takes a state of {len(self.state)} tensors", "begin a new stream")
        z = z.to(device=self.device, dtype=self.input_dtype).contiguous()
        state = tuple(tensor.to(device=self.device, dtype=self.input_dtype) for tensor in state)
        # Engines run on the current device and stream, whichever device their weights are on; and a caller's autocast
        # would cast what the program was built without.
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), on_device:
            return self._module(z, *state)


def load_program(data: bytes, device: torch.device | str, *, library: bool = True) -> LoadedProgram:
    """Reads a program whose bytes the caller has verified: its call list if it has one, else the exported program.

    Args:
        data: the whole `program.pt2`.
        device: where it is to run.
        library: whether Torch-TensorRT compiled it, as its report says; otherwise that is not imported.

    Raises:
        FastPathError: stage "import" when Torch-TensorRT is missing, "parity" when the program does not repeat the
            output of its build, else "load".
    """
    return _guarded(_load, data, device, library)


def load_exported(
    data: bytes, device: torch.device | str, *, library: bool = True
) -> tuple[LoadedProgram, ExportedProgram]:
    """Reads the exported program, to run and as it is. Arguments and errors as for `load_program`."""
    return _guarded(_exported, data, device, library)


def _guarded(load: Callable[[bytes, torch.device], _T], data: bytes, device: torch.device | str, library: bool) -> _T:
    register_operators()
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                if not library:
                    return load(data, device)
                return engines.reading(lambda: load(data, device))  # engine class and operator are registered by it
    except FastPathError:
        raise
    except Exception as error:  # a damaged archive raises anything from KeyError to RuntimeError
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        remedy = "build it again with the installed torch and Torch-TensorRT, whose versions owl-wms doctor shows"
        raise FastPathError("load", f"{type(error).__name__}: {first}", remedy) from error


def _load(data: bytes, device: torch.device) -> LoadedProgram:
    program = None
    try:
        program = load_calls(data, device)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # of another version, damaged, or it does not repeat the output of the build
        raise_interrupt(error)
        _LOG.info("a call list is not used, so the exported program is loaded: %s: %s", type(error).__name__, error)
    return _exported(data, device)[0] if program is None else program


def load_calls(data: bytes, device: torch.device) -> LoadedProgram | None:
    """Returns the program behind the call list in the file; None if there is no list.

    Raises:
        FastPathError: stage "parity", as `confirm`.
        Exception: the list is refused (`calls.read`).
    """
    read = calls.read(data, device)
    if read is None:
        return None
    kernels.adopt(read.extra)
    jit_kernels.attach(read.engines, read.extra.get(jit_kernels.FILE, ""))
    (shape, dtype), *state = read.inputs
    program = LoadedProgram(read.module, shape, dtype, device, tuple(shape for shape, _ in state))
    return _confirmed(program, read.extra)


def _exported(data: bytes, device: torch.device) -> tuple[LoadedProgram, ExportedProgram]:
    # An empty dict would be replaced, not filled.
    extra: dict[str, str] = {kernels.FILE: "", jit_kernels.FILE: "", output.FILE: ""}
    exported = torch.export.load(io.BytesIO(data), extra_files=extra)
    kernels.adopt(extra)
    inputs = exported.graph_signature.user_inputs
    first, *state = (
        node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder" and node.name in inputs
    )
    shapes = tuple(tuple(tensor.shape) for tensor in state)
    elsewhere = {
        t.device for t in [*exported.state_dict.values(), *exported.constants.values()] if isinstance(t, Tensor)
    }
    if elsewhere - {device}:
        from torch.export.passes import move_to_device_pass

        exported = move_to_device_pass(exported, str(device))
    jit_kernels.attach(exported.constants.values(), extra[jit_kernels.FILE])
    program = LoadedProgram(exported.module(), tuple(first.shape), first.dtype, device, shapes)
    return _confirmed(program, extra), exported


def _confirmed(program: LoadedProgram, extra: dict[str, str]) -> LoadedProgram:
    if extra.get(output.FILE):
        confirm(program, output.RecordedOutput.unpack(extra[output.FILE]))
    return program


def confirm(program: LoadedProgram, built: output.RecordedOutput) -> None:
    """Decode the latents of the build once more. Raises FastPathError, stage "parity", for another output."""
    inputs = example(program.input_shape, program.state, program.input_dtype, program.device, built.seed)
    difference = built.compare(program(*inputs))
    if difference:
        _LOG.info("a loaded program repeats the output of its build within the limits, not bit for bit: %s", difference)


def register_operators() -> None:
    """Import our own operators, so that programs made with them can be read. Without Triton such programs fail to load;
    others do not.
    """
    try:
        importlib.import_module("owl_wms.ops")
    except Exception as error:  # a missing or broken dependency: a program that needs them says so when it is read
        raise_interrupt(error)
        _LOG.info("our operators cannot be imported: %s: %s", type(error).__name__, error)


def prepare() -> None:
    """Import what reading a call list takes, so that it can happen while something else runs.

    Not for a thread of its own: two threads that import parts of torch at once may meet each other's half-made modules.
    """
    register_operators()
    engines.attached()
