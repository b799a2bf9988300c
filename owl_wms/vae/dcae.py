"""The deep-compression autoencoder (`model_id: dcae`) in plain PyTorch, in both revisions upstream trained.

Why one file for two: the "tiled" variant (owl-vaes 005e9fcf, every `cod_yt_v2` checkpoint) and the "learned" variant
(its later revision) share width plan, stages and order of operations; they differ in shortcuts and in the first and
last convolution. The shortcuts live in `owl_wms.vae.shortcuts`. This is the reference everything faster is compared
with.

Usage:
    decoder = DCAEDecoder(cfg)                    # cfg: owl_wms.configs.DCAEConfig
    x = decoder(torch.randn(8, 128, 8, 8))        # [8, 3, 360, 640], nominally in [-1, 1], not clamped
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor, nn

from owl_wms.configs.vae import DCAEConfig
from owl_wms.vae.blocks import DownBlock, SameBlock, UpBlock, conv2d
from owl_wms.vae.landscape import LandscapeToSquare, SquareToLandscape, is_sixteen_nine, is_wide
from owl_wms.vae.shortcuts import (
    ChannelAverage,
    ChannelDuplication,
    ChannelToSpace,
    LearnedChannelToSpace,
    LearnedSpaceToChannel,
    SpaceToChannel,
    group_mean,
)
from owl_wms.vae.widths import check_dcae, stage_widths

Variant = Literal["tiled", "learned"]

# Latent channels that survive `do_channel_mask` are a random count from this one upwards, in steps of it / 4.
CHANNEL_MASK_FIRST = 32
CHANNEL_MASK_STEP = 8
NORMALIZE_EPS = 1e-6


def _wide(config: DCAEConfig, variant: Variant) -> bool:
    return is_sixteen_nine(config.sample_size) if variant == "tiled" else is_wide(config.sample_size)


def _fixed_size(config: DCAEConfig, variant: Variant) -> tuple[int, int] | None:
    """The tiled variant always resizes to the configured size; the learned one decides from its input."""
    return config.sample_size if variant == "tiled" and isinstance(config.sample_size, tuple) else None


class DCAEDecoder(nn.Module):
    """Latents to frames: `z [B, latent_channels, s, s] -> x [B, channels, H, W]`, any float dtype.

    `(H, W)` is `sample_size` for 16:9 (tiled), the nearest standard size for wide frames (learned), else `s *
    2**stages`.

    Attributes:
        config: what it was built from.
        variant: "tiled" or "learned".
        latent_channels, out_channels: channel counts of z and x.
    """

    def __init__(self, config: DCAEConfig, variant: Variant = "tiled") -> None:
        super().__init__()
        depths = config.decoder_blocks_per_stage
        widths = stage_widths(config.ch_0, config.ch_max, len(depths))
        check_dcae(config, widths, depths, "decoder_blocks_per_stage", variant)
        self.config = config
        self.variant = variant
        self.latent_channels = config.latent_channels
        self.out_channels = config.channels
        self.rep_factor = config.ch_max // config.latent_channels
        learned, plain = variant == "learned", config.skip_residuals

        if not learned:
            self.conv_in: nn.Module = conv2d(config.latent_channels, config.ch_max, 1)
        elif plain:
            self.conv_in = conv2d(config.latent_channels, config.ch_max, 3)
        else:
            self.conv_in = ChannelDuplication(config.latent_channels, config.ch_max)
        self.middle_block = SameBlock(config.ch_max, depths[-1]) if config.use_middle_block else None

        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.blocks = nn.ModuleList(UpBlock(a, b, depth) for (a, b), depth in zip(pairs, depths, strict=True))
        shortcut = LearnedChannelToSpace if learned else ChannelToSpace
        self.residuals = nn.ModuleList() if learned and plain else nn.ModuleList(shortcut(a, b) for a, b in pairs)
        if _wide(config, variant):
            size = _fixed_size(config, variant)
            self.conv_out: nn.Module = SquareToLandscape(config.ch_0, config.channels, size=size, bias=learned)
        else:
            self.conv_out = conv2d(config.ch_0, config.channels, 3, bias=learned)
        self.act_out = nn.SiLU()

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        if self.variant == "tiled":
            x = x + z.repeat(1, self.rep_factor, 1, 1)
        if self.middle_block is not None:
            x = self.middle_block(x) + x if self.variant == "learned" else self.middle_block(x)
        for i, block in enumerate(self.blocks):
            x = block(x) + self.residuals[i](x) if len(self.residuals) else block(x)
        out: Tensor = self.conv_out(self.act_out(x))
        return out


class DCAEEncoder(nn.Module):
    """Frames to latents: `x [B, channels, H, W] -> mu [B, latent_channels, s, s]`.

    In training mode, unless `skip_logvar`, the result is `(mu, logvar)`, both of mu's shape.
    """

    def __init__(self, config: DCAEConfig, variant: Variant = "tiled") -> None:
        super().__init__()
        depths = config.encoder_blocks_per_stage
        widths = stage_widths(config.ch_0, config.ch_max, len(depths))
        check_dcae(config, widths, depths, "encoder_blocks_per_stage", variant)
        self.config = config
        self.variant = variant
        self.skip_logvar = config.skip_logvar
        self.latent_channels = config.latent_channels
        self.avg_factor = config.ch_max // config.latent_channels
        learned, plain = variant == "learned", config.skip_residuals

        if _wide(config, variant):
            size = _fixed_size(config, variant)
            self.conv_in: nn.Module = LandscapeToSquare(config.channels, config.ch_0, size=size, bias=learned)
        else:
            self.conv_in = conv2d(config.channels, config.ch_0, 3)
        self.middle_block = SameBlock(config.ch_max, depths[-1]) if config.use_middle_block else None
        pairs = list(itertools.pairwise(widths))
        self.blocks = nn.ModuleList(DownBlock(a, b, depth) for (a, b), depth in zip(pairs, depths, strict=True))
        shortcut = LearnedSpaceToChannel if learned else SpaceToChannel
        self.residuals = nn.ModuleList() if learned and plain else nn.ModuleList(shortcut(a, b) for a, b in pairs)
        if not learned:
            self.conv_out: nn.Module = conv2d(config.ch_max, config.latent_channels, 1)
        elif plain:
            self.conv_out = conv2d(config.ch_max, config.latent_channels, 3)
        else:
            self.conv_out = ChannelAverage(config.ch_max, config.latent_channels)
        if not self.skip_logvar:
            self.conv_out_logvar = (
                conv2d(config.ch_max, 1, 3) if learned else conv2d(config.ch_max, self.latent_channels, 1)
            )

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features, residual = self._features(x)
        mu = self._mu(features, residual)
        if self.skip_logvar or not self.training:
            return mu
        return mu, self._logvar(features)

    def distribution(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(mu, logvar)`, each `[B, latent_channels, s, s]`, whatever the mode; logvar is zero with `skip_logvar`."""
        features, residual = self._features(x)
        mu = self._mu(features, residual)
        return mu, torch.zeros_like(mu) if self.skip_logvar else self._logvar(features)

    @torch.no_grad()
    def sample(self, x: Tensor) -> Tensor:
        """One draw `mu + exp(logvar / 2) * noise`, `[B, latent_channels, s, s]`, in either mode."""
        return reparameterize(*self.distribution(x))

    def _features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv_in(x)
        for i, block in enumerate(self.blocks):
            x = block(x) + self.residuals[i](x) if len(self.residuals) else block(x)
        before_middle = x
        if self.middle_block is not None:
            x = self.middle_block(x) + x if self.variant == "learned" else self.middle_block(x)
        return x, before_middle

    def _mu(self, features: Tensor, before_middle: Tensor) -> Tensor:
        mu: Tensor = self.conv_out(features)
        if self.variant == "tiled":
            mu = mu + group_mean(before_middle, self.avg_factor)
        if self.config.normalize_mu:
            dims = (1, 2, 3)
            mu = (mu - mu.mean(dims, keepdim=True)) / (mu.std(dims, keepdim=True) + NORMALIZE_EPS)
        return mu

    def _logvar(self, features: Tensor) -> Tensor:
        logvar: Tensor = self.conv_out_logvar(features)
        return logvar.repeat(1, self.latent_channels, 1, 1) if self.variant == "learned" else logvar


