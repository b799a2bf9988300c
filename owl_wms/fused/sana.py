"""diffusers' AutoencoderDC decoder (sana) rewritten onto the ops of `owl_wms.ops`, NHWC throughout.

Why it exists: nine tenths of this decoder are dense 3x3 convolutions; what compilers lose is around them (norms, ReLU,
residuals, gates, shuffles and the layout changes between). Here each of those is inside a kernel, batch norm is folded
into the weights before it in fp32, and who computes a convolution is measured at build time, shape by shape.

`hybrid=True` keeps everything after the last EfficientViT block as plain convolutions in NCHW, for TensorRT to take
as one engine, so that both ways can be built and the faster kept. diffusers is never imported: its classes are known
by name.

Usage:
    fused = fuse(decoder_fp32.cuda(), torch.float16, (8, 128, 8, 8))     # the shape: to measure the convolutions
    x = fused(z)                                                        # z [B, c, h, w] -> [B, C, H, W], as decoder(z)
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from owl_wms.fused.convolution import Conv3x3, choose
from owl_wms.ops.channel_norm import channel_norm as norm_op
from owl_wms.ops.conv3x3 import latent_conv, pack
from owl_wms.ops.depthwise_gate import depthwise_gate
from owl_wms.ops.depthwise_gate import pack as pack_depthwise
from owl_wms.ops.linear_attention import linear_attention
from owl_wms.ops.pointwise import pointwise
from owl_wms.ops.shuffle_add import phases_first, shuffle_add, shuffle_frames
from owl_wms.vae.autoencoder_dc import UpBlock, channel_norm, is_sana_decoder

PADDED_CHANNELS = 16  # what three colours times four phases are padded to: tensor cores take multiples of 8


def supports(decoder: Any) -> tuple[bool, str]:
    """Whether `fuse` can rewrite `decoder`; `(False, reason)` where not."""
    if not is_sana_decoder(decoder):
        return False, f"no fused form of {type(decoder).__name__}; only diffusers' AutoencoderDC decoder has one"
    last = decoder.conv_out
    if type(last).__name__ != "DCUpBlock2d" or last.interpolate or last.conv.out_channels > PADDED_CHANNELS:
        return False, "needs a pixel-shuffle output convolution to at most 4 channels"
    if not isinstance(decoder.conv_act, nn.ReLU):
        return False, f"needs a ReLU before the output convolution, got {type(decoder.conv_act).__name__}"
    for block in (block for stage in decoder.up_blocks for block in stage):
        kind = type(block).__name__
        if kind == "DCUpBlock2d" and (block.interpolate or not block.shortcut):
            return False, "needs pixel-shuffle up blocks with a shortcut"
        if kind == "ResBlock" and not (isinstance(block.nonlinearity, nn.ReLU) and block.norm_type == "batch_norm"):
            return False, "needs residual blocks with ReLU and batch norm"
        if kind == "EfficientViTBlock" and (len(block.attn.to_qkv_multiscale) or block.attn.norm_type != "rms_norm"):
            return False, "needs attention of one scale with RMS norm"
        if kind not in ("DCUpBlock2d", "ResBlock", "EfficientViTBlock"):
            return False, f"no fused form of {kind}"
    return True, ""


def fuse(
    decoder: Any, dtype: torch.dtype, input_shape: tuple[int, ...] | None = None, *, hybrid: bool = False
) -> nn.Module:
    """The fused form of `decoder` (fp32, eval), weights cast to `dtype` once, on the decoder's device.

    Args:
        decoder: diffusers' decoder; not changed.
        dtype: of the result's weights and activations.
        input_shape: `(B, c, h, w)`; on a GPU, every convolution of that shape is timed and the fastest way kept.
        hybrid: leave what follows the last EfficientViT block as plain NCHW convolutions.

    Raises:
        ValueError: `supports` says no.
    """
    supported, reason = supports(decoder)
    if not supported:
        raise ValueError(reason)
    with torch.no_grad():
        fused = FusedSana(decoder, dtype, hybrid).eval()
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

    def __init__(self, norm: Any, *, relu: bool = False) -> None:
        super().__init__()
        self.eps, self.relu = float(norm.eps), relu
        self.register_buffer("weight", norm.weight.detach().float())
        bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
        self.register_buffer("bias", bias.detach().float())

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return norm_op(x, self.weight, self.bias, residual, self.eps, self.relu)


class Up(nn.Module):
    """3x3 convolution, pixel shuffle and repeated shortcut: `[B, H, W, C] -> [B, 2H, 2W, O]`."""

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv = Conv3x3(phases_first(block.conv.weight), phases_first(block.conv.bias), dtype)

    def forward(self, x: Tensor) -> Tensor:
        return shuffle_add(self.conv(x), x)


class Residual(nn.Module):
    """Two 3x3 convolutions with ReLU between and the batch norm folded into the second; `[B, H, W, C]` in and out."""

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = Conv3x3(block.conv1.weight, block.conv1.bias, dtype, relu=True)
        self.second = Conv3x3(*fold_batch_norm(block.conv2, block.norm), dtype)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x), x)
        return result


class EfficientViT(nn.Module):
    """Linear attention, then the gated convolution, each with RMS norm and residual; `[B, H, W, C]` in and out."""

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        super().__init__()
        attention, gated = block.attn, block.conv_out
        self.head, self.eps = attention.attention_head_dim, float(attention.eps)
        qkv = torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight])
        self.register_buffer("qkv", qkv.detach().to(dtype))
        self.register_buffer("out", attention.to_out.weight.detach().to(dtype))
        self.attention_norm, self.gate_norm = Norm(attention.norm_out), Norm(gated.norm)
        self.register_buffer("inverted", gated.conv_inverted.weight.detach().flatten(1).to(dtype))
        self.register_buffer("inverted_bias", gated.conv_inverted.bias.detach().to(dtype))
        self.register_buffer("depth", pack_depthwise(gated.conv_depth.weight.detach()))
        self.register_buffer("depth_bias", gated.conv_depth.bias.detach().float())
        self.register_buffer("point", gated.conv_point.weight.detach().flatten(1).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        mixed = linear_attention(pointwise(x, self.qkv, None), self.head, self.eps)
        x = self.attention_norm(pointwise(mixed, self.out, None), x)
        hidden = depthwise_gate(pointwise(x, self.inverted, self.inverted_bias), self.depth, self.depth_bias)
        result: Tensor = self.gate_norm(pointwise(hidden, self.point, None), x)
        return result


class Output(nn.Module):
    """Norm, ReLU, 3x3 convolution and pixel shuffle to the image: `[B, H, W, C] -> [B, 3, 2H, 2W]`."""

    def __init__(self, decoder: Any, dtype: torch.dtype) -> None:
        super().__init__()
        conv = decoder.conv_out.conv
        self.channels = conv.out_channels // 4
        self.norm = Norm(decoder.norm_out, relu=True)
        missing = PADDED_CHANNELS - conv.out_channels
        weight = F.pad(conv.weight.detach(), (0, 0, 0, 0, 0, 0, 0, missing))
        self.conv = Conv3x3(weight, F.pad(conv.bias.detach(), (0, missing)), dtype)

    def forward(self, x: Tensor) -> Tensor:
        return shuffle_frames(self.conv(self.norm(x)), self.channels)


class PlainResidual(nn.Module):
    """`Residual` in NCHW and ATen operators, for TensorRT."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv1, self.conv2 = copy.deepcopy(block.conv1), copy.deepcopy(block.conv2)
        weight, bias = fold_batch_norm(block.conv2, block.norm)
        self.conv2.weight = nn.Parameter(weight, requires_grad=False)
        self.conv2.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(F.relu(self.conv1(x)))
        return x + y


