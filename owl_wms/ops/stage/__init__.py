"""`owl_wms::stage`: one decoder stage, from its low-resolution input to its output, NHWC.

Why one op: inside it, the residual is accumulated in place by the matrix products and buffers are reused, which a
functional graph cannot say; seen from outside it is a pure function. Three exact rewrites:

- the first 1x1 convolution runs before the enlargement (bicubic weights sum to one, clamped borders included), on a
  quarter of the pixels, and the enlargement happens inside `grouped_conv`, so the widest tensor is never written;
- with one block, the shortcut joins the residual before the branch does; with more, right after the last block has read
  the residual, so no block sees it;
- the back-projection accumulates into the residual in the matrix product itself (fp32 inside, rounded once); a stage of
  one block does all that follows its low-resolution products in `stage_tail` where that pays.

Usage:
    y = stage(x, shortcut, proj, [w1], [b1], [w2], [b2], [w3], scale=2)
    # x [B, h, w, Cin]; shortcut [B, h, w, Cs] or None; proj [C, Cin] or None; for each block w1 [2C, C], b1 [2C],
    # w2 packed as grouped_conv wants it, b2 [2C] fp32, w3 [C, 2C]; scale 1, 2 or 4
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from owl_wms.ops import enlarging_both, stage_products
from owl_wms.ops.common.register import define, first_that_runs, has_kernel
from owl_wms.ops.grouped_conv import grouped_conv
from owl_wms.ops.stage.reference import reference
from owl_wms.ops.stage_tail import pays, stage_tail
from owl_wms.ops.up_residual import add_shortcut_, up_residual

__all__ = ["enlarge_matrix", "enlarged", "products", "reference", "stage"]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1x1 convolution as one matrix product over all pixels."""
    rows = x.reshape(-1, x.shape[-1])
    out = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    return out.view(*x.shape[:-1], weight.shape[0])


@functools.cache  # never let go: a CUDA graph that was captured with a matrix goes on reading it where it is
def enlarge_matrix(size: int, scale: int, device: torch.device) -> Tensor:
    """Bicubic enlargement of one axis as a constant fp32 matrix `[scale * size, size]`, read off `F.interpolate`."""
    unit = torch.eye(size, dtype=torch.float32, device="cpu").view(1, size, size, 1).expand(1, size, size, 4)
    rows = F.interpolate(unit.contiguous(), size=(scale * size, 4), mode="bicubic")
    return rows[0, :, :, 0].t().contiguous().to(device)


def _enlarge(low: Tensor, scale: int) -> Tensor:
    """Enlargement by a factor other than 2, by two matrix products; only the small x4 step of `distill_vae` has one."""
    batch, height, width, channels = low.shape
    across = enlarge_matrix(width, scale, low.device) @ low.float()
    down = enlarge_matrix(height, scale, low.device) @ across.view(batch, height, -1)
    return down.view(batch, scale * height, scale * width, channels).to(low.dtype)


def products(x: Tensor, proj: Tensor | None, w1: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the part of a stage before it enlarges: its projected input and the first block's first product."""
    if proj is None:
        return x, _linear(x, w1, b1)
    ways = (stage_products.launch, _two_products) if stage_products.fits(x, proj, w1) else (_two_products,)
    return first_that_runs("stage_products", ways, x, proj, w1, b1)


def _two_products(x: Tensor, proj: Tensor, w1: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
    low = _linear(x, proj)
    return low, _linear(low, w1, b1)


def enlarged(x: Tensor, low: Tensor, hidden: Tensor, shortcut: Tensor | None, scale: int) -> tuple[Tensor, Tensor]:
    """The residual at full size, a tensor of its own with the shortcut added where given, and `hidden` at full size
    too, unless `scale` is 2: then the grouped convolution behind it enlarges.
    """
    if scale == 2:
        return up_residual(low, shortcut), hidden
    if scale == 1:
        u = x.clone() if low is x else low
    else:
        u, hidden = _enlarge(low, scale), _enlarge(hidden, scale)
    if shortcut is not None:
        add_shortcut_(u, shortcut)
    return u, hidden


def _apart(low: Tensor, shortcut: Tensor | None, hidden: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    return up_residual(low, shortcut), grouped_conv(hidden, w2, b2, True)


def enlarged_beside(
    low: Tensor, shortcut: Tensor | None, hidden: Tensor, w2: Tensor, b2: Tensor
) -> tuple[Tensor, Tensor]:
    """`up_residual(low, shortcut)` and `grouped_conv(hidden, w2, b2, True)`, in one launch where that kernel runs."""
    suits = has_kernel(low) and low.dtype == hidden.dtype == w2.dtype and enlarging_both.suits(low, hidden)
    ways = (enlarging_both.launch, _apart) if suits else (_apart,)
    return first_that_runs("grouped_conv", ways, low, shortcut, hidden, w2, b2)


def _run(
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
    one_block = len(w1) == 1
    x = x.contiguous()
    low, hidden = products(x, proj, w1[0], b1[0])
    if scale == 2 and one_block and pays(low, shortcut):
        return stage_tail(low, hidden, shortcut, w2[0], b2[0], w3[0])
    if scale == 2 and one_block:
        u, branch = enlarged_beside(low, shortcut, hidden, w2[0], b2[0])
    else:
        u, hidden = enlarged(x, low, hidden, shortcut if one_block else None, scale)
        branch = grouped_conv(hidden, w2[0], b2[0], scale == 2)
    flat = u.view(-1, u.shape[-1])
    flat.addmm_(branch.view(-1, branch.shape[-1]), w3[0].t())
    for j in range(1, len(w1)):
        hidden = _linear(u, w1[j], b1[j])
        if shortcut is not None and j == len(w1) - 1:
            add_shortcut_(u, shortcut)
        branch = grouped_conv(hidden, w2[j], b2[j], False)
        flat.addmm_(branch.view(-1, branch.shape[-1]), w3[j].t())
    return u


def _fake(
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
    batch, height, width, _ = x.shape
    return x.new_empty(batch, scale * height, scale * width, w3[0].shape[0])


stage = define(
    "stage(Tensor x, Tensor? shortcut, Tensor? proj, Tensor[] w1, Tensor[] b1, Tensor[] w2, Tensor[] b2, Tensor[] w3, "
    "int scale) -> Tensor",
    run=_run,
    fake=_fake,
)