class DCAE(nn.Module):
    """Encoder and decoder; `x [B, C, H, W] -> (rec, mu, logvar)` with one reparameterised draw between them."""

    def __init__(self, config: DCAEConfig, variant: Variant = "tiled") -> None:
        super().__init__()
        self.config = config
        self.encoder = DCAEEncoder(config, variant)
        self.decoder = DCAEDecoder(config, variant)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encoder.distribution(x)
        z = mu if self.config.skip_logvar else reparameterize(mu, logvar)
        if self.config.do_channel_mask and self.training:
            z = mask_channels(z)
        return self.decoder(z), mu, logvar


def reparameterize(mu: Tensor, logvar: Tensor) -> Tensor:
    """A draw from N(mu, exp(logvar)) through which gradients flow; all shapes alike."""
    return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)


def mask_channels(z: Tensor) -> Tensor:
    """Zero the channels above a random count from {32, 40, ..}, per sample, so that early channels carry the most.

    `z [B, C, h, w]` with C >= 32; the same shape comes back.
    """
    batch, channels = z.shape[:2]
    choices = torch.arange(CHANNEL_MASK_FIRST, channels + 1, CHANNEL_MASK_STEP, device=z.device)
    kept = choices[torch.randint(len(choices), (batch,), device=z.device)]
    index = torch.arange(channels, device=z.device)
    return z * (index[None, :] < kept[:, None]).to(z.dtype)[:, :, None, None]
