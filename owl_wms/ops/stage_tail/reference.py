"""Reference of `stage_tail` in plain PyTorch.

Usage:
    y = reference(low, hidden, shortcut, w2, b2, w3)     # low [B, h, w, C] -> [B, 2h, 2w, C]
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from owl_wms.ops.grouped_conv.reference import reference as grouped_conv
from owl_wms.ops.up_residual.reference import reference as up_residual


def reference(low: Tensor, hidden: Tensor, shortcut: Tensor | None, w2: Tensor, b2: Tensor, w3: Tensor) -> Tensor:
    """The op in plain PyTorch; arguments as for the op in `owl_wms.ops.stage_tail`."""
    return up_residual(low, shortcut) + F.linear(grouped_conv(hidden, w2, b2, True), w3)
