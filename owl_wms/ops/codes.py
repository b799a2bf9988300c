"""The two 8-bit number formats that stage products run in, and the rule by which a value becomes a code.

Why it exists: kernels and references must agree on rounding and saturation to the last bit. A code stands for
`code * step * gain`: steps are fixed, one per channel, found by calibration and folded into weights and biases; `gain`
is one factor an image, at least 1, for latents that reach further than the calibration's did.

    int8   nearest integer, halves to even, saturating at 127 either side
    fp8    e4m3 (OCP 8-bit floating point specification, 2023), saturating at 448; no infinities

Usage:
    codes = encode(x / step, torch.int8)
    gain = torch.ops.owl_wms.code_gain(z, 4.5)       # z [B, c, h, w] -> [B, 2]: gain and its inverse
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl_wms.ops.common.register import define

FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Precision -> dtype of its codes."""
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Dtype -> largest value a code can hold."""
DEFINES = {torch.int8: ("INT8",), torch.float8_e4m3fn: ("FP8",)}
"""Dtype -> preprocessor symbols that select it in CUDA sources."""


def encode(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes of `x`, which already is in units of the step."""
    largest = LARGEST[dtype]
    bounded = x.float().clamp(-largest, largest)
    return (bounded.round() if dtype == torch.int8 else bounded).to(dtype)


def quantise_rows(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of `weight [N, ...]`, each row in its own full range, and the rows' steps, fp32 `[N]`."""
    rows = weight.float().flatten(1)
    step = rows.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny * 2**20) / LARGEST[dtype]
    return encode(rows / step[:, None], dtype).view(weight.shape), step


def _gain(z: Tensor, reach: float) -> Tensor:
    reached = z.float().abs().flatten(1).amax(dim=1) / reach
    # A latent that is not finite must not decide the steps of an image; its trace runs through the residuals anyway.
    gain = torch.where(reached.isfinite(), reached, 1.0).clamp_min(1.0)
    return torch.stack([gain, gain.reciprocal()], dim=1)


def _fake_gain(z: Tensor, reach: float) -> Tensor:
    return z.new_empty(z.shape[0], 2, dtype=torch.float32)


code_gain = define("code_gain(Tensor z, float reach) -> Tensor", run=_gain, fake=_fake_gain)
