"""`owl_wms::linear8`: the 1x1 convolutions of a residual block as 8-bit matrix products, NHWC.

Why it exists: they are nine tenths of the wide decoders' work, and Hopper multiplies 8-bit numbers twice as fast as
16-bit ones. Quantising as a pass of its own would give half of that back, so codes are made where the values are: in
the epilogue of the product (or convolution) that computes them.

On compute capability 9.0, shapes with a plan (`plan.plan_of`) take a CUDA kernel that keeps weights in registers and
streams pixels past them; everything else takes the Triton kernels.

Usage:
    codes = linear8(codes, weight, scale, bias, gain)           # first 1x1: LeakyReLU and codes again
    codes = add_linear8_(u, codes, weight, scale, gain, inverse)    # second: u += ..., and the codes of the new u
    add_linear8_(u, codes, weight, scale, gain, None, shortcut)     # last of a stage: and the shuffled shortcut
    # codes [B, H, W, K] int8 or float8_e4m3fn; weight [N, K] of the same dtype; scale, bias, inverse fp32 [N];
    # gain fp32 [B, 2]; u [B, H, W, N] 16-bit; shortcut [B, H/2, W/2, Cs] as u, 4 N a multiple of Cs
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl_wms.ops.codes import LARGEST
from owl_wms.ops.common.gpu import is_hopper, processors
from owl_wms.ops.common.register import aligned, define, first_that_runs, has_kernel, require
from owl_wms.ops.linear8.plan import THREADS, ProductPlan, fitting, plan_of
from owl_wms.ops.linear8.reference import add_reference, reference
from owl_wms.ops.up_residual import add_shortcut_

__all__ = [
    "add_linear8_",
    "add_reference",
    "fitting",
    "linear8",
    "plan_of",
    "reference",
    "run_plan",
    "tile_of",
]

# The tensor copy engine wants rows of a multiple of 16 bytes.
ALIGNMENT = 16


def tile_of(channels: int) -> int:
    """Index into `kernel.TILES` of the tile that measured best (docs/log.md) for a product of that width."""
    return 1 if channels <= 64 else 0


def run_plan(
    plan: ProductPlan,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    other: Tensor | None,
    gain: Tensor,
    u: Tensor | None = None,
    shortcut: Tensor | None = None,
) -> Tensor | None:
    """The CUDA kernel of one plan, on a GPU of compute capability 9.0; arguments as for the ops, already checked.

    Args:
        plan: what `fitting` gave for these shapes.
        x: codes `[B, H, W, K]`.
        weight: codes `[N, K]`.
        scale: fp32 `[N]`.
        other: fp32 `[N]`: the bias, or with `u` one over the steps of its codes, or None for no codes.
        gain: fp32 `[B, 2]`.
        u: contiguous 16-bit `[B, H, W, N]` that is added to in place, for a plan that `adds`.
        shortcut: 16-bit `[B, H/2, W/2, Cs]` that is shuffled and added too, for a plan with one.

    Returns:
        Codes `[B, H, W, N]`, or None for a plan without.
    """
    x, weight, gain = aligned(x), aligned(weight), aligned(gain.float())
    scale, other = scale.float().contiguous(), None if other is None else other.float().contiguous()
    batch, height, width, _ = x.shape
    codes = x.new_empty(batch, height, width, plan.channels) if plan.codes else None
    tiles_of_image = plan.tiles_of_image(height, width)
    tiles = batch * tiles_of_image
    if not tiles:
        return codes
    plan.kernel(x.dtype, torch.bfloat16 if u is None else u.dtype).launch(
        x.device,
        grid=plan.grid(tiles, processors(x.device)),
        block=THREADS,
        arguments=(
            *(codes, u, x, weight, scale, other, gain, None if shortcut is None else aligned(shortcut)),
            *(height * width, width, tiles_of_image, tiles),
        ),
    )
    return codes


def _run(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
    _check(x, weight, scale, gain)
    if not x.is_cuda:
        return reference(x, weight, scale, bias, gain)
    if is_hopper(x.device) and (plan := plan_of(x.shape[-1], weight.shape[0], False, True, 0)) is not None:
        codes = run_plan(plan, x, weight, scale, bias, gain)
        assert codes is not None
        return codes
    return _by_triton(x, weight, scale, bias, gain)


def _by_triton(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
    from owl_wms.ops.linear8 import kernel

    rows, pixels = x.contiguous().view(-1, x.shape[-1]), x.shape[1] * x.shape[2]
    tile = kernel.TILES[tile_of(weight.shape[0])]
    return kernel.launch(rows, weight, scale, bias, gain, pixels, tile).view(*x.shape[:-1], weight.shape[0])


def add_linear8_(
    u: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    gain: Tensor,
    inverse: Tensor | None,
    shortcut: Tensor | None = None,
) -> Tensor | None:
    """`u += gain scale x weight^T`, and the pixel-shuffled `shortcut` where given, in place on contiguous `u`.

    Args:
        u: residual `[B, H, W, N]`, contiguous.
        x: codes `[B, H, W, K]`.
        weight: codes `[N, K]` of the same dtype.
        scale: fp32 `[N]`.
        gain: fp32 `[B, 2]`.
        inverse: fp32 `[N]`, one over the steps of the codes of the new `u`; None for no codes.
        shortcut: `[B, H/2, W/2, Cs]` in the dtype of `u`, 4 N a multiple of Cs.

    Returns:
        Codes of the new `u` in steps of `gain / inverse`, or None.

    Raises:
        RuntimeError: shapes or dtypes that do not fit each other.
    """
    _check(x, weight, scale, gain)
    _check_residual(u, x, weight, shortcut)
    if not has_kernel(u):
        return _add_by_torch_(u, x, weight, scale, gain, inverse, shortcut)
    plan = _plan_of_addition(u, weight, inverse, shortcut)
    if plan is None and shortcut is not None:
        add_shortcut_(u, shortcut)
        shortcut = None
        plan = _plan_of_addition(u, weight, inverse, None)
    # Each writes into `u` by its last step alone, so that nothing is added twice where a kernel is refused.
    ways = [_add_by_torch_]
    if shortcut is None:
        ways.insert(0, _add_by_triton_)
    if plan is not None:
        ways.insert(0, _add_by_plan_)
    return first_that_runs("linear8", ways, u, x, weight, scale, gain, inverse, shortcut)


def _add_by_plan_(
    u: Tensor, x: Tensor, weight: Tensor, scale: Tensor, gain: Tensor, inverse: Tensor | None, shortcut: Tensor | None
) -> Tensor | None:
    plan = _plan_of_addition(u, weight, inverse, shortcut)
    assert plan is not None
    return run_plan(plan, x, weight, scale, inverse, gain, u, shortcut)


def _add_by_torch_(
    u: Tensor, x: Tensor, weight: Tensor, scale: Tensor, gain: Tensor, inverse: Tensor | None, shortcut: Tensor | None
) -> Tensor | None:
    total, codes = add_reference(u, x, weight, scale, gain, inverse, shortcut)
    u.copy_(total)
    return codes


def _add_by_triton_(
    u: Tensor, x: Tensor, weight: Tensor, scale: Tensor, gain: Tensor, inverse: Tensor | None, shortcut: Tensor | None
) -> Tensor | None:
    from owl_wms.ops.linear8 import kernel

    rows, pixels = x.contiguous().view(-1, x.shape[-1]), x.shape[1] * x.shape[2]
    tile = kernel.TILES[tile_of(weight.shape[0])]
    codes = kernel.launch_add_(u.view(-1, u.shape[-1]), rows, weight, scale, gain, inverse, pixels, tile)
    return None if codes is None else codes.view(u.shape)


def _plan_of_addition(u: Tensor, weight: Tensor, inverse: Tensor | None, shortcut: Tensor | None) -> ProductPlan | None:
    # Its rows are copied sixteen bytes at a time and written where they are.
    if not is_hopper(u.device) or u.data_ptr() % ALIGNMENT:
        return None
    channels = 0 if shortcut is None else shortcut.shape[-1]
    return plan_of(weight.shape[1], weight.shape[0], True, inverse is not None, channels)


def _check(x: Tensor, weight: Tensor, scale: Tensor, gain: Tensor) -> None:
    depth, channels = x.shape[-1], weight.shape[0]
    fits = x.dtype in LARGEST and weight.dtype == x.dtype and weight.shape[1] == depth and scale.shape == (channels,)
    require(fits, lambda: f"linear8: {x.dtype} {list(x.shape)} does not fit {weight.dtype} {list(weight.shape)}")
    even = depth % ALIGNMENT == 0 and channels % ALIGNMENT == 0
    require(even, lambda: f"linear8 wants multiples of {ALIGNMENT} channels, got {depth} and {channels}")
    require(gain.shape == (x.shape[0], 2), lambda: f"linear8: gain {list(gain.shape)} for {x.shape[0]} images")


def _check_residual(u: Tensor, x: Tensor, weight: Tensor, shortcut: Tensor | None) -> None:
    batch, height, width, channels = u.shape
    fits = x.shape[:3] == u.shape[:3] and weight.shape[0] == channels and u.is_contiguous()
    require(fits, lambda: f"linear8: residual {list(u.shape)} for {list(x.shape)} and {list(weight.shape)}")
    if shortcut is not None:
        quarter = (batch, height // 2, width // 2) if height % 2 == width % 2 == 0 else None
        fits = shortcut.shape[:3] == quarter and 4 * channels % shortcut.shape[-1] == 0 and shortcut.dtype == u.dtype
        require(fits, lambda: f"linear8: shortcut {list(shortcut.shape)} {shortcut.dtype} for {list(u.shape)}")


def _fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
    _check(x, weight, scale, gain)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


linear8 = define(
    "linear8(Tensor x, Tensor weight, Tensor scale, Tensor bias, Tensor gain) -> Tensor",
    run=_run,
    fake=_fake,
    simpler=(_by_triton, reference),
)
