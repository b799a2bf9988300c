"""diffusers' AutoencoderDC decoder (sana) rewritten onto the ops of `owl_wms.ops`, NHWC throughout.

Why it exists: nine tenths of this decoder are dense 3x3 convolutions. What compilers lose is around them: norms,
activations, residuals, gates, shuffles and the layout changes between. Here each of those is inside a kernel. Batch
norm is folded into the weights before it in fp32. Who computes a convolution is measured at build time, shape by shape.

All released configurations have a fused form: f32c32 of the Sana pipelines (attention at two scales, enlargement by
nearest neighbour, RMS norm and SiLU in every residual block) and f32c32, f64c128 and f128c512 of the first release
(one scale, pixel shuffle, batch norm and ReLU).

diffusers is never imported: its classes are known by name.

Usage:
    fused = fuse(decoder_fp32.cuda(), torch.float16, (8, 128, 8, 8))     # the shape: to measure the convolutions
    x = fused(z)                                                        # z [B, c, h, w] -> [B, C, H, W], as decoder(z)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from owl_wms.fused.convolution import Conv3x3, choose
from owl_wms.ops.channel_norm import channel_norm as norm_op
from owl_wms.ops.conv3x3 import latent_conv, pack
from owl_wms.ops.conv_out import MAX_OUT, conv_out, padded
from owl_wms.ops.conv_out import pack as pack_out
from owl_wms.ops.depthwise_gate import depthwise_gate
from owl_wms.ops.depthwise_gate import pack as pack_depthwise
from owl_wms.ops.linear_attention import linear_attention, multiscale_attention, pack_scale
from owl_wms.ops.nearest_up import as_pixel_shuffle, nearest_up
from owl_wms.ops.nearest_up import pack as pack_nearest
from owl_wms.ops.pointwise import pointwise
from owl_wms.ops.resize import resize
from owl_wms.ops.shuffle_add import phases_first, shuffle_add, shuffle_frames
from owl_wms.vae.autoencoder_dc import is_sana_decoder

PADDED_CHANNELS = 16  # what three colours times four phases are padded to: tensor cores take multiples of 8


def supports(decoder: Any) -> tuple[bool, str]:
    """Returns whether `fuse` can rewrite `decoder`; `(False, reason)` where not."""
    if not is_sana_decoder(decoder):
        return False, f"no fused form of {type(decoder).__name__}; only diffusers' AutoencoderDC decoder has one"
    last = decoder.conv_out
    if type(last).__name__ == "DCUpBlock2d":
        if (4 if last.interpolate else 1) * last.conv.out_channels > PADDED_CHANNELS:
            return False, "needs an enlarging output convolution to at most 4 channels"
    elif last.out_channels > MAX_OUT or last.in_channels % 8:
        return False, f"needs an output convolution from a multiple of 8 channels to at most {MAX_OUT}"
    if not isinstance(decoder.conv_act, nn.ReLU):
        return False, f"needs a ReLU before the output convolution, got {type(decoder.conv_act).__name__}"
    for block in (block for stage in decoder.up_blocks for block in stage):
        kind = type(block).__name__
        if kind == "DCUpBlock2d" and block.interpolate and block.interpolation_mode != "nearest":
            return False, f"needs enlargement by nearest neighbour, not {block.interpolation_mode}"
        if kind == "ResBlock" and type(block.nonlinearity) not in (nn.ReLU, nn.SiLU):
            return False, f"needs residual blocks with ReLU or SiLU, got {type(block.nonlinearity).__name__}"
        if kind == "ResBlock" and block.norm_type not in ("batch_norm", "rms_norm"):
            return False, f"needs residual blocks with batch norm or RMS norm, got {block.norm_type}"
        if kind == "EfficientViTBlock" and block.attn.norm_type != "rms_norm":
            return False, f"needs attention with RMS norm, got {block.attn.norm_type}"
        if kind == "EfficientViTBlock" and len(block.attn.to_qkv_multiscale) > 1:
            return False, "needs attention at the pixels themselves and at most one scale besides"
        if kind not in ("DCUpBlock2d", "ResBlock", "EfficientViTBlock"):
            return False, f"no fused form of {kind}"
    return True, ""


def fuse(decoder: Any, dtype: torch.dtype, input_shape: tuple[int, ...] | None = None) -> nn.Module:
    """The fused form of `decoder` (fp32, eval), weights cast to `dtype` once, on the decoder's device.

    Args:
        decoder: diffusers' decoder; not changed.
        dtype: of the result's weights and activations.
        input_shape: `(B, c, h, w)`; on a GPU, every convolution of that shape is timed and the fastest way chosen.

    Raises:
        ValueError: `supports` says no.
    """
    supported, reason = supports(decoder)
    if not supported:
        raise ValueError(reason)
    with torch.no_grad():
        fused = FusedSana(decoder, dtype).eval()
        choose(fused, dtype, input_shape)
    return fused


def fold_batch_norm(conv: nn.Conv2d, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias, fp32, of one convolution that does what `norm(conv(x))` does in eval mode."""
    scale = norm.weight.detach().float() * torch.rsqrt(norm.running_var.float() + norm.eps)
    bias = 0.0 if conv.bias is None else conv.bias.detach().float()
    shifted = (bias - norm.running_mean.float()) * scale + norm.bias.detach().float()
    return conv.weight.detach().float() * scale[:, None, None, None], shifted


