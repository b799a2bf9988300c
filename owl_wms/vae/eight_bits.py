"""Weights stored with 8 bits: a matrix as int8 with one bfloat16 factor per row, everything else in bfloat16.

A file of half the size of one in bfloat16. The factor of the matrix NAME is the tensor NAME.row_scale beside it; a
row's largest element becomes 127. Weights are unpacked to fp32 where they are read, so nothing else knows of it.

Usage:
    save_file(packed(model.state_dict()), "world.safetensors")
    weights = unpacked(load_file("world.safetensors"), "world.safetensors")
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from owl_wms.errors import CheckpointError

SCALE = ".row_scale"
_LARGEST = 127


def packed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors to store, contiguous and on the CPU.

    Args:
        weights: floating point, finite; those with two axes and more than one row and column are stored with 8 bits.
    """
    stored: dict[str, Tensor] = {}
    for name, value in weights.items():
        value = value.detach().float().cpu()
        if value.ndim != 2 or min(value.shape) < 2:
            stored[name] = value.bfloat16().contiguous()
            continue
        # Rounded up: a factor rounded down would send the largest element beyond 127.
        scale = (value.abs().amax(dim=1) / _LARGEST * (1 + 2**-8)).bfloat16()
        divisor = torch.where(scale == 0, torch.ones_like(scale), scale).float()
        stored[name] = (value / divisor[:, None]).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
        stored[name + SCALE] = scale
    return stored


def unpacked(weights: Mapping[str, Tensor], path: Path | str) -> dict[str, Tensor]:
    """Returns the weights of a file: int8 matrices times their factors in fp32, all others as they are.

    Args:
        weights: by name; without factors among them, all are returned as they are.
        path: where they are from, for messages.

    Raises:
        CheckpointError: a factor without its matrix, or of another number of rows.
    """
    whole = {name: value for name, value in weights.items() if not name.endswith(SCALE)}
    for key, scale in weights.items():
        if not key.endswith(SCALE):
            continue
        name = key.removesuffix(SCALE)
        matrix = whole.get(name)
        if matrix is None or matrix.dtype != torch.int8 or matrix.ndim != 2 or scale.shape != matrix.shape[:1]:
            held = "nothing" if matrix is None else f"{matrix.dtype} {list(matrix.shape)}"
            problem = f"{key} {list(scale.shape)} has no int8 matrix of so many rows beside it, but {held}"
            raise CheckpointError(f"{path}: {problem}; write the file again", path=path, mismatch=problem)
        whole[name] = matrix.float() * scale.float()[:, None]
    return whole
