"""A streaming decoder's step as a module that takes and returns tensors alone, which is what exporters want.

Usage:
    step = Stepping(decoder)
    frames, *state = step(latent, *state)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from owl_wms.state import StateSpec


class Stepping(nn.Module):
    """`(latent [b, c, h, w], *state) -> (frames [b, t, C, H, W], *state)`, the step of a streaming decoder.

    Args:
        decoder: a module with `step` and `state_specs`, such as `owl_wms.vae.taehv.TAEHVDecoder`; shared, not copied.
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.latent_channels = getattr(decoder, "latent_channels", None)

    def forward(self, latent: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        decoder: Any = self.decoder
        frames, following = decoder.step(latent, state)
        return frames, *following

    def state_specs(self, shape: tuple[int, ...]) -> tuple[StateSpec, ...]:
        """Describes the state for latents `shape` = `(b, c, h, w)`."""
        decoder: Any = self.decoder
        specs: tuple[StateSpec, ...] = decoder.state_specs(shape)
        return specs