class FusedSana(nn.Module):
    """`z [B, c, h, w] -> x [B, C, H, W]`, the same function as the decoder it was made from. Built by `fuse`."""

    def __init__(self, decoder: Any, dtype: torch.dtype, hybrid: bool) -> None:
        super().__init__()
        conv = decoder.conv_in
        self.repeats = decoder.in_shortcut_repeats if decoder.in_shortcut else 0
        self.register_buffer("in_weight", pack(conv.weight.detach()).to(dtype))
        self.register_buffer("in_bias", conv.bias.detach().to(dtype))
        blocks = [block for stage in reversed(decoder.up_blocks) for block in stage]
        attentive = [i for i, block in enumerate(blocks) if type(block).__name__ == "EfficientViTBlock"]
        split = (attentive[-1] + 1 if attentive else 0) if hybrid else len(blocks)
        kinds = {"DCUpBlock2d": Up, "ResBlock": Residual, "EfficientViTBlock": EfficientViT}
        self.body = nn.Sequential(*(kinds[type(block).__name__](block, dtype) for block in blocks[:split]))
        self.output = None if hybrid else Output(decoder, dtype)
        tail: list[nn.Module] = []
        if hybrid:
            rest = copy.deepcopy(blocks[split:])
            tail = [UpBlock(b) if type(b).__name__ == "DCUpBlock2d" else PlainResidual(b) for b in rest]
            tail += [channel_norm(copy.deepcopy(decoder.norm_out)), nn.ReLU(), UpBlock(copy.deepcopy(decoder.conv_out))]
        self.tail = nn.Sequential(*tail).to(dtype).requires_grad_(False)

    def forward(self, z: Tensor) -> Tensor:
        x = self.body(latent_conv(z, self.in_weight, self.in_bias, self.repeats))
        frames: Tensor = self.tail(x.permute(0, 3, 1, 2)) if self.output is None else self.output(x)
        return frames
