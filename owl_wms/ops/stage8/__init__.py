"""`owl_wms::stage8`: one decoder stage whose full-resolution products run in 8 bits, NHWC.

Why one op: as in `stage`, the residual is accumulated in place and buffers are reused. What runs on the small input
(projection, first product) stays in 16 bits: it is a sixteenth of a stage's work, and its rounding would be enlarged
with it. The residual stays in 16 bits throughout, so no error of a code is carried further than its own block.

Usage:
    y = stage8(x, shortcut, proj, w1, b1, w2, b2, up, up_scale, up_bias, taps, taps_scale, taps_bias,
               down, down_scale, inverse, gain, scale=2)
    # first block: w1 [2C, C], b1 [2C], w2 packed and b2, both divided by the steps of its middle's codes
    # blocks j >= 1: up codes [2C, C], up_scale, up_bias [2C]; taps, taps_scale, taps_bias as grouped_conv8 wants them
    # all blocks: down codes [C, 2C], down_scale [C]; all but the last: inverse [C], one over the steps of its output
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from owl_wms.ops.common.register import define
from owl_wms.ops.grouped_conv8 import grouped_conv8
from owl_wms.ops.linear8 import add_linear8_, linear8
from owl_wms.ops.stage import enlarged, products

__all__ = ["stage8"]


def _run(
    x: Tensor,
    shortcut: Tensor | None,
    proj: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    up: list[Tensor],
    up_scale: list[Tensor],
    up_bias: list[Tensor],
    taps: list[Tensor],
    taps_scale: list[Tensor],
    taps_bias: list[Tensor],
    down: list[Tensor],
    down_scale: list[Tensor],
    inverse: list[Tensor],
    gain: Tensor,
    scale: int,
) -> Tensor:
    last = len(down) - 1
    fp8 = down[0].dtype == torch.float8_e4m3fn
    x = x.contiguous()
    low, hidden = products(x, proj, w1, b1)
    u, hidden = enlarged(x, low, hidden, None if last else shortcut, scale)
    codes = grouped_conv8(hidden, w2, None, b2, gain, scale == 2, fp8)
    step = add_linear8_(u, codes, down[0], down_scale[0], gain, inverse[0] if last else None)
    for j in range(1, last + 1):
        assert step is not None
        hidden = linear8(step, up[j - 1], up_scale[j - 1], up_bias[j - 1], gain)
        codes = grouped_conv8(hidden, taps[j - 1], taps_scale[j - 1], taps_bias[j - 1], gain, False, fp8)
        if j < last:
            step = add_linear8_(u, codes, down[j], down_scale[j], gain, inverse[j])
        else:
            add_linear8_(u, codes, down[j], down_scale[j], gain, None, shortcut)
    return u


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    batch, height, width, _ = x.shape
    down, scale = arguments[12], arguments[-1]
    return x.new_empty(batch, scale * height, scale * width, down[0].shape[0])


stage8 = define(
    "stage8(Tensor x, Tensor? shortcut, Tensor? proj, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor[] up, "
    "Tensor[] up_scale, Tensor[] up_bias, Tensor[] taps, Tensor[] taps_scale, Tensor[] taps_bias, Tensor[] down, "
    "Tensor[] down_scale, Tensor[] inverse, Tensor gain, int scale) -> Tensor",
    run=_run,
    fake=_fake,
)
