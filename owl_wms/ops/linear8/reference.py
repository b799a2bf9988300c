"""References of the 8-bit products in plain PyTorch.

Usage:
    codes = reference(x, weight, scale, bias, gain)                  # x [B, H, W, K] codes -> [B, H, W, N] codes
    u, codes = add_reference(u, x, weight, scale, gain, inverse)     # u [B, H, W, N] 16-bit
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from owl_wms.ops.codes import encode
from owl_wms.ops.grouped_conv.reference import SLOPE
from owl_wms.ops.up_residual.reference import shuffle


def _product(x: Tensor, weight: Tensor) -> Tensor:
    # In double: sums of integer products are exact, as they are in the kernel.
    return (x.double() @ weight.double().t()).float()


def _per_image(gain: Tensor, index: int) -> Tensor:
    return gain[:, index].view(-1, 1, 1, 1)


def reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
    """`encode(leaky(x weight^T * scale + bias / gain))`."""
    y = _product(x, weight) * scale + bias * _per_image(gain, 1)
    return encode(F.leaky_relu(y, SLOPE), x.dtype).contiguous()


def add_reference(
    u: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    gain: Tensor,
    inverse: Tensor | None,
    shortcut: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`u + gain * scale * x weight^T + shuffle(shortcut)` in the dtype of `u`, and codes in steps of `gain / inverse`.

    Without a shortcut nothing is added for it, without `inverse` there are no codes.
    """
    total = u.float() + _product(x, weight) * scale * _per_image(gain, 0)
    if shortcut is not None:
        total += shuffle(shortcut, u.shape[-1])
    codes = None if inverse is None else encode(total * inverse * _per_image(gain, 1), x.dtype).contiguous()
    return total.to(u.dtype), codes
