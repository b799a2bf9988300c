"""`owl_wms::stage_tail`: the rest of a stage with one residual block, once its low-resolution products are done, NHWC.

    out = up2(low) + shuffle(shortcut) + w3 leaky(conv3x3_groups_of_16(leaky(up2(hidden))) + b2)

Why it exists: as three kernels, the hidden branch (twice as wide as the stage, at full resolution) is written and read
once and the result three times; here it never leaves the multiprocessor where its weights fit (C <= 96), and is written
and read once where they do not. up2 is bicubic (a = -0.75), shuffle the pixel shuffle tiled to C channels, leaky
LeakyReLU(0.01). The kernels need compute capability 9.0; elsewhere, and for shapes without a plan, the op is
`composition`.

Usage:
    y = stage_tail(low, hidden, shortcut, w2, b2, w3)
    # low [B, h, w, C]; hidden [B, h, w, 2C]; shortcut [B, h, w, Cs] with 4 C a multiple of Cs, or None; w2 packed as
    # grouped_conv wants it [2C / 16, 9, 32, 8]; b2 [2C] fp32; w3 [C, 2C] -> [B, 2h, 2w, C]
"""

from __future__ import annotations

from torch import Tensor

from owl_wms.ops import enlarging
from owl_wms.ops.common.gpu import is_hopper, processors
from owl_wms.ops.common.register import aligned, define, has_kernel, require
from owl_wms.ops.common.tensor_maps import TensorMap, tensor_map
from owl_wms.ops.enlarging import STRIP, rows_of_band
from owl_wms.ops.grouped_conv import grouped_conv
from owl_wms.ops.stage_tail.plan import BOX, TailPlan, blocks_at_once, plan_of
from owl_wms.ops.stage_tail.reference import reference
from owl_wms.ops.up_residual import up_residual

__all__ = ["composition", "pays", "plan_of", "reference", "run_plan", "stage_tail"]

# Stage widths for which `stage` uses this op; the composition is used outside.
WIDTHS = range(16, 193)


def composition(low: Tensor, hidden: Tensor, shortcut: Tensor | None, w2: Tensor, b2: Tensor, w3: Tensor) -> Tensor:
    """Computes the op out of `grouped_conv`, `up_residual` and a library product that accumulates in place."""
    branch = grouped_conv(hidden, w2, b2, True)
    u = up_residual(low, shortcut)
    u.view(-1, u.shape[-1]).addmm_(branch.view(-1, branch.shape[-1]), w3.t())
    return u


def pays(low: Tensor, shortcut: Tensor | None) -> bool:
    """Returns whether `stage` uses this op rather than the composition; decided by measurement, here only."""
    return low.shape[-1] in WIDTHS and _plan(low, shortcut) is not None


def _plan(low: Tensor, shortcut: Tensor | None) -> TailPlan | None:
    if not has_kernel(low) or not is_hopper(low.device):
        return None
    return plan_of(low.shape[-1], 0 if shortcut is None else shortcut.shape[-1])


def _run(low: Tensor, hidden: Tensor, shortcut: Tensor | None, w2: Tensor, b2: Tensor, w3: Tensor) -> Tensor:
    _check(low, hidden, shortcut, w2, b2, w3)
    plan = _plan(low, shortcut)
    if plan is None:
        return composition(low, hidden, shortcut, w2, b2, w3)
    return run_plan(plan, low, hidden, shortcut, w2, b2, w3)


def run_plan(
    plan: TailPlan, low: Tensor, hidden: Tensor, shortcut: Tensor | None, w2: Tensor, b2: Tensor, w3: Tensor
) -> Tensor:
    """The kernels of one plan, on a GPU of compute capability 9.0; arguments as for the op, already checked."""
    low, hidden, w2, w3 = aligned(low), aligned(hidden), aligned(w2), aligned(w3)
    shortcut = None if shortcut is None else aligned(shortcut)
    # A module cast as a whole hands over a 16-bit bias; the kernel reads fp32.
    bias = b2.float().contiguous()
    batch, height, width, channels = low.shape
    out = low.new_empty(batch, 2 * height, 2 * width, channels)
    if not out.numel():
        return out
    source: Tensor | TensorMap = hidden
    if not plan.whole:
        branch = enlarging.launch(hidden, w2, bias, None, None)
        source = tensor_map(branch.view(-1, *branch.shape[2:]), BOX)
    kernel, strips, parts = plan.projection(low.dtype), batch * -(-2 * width // STRIP), channels // plan.columns
    at_once = blocks_at_once(kernel.shared_bytes, plan.threads, processors(low.device))
    rows = rows_of_band(height, strips * parts, at_once)
    kernel.launch(
        low.device,
        grid=strips * parts * -(-height // rows),
        block=plan.threads,
        arguments=(out, source, w2, bias, low, shortcut, w3, height, width, rows),
    )
    return out


def _check(low: Tensor, hidden: Tensor, shortcut: Tensor | None, w2: Tensor, b2: Tensor, w3: Tensor) -> None:
    channels = low.shape[-1]
    wide = 2 * channels
    require(
        hidden.shape[:3] == low.shape[:3] and hidden.shape[3] == wide,
        lambda: f"stage_tail: hidden {list(hidden.shape)} beside low {list(low.shape)}; it must be twice as wide",
    )
    require(
        w2.shape == (wide // 16, 9, 32, 8) and b2.shape == (wide,) and w3.shape == (channels, wide) and wide % 16 == 0,
        lambda: (
            f"stage_tail: width {channels} does not fit w2 {list(w2.shape)}, b2 {list(b2.shape)}, w3 {list(w3.shape)}"
        ),
    )
    if shortcut is not None:
        fits = shortcut.shape[:3] == low.shape[:3] and 4 * channels % shortcut.shape[-1] == 0
        require(fits, lambda: f"stage_tail: shortcut {list(shortcut.shape)} beside low {list(low.shape)}")
    types = {x.dtype for x in (low, hidden, shortcut, w2, w3) if x is not None}
    require(len(types) == 1, lambda: f"stage_tail wants one type for all but b2, got {sorted(map(str, types))}")


def _fake(low: Tensor, hidden: Tensor, shortcut: Tensor | None, w2: Tensor, b2: Tensor, w3: Tensor) -> Tensor:
    _check(low, hidden, shortcut, w2, b2, w3)
    batch, height, width, channels = low.shape
    return low.new_empty(batch, 2 * height, 2 * width, channels)


stage_tail = define(
    "stage_tail(Tensor low, Tensor hidden, Tensor? shortcut, Tensor w2, Tensor b2, Tensor w3) -> Tensor",
    run=_run,
    fake=_fake,
    simpler=(composition,),
)
