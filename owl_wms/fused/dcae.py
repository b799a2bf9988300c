"""A decoder rewritten onto the ops of `owl_wms.ops`: same function, same call, a fraction of the memory traffic.

Why it exists: TensorRT, and PyTorch's own compiler, leave this architecture memory-bound (bicubic enlargement,
grouped convolution, layout changes). Here every stage is one `owl_wms::stage`, everything between is NHWC, and the
last steps are `owl_wms::conv_out` and `owl_wms::resize`. On the CPU, and in fp32, the ops run their references, so
the rewrite itself is tested without a GPU.

Usage:
    fused = fuse(fold_weight_norm(decoder), torch.bfloat16).cuda()
    x = fused(z)                                  # z [B, c, h, w] -> [B, C, H, W], as decoder(z)
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from owl_wms.fused.convolution import LearnedShortcut, choose
from owl_wms.ops.codes import code_gain
from owl_wms.ops.conv_out import MAX_OUT, conv_out, padded
from owl_wms.ops.conv_out import pack as pack_conv_out
from owl_wms.ops.grouped_conv import pack as pack_grouped
from owl_wms.ops.resize import resize
from owl_wms.ops.stage import stage
from owl_wms.vae.build import build_decoder
from owl_wms.vae.dcae import DCAEDecoder
from owl_wms.vae.distill import DistillDecoder
from owl_wms.vae.landscape import SquareToLandscape, nearest_landscape


def supports(decoder: nn.Module) -> tuple[bool, str]:
    """Returns whether `fuse` can rewrite `decoder` (weight norm folded or not), and if not, why: `(False, reason)`."""
    if not isinstance(decoder, (DCAEDecoder, DistillDecoder)):
        return False, f"no fused form of {type(decoder).__name__}; only DCAEDecoder and DistillDecoder have one"
    if decoder.out_channels > MAX_OUT:
        return False, f"the last convolution makes {decoder.out_channels} channels, the fused one at most {MAX_OUT}"
    if decoder.config.ch_0 % 8:
        return False, f"ch_0 must be a multiple of 8, got {decoder.config.ch_0}"
    return True, ""


def fuse(decoder: nn.Module, dtype: torch.dtype, input_shape: tuple[int, ...] | None = None) -> nn.Module:
    """The fused form of a folded decoder, with weights cast to `dtype` once, on the decoder's device.

    Args:
        decoder: folded; not changed.
        dtype: of weights and activations.
        input_shape: `(B, c, h, w)`; on a GPU, learned shortcuts of that shape are timed and the fastest way chosen.

    Raises:
        ValueError: `supports` says no, or weight norm has not been folded.
    """
    with torch.no_grad():
        # Everything is made from weights that have been rounded once, as eager PyTorch at this precision has them.
        rounded = copy.deepcopy(fusible(decoder)).to(dtype)
        fused = FusedDecoder(rounded, dtype).eval()
        choose(fused, dtype, input_shape)
    return fused


def standard(decoder: DCAEDecoder | DistillDecoder) -> nn.Module:
    """A new decoder of the same configuration and variant, with random weights."""
    return build_decoder(decoder.config, variant=decoder.variant if isinstance(decoder, DCAEDecoder) else None)


def fusible(decoder: nn.Module) -> DCAEDecoder | DistillDecoder:
    """`decoder` itself. Raises ValueError when it has no fused form, or weight norm has not been folded."""
    supported, reason = supports(decoder)
    if not supported:
        raise ValueError(reason)
    if any(hasattr(module, "parametrizations") for module in decoder.modules()):
        raise ValueError("fuse wants plain weights: call owl_wms.vae.fold_weight_norm first")
    return cast("DCAEDecoder | DistillDecoder", decoder)


def matrix(conv: nn.Conv2d, dtype: torch.dtype) -> Tensor:
    """Weights of a 1x1 convolution as `[out, in]`."""
    return conv.weight.detach().flatten(1).to(dtype).contiguous()


class FusedStage(nn.Module):
    """One stage on `[B, h, w, Cin] -> [B, s h, s w, C]`: enlargement by `scale`, residual blocks, shortcut.

    Args:
        blocks: the stage's ResBlocks (folded).
        proj: its 1x1 projection, or None where widths are equal.
        scale: 1, 2 or 4.
        shortcut: "tiled" (the input itself, shuffled), "none", or the learned 3x3 convolution.
    """

    proj: Tensor | None

    def __init__(
        self,
        blocks: nn.ModuleList | list[Any],
        proj: nn.Module | None,
        scale: int,
        shortcut: str | nn.Conv2d,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.scale, self.depth = scale, len(blocks)
        self.tiled = shortcut == "tiled"
        self.register_buffer("proj", matrix(proj, dtype) if isinstance(proj, nn.Conv2d) else None)
        learned = shortcut if isinstance(shortcut, nn.Conv2d) else None
        # Not left to TensorRT: its half-precision sums fail the parity check, and its engines hold weights in a form
        # that takes a minute to write and twenty seconds to read (docs/log.md).
        self.shortcut = None if learned is None else LearnedShortcut(learned.weight, learned.bias, dtype)
        self.take(blocks, dtype)

    def take(self, blocks: nn.ModuleList | list[Any], dtype: torch.dtype) -> None:
        """Register the blocks' weights as buffers; a form of the stage with other products overrides it."""
        for j, block in enumerate(blocks):
            self.register_buffer(f"w1_{j}", matrix(block.conv1, dtype))
            self.register_buffer(f"b1_{j}", block.conv1.bias.detach().to(dtype))
            self.register_buffer(f"w2_{j}", pack_grouped(block.conv2.weight.detach()).to(dtype))
            # An fp32 tensor in a 16-bit program: the kernel adds it to fp32 sums.
            self.register_buffer(f"b2_{j}", block.conv2.bias.detach().float())
            self.register_buffer(f"w3_{j}", matrix(block.conv3, dtype))

    def _all(self, name: str) -> list[Tensor]:
        return [getattr(self, f"{name}_{j}") for j in range(self.depth)]

    def forward(self, x: Tensor, gain: Tensor | None) -> Tensor:
        if self.shortcut is None:
            return self.run(x, gain, x if self.tiled else None)
        return self.shortcut.join(x, functools.partial(self.run, x, gain))

    def run(self, x: Tensor, gain: Tensor | None, shortcut: Tensor | None) -> Tensor:
        """The stage's op; `shortcut` is what it shuffles onto its result, or None."""
        weights = (self._all(name) for name in ("w1", "b1", "w2", "b2", "w3"))
        return stage(x, shortcut, self.proj, *weights, self.scale)


