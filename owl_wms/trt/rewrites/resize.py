"""Bicubic resizing as two products with constant matrices: exact, and what tensor cores are for.

Why it exists: TensorRT lowers bicubic to a slow pointwise kernel full of index arithmetic (7.9 of 19.9 ms of the
distilled decoder on an H200; two matrix products take that program from 19.5 to 15.4 ms). A resize is linear and
separable, `y = R x C`, so for a static size both factors are constants.

The kernel is torch's: cubic convolution (R. Keys, "Cubic convolution interpolation for digital image processing", 1981)
with a = -0.75, half-pixel centres, clamped borders, no antialias.

Usage:
    up = MatmulResize((8, 8), (16, 16), dtype=torch.bfloat16)
    y = up(x)        # [B, C, 8, 8] -> [B, C, 16, 16], F.interpolate(..., mode="bicubic") up to rounding
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CUBIC_A = -0.75


def bicubic_matrix(size_in: int, size_out: int) -> Tensor:
    """`[size_out, size_in]` float64; row i holds the weights of output i. Both sizes >= 1."""
    matrix = torch.zeros(size_out, size_in, dtype=torch.float64, device="cpu")
    scale = size_in / size_out
    for row in range(size_out):
        centre = (row + 0.5) * scale - 0.5
        first = int(centre // 1)
        offset = centre - first
        for tap, weight in zip(range(first - 1, first + 3), _cubic_weights(offset), strict=True):
            matrix[row, min(max(tap, 0), size_in - 1)] += weight
    return matrix


def _cubic_weights(t: float) -> tuple[float, float, float, float]:
    def near(x: float) -> float:  # |x| <= 1
        return ((CUBIC_A + 2) * x - (CUBIC_A + 3)) * x * x + 1

    def far(x: float) -> float:  # 1 < |x| < 2
        return ((CUBIC_A * x - 5 * CUBIC_A) * x + 8 * CUBIC_A) * x - 4 * CUBIC_A

    return far(t + 1), near(t), near(1 - t), far(2 - t)


def fitted(matrix: Tensor, dtype: torch.dtype) -> Tensor | None:
    """`matrix` in `dtype` when that costs nothing that matters, else None.

    Doubling has weights of 225, 67, -9 and -27 in 256ths, which fp16 and bf16 hold exactly. Only where the border is
    clamped do three of them add up to 283/256, one bit too many for bf16. Such a border row is rounded so that it still
    sums to one (284 and -28): constant images stay constant, and the two border pixels differ by 1/256 of the step
    between them. A matrix whose inner rows would be rounded too (any other factor in bf16, or 512 to 360) is None:
    rounded weights everywhere are an error everywhere."""
    rounded = matrix.to(dtype).double()
    off = (rounded != matrix).any(dim=1).nonzero().flatten().tolist()
    border = {0, 1, matrix.shape[0] - 2, matrix.shape[0] - 1}
    if not set(off) <= border:
        return None
    for row in off:
        taps = matrix[row].nonzero().flatten()
        smallest = taps[matrix[row, taps].abs().argmin()]
        rounded[row, smallest] += 1.0 - rounded[row].sum()
    exact = torch.equal(rounded.to(dtype).double(), rounded)
    return rounded.to(dtype) if exact else None


class MatmulResize(nn.Module):
    """`[B, C, H, W] -> [B, C, H', W']` in x's dtype.

    Args:
        size_in: `(H, W)`.
        size_out: `(H', W')`.
        dtype: of the activations. The products run in it where it can hold the weights (`fitted`: doubling), otherwise
            in float32 (360x640 from 512x512, factor 4 in bf16).
    """

    def __init__(self, size_in: tuple[int, int], size_out: tuple[int, int], *, dtype: torch.dtype) -> None:
        super().__init__()
        rows, columns = bicubic_matrix(size_in[0], size_out[0]), bicubic_matrix(size_in[1], size_out[1]).T.contiguous()
        narrow_rows, narrow_columns = fitted(rows, dtype), fitted(columns.T, dtype)
        wide = dtype if dtype == torch.float64 else torch.float32
        if narrow_rows is None or narrow_columns is None:
            rows, columns = rows.to(wide), columns.to(wide)
        else:
            rows, columns = narrow_rows, narrow_columns.T
        self.rows: Tensor
        self.columns: Tensor
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(self.rows, torch.matmul(x.to(self.rows.dtype), self.columns))
        return y.to(x.dtype)
