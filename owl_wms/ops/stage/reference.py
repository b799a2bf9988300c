"""Reference of `stage` in plain PyTorch, in the order the decoder is written in: project, enlarge, blocks, shortcut.

Usage:
    y = reference(x, shortcut, proj, w1, b1, w2, b2, w3, scale=2)     # x [B, h, w, Cin] -> [B, 2h, 2w, C]
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from owl_wms.ops.grouped_conv.reference import enlarge
from owl_wms.ops.grouped_conv.reference import reference as grouped_conv
from owl_wms.ops.up_residual.reference import shuffle


def reference(
    x: Tensor,
    shortcut: Tensor | None,
    proj: Tensor | None,
    w1: list[Tensor],
    b1: list[Tensor],
    w2: list[Tensor],
    b2: list[Tensor],
    w3: list[Tensor],
    scale: int,
) -> Tensor:
    """The stage in plain PyTorch; arguments as for the op in `owl_wms.ops.stage`."""
    u = x if proj is None else F.linear(x, proj)
    u = u if scale == 1 else enlarge(u, scale)
    for up, bias, taps, taps_bias, down in zip(w1, b1, w2, b2, w3, strict=True):
        u = u + F.linear(grouped_conv(F.linear(u, up, bias), taps, taps_bias, False), down)
    return u if shortcut is None else u + shuffle(shortcut, u.shape[-1])
