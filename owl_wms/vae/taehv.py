"""TAEHV, the tiny video decoder (Ollin Boer Bohan, github.com/madebyollin/taehv), as a streaming decoder.

Why it exists: most real-time video systems decode with it. Its memory blocks see the previous frame besides the current
one. Here that memory is an explicit state (owl_wms.state), so that one step is a pure function.

The layers, their numbers and their parameters are those of the author's checkpoints (`decoder.N...`); the code is
written from the description of the network.

Usage:
    decoder = TAEHVDecoder(TAEHVConfig(model_id="taehv", latent_channels=16))
    frames = decoder(latents)                       # [b, n, 16, h, w] -> [b, 4 n - 3, 3, 8 h, 8 w] in [0, 1]
    frames, state = decoder.step(latents[:, 0])     # [b, 16, h, w] -> [b, 4, 3, 8 h, 8 w], first step of a stream
    frames, state = decoder.step(latents[:, 1], state)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from owl_wms.configs.vae import TAEHVConfig
from owl_wms.errors import LatentShapeError
from owl_wms.state import State, StateSpec, zeros

IMAGE_CHANNELS = 3
STAGES = 3
BLOCKS_PER_STAGE = 3
# Width of each stage's memory blocks, then the width behind the last stage.
WIDTHS = {"normal": (256, 128, 64, 64), "super": (512, 256, 128, 64)}


def conv3x3(c_in: int, c_out: int, *, bias: bool = True) -> nn.Conv2d:
    """Returns a 3x3 convolution that keeps height and width."""
    return nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias)


class Clamp(nn.Module):
    """Limits latents softly to (-3, 3): `3 tanh(x / 3)`."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemoryBlock(nn.Module):
    """`relu(conv([x, past]) + x)` with three 3x3 convolutions; `x` and `past` are `[B, ch, H, W]`, as the result."""

    def __init__(self, ch: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            conv3x3(2 * ch, ch), nn.ReLU(inplace=True), conv3x3(ch, ch), nn.ReLU(inplace=True), conv3x3(ch, ch)
        )

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat([x, past], 1)) + x)


class SuperMemoryBlock(nn.Module):
    """`conv([x, past]) + x`: 7x7 depthwise, 1x1 to four times the width, ReLU, 1x1 back; shapes as in MemoryBlock."""

    def __init__(self, ch: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * ch, 2 * ch, 7, padding=3, groups=2 * ch, bias=False),
            nn.Conv2d(2 * ch, 4 * ch, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(4 * ch, ch, 1, bias=False),
        )

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        result: Tensor = self.conv(torch.cat([x, past], 1)) + x
        return result


MEMORY_BLOCKS = (MemoryBlock, SuperMemoryBlock)


class Grow(nn.Module):
    """Makes `factor` frames of each one by a 1x1 convolution: `[B, ch, H, W] -> [B * factor, ch, H, W]`.

    The channels of the convolution's result are the frames, one after the other, in the order of time.
    """

    def __init__(self, ch: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(ch, ch * factor, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(x).unflatten(1, (self.factor, -1)).flatten(0, 1)
        return result


def _normal_layers(config: TAEHVConfig) -> list[nn.Module]:
    widths = WIDTHS["normal"]
    layers: list[nn.Module] = [Clamp(), conv3x3(config.latent_channels, widths[0]), nn.ReLU(inplace=True)]
    for i in range(STAGES):
        layers += [MemoryBlock(widths[i]) for _ in range(BLOCKS_PER_STAGE)]
        layers += [
            nn.Upsample(scale_factor=1 + config.space_upscale[i]),
            Grow(widths[i], 1 + config.time_upscale[i]),
            conv3x3(widths[i], widths[i + 1], bias=False),
        ]
    return [*layers, nn.ReLU(inplace=True), conv3x3(widths[-1], IMAGE_CHANNELS * config.patch_size**2)]


def _super_layers(config: TAEHVConfig) -> list[nn.Module]:
    widths = WIDTHS["super"]
    layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, widths[0], 1, bias=False)]
    for i in range(STAGES):
        factor = 1 + config.space_upscale[i]
        layers += [SuperMemoryBlock(widths[i]) for _ in range(BLOCKS_PER_STAGE)]
        layers += [
            conv3x3(widths[i], widths[i + 1] * factor**2),
            nn.ReLU(inplace=True),
            nn.PixelShuffle(factor),
            Grow(widths[i + 1], 1 + config.time_upscale[i]),
        ]
    return [*layers, conv3x3(widths[-1], IMAGE_CHANNELS * config.patch_size**2)]


