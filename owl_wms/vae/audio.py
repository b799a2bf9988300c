"""The decoder of the audio autoencoder (`model_id: audio_ae`), in plain PyTorch.

Why it exists: the audio bridge decodes one latent per video frame into `prod(strides)` samples (735 = 44100 / 60). The
activation is implemented here in three lines instead of importing a package for it.

Usage:
    AudioDecoder(cfg)(torch.randn(1, 64, 60))      # [1, 2, 44100], in [-1, 1]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from owl_wms.configs.vae import AudioAEConfig
from owl_wms.vae.blocks import GROUP_CHANNELS, Residual
from owl_wms.vae.widths import check_audio, stage_widths

DILATIONS = (1, 3, 9)
KERNEL = 7
# Keeps the division finite where exp(beta) underflows.
SNAKE_EPS = 1e-6


def conv1d(c_in: int, c_out: int, kernel: int, *, bias: bool = True, groups: int = 1, dilation: int = 1) -> nn.Conv1d:
    """Weight-normed "same" convolution, `[B, c_in, n] -> [B, c_out, n]` for odd and even kernels."""
    conv: nn.Conv1d = weight_norm(
        nn.Conv1d(c_in, c_out, kernel, padding="same", bias=bias, groups=groups, dilation=dilation)
    )
    return conv


class SnakeBeta(nn.Module):
    """Periodic activation `x + sin(x (1 + alpha))^2 / (1e-6 + exp(beta))` per channel, `[B, ch, n]`.

    Source: Ziyin et al., "Neural Networks Fail to Learn Periodic Functions" (2020).
    """

    def __init__(self, ch: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(ch))
        self.beta = nn.Parameter(torch.zeros(ch))

    def forward(self, x: Tensor) -> Tensor:
        frequency = 1 + self.alpha[:, None]
        return x + torch.sin(x * frequency) ** 2 / (SNAKE_EPS + torch.exp(self.beta[:, None]))


class AudioResBlock(Residual):
    """1x1 to twice the width, dilated grouped k7, 1x1 back, SnakeBeta between; `[B, ch, n]` in and out."""

    def __init__(self, ch: int, dilation: int) -> None:
        super().__init__()
        hidden = 2 * ch
        self.conv1 = conv1d(ch, hidden, 1)
        self.conv2 = conv1d(hidden, hidden, KERNEL, groups=hidden // GROUP_CHANNELS, dilation=dilation)
        self.conv3 = conv1d(hidden, ch, 1, bias=False)
        self.act1 = SnakeBeta(hidden)
        self.act2 = SnakeBeta(hidden)


class AudioUpBlock(nn.Module):
    """Nearest upsample, project, activate, three dilated residual blocks: `[B, c_in, n] -> [B, c_out, stride * n]`.

    The blocks are attributes of their own because upstream's checkpoints name them `block1` to `block3`.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.proj = conv1d(c_in, c_out, 2 * stride, bias=False)
        self.act = SnakeBeta(c_out)
        self.block1, self.block2, self.block3 = (AudioResBlock(c_out, dilation) for dilation in DILATIONS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.proj(F.interpolate(x, scale_factor=self.stride, mode="nearest")))
        for block in (self.block1, self.block2, self.block3):
            x = block(x)
        return x


class AudioDecoder(nn.Module):
    """Audio latents to samples: `[B, latent_channels, n] -> [B, channels, n * prod(strides)]` in [-1, 1]."""

    def __init__(self, config: AudioAEConfig) -> None:
        super().__init__()
        widths = stage_widths(config.ch_0, config.ch_max, len(config.strides))
        check_audio(config, widths)
        self.config = config
        self.latent_channels = config.latent_channels
        self.out_channels = config.channels
        self.conv_in = conv1d(config.latent_channels, config.ch_max, KERNEL)
        pairs = zip(widths[:0:-1], widths[-2::-1], reversed(config.strides), strict=True)
        self.blocks = nn.ModuleList(AudioUpBlock(a, b, stride) for a, b, stride in pairs)
        self.final = SnakeBeta(config.ch_0)
        self.conv_out = conv1d(config.ch_0, config.channels, KERNEL, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for block in self.blocks:
            x = block(x)
        return torch.tanh(self.conv_out(self.final(x)))
