"""TAEHV on our ops, NHWC throughout: one step of a stream, the same function as the decoder's.

Why it exists: everyone runs these decoders frame by frame in PyTorch. What that spends beside the products are passes
over the largest tensors: concatenation with the earlier frame, enlargement, frames put into the order of time, bias,
ReLU, residual, shuffle, clamp. Here each is where a convolution reads or writes. Two convolutions without a bias or
anything between them become one: growth in time (1x1) and the 3x3 behind it, whose weights are multiplied in fp32. And
behind a nearest enlargement each output pixel sees only 2 x 2 different pixels, so 4 of 9 products remain.

Usage:
    fused = fuse(decoder.float().cuda(), torch.float16, (1, 32, 45, 80))    # the shape: to measure the convolutions
    frames, state = fused.step(latent)          # as decoder.step; a state of either is a state of the other
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import owl_wms.ops  # noqa: F401  registers torch.ops.owl_wms
from owl_wms.fused.convolution import Chosen, choose
from owl_wms.ops import frame_conv as ops
from owl_wms.ops.conv3x3 import conv3x3
from owl_wms.ops.frame_depthwise import frame_depthwise
from owl_wms.ops.frame_depthwise import pack as pack_depthwise
from owl_wms.ops.pointwise import pointwise, pointwise_add, pointwise_frames, pointwise_relu
from owl_wms.ops.shuffle_add import phases_first, shuffle_add
from owl_wms.state import State, StateSpec, zeros
from owl_wms.vae.stepping import Stepping
from owl_wms.vae.taehv import BLOCKS_PER_STAGE, STAGES, Grow, TAEHVDecoder, state_specs

INPUT_CHANNELS = 64  # what the latents' channels are filled up to a multiple of, since our kernel reads 64 at a time
MAX_OUT = 64


def supports(decoder: nn.Module) -> tuple[bool, str]:
    """Returns whether `fuse` can rewrite `decoder`, and if not, why: `(False, reason)`."""
    decoder = _inner(decoder)
    if not isinstance(decoder, TAEHVDecoder):
        return False, f"no fused form of {type(decoder).__name__}; only TAEHVDecoder has one"
    outputs = decoder.out_channels * decoder.config.patch_size**2
    if outputs > MAX_OUT:
        return False, f"the last convolution makes {outputs} channels, the fused one at most {MAX_OUT}"
    if decoder.config.form == "super" and not all(decoder.config.space_upscale):
        return False, "the fused super form doubles height and width in every stage"
    return True, ""


def fuse(decoder: nn.Module, dtype: torch.dtype, input_shape: tuple[int, ...] | None = None) -> Any:
    """Returns the fused form of a decoder, with weights cast to `dtype` once, on the decoder's device.

    Args:
        decoder: a TAEHVDecoder, best in fp32; not changed. Its `Stepping` gives the `Stepping` of the fused form.
        dtype: of weights and activations.
        input_shape: `(b, c, h, w)`; on a GPU, every convolution of that shape is timed and the fastest way chosen.

    Raises:
        ValueError: `supports` says no.
    """
    supported, reason = supports(decoder)
    if not supported:
        raise ValueError(reason)
    inner = _inner(decoder)
    assert isinstance(inner, TAEHVDecoder)
    with torch.no_grad():
        fused = FusedTAEHV(inner, dtype).eval()
        choose(fused, dtype, input_shape)
    return fused if inner is decoder else Stepping(fused)


def standard(decoder: nn.Module) -> nn.Module:
    """Returns a new decoder of the same configuration, with random weights."""
    inner = _inner(decoder)
    assert isinstance(inner, TAEHVDecoder)
    fresh = TAEHVDecoder(inner.config)
    return fresh if inner is decoder else Stepping(fresh)


def _inner(decoder: nn.Module) -> nn.Module:
    return decoder.decoder if isinstance(decoder, Stepping) else decoder


class FrameConv(Chosen):
    """`relu(conv([x, past]) + bias + residual)`; `other` is the past, or the residual where `adds`."""

    def __init__(self, conv: Any, dtype: torch.dtype, *, adds: bool = False) -> None:
        weight = ops.pack(conv.weight.detach())
        super().__init__(F.pad(weight, (0, -weight.shape[-1] % INPUT_CHANNELS)), conv.bias, dtype)
        self.adds, self.alike = adds, (adds,)

    def ways(self, x: Tensor, other: Tensor | None) -> list[int]:
        past, residual = (None, other) if self.adds else (other, None)
        return ops.frame_ways(x, past, self.weight, residual)

    def compute(self, how: int, x: Tensor, other: Tensor | None) -> Tensor:
        past, residual = (None, other) if self.adds else (other, None)
        return ops.frame_conv(x, past, self.weight, self.bias, residual, how)


class EnlargeConv(Chosen):
    """Nearest enlargement by two, growth in time, 3x3 convolution, and ReLU where asked."""

    def __init__(self, grow: Grow, conv: Any, relu: bool, dtype: torch.dtype) -> None:
        packed = ops.pack_enlarging(grow.conv.weight.detach().float(), conv.weight.detach().float())
        super().__init__(packed, None, dtype)
        self.frames, self.relu = grow.factor, relu
        self.alike = (grow.factor, relu)

    def ways(self, x: Tensor, other: Tensor | None) -> list[int]:
        return ops.enlarge_ways(x, self.weight, self.frames)

    def compute(self, how: int, x: Tensor, other: Tensor | None) -> Tensor:
        return ops.enlarge_conv(x, self.weight, self.frames, self.relu, how)


class GrowConv(nn.Module):
    """Growth in time, then a 3x3 convolution, and ReLU where asked; no enlargement."""

    weight: Tensor

    def __init__(self, grow: Grow, conv: Any, relu: bool, dtype: torch.dtype) -> None:
        super().__init__()
        merged = ops.grown(grow.conv.weight.detach().float(), conv.weight.detach().float())
        self.register_buffer("weight", ops.pack(merged).to(dtype))
        self.frames, self.relu = grow.factor, relu

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = conv3x3(x, self.weight, None, None, self.relu, ops.LIBRARY)
        result: Tensor = y.unflatten(-1, (self.frames, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1).contiguous()
        return result


class PictureConv(Chosen):
    """The last convolution, clamp and pixel shuffle; bytes where `as_bytes`."""

    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, patch: int, dtype: torch.dtype) -> None:
        super().__init__(*ops.pack_picture(weight.detach(), bias.detach()), dtype)
        self.patch, self.as_bytes = patch, False

    def ways(self, x: Tensor, other: Tensor | None) -> list[int]:
        return ops.picture_ways(x, self.weight, self.patch)

    def compute(self, how: int, x: Tensor, other: Tensor | None) -> Tensor:
        return ops.picture_conv(x, self.weight, self.bias, self.patch, self.as_bytes, how)


class MemoryBlock(nn.Module):
    """A block of the normal form on `[B, H, W, C]`: three convolutions with what follows them."""

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.second = FrameConv(block.conv[0], dtype), FrameConv(block.conv[2], dtype)
        self.third = FrameConv(block.conv[4], dtype, adds=True)

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        result: Tensor = self.third(self.second(self.first(x, past)), x)
        return result


class SuperMemoryBlock(nn.Module):
    """A block of the super form: depthwise 7x7, then two products with ReLU and residual in their epilogues."""

    taps: Tensor
    wide: Tensor
    wide_bias: Tensor
    narrow: Tensor

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("taps", pack_depthwise(block.conv[0].weight.detach()))
        self.register_buffer("wide", block.conv[1].weight.detach().flatten(1).to(dtype))
        self.register_buffer("wide_bias", block.conv[1].bias.detach().to(dtype))
        self.register_buffer("narrow", block.conv[3].weight.detach().flatten(1).to(dtype))

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        hidden = pointwise_relu(frame_depthwise(x, past, self.taps), self.wide, self.wide_bias)
        result: Tensor = pointwise_add(hidden, self.narrow, x)
        return result


class SuperEnlarge(nn.Module):
    """3x3 convolution, ReLU, pixel shuffle by two, and growth in time where it is not part of the last convolution."""

    grow: Tensor | None

    def __init__(self, conv: Any, grow: Grow | None, dtype: torch.dtype) -> None:
        super().__init__()
        ordered = nn.Module()
        ordered.weight, ordered.bias = phases_first(conv.weight.detach()), phases_first(conv.bias.detach())
        self.conv = FrameConv(ordered, dtype)
        self.frames = 1 if grow is None else grow.factor
        self.register_buffer("grow", None if grow is None else grow.conv.weight.detach().flatten(1).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        y = shuffle_add(self.conv(x), None)
        if self.grow is None:
            return y
        result: Tensor = (
            pointwise(y, self.grow, None) if self.frames == 1 else pointwise_frames(y, self.grow, self.frames)
        )
        return result


class FusedTAEHV(nn.Module):
    """`step` and `state_specs` as those of the decoder it was made from. Built by `fuse`."""

    entry: Tensor

    def __init__(self, decoder: TAEHVDecoder, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.latent_channels, self.out_channels = dtype, decoder.latent_channels, decoder.out_channels
        self.frames_per_latent, self.scale = decoder.frames_per_latent, decoder.scale
        self.config, self.normal = decoder.config, decoder.config.form == "normal"
        layers: list[Any] = list(decoder)
        last, patch = layers[-1], decoder.config.patch_size
        blocks: list[nn.Module] = []
        if self.normal:
            self.input = FrameConv(layers[1], dtype)
            self.pictures = nn.ModuleList([PictureConv(last.weight, last.bias, patch, dtype)])
            for i in range(STAGES):
                first = 3 + i * (BLOCKS_PER_STAGE + 3)
                blocks += [MemoryBlock(layers[first + j], dtype) for j in range(BLOCKS_PER_STAGE)]
                kind = EnlargeConv if decoder.config.space_upscale[i] else GrowConv
                blocks.append(kind(layers[first + 4], layers[first + 5], i == STAGES - 1, dtype))
        else:
            self.register_buffer("entry", layers[0].weight.detach().flatten(1).to(dtype))
            for i in range(STAGES):
                first = 1 + i * (BLOCKS_PER_STAGE + 4)
                blocks += [SuperMemoryBlock(layers[first + j], dtype) for j in range(BLOCKS_PER_STAGE)]
                grow = layers[first + 6]
                blocks.append(SuperEnlarge(layers[first + 3], grow if i < STAGES - 1 else None, dtype))
            merged = ops.grown(grow.conv.weight.detach().float(), last.weight.detach().float())
            frames = merged.chunk(grow.factor)
            self.pictures = nn.ModuleList(PictureConv(weight, last.bias, patch, dtype) for weight in frames)
        self.blocks = nn.ModuleList(blocks)

    def state_specs(self, shape: tuple[int, ...]) -> tuple[StateSpec, ...]:
        """Describes the state: shapes `[b, C, H, W]` as the decoder's; channels_last in memory costs no copy."""
        return state_specs(self.config, shape, self.dtype)

    def forward(self, latent: Tensor) -> Tensor:
        """Decodes the first latent `[b, c, h, w]` of streams: frames `[b, t, 3, H, W]`."""
        return self.step(latent)[0]

    def step(self, latent: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Decodes the next latent of each stream, as `TAEHVDecoder.step`: `[b, c, h, w]` to `[b, t, 3, H, W]`."""
        return self._step(latent, state, False)

    def step_bytes(self, latent: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Does what `step` does and returns frames as uint8 `[b, t, H, W, 3]`, [0, 1] mapped to [0, 255]."""
        return self._step(latent, state, True)

    def _step(self, latent: Tensor, state: State | None, as_bytes: bool) -> tuple[Tensor, State]:
        streams = len(latent)
        state = state or zeros(self.state_specs(tuple(latent.shape)), latent.device)
        x = self._enter(latent)
        following: list[Tensor] = []
        for block in self.blocks:
            if isinstance(block, (MemoryBlock, SuperMemoryBlock)):
                past = state[len(following)].to(self.dtype).permute(0, 2, 3, 1).contiguous()
                # A block's last input, seen as the decoder shapes it.
                following.append(x.unflatten(0, (streams, -1))[:, -1].permute(0, 3, 1, 2))
                x = block(x, past)
            else:
                x = block(x)
        made = []
        for picture in self.pictures:
            assert isinstance(picture, PictureConv)
            picture.as_bytes = as_bytes
            made.append(picture(x))
        frames = made[0] if len(made) == 1 else torch.stack(made, 1).flatten(0, 1)
        return frames.unflatten(0, (streams, -1)), tuple(following)

    def _enter(self, latent: Tensor) -> Tensor:
        if not self.normal:
            rows = latent.to(self.dtype).permute(0, 2, 3, 1).contiguous()
            result: Tensor = pointwise(rows, self.entry, None)
            return result
        limited = torch.tanh(latent.float() / 3) * 3
        rows = limited.permute(0, 2, 3, 1).to(self.dtype)
        result = self.input(F.pad(rows, (0, -rows.shape[-1] % INPUT_CHANNELS)).contiguous())
        return result
