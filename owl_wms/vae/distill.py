"""The distilled autoencoder (`model_id: distill_vae`): a fixed x64 topology without shortcuts.

Why it exists: upstream's 64-channel world models decode with it. One residual block per level, five levels, one of
which resizes by four; there is no tiling, no SiLU before the last convolution and no logvar.

Usage:
    DistillDecoder(cfg)(torch.randn(1, 64, 8, 8))      # [1, 3, 360, 640]
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from owl_wms.configs.vae import DistillVAEConfig
from owl_wms.vae.blocks import Downsample, ResBlock, Upsample, conv2d
from owl_wms.vae.landscape import LandscapeToSquare, SquareToLandscape, is_sixteen_nine
from owl_wms.vae.widths import check_distill, stage_widths

# Latents beyond this are not produced, whatever the input.
LATENT_BOUND = 10.0
# Resize factors from deep to shallow; their product, 64, is the spatial compression.
UP_STRIDES = (2, 4, 2, 2, 2)


class DistillDecoder(nn.Module):
    """Latents to frames: `z [B, latent_channels, s, s] -> x [B, channels, H, W]`.

    `(H, W)` is `sample_size` or `64 * s`.
    """

    def __init__(self, config: DistillVAEConfig) -> None:
        super().__init__()
        check_distill(config)
        self.config = config
        self.latent_channels = config.latent_channels
        self.out_channels = config.channels
        self.conv_in = conv2d(config.latent_channels, config.ch_max, 3, bias=False)
        # Level widths 16, 16, 8, 4, 2, 1 times ch_0: the first step resizes without changing the width.
        widths = [config.ch_max, *stage_widths(config.ch_0, config.ch_max, len(UP_STRIDES) - 1)[::-1]]
        layers: list[nn.Module] = []
        for stride, c_in, c_out in zip(UP_STRIDES, widths[:-1], widths[1:], strict=True):
            layers += [Upsample(c_in, c_out, stride), ResBlock(c_out)]
        self.blocks = nn.Sequential(*layers)
        if is_sixteen_nine(config.sample_size):
            self.conv_out: nn.Module = SquareToLandscape(config.ch_0, config.channels, size=config.sample_size)  # type: ignore[arg-type]
        else:
            self.conv_out = conv2d(config.ch_0, config.channels, 3, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.conv_out(self.blocks(self.conv_in(z)))
        return out


class DistillEncoder(nn.Module):
    """Frames to latents: `x [B, >= channels, H, W] -> [B, latent_channels, s, s]` in [-10, 10].

    Extra channels are ignored.
    """

    def __init__(self, config: DistillVAEConfig) -> None:
        super().__init__()
        check_distill(config)
        self.config = config
        self.latent_channels = config.latent_channels
        if is_sixteen_nine(config.sample_size):
            self.conv_in: nn.Module = LandscapeToSquare(config.channels, config.ch_0, size=config.sample_size)  # type: ignore[arg-type]
        else:
            self.conv_in = conv2d(config.channels, config.ch_0, 3, bias=False)
        widths = stage_widths(config.ch_0, config.ch_max, len(UP_STRIDES))
        layers: list[nn.Module] = []
        for stride, c_in, c_out in zip(reversed(UP_STRIDES), widths[:-1], widths[1:], strict=True):
            layers += [ResBlock(c_in), Downsample(c_in, c_out, stride)]
        self.blocks = nn.Sequential(*layers)
        self.conv_out = conv2d(config.ch_max, config.latent_channels, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv_out(self.blocks(self.conv_in(x[:, : self.config.channels])))
        return torch.clamp(z, -LATENT_BOUND, LATENT_BOUND)


class DistillVAE(nn.Module):
    """Encoder and decoder; `x [B, C, H, W] -> (rec, z)`, deterministic."""

    def __init__(self, config: DistillVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = DistillEncoder(config)
        self.decoder = DistillDecoder(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x)
        return self.decoder(z), z