MakeStage = Callable[[Any, Any, int, Any, torch.dtype], FusedStage]


class FusedInput(nn.Module):
    """`[B, c, h, w]` latents to `[B, h, w, C]`: the first convolution and its parameter-free shortcut."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d, shortcut: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.pointwise = conv.kernel_size == (1, 1)
        self.shortcut, self.repeats = shortcut, conv.out_channels // conv.in_channels
        self.register_buffer("weight", matrix(conv, dtype) if self.pointwise else conv.weight.detach().to(dtype))
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().to(dtype))

    def forward(self, z: Tensor) -> Tensor:
        rows = z.permute(0, 2, 3, 1).contiguous()
        x: Tensor
        if self.pointwise:
            x = F.linear(rows, self.weight, self.bias)
        else:
            x = F.conv2d(z, self.weight, self.bias, padding=1).permute(0, 2, 3, 1).contiguous()
        if self.shortcut == "tiled":
            return x + rows.repeat(1, 1, 1, self.repeats)
        if self.shortcut == "interleaved":
            x = x + rows.repeat_interleave(self.repeats, dim=-1) * self.repeats**-0.5
        return x


class FusedDecoder(nn.Module):
    """`z [B, c, h, w] -> x [B, C, H, W]`, the same function as the decoder it was made from. Built by `fuse`.

    Args:
        decoder: folded.
        dtype: of weights and activations.
        make_stage: what a stage is made by; takes what FusedStage takes.
        reach: largest magnitude of the latents that 8-bit stages were calibrated on; None without such stages.
    """

    def __init__(
        self,
        decoder: DCAEDecoder | DistillDecoder,
        dtype: torch.dtype,
        make_stage: MakeStage = FusedStage,
        reach: float | None = None,
    ) -> None:
        super().__init__()
        self.dtype, self.reach = dtype, reach
        self.latent_channels, self.out_channels = decoder.latent_channels, decoder.out_channels
        stages: list[nn.Module] = []
        # The learned variant's middle block keeps its input beside the result: m(x) + x.
        self.keep_middle_input = False
        blocks: Any = decoder.blocks
        if isinstance(decoder, DCAEDecoder):
            self.silu = True
            residuals: Any = decoder.residuals
            learned = decoder.variant == "learned"
            conv_in: Any = getattr(decoder.conv_in, "proj", decoder.conv_in)
            kind = "none" if conv_in is decoder.conv_in and learned else "interleaved" if learned else "tiled"
            self.middle = None
            if decoder.middle_block is not None:
                self.middle = make_stage(decoder.middle_block.blocks, None, 1, "none", dtype)
                self.keep_middle_input = learned
            for i, block in enumerate(blocks):
                if not learned:
                    shortcut: str | nn.Conv2d = "tiled"
                else:
                    shortcut = residuals[i].proj if len(residuals) else "none"
                stages.append(make_stage(block.blocks, block.up.proj, 2, shortcut, dtype))
        else:
            self.silu, self.middle, conv_in, kind = False, None, decoder.conv_in, "none"
            for up, block in zip(blocks[::2], blocks[1::2], strict=True):
                stages.append(make_stage([block], up.proj, up.stride, "none", dtype))
        self.input = FusedInput(conv_in, kind, dtype)
        self.stages = nn.ModuleList(stages)

        wide = isinstance(decoder.conv_out, SquareToLandscape)
        end: Any = decoder.conv_out
        last: Any = end.proj if wide else end
        self.wide: bool = wide
        self.size: tuple[int, int] | None = end.size if wide else None
        bias = torch.zeros(padded(self.out_channels), dtype=torch.float32, device=last.weight.device)
        if last.bias is not None:
            bias[: self.out_channels] = last.bias.detach().float()
        self.register_buffer("out_weight", pack_conv_out(last.weight.detach()).to(dtype))
        self.register_buffer("out_bias", bias)

    def features(self, z: Tensor) -> Tensor:
        """Everything before the final resize: fp32 `[B, S, S, 4 or 8]`."""
        gain = None if self.reach is None else code_gain(z, self.reach)
        x = self.input(z.to(self.dtype))
        if self.middle is not None:
            x = self.middle(x, gain) + x if self.keep_middle_input else self.middle(x, gain)
        for one in self.stages:
            x = one(x, gain)
        return conv_out(x, self.out_weight, self.out_bias, self.silu)

    def _frame_size(self, square: Tensor) -> tuple[int, int]:
        height, width = square.shape[1:3]
        return (self.size or nearest_landscape(height, width)) if self.wide else (height, width)

    def forward(self, z: Tensor) -> Tensor:
        square = self.features(z)
        return resize(square, self.out_channels, *self._frame_size(square), self.dtype)
