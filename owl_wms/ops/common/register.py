"""Registers an op as `torch.ops.owl_wms.<name>`: schema, fake, and one function for CPU and CUDA.

Why not `torch.library.custom_op`: its Python wrapper costs twice as much a call, and every op here runs dozens of
times a decode. All ops are functional (no argument is written, no result aliases an argument), so an exported
program keeps them as they are and a compiler that does not know them leaves them to PyTorch.

Usage:
    define("grouped_conv(Tensor x, Tensor weight, Tensor bias, bool up2) -> Tensor", run=_run, fake=_fake)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from owl_wms.ops.common import gpu

NAMESPACE = "owl_wms"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
# What the kernels compute in; anything else (fp32 above all) takes the reference, on a GPU too.
KERNEL_DTYPES = (torch.bfloat16, torch.float16)


def define(schema: str, *, run: Callable[..., Tensor], fake: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Register `schema` with `run` for CPU and CUDA and `fake` for shapes; returns the callable op."""
    name = schema.split("(", 1)[0]
    _library.define(schema)
    _library.impl(name, run, "CPU")
    _library.impl(name, run, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    op: Callable[..., Tensor] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return op


def has_kernel(x: Tensor) -> bool:
    """Returns whether the CUDA kernels take `x`: 16-bit floats on a GPU of compute capability 8.0 or newer."""
    return x.is_cuda and x.dtype in KERNEL_DTYPES and gpu.capability(x.device) >= gpu.OLDEST


def dtype_defines(dtype: torch.dtype) -> tuple[str, ...]:
    """Preprocessor symbols that select the element type, see device.cuh."""
    return ("FP16",) if dtype == torch.float16 else ()


def aligned(x: Tensor) -> Tensor:
    """`x`, contiguous and at an address that sixteen-byte copies can start from."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
