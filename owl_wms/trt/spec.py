"""From a request to what the compiler is given: dtypes and compile settings of each precision.

Usage:
    compile_settings(request, "bf16")        # exactly what torch_tensorrt.compile receives
"""

from __future__ import annotations

from typing import Any

import torch

from owl_wms.request import Request
from owl_wms.trt.library import versions

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""Precision -> dtype of the module's activations; fp8 and int8 plans compute inside a bf16 program."""


def dtype_of(precision: str) -> torch.dtype:
    """Dtype of a program's input and output at `precision`; 8-bit precisions keep bf16 at their borders."""
    return DTYPES.get(precision, torch.bfloat16)


def compile_settings(request: Request, precision: str) -> dict[str, Any]:
    """Every keyword `torch_tensorrt.compile` gets at `precision`, JSON-ready.

    Precision itself is not among them: it is the module's dtype (`enabled_precisions` is ignored from 2.13 on).
    Torch-TensorRT's engine cache stays off, because its key leaves out weights and operator arguments. TF32 is switched
    off where fp32 was asked for. Keywords that the installed release does not take are left out.
    """
    wanted = {
        "use_explicit_typing": True,
        "immutable_weights": True,
        "cache_built_engines": False,
        "reuse_cached_engines": False,
        "pass_through_build_failures": True,
        "require_full_compilation": False,
        "use_python_runtime": False,
        "truncate_double": False,
        "disable_tf32": precision == "fp32",
        "min_block_size": request.min_block_size,
        "workspace_size": request.workspace_size,
    }
    return versions.accepted(wanted)