class Norm(nn.Module):
    """RMS norm over the last axis with scale, shift and, optionally, ReLU and a residual."""

    weight: Tensor
    bias: Tensor

    def __init__(self, norm: Any, *, relu: bool = False) -> None:
        super().__init__()
        self.eps, self.relu = float(norm.eps), relu
        self.register_buffer("weight", norm.weight.detach().float())
        bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
        self.register_buffer("bias", bias.detach().float())

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return norm_op(x, self.weight, self.bias, residual, self.eps, self.relu)


def up(block: Any, dtype: torch.dtype) -> nn.Module:
    """The fused form of an up block, by how it enlarges."""
    return NearestUp(block, dtype) if block.interpolate else Up(block, dtype)


class Up(nn.Module):
    """3x3 convolution, pixel shuffle and repeated shortcut: `[B, H, W, C] -> [B, 2H, 2W, O]`."""

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv = Conv3x3(phases_first(block.conv.weight), phases_first(block.conv.bias), dtype)
        self.shortcut = bool(block.shortcut)

    def forward(self, x: Tensor) -> Tensor:
        return shuffle_add(self.conv(x), x if self.shortcut else None)


class NearestUp(nn.Module):
    """Enlargement by nearest neighbour, 3x3 convolution and repeated shortcut: `[B, H, W, C] -> [B, 2H, 2W, O]`."""

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", pack_nearest(block.conv.weight.detach().float()).to(dtype))
        self.register_buffer("bias", block.conv.bias.detach().float())
        self.shortcut = bool(block.shortcut)

    def forward(self, x: Tensor) -> Tensor:
        return nearest_up(x, self.weight, self.bias, self.shortcut)


class Residual(nn.Module):
    """Two 3x3 convolutions with ReLU or SiLU between, then the residual; `[B, H, W, C]` in and out.

    A batch norm is folded into the second convolution, an RMS norm follows it.
    """

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        super().__init__()
        relu = isinstance(block.nonlinearity, nn.ReLU)
        self.first = Conv3x3(block.conv1.weight, block.conv1.bias, dtype, relu=relu, silu=not relu)
        if block.norm_type == "batch_norm":
            self.second = Conv3x3(*fold_batch_norm(block.conv2, block.norm), dtype)
        else:
            norm = Norm(block.norm)
            self.second = Conv3x3(block.conv2.weight, norm.bias, dtype, norm=(norm.weight, norm.eps))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x), x)
        return result


