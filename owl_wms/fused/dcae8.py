"""The fused decoder with 8-bit products in its wide stages: steps found by calibration, folded into the weights.

Why calibration: an 8-bit code needs to know how far its channel reaches. The fp32 decoder decodes a batch of latents
(seeded ones, or the user's), every residual block notes the largest magnitude of each of its channels, and that
magnitude becomes the largest code. Steps then disappear into neighbouring weights: no kernel divides at run time. The
scheme is symmetric, static and per channel for activations and per output channel for weights, as in Jacob et al.
2018 (arXiv:1712.05877) for int8 and Micikevicius et al. 2022 (arXiv:2209.05433) for fp8.

Usage:
    fused = fuse8(decoder_fp32, torch.bfloat16, torch.int8, latents)     # latents [N, c, h, w], fp32, same device
    x = fused(z)                                                         # as the decoder
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from owl_wms.fused.convolution import choose
from owl_wms.fused.dcae import FusedDecoder, FusedStage, fusible, matrix, supports
from owl_wms.ops.codes import LARGEST, quantise_rows
from owl_wms.ops.grouped_conv import pack as pack_grouped
from owl_wms.ops.grouped_conv.reference import GROUP
from owl_wms.ops.grouped_conv8 import pack_codes
from owl_wms.ops.stage8 import stage8
from owl_wms.vae.blocks import ResBlock

# Narrower stages are bound by memory, and those of one block have `stage_tail`: 8 bits measured slower there
# (docs/log.md).
LEAST_CHANNELS = 256
# Room above what calibration saw. An int8 code pays for it in resolution, an fp8 code, which has an exponent, does not.
# Measured on the base decoder with 16 latents (docs/log.md): 1.25 is the least error for int8, 1.6 and more for fp8.
HEADROOM = {torch.int8: 1.25, torch.float8_e4m3fn: 2.0}
# A channel that calibration saw (nearly) silent still gets a step, this share of its layer's largest reach.
QUIETEST = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Reach:
    """Largest magnitudes, fp32 a channel, that a residual block met: its input, and both LeakyReLUs' results."""

    block: Tensor
    first: Tensor
    middle: Tensor


