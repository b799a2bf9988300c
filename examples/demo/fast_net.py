"""The demo autoencoder's forward pass in a form that trains several times faster, sharing the weights of the stock
modules.

Why: bicubic interpolation's backward pass is slow in PyTorch and takes most of a training step. Here each fixed
resize is a pair of constant matrix products (or part of a convolution), which computes the same sums. Everything else
is the stock modules' arithmetic in the same order. The result is checked against them at the start of training and,
as what is reported, replaced by them at the end.

Usage:
    net = FastAutoencoder(fold_weight_norm(DCAE(cfg)))
    z = net.encode(frames)          # [B, 4, 360, 640] in [-1, 1] -> [B, 128, 8, 8]
    x = net.decode(z)               # -> [B, 4, 360, 640]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SLOPE = 0.01


# Grouped 3x3 convolutions narrower than this run as dense ones with zero blocks: cuDNN's grouped kernels are slow
# where there are few channels and many pixels.
_DENSE_BELOW = 129


def resize_matrix(size_in: int, size_out: int) -> Tensor:
    """Bicubic resampling of a line as a matrix [size_out, size_in], read off PyTorch's own interpolation in float64."""
    identity = torch.eye(size_in, dtype=torch.float64)[None, None]  # rows are unit vectors
    return F.interpolate(identity, size=(size_in, size_out), mode="bicubic")[0, 0].T.float()


class FastAutoencoder(nn.Module):
    """Runs a folded stock `DCAE` (tiled variant, 16:9, no middle block); its parameters are the stock module's."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock
        self._matrices: dict[tuple, Tensor] = {}
        height, width = stock.config.sample_size
        self.sample_size, self.side = (height, width), stock.encoder.conv_in.side

    def encode(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> latents [B, c, h, w]."""
        encoder = self.stock.encoder
        x = self._format(self._resize(x, (self.side, self.side)))
        x = self._conv(encoder.conv_in.proj, x)
        for stage, shortcut in zip(encoder.blocks, encoder.residuals, strict=True):
            y = x
            for block in stage.blocks:
                y = self._residual_block(block, y)
            y = self._down(stage.down.proj, y)
            x = y + _group_mean(F.pixel_unshuffle(x, 2), shortcut.groups)
        return self._conv(encoder.conv_out, x) + _group_mean(x, encoder.avg_factor)

    def decode(self, z: Tensor) -> Tensor:
        """Latents [B, c, h, w] -> [B, C, H, W]."""
        decoder = self.stock.decoder
        x = _add_tiled(self._conv(decoder.conv_in, self._format(z)), z, decoder.rep_factor)
        for stage, shortcut in zip(decoder.blocks, decoder.residuals, strict=True):
            y = x if isinstance(stage.up.proj, nn.Sequential) else self._conv(stage.up.proj, x)
            y = self._format(self._resize(y, (2 * x.shape[2], 2 * x.shape[3])))
            for block in stage.blocks:
                y = self._residual_block(block, y)
            x = _add_tiled(y, F.pixel_shuffle(x, 2), shortcut.repeats)
        x = self._conv(decoder.conv_out.proj, F.silu(x))
        return self._resize(x, self.sample_size)

    def _format(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    def _conv(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        weight, groups = conv.weight, conv.groups
        if groups > 1 and conv.out_channels < _DENSE_BELOW:
            blocks = weight.view(groups, -1, *weight.shape[1:])
            mask = torch.eye(groups, dtype=weight.dtype, device=weight.device)[:, None, :, None, None, None]
            weight = (blocks[:, :, None] * mask).reshape(conv.out_channels, -1, *weight.shape[2:])
            groups = 1
        return F.conv2d(x, weight, conv.bias, padding=conv.padding, groups=groups)

    def _residual_block(self, block: nn.Module, x: Tensor) -> Tensor:
        y = F.leaky_relu_(self._conv(block.conv1, x), _SLOPE)
        y = F.leaky_relu_(self._conv(block.conv2, y), _SLOPE)
        return x + self._conv(block.conv3, y)

    def _down(self, proj: nn.Conv2d, x: Tensor) -> Tensor:
        # Halving is four fixed taps each way, so it and the 1x1 projection are one 4x4 convolution of stride 2.
        taps = self._constant(("taps",), x.device, lambda: resize_matrix(16, 8)[4, 7:11])
        kernel = taps[:, None] * taps[None]
        padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
        return F.conv2d(padded, proj.weight * kernel, stride=2)

    def _resize(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        height, width = x.shape[2:]
        if (height, width) == size:
            return x
        down = self._constant((height, size[0]), x.device, lambda: resize_matrix(height, size[0]))
        across = self._constant((width, size[1]), x.device, lambda: resize_matrix(width, size[1]))
        x = x.contiguous()
        return torch.matmul(down.to(x.dtype), torch.matmul(x, across.to(x.dtype).T))

    def _constant(self, key: tuple, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        if key not in self._matrices:
            self._matrices[key] = make().to(device)
        return self._matrices[key]


def _add_tiled(x: Tensor, short: Tensor, repeats: int) -> Tensor:
    """`x + short.repeat(1, repeats, 1, 1)` without writing the repeated tensor."""
    return (x.unflatten(1, (repeats, -1)) + short.unsqueeze(1)).flatten(1, 2)


def _group_mean(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(1, (groups, -1)).mean(dim=1)


def initialise(stock: nn.Module) -> None:
    """He initialisation of the folded stock autoencoder; residual branches start near zero, projections keep scale."""
    for name, module in stock.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        fan_in = module.weight[0].numel()
        gain = {"conv1": 2.0, "conv2": 2.0, "conv3": 1e-4}.get(name.rsplit(".", 1)[-1], 0.5)
        nn.init.normal_(module.weight, std=(gain / fan_in) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
