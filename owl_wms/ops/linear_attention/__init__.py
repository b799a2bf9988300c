"""`owl_wms::linear_attention` and `multiscale_attention`: ReLU linear attention over the pixels of an image, NHWC.

Why it exists: written out, q, k and v are widened to fp32, transposed and copied before two tiny products each; here
they are read as they lie, twice, and everything between stays on the chip. The multi-scale form has a second set of
heads, whose q, k and v are the first ones averaged over a neighbourhood (depthwise 5x5, then 1x1 within each head).
Those k and v are made, multiplied and forgotten in the pass that sums the first ones; only the q are written.

Usage:
    y = linear_attention(qkv, head=32, eps=1e-15)     # [B, H, W, 3 * heads * 32] -> [B, H, W, heads * 32]
    taps, point = pack_scale(proj_in.weight, proj_out.weight)
    y = multiscale_attention(qkv, taps, point.to(qkv.dtype), 32, 1e-15)     # -> [B, H, W, 2 * heads * 32]
"""

from __future__ import annotations

from torch import Tensor

from owl_wms.ops.common.register import define, has_kernel, require
from owl_wms.ops.linear_attention.reference import multiscale_reference, pack_scale, reference

__all__ = ["linear_attention", "multiscale_attention", "multiscale_reference", "pack_scale", "reference"]


def _has_kernel(qkv: Tensor, head: int) -> bool:
    """With no more pixels than a head has channels, diffusers computes the quadratic form, which has no kernel."""
    return has_kernel(qkv) and qkv.shape[1] * qkv.shape[2] > head and head >= 16 and not head & (head - 1)


def _run(qkv: Tensor, head: int, eps: float) -> Tensor:
    if not _has_kernel(qkv, head):
        return reference(qkv, head, eps)
    from owl_wms.ops.linear_attention.kernel import launch

    return launch(qkv.contiguous(), None, None, head, eps)


def _run_multiscale(qkv: Tensor, taps: Tensor, point: Tensor, head: int, eps: float) -> Tensor:
    if not _has_kernel(qkv, head):
        return multiscale_reference(qkv, taps, point, head, eps)
    from owl_wms.ops.linear_attention.kernel import launch

    return launch(qkv.contiguous(), taps.float().contiguous(), point.contiguous(), head, eps)


def _fake(qkv: Tensor, head: int, eps: float) -> Tensor:
    channels = qkv.shape[-1]
    require(channels % (3 * head) == 0, lambda: f"{channels} channels are no multiple of 3 x {head}")
    return qkv.new_empty(*qkv.shape[:-1], channels // 3)


def _fake_multiscale(qkv: Tensor, taps: Tensor, point: Tensor, head: int, eps: float) -> Tensor:
    channels = qkv.shape[-1]
    require(channels % (3 * head) == 0, lambda: f"{channels} channels are no multiple of 3 x {head}")
    fits = taps.shape[1] == channels and point.shape == (channels // head, head, head)
    require(fits, lambda: f"{channels} channels, taps {list(taps.shape)}, 1x1 weights {list(point.shape)}")
    return qkv.new_empty(*qkv.shape[:-1], 2 * channels // 3)


linear_attention = define(
    "linear_attention(Tensor qkv, int head, float eps) -> Tensor", run=_run, fake=_fake, simpler=(reference,)
)
multiscale_attention = define(
    "multiscale_attention(Tensor qkv, Tensor taps, Tensor point, int head, float eps) -> Tensor",
    run=_run_multiscale,
    fake=_fake_multiscale,
    simpler=(multiscale_reference,),
)