@torch.no_grad()
def reaches(decoder: nn.Module, blocks: Iterable[Any], latents: Tensor) -> dict[nn.Module, Reach]:
    """Decode `latents` one at a time and say how far every channel of every residual block among `blocks` reached."""
    found: dict[nn.Module, Tensor] = {}

    def note(conv: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        largest = arguments[0].detach().abs().amax(dim=(0, 2, 3)).float()
        found[conv] = largest if conv not in found else torch.maximum(found[conv], largest)

    blocks = list(blocks)
    handles = [
        conv.register_forward_pre_hook(note) for block in blocks for conv in (block.conv1, block.conv2, block.conv3)
    ]
    try:
        for z in latents.split(1):
            decoder(z)
    finally:
        for handle in handles:
            handle.remove()
    return {
        block: Reach(block=found[block.conv1], first=found[block.conv2], middle=found[block.conv3]) for block in blocks
    }


def _step(reach: Tensor, codes: torch.dtype) -> Tensor:
    return torch.maximum(reach, QUIETEST * reach.max()).clamp_min(1e-12) * (HEADROOM[codes] / LARGEST[codes])


class FusedStage8(FusedStage):
    """`FusedStage` on `owl_wms::stage8`; `reach` and `codes` beside what that takes."""

    def __init__(
        self,
        blocks: list[Any],
        proj: nn.Module | None,
        scale: int,
        shortcut: str | nn.Conv2d,
        dtype: torch.dtype,
        reach: dict[nn.Module, Reach],
        codes: torch.dtype,
    ) -> None:
        super().__init__([], proj, scale, shortcut, dtype)
        self.depth = len(blocks)
        for j, block in enumerate(blocks):
            own = reach[block]
            middle = _step(own.middle, codes)
            weight, bias = block.conv2.weight.detach().float(), block.conv2.bias.detach().float() / middle
            if j == 0:
                self.register_buffer("w1", matrix(block.conv1, dtype))
                self.register_buffer("b1", block.conv1.bias.detach().to(dtype))
                self.register_buffer("w2", pack_grouped(weight / middle[:, None, None, None]).to(dtype))
                self.register_buffer("b2", bias)
            else:
                block_step, first = _step(own.block, codes), _step(own.first, codes)
                up, unit = quantise_rows(block.conv1.weight.detach().flatten(1).float() * block_step, codes)
                grouped = weight.view(-1, GROUP, GROUP, 3, 3) * first.view(-1, 1, GROUP, 1, 1)
                taps, taps_scale = pack_codes(grouped.view_as(weight), middle, codes)
                self._keep(j, up=up, up_scale=unit / first, up_bias=block.conv1.bias.detach().float() / first)
                self._keep(j, taps=taps, taps_scale=taps_scale, taps_bias=bias, inverse=block_step.reciprocal())
            down, unit = quantise_rows(block.conv3.weight.detach().flatten(1).float() * middle, codes)
            self._keep(j, down=down, down_scale=unit)

    def _keep(self, j: int, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(f"{name}_{j}", tensor.contiguous())

    def run(self, x: Tensor, gain: Tensor | None, shortcut: Tensor | None) -> Tensor:
        first = (self.w1, self.b1, self.w2, self.b2)
        later = ("up", "up_scale", "up_bias", "taps", "taps_scale", "taps_bias")
        lists = [[getattr(self, f"{name}_{j}") for j in range(1, self.depth)] for name in (*later, "inverse")]
        down, down_scale = self._all("down"), self._all("down_scale")
        return stage8(x, shortcut, self.proj, *first, *lists[:-1], down, down_scale, lists[-1], gain, self.scale)


def supports8(decoder: nn.Module) -> tuple[bool, str]:
    """Returns whether `fuse8` can rewrite `decoder`, and if not, why."""
    supported, reason = supports(decoder)
    if supported and not any(_suits(module) for module in decoder.modules()):
        return False, f"no stage has {LEAST_CHANNELS} channels or more in a multiple of {GROUP}"
    return supported, reason


def _suits(module: nn.Module) -> bool:
    if not isinstance(module, ResBlock):
        return False
    channels = module.conv3.out_channels
    return channels >= LEAST_CHANNELS and channels % GROUP == 0


@torch.no_grad()
def fuse8(
    decoder: nn.Module,
    dtype: torch.dtype,
    codes: torch.dtype,
    latents: Tensor,
    input_shape: tuple[int, ...] | None = None,
) -> FusedDecoder:
    """The fused form with 8-bit products in every stage of at least `LEAST_CHANNELS` channels.

    Args:
        decoder: folded, fp32, on the device to run on; not changed.
        dtype: of residuals and of everything that is not a code, float16 or bfloat16.
        codes: torch.int8 or torch.float8_e4m3fn.
        latents: `[N, c, h, w]` fp32 on the same device: what the steps are calibrated on.
        input_shape: as in `fuse`.

    Raises:
        ValueError: `supports8` says no, or weight norm has not been folded.
    """
    plain = fusible(decoder)
    supported, reason = supports8(decoder)
    if not supported:
        raise ValueError(reason)
    found = reaches(decoder, [block for block in decoder.modules() if _suits(block)], latents)

    def make(blocks: Any, proj: Any, scale: int, shortcut: Any, dtype: torch.dtype) -> FusedStage:
        if _suits(blocks[0]):
            return FusedStage8(list(blocks), proj, scale, shortcut, dtype, found, codes)
        return FusedStage(blocks, proj, scale, shortcut, dtype)

    fused = FusedDecoder(plain, dtype, make, float(latents.abs().max())).eval()
    choose(fused, dtype, input_shape)
    return fused
