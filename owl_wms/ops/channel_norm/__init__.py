"""`owl_wms::channel_norm`: RMS norm over channels, scale, shift, ReLU and residual in one pass over NHWC.

Why it exists: written out it is half a dozen passes, with the channels moved to the last axis and back around them.

Usage:
    y = channel_norm(x, weight, bias, residual, 1e-5, relu=False)     # all [B, H, W, C]; residual may be None
"""

from __future__ import annotations

from torch import Tensor

from owl_wms.ops.channel_norm.reference import reference
from owl_wms.ops.common.register import define, has_kernel, require

__all__ = ["channel_norm", "reference"]


def _run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, relu: bool) -> Tensor:
    if not has_kernel(x):
        return reference(x, weight, bias, residual, eps, relu)
    from owl_wms.ops.channel_norm.kernel import launch

    return launch(x.contiguous(), weight, bias, None if residual is None else residual.contiguous(), eps, relu)


def _fake(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, relu: bool) -> Tensor:
    require(x.shape[-1] == weight.shape[0], lambda: f"{x.shape[-1]} channels, weights for {weight.shape[0]}")
    return x.new_empty(x.shape)


channel_norm = define(
    "channel_norm(Tensor x, Tensor weight, Tensor bias, Tensor? residual, float eps, bool relu) -> Tensor",
    run=_run,
    fake=_fake,
    simpler=(reference,),
)
