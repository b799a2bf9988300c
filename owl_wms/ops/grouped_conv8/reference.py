"""Reference of `grouped_conv8` in plain PyTorch, and the layouts its weights are packed in.

Usage:
    taps, scale = pack_codes(weight, step_out, torch.int8)     # [C, 16, 3, 3], the steps of its inputs folded in
    y = reference(x, taps, scale, conv.bias / step_out, gain, False, torch.int8)     # codes [B, H, W, C]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from owl_wms.ops.codes import encode, quantise_rows
from owl_wms.ops.grouped_conv.reference import GROUP, SLOPE, enlarge, unpack

FLOAT16_LARGEST = 2.0**10
"""What the float16 taps of a channel are scaled to reach: far from overflow, and small taps far from subnormal."""


def _fragment_channels() -> tuple[Tensor, Tensor]:
    """Output channel of (tile n, lane), and the input channels of a lane's four bytes: `[2, 32]`, `[32, 4]`.

    Lane 4g + t holds column g of a tile and channels 4t..4t+3. Columns are dealt out as in grouped_conv, so that a
    thread ends with four neighbouring output channels.
    """
    lane, byte = torch.arange(32, device="cpu"), torch.arange(4, device="cpu")
    g, t = lane // 4, lane % 4
    tile = torch.arange(2, device="cpu")[:, None]
    return 4 * (g // 2) + 2 * tile + g % 2, 4 * t[:, None] + byte


def pack_codes(weight: Tensor, step: Tensor, codes: torch.dtype) -> tuple[Tensor, Tensor]:
    """Taps and scale for an input of codes.

    Args:
        weight: `[C, 16, 3, 3]`, already multiplied by the steps of its input channels.
        step: `[C]`, steps of the result's codes.
        codes: format of input and result.

    Returns:
        int8: taps int8 `[C / 16, 18, 32, 4]` (dy, tile, dx; lane; byte); fp8: float16 `[C / 16, 9, 2, 2, 32, 2]` (tap;
        tile; register; lane; half). Scale: fp32 `[C]`, from a sum of products to units of `step`.

    Raises:
        ValueError: another group width.
    """
    if weight.dim() != 4 or weight.shape[0] % GROUP or tuple(weight.shape[1:]) != (GROUP, 3, 3):
        raise ValueError(f"grouped_conv8 wants weights [16 n, 16, 3, 3], got {list(weight.shape)}")
    out_channel, in_channel = _fragment_channels()
    groups = weight.shape[0] // GROUP
    if codes == torch.int8:
        rounded, unit = quantise_rows(weight, torch.int8)
        taps = rounded.view(groups, GROUP, GROUP, 3, 3)
        # [G, n, lane, byte, dy, dx] -> [G, dy, n, dx, lane, byte]
        picked = taps[:, out_channel[:, :, None], in_channel[None]]
        packed = picked.permute(0, 4, 1, 5, 2, 3).reshape(groups, 18, 32, 4)
    else:
        wide = weight.float()
        unit = wide.flatten(1).abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny * 2**20) / FLOAT16_LARGEST
        taps = (wide / unit[:, None, None, None]).half().view(groups, GROUP, GROUP, 9)
        picked = taps[:, out_channel[:, :, None], in_channel[None]]  # [G, n, lane, 4, tap]
        packed = picked.view(groups, 2, 32, 2, 2, 9).permute(0, 5, 1, 3, 2, 4)  # [G, tap, n, register, lane, half]
    return packed.contiguous(), unit.to(step.device) / step.float()


def unpack_codes(taps: Tensor) -> Tensor:
    """The taps as `[C, 16, 3, 3]`, fp32."""
    out_channel, in_channel = _fragment_channels()
    groups = taps.shape[0]
    if taps.dtype == torch.int8:
        picked = taps.view(groups, 3, 2, 3, 32, 4).permute(0, 2, 4, 5, 1, 3)
    else:
        picked = taps.permute(0, 2, 4, 3, 5, 1).reshape(groups, 2, 32, 4, 3, 3)
    found = torch.empty(groups, GROUP, GROUP, 3, 3, dtype=torch.float32, device=taps.device)
    found[:, out_channel[:, :, None], in_channel[None]] = picked.float()
    return found.view(groups * GROUP, GROUP, 3, 3)


def reference(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor, gain: Tensor, up2: bool, codes: torch.dtype
) -> Tensor:
    """Codes of the block's middle; arguments as for the op, `codes` in place of its flag."""
    inverse = gain[:, 1].view(-1, 1, 1, 1).float()
    if scale is None:
        image, taps, unit = F.leaky_relu((enlarge(x) if up2 else x).float(), SLOPE), unpack(weight).float(), inverse
    else:
        image, taps, unit = x.float(), unpack_codes(weight), scale
    # In double: sums of integer products are exact, as they are in the kernel.
    sums = F.conv2d(image.permute(0, 3, 1, 2).double(), taps.double(), padding=1, groups=x.shape[-1] // GROUP)
    y = sums.permute(0, 2, 3, 1).float() * unit + bias.float() * inverse
    return encode(F.leaky_relu(y, SLOPE), codes).contiguous()
