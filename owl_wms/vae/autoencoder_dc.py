"""diffusers' AutoencoderDC (the sana decoder) in operators that export and compile cleanly.

Why it exists: its modules move channels to the last axis and back around every norm and projection, choose the
attention branch from run-time shapes, and append a row of ones to the values to get a sum. For a static program all of
that can be settled beforehand. diffusers itself is never imported: its classes are recognised by name, since a decoder
made of them brings the library along.

Usage:
    replacement = plain_block(module)            # None when there is nothing to do
    attention = FixedLinearAttention(module, (8, 2048, 8, 8))
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _is(module: nn.Module, name: str) -> bool:
    return type(module).__name__ == name and type(module).__module__.startswith("diffusers.")


def is_sana_decoder(module: nn.Module) -> bool:
    """Returns whether `module` is diffusers' AutoencoderDC decoder, by class."""
    return type(module).__name__ == "Decoder" and type(module).__module__.endswith("autoencoder_dc")


def is_attention(module: nn.Module) -> bool:
    """Returns whether `module` is the multiscale linear attention of an EfficientViT block."""
    return _is(module, "SanaMultiscaleLinearAttention")


def plain_block(module: Any) -> nn.Module | None:
    """A replacement for an up block, a gated convolution or a residual block with a channel norm; None for anything
    else.
    """
    if _is(module, "DCUpBlock2d"):
        return UpBlock(module)
    if _is(module, "GLUMBConv"):
        return GatedConv(module)
    if _is(module, "ResBlock") and module.norm_type == "rms_norm":
        return ResidualBlock(module)
    return None


class ChannelNorm(nn.Module):
    """RMS norm over the channels of `[B, C, H, W]`, statistics in float32, scale and shift in the weights' dtype."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight = (
            None if norm.weight is None else nn.Parameter(norm.weight.detach()[:, None, None], requires_grad=False)
        )
        self.bias = None if norm.bias is None else nn.Parameter(norm.bias.detach()[:, None, None], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        variance = x.to(torch.float32).pow(2).mean(1, keepdim=True)
        normed = (x * torch.rsqrt(variance + self.eps)).to(x.dtype)
        if self.weight is not None:
            normed = normed * self.weight
        return normed if self.bias is None else normed + self.bias


def channel_norm(norm: Any) -> nn.Module:
    """The NCHW form of one of diffusers' norms: its RMSNorm becomes a ChannelNorm, a batch norm already is one, None is
    nothing.
    """
    if norm is None:
        return nn.Identity()
    return ChannelNorm(norm) if _is(norm, "RMSNorm") else norm


class UpBlock(nn.Module):
    """Adds a shortcut that repeats channels into space to a 3x3 convolution and a pixel shuffle, or to a 3x3
    convolution of the enlarged input (`upsample_block_type="interpolate"`); `[B, C, H, W] -> [B, O, 2H, 2W]`.

    Repeating each channel `r` times and shuffling by 2 sends source channel `(4 o + 2 i + j) // r` to place (i, j) of
    output channel o, so for r = 4, 2 or 1 the shortcut is a reshape with broadcast axes."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv = block.conv
        self.factor = block.factor
        self.interpolation = block.interpolation_mode if block.interpolate else ""
        self.repeats = block.repeats if block.shortcut else 0

    def forward(self, x: Tensor) -> Tensor:
        if self.interpolation:
            y: Tensor = self.conv(F.interpolate(x, scale_factor=float(self.factor), mode=self.interpolation))
        else:
            y = F.pixel_shuffle(self.conv(x), self.factor)
        if not self.repeats:
            return y
        batch, channels, height, width = x.shape
        if self.factor == 2 and self.repeats in (2, 4):
            rows = 4 // self.repeats
            spread = x.reshape(batch, channels // rows, rows, height, width).permute(0, 1, 3, 2, 4)
            spread = spread[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, 2)
            if rows == 1:
                spread = spread.expand(-1, -1, -1, 2, -1, -1)
            return y + spread.reshape(y.shape)
        return y + F.pixel_shuffle(x.repeat_interleave(self.repeats, dim=1), self.factor)


class GatedConv(nn.Module):
    """Inverted 1x1, depthwise 3x3, SiLU gate, 1x1 back, channel norm, residual; `[B, C, H, W]` in and out."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.nonlinearity = block.nonlinearity
        self.conv_inverted, self.conv_depth, self.conv_point = block.conv_inverted, block.conv_depth, block.conv_point
        self.norm = channel_norm(block.norm)
        self.residual = block.residual_connection

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.conv_depth(self.nonlinearity(self.conv_inverted(x))).chunk(2, dim=1)
        y: Tensor = self.norm(self.conv_point(hidden * self.nonlinearity(gate)))
        return y + x if self.residual else y


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, channel norm, residual; `[B, C, H, W]` in and out."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv1, self.conv2, self.nonlinearity = block.conv1, block.conv2, block.nonlinearity
        self.norm = channel_norm(block.norm)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv2(self.nonlinearity(self.conv1(x))))
        return y + x


class FixedLinearAttention(nn.Module):
    """Multiscale linear attention for one input shape; `[B, C, H, W]` in and out.

    q, k and v come from one 1x1 convolution. With more pixels than head channels, `out = (v k^T) q / (sum(k)^T q +
    eps)` in float32; with fewer, the quadratic form in the module's dtype with float32 normalisation, as diffusers
    chooses at run time.

    Args:
        attention: diffusers' SanaMultiscaleLinearAttention.
        shape: its static input shape.
    """

    def __init__(self, attention: Any, shape: tuple[int, ...]) -> None:
        super().__init__()
        weight = torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]).detach()
        self.qkv = nn.Parameter(weight[:, :, None, None].contiguous(), requires_grad=False)
        self.scales = attention.to_qkv_multiscale
        self.out = nn.Parameter(attention.to_out.weight.detach()[:, :, None, None].contiguous(), requires_grad=False)
        self.norm = channel_norm(attention.norm_out)
        self.head_channels = attention.attention_head_dim
        self.eps = attention.eps
        self.residual = attention.residual_connection
        self.linear = shape[-1] * shape[-2] > self.head_channels

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        qkv = F.conv2d(x, self.qkv)
        qkv = torch.cat([qkv, *(scale(qkv) for scale in self.scales)], dim=1)
        heads = qkv.reshape(batch, -1, 3 * self.head_channels, height * width)
        query, key, value = (heads.to(torch.float32) if self.linear else heads).chunk(3, dim=2)
        query, key = query.relu(), key.relu()
        if self.linear:
            total = torch.matmul(torch.matmul(value, key.transpose(-1, -2)), query)
            weight = torch.matmul(key.sum(-1, keepdim=True).transpose(-1, -2), query)
            mixed = (total / (weight + self.eps)).to(x.dtype)
        else:
            scores = torch.matmul(key.transpose(-1, -2), query).to(torch.float32)
            scores = scores / (scores.sum(dim=2, keepdim=True) + self.eps)
            mixed = torch.matmul(value, scores.to(value.dtype))
        y: Tensor = self.norm(F.conv2d(mixed.reshape(batch, -1, height, width), self.out))
        return y + x if self.residual else y
