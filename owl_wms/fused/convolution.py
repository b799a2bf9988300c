"""Dense 3x3 convolutions of a fused decoder, each computed the way that was fastest when its program was built.

Why measured: which of library, fused library and our kernels wins depends on shape and GPU. The choice is made once, at
build, and is part of the program.

Usage:
    conv = Conv3x3(weight, bias, torch.bfloat16)        # a module of the fused decoder
    choose(fused, torch.bfloat16, (8, 128, 8, 8))       # sets `how` of every Conv3x3 in it
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from owl_wms.ops import conv3x3 as conv3x3_op
from owl_wms.ops.common.ahead import compile_ahead
from owl_wms.ops.conv3x3 import LIBRARY, conv3x3, conv3x3_norm, pack
from owl_wms.timing import interleaved

TIMING_SECONDS = 0.3  # of each distinct convolution; sana has a dozen
HEAD_START = 1_000_000  # clock cycles, some 0.6 ms; a launch from Python takes as long as a convolution at batch 1
# A way to compute a convolution that strays further than rounding can from the library's result is wrong, not fast.
MOST_STRAY = 2e-2
# Shapes of input and weights, ReLU, SiLU, no norm, no residual.
Choice: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], bool, bool, bool, bool]
Norm: TypeAlias = tuple[Tensor, float]  # gain over the channels, fp32, and eps


class Conv3x3(nn.Module):
    """`relu(conv(x) + bias) + residual` on `[B, H, W, C]`; `how` as in `owl_wms.ops.conv3x3`.

    Args:
        relu, silu: at most one of them.
        norm: the gain and eps of an RMS norm over the channels before the bias, which is then the norm's shift.
    """

    weight: Tensor
    bias: Tensor | None
    gain: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        *,
        relu: bool = False,
        silu: bool = False,
        norm: Norm | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("gain", None if norm is None else norm[0].detach().float())
        self.eps = None if norm is None else norm[1]
        self.silu = silu
        self.register_buffer("weight", pack(weight.detach()).to(dtype))
        self.register_buffer("bias", None if bias is None else bias.detach().float())  # added to fp32 sums
        self.relu, self.how = relu, LIBRARY
        self.choices: dict[Choice, int] | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.choices is not None:
            key = (tuple(x.shape), tuple(self.weight.shape), self.relu, self.silu, self.eps is None, residual is None)
            if key not in self.choices:
                self.choices[key] = fastest(x, self.weight, self.bias, residual, self.relu, self.silu, self.norm())
            self.how = self.choices[key]
        return _compute(
            x,
            weight=self.weight,
            bias=self.bias,
            residual=residual,
            relu=self.relu,
            silu=self.silu,
            norm=self.norm(),
            how=self.how,
        )

    def norm(self) -> Norm | None:
        """The gain and eps of the norm, None without one."""
        return None if self.gain is None or self.eps is None else (self.gain, self.eps)


def fastest(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    silu: bool = False,
    norm: Norm | None = None,
) -> int:
    """The quickest `how` for this shape on this GPU, among those that run and agree with the library.

    Ways are timed in turns: some differ by less than the clock drifts from one to the next.
    """

    def way(how: int) -> Callable[[Tensor], Tensor]:
        return functools.partial(
            _compute, weight=weight, bias=bias, residual=residual, relu=relu, silu=silu, norm=norm, how=how
        )

    wanted = way(LIBRARY)(x).float()
    sound = {str(LIBRARY): way(LIBRARY)}
    for how in conv3x3_op.ways(x, weight, residual is not None, relu, silu, norm is not None):
        try:
            stray = torch.linalg.vector_norm(way(how)(x).float() - wanted)
        except Exception:  # a kernel this driver or GPU refuses: the library remains
            continue
        if stray <= MOST_STRAY * torch.linalg.vector_norm(wanted):
            sound[str(how)] = way(how)
    times = interleaved(sound, x, budget_seconds=TIMING_SECONDS, head_start=HEAD_START)
    return int(min(times, key=times.__getitem__))


def _compute(
    x: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    silu: bool,
    norm: Norm | None,
    how: int,
) -> Tensor:
    if norm is not None and bias is not None:
        return conv3x3_norm(x, weight, norm[0], bias, residual, norm[1], how)
    return conv3x3(x, weight, bias, residual, relu, how, silu)


def choose(fused: nn.Module, dtype: torch.dtype, input_shape: tuple[int, ...] | None) -> None:
    """Time every way to compute each convolution of `fused` for latents of that shape and keep the fastest.

    Nothing happens without a shape, off a GPU, and where there is no such convolution.
    """
    convs = [module for module in fused.modules() if isinstance(module, Conv3x3)]
    if input_shape is None or not convs or not convs[0].weight.is_cuda:
        return
    z = torch.randn(input_shape, device=convs[0].weight.device).to(dtype)
    # In threads; the run below needs all of them, and what it tries for a convolution does not show before.
    eps = next((conv.eps for conv in convs if conv.eps is not None), None)
    compile_ahead(fused, z, also=conv3x3_op.variants(z, any(conv.silu for conv in convs), eps))
    choices: dict[Choice, int] = {}
    for conv in convs:
        conv.choices = choices
    try:
        fused(z)
    finally:
        for conv in convs:
            conv.choices = None
