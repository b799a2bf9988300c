"""Registers an op as `torch.ops.owl_wms.<name>`: schema, fake, and one function for CPU and CUDA.

Why not `torch.library.custom_op`: its Python wrapper costs twice as much per call, and every op here runs dozens
of times per decode. All ops are functional (no argument is written, no result aliases an argument), so an exported
program keeps them as they are and a compiler that does not know them leaves them to PyTorch.

Operator by operator, a kernel that this GPU, driver or compiler cannot have is replaced by a simpler way to compute the
same, down to plain PyTorch: one kernel that is refused must not leave a whole decoder to PyTorch.

Usage:
    define("grouped_conv(Tensor x, Tensor weight, Tensor bias, bool up2) -> Tensor", run=_run, fake=_fake,
           simpler=(reference,))
    refused()       # {"grouped_conv": "Kernel(...) does not compile for sm_80: ..."}, of this process
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from owl_wms.ops.common import gpu
from owl_wms.ops.common.driver import KernelRefused

_T = TypeVar("_T")
_LOG = logging.getLogger(__name__)
NAMESPACE = "owl_wms"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
# What the kernels compute in; anything else (fp32 above all) takes the reference, on a GPU too.
KERNEL_DTYPES = (torch.bfloat16, torch.float16)
# Where a kernel was refused: operator, shapes and other arguments -> index of the first way that is left.
_left: dict[Hashable, int] = {}
_reasons: dict[str, str] = {}


def define(
    schema: str,
    *,
    run: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    simpler: tuple[Callable[..., Tensor], ...] = (),
) -> Callable[..., Tensor]:
    """Register an operator.

    Args:
        schema: as torch.library takes it.
        run: computes it on CPU and CUDA.
        fake: its shapes.
        simpler: ways to compute the same with the same arguments, tried in order where a kernel of `run` is refused;
            the last needs no kernel of ours.

    Returns:
        The callable op.
    """
    name = schema.split("(", 1)[0]

    def body(*arguments: Any) -> Tensor:
        return first_that_runs(name, (run, *simpler), *arguments)

    _library.define(schema)
    for backend in ("CPU", "CUDA"):
        _library.impl(name, body if simpler else run, backend)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    op: Callable[..., Tensor] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return op


def require(holds: bool, message: Callable[[], str]) -> None:
    """Raises RuntimeError unless an argument is as an operator wants it.

    Not `torch._check`: its first call imports sympy, 3.5 of the 3.8 seconds that the first decode of a cached program
    took (one H200 machine, 2026-11-29). Shapes are static here, so there is nothing symbolic to reason about.
    """
    if not holds:
        raise RuntimeError(message())


def has_kernel(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Returns whether the CUDA kernels take `x`: 16-bit floats on a GPU of compute capability 8.0 or newer.

    `dtype` is the result's, where that decides and not the type of `x`.
    """
    return x.is_cuda and (dtype or x.dtype) in KERNEL_DTYPES and gpu.capability(x.device) >= gpu.OLDEST


def dtype_defines(dtype: torch.dtype) -> tuple[str, ...]:
    """Preprocessor symbols that select the element type, see device.cuh."""
    return ("FP16",) if dtype == torch.float16 else ()


def aligned(x: Tensor) -> Tensor:
    """`x`, contiguous and at an address that sixteen-byte copies can start from."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def first_that_runs(name: str, ways: Sequence[Callable[..., _T]], *arguments: Any) -> _T:
    """Compute `ways[0](*arguments)`, or the next way wherever a kernel is refused.

    A refusal is remembered for these shapes, so that the next call, a CUDA graph's capture among them, does not try it
    again. Any other error is raised: after a kernel has begun, nothing is computed a second time.

    Args:
        name: for the warning, which is logged once per name.
        ways: each with the same result; one that writes into an argument launches its only kernel last.
        arguments: tensors, lists of them, numbers.
    """
    first = _left.get(_signature(name, arguments), 0) if _left else 0
    for place in range(first, len(ways) - 1):
        try:
            return ways[place](*arguments)
        except Exception as error:
            reason = _refusal(error)
            if not reason:
                raise
        _left[_signature(name, arguments)] = place + 1
        if name not in _reasons:
            _reasons[name] = reason
            _LOG.warning("%s is computed by a simpler and slower way on this machine: %s", name, reason)
    return ways[-1](*arguments)


def refused() -> dict[str, str]:
    """Operator -> why a kernel of it was refused in this process."""
    return dict(_reasons)


def _refusal(error: Exception) -> str:
    """Returns why there is no such kernel here, in one line; empty for an error of any other kind."""
    text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    without_triton = isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "triton"
    if isinstance(error, KernelRefused) or without_triton:
        return text
    # Triton raises whatever its parts raise: no C compiler, too much shared memory, an assembler that is too old.
    # Errors of a running kernel begin with these words, and memory that ran out is torch's own error.
    if text.startswith("Triton Error [CUDA]") or isinstance(error, torch.OutOfMemoryError):
        return ""
    place = error.__traceback__
    while place is not None:
        if place.tb_frame.f_globals.get("__name__", "").startswith("triton."):
            return f"{type(error).__name__}: {text}"
        place = place.tb_next
    return ""


def _signature(name: str, arguments: Sequence[Any]) -> Hashable:
    return name, tuple(_fact(value) for value in arguments)


def _fact(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return tuple(_fact(one) for one in value)
    found: Hashable = value
    return found
