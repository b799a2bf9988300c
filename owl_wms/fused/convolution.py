"""Dense 3x3 convolutions of a fused decoder, each computed the way that was fastest when its program was built.

Why measured: which of library, fused library and our kernels wins depends on shape and GPU. The choice is made once, at
build, and is part of the program.

Usage:
    conv = Conv3x3(weight, bias, torch.bfloat16)        # a module of the fused decoder
    choose(fused, torch.bfloat16, (8, 128, 8, 8))       # sets `how` of every Conv3x3 in it
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from owl_wms.ops import conv3x3 as conv3x3_op
from owl_wms.ops.common.ahead import compile_ahead
from owl_wms.ops.conv3x3 import LIBRARY, conv3x3, conv3x3_norm, conv3x3_shuffled, pack
from owl_wms.timing import interleaved

SHUFFLED = -6  # beside the ways of `owl_wms.ops.conv3x3`, see LearnedShortcut
TIMING_SECONDS = 0.3  # of each distinct convolution; sana has a dozen
HEAD_START = 1_000_000  # clock cycles, some 0.6 ms; a launch from Python takes as long as a convolution at batch 1
# Relative L2. A way whose result is further from the library's than this is wrong: rounding does not explain it.
MAX_DIFFERENCE = 2e-2
# The kind of convolution, shapes of its inputs and weights, and what else decides how long it takes.
Choice: TypeAlias = tuple[str, tuple[tuple[int, ...] | None, ...], tuple[int, ...], tuple[object, ...]]
Way: TypeAlias = Callable[[Tensor], Tensor]
Norm: TypeAlias = tuple[Tensor, float]  # gain over the channels, fp32, and eps


class Chosen(nn.Module):
    """A convolution that can be computed in several ways; `choose` measures them and sets `how`.

    A subclass gives `ways` and `compute`, and in `alike` what besides the shapes decides how long it takes.
    """

    weight: Tensor
    bias: Tensor | None
    alike: tuple[object, ...] = ()

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().to(dtype))
        self.register_buffer("bias", None if bias is None else bias.detach().float())  # added to fp32 sums
        self.how = LIBRARY
        self.choices: dict[Choice, int] | None = None

    def ways(self, x: Tensor, other: Tensor | None) -> list[int]:
        """Returns every `how` that can compute these inputs."""
        raise NotImplementedError

    def compute(self, how: int, x: Tensor, other: Tensor | None) -> Tensor:
        """Computes the convolution as `how` says."""
        raise NotImplementedError

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        self.decide(x, other, functools.partial(self.compute, other=other))
        return self.compute(self.how, x, other)

    def decide(self, x: Tensor, other: Tensor | None, compute: Callable[[int, Tensor], Tensor]) -> None:
        """Set `how` to the way in which `compute(how, x)` is quickest, while choices are being made."""
        if self.choices is None:
            return
        shapes = (tuple(x.shape), None if other is None else tuple(other.shape))
        key: Choice = (type(self).__name__, shapes, tuple(self.weight.shape), self.alike)
        if key not in self.choices:
            ways = {how: functools.partial(compute, how) for how in self.ways(x, other)}
            self.choices[key] = quickest(ways, x)
        self.how = self.choices[key]


class Conv3x3(Chosen):
    """`relu(conv(x) + bias) + residual` on `[B, H, W, C]`; `how` as in `owl_wms.ops.conv3x3`.

    Args:
        relu, silu: at most one of them.
        norm: the gain and eps of an RMS norm over the channels before the bias, which is then the norm's shift.
    """

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
        super().__init__(pack(weight.detach()), bias, dtype)
        self.register_buffer("gain", None if norm is None else norm[0].detach().float())
        self.eps = None if norm is None else norm[1]
        self.relu, self.silu = relu, silu
        self.alike = (relu, silu, norm is None)

    def ways(self, x: Tensor, other: Tensor | None) -> list[int]:
        return conv3x3_op.ways(x, self.weight, other is not None, self.relu, self.silu, self.norm() is not None)

    def compute(self, how: int, x: Tensor, other: Tensor | None) -> Tensor:
        norm = self.norm()
        if norm is not None and self.bias is not None:
            return conv3x3_norm(x, self.weight, norm[0], self.bias, other, norm[1], how)
        return conv3x3(x, self.weight, self.bias, other, self.relu, how, self.silu)

    def norm(self) -> Norm | None:
        """The gain and eps of the norm, None without one."""
        return None if self.gain is None or self.eps is None else (self.gain, self.eps)


class LearnedShortcut(Conv3x3):
    """`run(shortcut)`, a stage, with its shortcut `conv(x) + bias`; `how` as in `owl_wms.ops.conv3x3`, or SHUFFLED.

    With SHUFFLED the stage runs without a shortcut, and the convolution adds itself, pixel-shuffled, onto the result:
    the shortcut is neither written nor read, and the stage has room for its quicker form. What is timed is both
    together; no two stages of a decoder have inputs of one shape.
    """

    def ways(self, x: Tensor, other: Tensor | None) -> list[int]:
        shuffled = conv3x3_op.fits_shuffled(x, self.weight)
        return [*super().ways(x, other), *([SHUFFLED] if shuffled else [])]

    def join(self, x: Tensor, run: Callable[[Tensor | None], Tensor]) -> Tensor:
        """Returns the stage's result `[B, 2H, 2W, O]` of its input `x [B, H, W, C]`."""

        def compute(how: int, x: Tensor) -> Tensor:
            if how == SHUFFLED:
                return conv3x3_shuffled(x, self.weight, self.bias, run(None))
            return run(self.compute(how, x, None))

        self.decide(x, None, compute)
        return compute(self.how, x)


def quickest(ways: Mapping[int, Way], x: Tensor) -> int:
    """Returns the quickest `how` for this shape on this GPU, among those that run and agree with the library.

    Ways are timed in turns: some differ by less than the clock drifts from one to the next.
    """
    wanted = ways[LIBRARY](x).float()
    sound = {str(LIBRARY): ways[LIBRARY]}
    for how, way in ways.items():
        try:
            difference = torch.linalg.vector_norm(way(x).float() - wanted)
        except Exception:  # a kernel this driver or GPU refuses: the library remains
            continue
        if difference <= MAX_DIFFERENCE * torch.linalg.vector_norm(wanted):
            sound[str(how)] = way
    times = interleaved(sound, x, budget_seconds=TIMING_SECONDS, head_start=HEAD_START)
    return int(min(times, key=times.__getitem__))


def choose(fused: nn.Module, dtype: torch.dtype, input_shape: tuple[int, ...] | None) -> None:
    """Time every way to compute each convolution of `fused` for latents of that shape and keep the fastest.

    Nothing happens without a shape, off a GPU, and where there is no such convolution.
    """
    convs = [module for module in fused.modules() if isinstance(module, Chosen)]
    if input_shape is None or not convs or not convs[0].weight.is_cuda:
        return
    z = torch.randn(input_shape, device=convs[0].weight.device).to(dtype)
    # In threads; the run below needs all of them, and what it tries for a convolution does not show before.
    plain = [conv for conv in convs if isinstance(conv, Conv3x3)]
    eps = next((conv.eps for conv in plain if conv.eps is not None), None)
    silu, shuffled = any(conv.silu for conv in plain), any(isinstance(conv, LearnedShortcut) for conv in plain)
    compile_ahead(fused, z, also=conv3x3_op.variants(z, silu, eps, shuffled) if plain else ())
    choices: dict[Choice, int] = {}
    for conv in convs:
        conv.choices = choices
    try:
        fused(z)
    finally:
        for conv in convs:
            conv.choices = None