class EfficientViT(nn.Module):
    """Linear attention at one or two scales, then the gated convolution; `[B, H, W, C]` in and out.

    Each of them ends in an RMS norm and its residual.
    """

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        super().__init__()
        attention, gated = block.attn, block.conv_out
        self.head, self.eps = attention.attention_head_dim, float(attention.eps)
        qkv = torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight])
        self.register_buffer("qkv", qkv.detach().to(dtype))
        taps, near = None, None
        if len(attention.to_qkv_multiscale):
            scale = attention.to_qkv_multiscale[0]
            taps, near = pack_scale(scale.proj_in.weight.detach(), scale.proj_out.weight.detach())
        self.register_buffer("taps", taps)
        self.register_buffer("near", None if near is None else near.to(dtype))
        self.register_buffer("out", attention.to_out.weight.detach().to(dtype))
        self.attention_norm, self.gate_norm = Norm(attention.norm_out), Norm(gated.norm)
        self.register_buffer("inverted", gated.conv_inverted.weight.detach().flatten(1).to(dtype))
        self.register_buffer("inverted_bias", gated.conv_inverted.bias.detach().to(dtype))
        self.register_buffer("depth", pack_depthwise(gated.conv_depth.weight.detach()))
        self.register_buffer("depth_bias", gated.conv_depth.bias.detach().float())
        self.register_buffer("point", gated.conv_point.weight.detach().flatten(1).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        qkv = pointwise(x, self.qkv, None)
        if self.taps is None:
            mixed = linear_attention(qkv, self.head, self.eps)
        else:
            mixed = multiscale_attention(qkv, self.taps, self.near, self.head, self.eps)
        x = self.attention_norm(pointwise(mixed, self.out, None), x)
        hidden = depthwise_gate(pointwise(x, self.inverted, self.inverted_bias), self.depth, self.depth_bias)
        result: Tensor = self.gate_norm(pointwise(hidden, self.point, None), x)
        return result


def output(decoder: Any, dtype: torch.dtype) -> nn.Module:
    """The fused form of what follows the last block, by whether it enlarges."""
    return UpOutput(decoder, dtype) if type(decoder.conv_out).__name__ == "DCUpBlock2d" else OutputConv(decoder, dtype)


class UpOutput(nn.Module):
    """Norm, ReLU, 3x3 convolution and pixel shuffle to the image: `[B, H, W, C] -> [B, 3, 2H, 2W]`."""

    def __init__(self, decoder: Any, dtype: torch.dtype) -> None:
        super().__init__()
        block = decoder.conv_out
        weight, bias = block.conv.weight.detach(), block.conv.bias.detach()
        if block.interpolate:
            weight, bias = as_pixel_shuffle(weight), bias.repeat_interleave(4)
        self.channels = weight.shape[0] // 4
        self.norm = Norm(decoder.norm_out, relu=True)
        missing = PADDED_CHANNELS - weight.shape[0]
        self.conv = Conv3x3(F.pad(weight, (0, 0, 0, 0, 0, 0, 0, missing)), F.pad(bias, (0, missing)), dtype)

    def forward(self, x: Tensor) -> Tensor:
        return shuffle_frames(self.conv(self.norm(x)), self.channels)


class OutputConv(nn.Module):
    """Norm, ReLU and 3x3 convolution to the image: `[B, H, W, C] -> [B, 3, H, W]`."""

    def __init__(self, decoder: Any, dtype: torch.dtype) -> None:
        super().__init__()
        conv = decoder.conv_out
        self.channels, self.dtype = conv.out_channels, dtype
        self.norm = Norm(decoder.norm_out, relu=True)
        self.register_buffer("weight", pack_out(conv.weight.detach()).to(dtype))
        bias = conv.bias.detach().float()
        self.register_buffer("bias", F.pad(bias, (0, padded(self.channels) - self.channels)))

    def forward(self, x: Tensor) -> Tensor:
        image = conv_out(self.norm(x), self.weight, self.bias, False)
        # Bicubic to the size that it has: the image as it is, in planes and in the decoder's dtype.
        return resize(image, self.channels, image.shape[1], image.shape[2], self.dtype)


class FusedSana(nn.Module):
    """`z [B, c, h, w] -> x [B, C, H, W]`, the same function as the decoder it was made from. Built by `fuse`."""

    def __init__(self, decoder: Any, dtype: torch.dtype) -> None:
        super().__init__()
        conv = decoder.conv_in
        self.repeats = decoder.in_shortcut_repeats if decoder.in_shortcut else 0
        self.register_buffer("in_weight", pack(conv.weight.detach()).to(dtype))
        self.register_buffer("in_bias", conv.bias.detach().to(dtype))
        blocks = [block for stage in reversed(decoder.up_blocks) for block in stage]
        kinds: dict[str, Callable[[Any, torch.dtype], nn.Module]]
        kinds = {"DCUpBlock2d": up, "ResBlock": Residual, "EfficientViTBlock": EfficientViT}
        self.body = nn.Sequential(*(kinds[type(block).__name__](block, dtype) for block in blocks))
        self.output = output(decoder, dtype)

    def forward(self, z: Tensor) -> Tensor:
        x = self.body(latent_conv(z, self.in_weight, self.in_bias, self.repeats))
        frames: Tensor = self.output(x)
        return frames
