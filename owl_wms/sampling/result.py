"""The result of every sampler."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleResult:
    """Generated frames and the controls that made them. Read by name; it does not unpack.

    All members cover the same frames: the context and what was generated, or with `only_return_generated` the latter
    alone.

    Attributes:
        latents: [b, n, c, h, w] in the model's scale; context frames as they were given.
        mouse: [b, n, 2], frame k's own movement.
        buttons: [b, n, n_buttons].
        video: [b, n, C, H, W] as the decode function returned it, or None without one.
        latents_audio: [b, n, c_a], or None for a model without sound.
        audio: [b, samples, 2] as the audio decode function returned it, or None without one.
    """

    latents: Tensor
    mouse: Tensor
    buttons: Tensor
    video: Tensor | None = None
    latents_audio: Tensor | None = None
    audio: Tensor | None = None
