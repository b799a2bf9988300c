"""`owl_wms::grouped_conv8`: the middle of a residual block with an 8-bit result, NHWC.

Why it exists: between the two 1x1 convolutions of a block the tensor is twice as wide as the block, and is written
twice and read twice; as codes it is half the bytes, and both products take it as it is. The first block of a stage
comes from 16-bit numbers (and may enlarge them), the others from codes.

Usage:
    codes = grouped_conv8(x, pack(w / step), None, b / step, gain, up2=True, fp8=False)   # x [B, h, w, C] 16-bit
    codes = grouped_conv8(codes, taps, scale, b / step, gain, False, False)               # x [B, H, W, C] codes
    # taps, scale from pack_codes; gain [B, 2] from code_gain
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl_wms.ops.codes import DEFINES, FORMATS
from owl_wms.ops.common.gpu import processors
from owl_wms.ops.common.nvrtc import Kernel
from owl_wms.ops.common.register import aligned, define, has_kernel, require
from owl_wms.ops.grouped_conv import grid_of
from owl_wms.ops.grouped_conv import launch as launch_wide
from owl_wms.ops.grouped_conv.reference import GROUP
from owl_wms.ops.grouped_conv8.reference import pack_codes, reference, unpack_codes

__all__ = ["GROUP", "grouped_conv8", "kernel_of", "pack_codes", "reference", "unpack_codes"]

CHANNELS_PER_BLOCK = 128
# A ring of 3 phases of 4 input rows, and results of two phases; as in kernel.cu.
SHARED = 3 * 4 * (32 + 2) * 128 + 2 * 4 * 32 * 128
TAP_SHAPE = {torch.int8: (18, 32, 4), torch.float16: (9, 2, 2, 32, 2)}


def kernel_of(codes: torch.dtype) -> Kernel:
    """The variant for a format of codes."""
    return Kernel("grouped_conv8", "grouped_conv8", ("BYTES=1", *DEFINES[codes]), SHARED, ("common/strip.cuh",))


def _run(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor, gain: Tensor, up2: bool, fp8: bool) -> Tensor:
    codes = FORMATS["fp8" if fp8 else "int8"]
    _check(x, weight, scale, bias, gain, up2, fp8)
    if scale is None:
        if has_kernel(x):
            return launch_wide(x, weight, bias, up2, codes, gain)
        return reference(x, weight, scale, bias, gain, up2, codes)
    if not x.is_cuda:
        return reference(x, weight, scale, bias, gain, up2, codes)
    x, weight = aligned(x), aligned(weight)
    batch, height, width, channels = x.shape
    out = torch.empty_like(x)
    blocks, rows = grid_of(batch, height, width, -(-channels // CHANNELS_PER_BLOCK), processors(x.device))
    kernel_of(codes).launch(
        x.device,
        grid=blocks,
        block=256,
        arguments=(out, x, weight, scale, bias, gain, height, width, channels, rows),
    )
    return out


def _by_torch(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor, gain: Tensor, up2: bool, fp8: bool
) -> Tensor:
    return reference(x, weight, scale, bias, gain, up2, FORMATS["fp8" if fp8 else "int8"])


def _check(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor, gain: Tensor, up2: bool, fp8: bool) -> None:
    batch, channels = x.shape[0], x.shape[-1]
    require(gain.shape == (batch, 2), lambda: f"grouped_conv8: gain {list(gain.shape)} for {batch} images")
    fits = channels % GROUP == 0 and bias.shape == (channels,) and weight.shape[0] == channels // GROUP
    require(fits, lambda: f"grouped_conv8: {channels} channels do not fit weights {list(weight.shape)}")
    if scale is None:
        require(weight.dtype == x.dtype, lambda: f"grouped_conv8: input {x.dtype}, weights {weight.dtype}")
        return
    require(not up2, lambda: "grouped_conv8: codes cannot be enlarged")
    expected = torch.float16 if fp8 else torch.int8
    fits = x.dtype == FORMATS["fp8" if fp8 else "int8"] and weight.dtype == expected
    fits = fits and tuple(weight.shape[1:]) == TAP_SHAPE[expected]
    require(fits, lambda: f"grouped_conv8: codes {x.dtype}, taps {weight.dtype} {list(weight.shape)}")


def _fake(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor, gain: Tensor, up2: bool, fp8: bool) -> Tensor:
    _check(x, weight, scale, bias, gain, up2, fp8)
    batch, height, width, channels = x.shape
    factor = 2 if up2 else 1
    return x.new_empty(batch, height * factor, width * factor, channels, dtype=FORMATS["fp8" if fp8 else "int8"])


grouped_conv8 = define(
    "grouped_conv8(Tensor x, Tensor weight, Tensor? scale, Tensor bias, Tensor gain, bool up2, bool fp8) -> Tensor",
    run=_run,
    fake=_fake,
    simpler=(_by_torch,),
)