class TAEHVDecoder(nn.Sequential):
    """Decodes video latents to frames in [0, 1], a whole clip at once or latent by latent.

    Every latent gives `frames_per_latent` frames. The first `frames_per_latent - 1` frames of a stream come before the
    video begins: `forward` drops them, `step` and `advance` return them.

    Args:
        config: sizes of the network.
    """

    def __init__(self, config: TAEHVConfig) -> None:
        super().__init__(*(_super_layers(config) if config.form == "super" else _normal_layers(config)))
        self.config = config
        self.latent_channels = config.latent_channels
        self.out_channels = IMAGE_CHANNELS
        self.frames_per_latent = config.frames_per_latent
        self.scale: int = 2 ** sum(config.space_upscale) * config.patch_size

    def forward(self, latents: Tensor) -> Tensor:
        """Decodes whole clips: `[b, n, c, h, w] -> [b, n t - t + 1, 3, H, W]` with t frames per latent.

        All latents are computed at once; the result is that of a stream of steps.

        Raises:
            LatentShapeError: another rank or channel count.
        """
        return self.advance(latents)[0][:, self.frames_per_latent - 1 :]

    def step(self, latent: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Decodes the next latent of each stream and changes nothing.

        Args:
            latent: `[b, c, h, w]`, one latent per stream, in the decoder's dtype.
            state: what the step before returned; None or () at the beginning of a stream.

        Returns:
            Frames `[b, t, 3, H, W]` and the next state.

        Raises:
            LatentShapeError: another rank or channel count.
        """
        if latent.dim() != 4:
            self._refuse(latent, f"[b, {self.latent_channels}, h, w]")
        return self.advance(latent[:, None], state)

    def advance(self, latents: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Decodes the next n latents of each stream at once: `[b, n, c, h, w]` to frames `[b, n t, 3, H, W]`.

        Arguments, results and errors are otherwise those of `step`.
        """
        if latents.dim() != 5 or latents.shape[2] != self.latent_channels:
            self._refuse(latents, f"[b, n, {self.latent_channels}, h, w]")
        streams = len(latents)
        state = state or zeros(self.state_specs((streams, *latents.shape[2:])), latents.device)
        following: list[Tensor] = []
        x = latents.flatten(0, 1)
        for layer in self:
            if isinstance(layer, MEMORY_BLOCKS):
                past, last = shifted(x, state[len(following)])
                following.append(last)
                x = layer(x, past)
            else:
                x = layer(x)
        frames = F.pixel_shuffle(x, self.config.patch_size).clamp(0, 1)
        return frames.unflatten(0, (streams, -1)), tuple(following)

    def state_specs(self, shape: tuple[int, ...]) -> tuple[StateSpec, ...]:
        """Describes the state of streams of latents `shape` = `(b, c, h, w)`: the last input of every memory block."""
        return state_specs(self.config, shape, next(self.parameters()).dtype)

    def _refuse(self, latents: Tensor, expected: str) -> None:
        got = tuple(latents.shape)
        raise LatentShapeError(
            f"latents must be {expected}; got {list(got)}. Check that they belong to this decoder",
            got=got,
            expected=expected,
        )


def state_specs(config: TAEHVConfig, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[StateSpec, ...]:
    """Describes the state of a decoder in `dtype` for latents `shape` = `(b, c, h, w)`."""
    streams, _, height, width = shape
    specs: list[StateSpec] = []
    for i, widths in enumerate(WIDTHS[config.form][:STAGES]):
        size = (streams, widths, height, width)
        specs += [StateSpec(f"stage{i}.block{j}", size, dtype) for j in range(BLOCKS_PER_STAGE)]
        factor = 1 + config.space_upscale[i]
        height, width = height * factor, width * factor
    return tuple(specs)


def shifted(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Returns for every frame of `x [b * n, C, H, W]` the frame before it, and the last frame of each stream.

    Args:
        x: n consecutive frames of each of b streams, stream by stream.
        state: `[b, C, H, W]`, the frame before the first one.
    """
    frames = x.unflatten(0, (len(state), -1))
    if frames.shape[1] == 1:
        return state, x
    return torch.cat([state[:, None], frames[:, :-1]], 1).flatten(0, 1), frames[:, -1].contiguous()
