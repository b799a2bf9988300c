"""`av_caching`: generate with a cache that lives as long as the clip; a frame costs its own steps and one pass to
remember it.

The context, and each finished frame, is noised once to `noise_prev`, passed once, and never run again. With
`max_window` attention spans that many frames (the new one included) and the clip may be of any length; the result is
what the whole sequence gives under a window mask of that size (`tests/sampling/test_caching.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from owl_wms.dynamo import uncompiled
from owl_wms.errors import ConfigError
from owl_wms.nn.kv_cache import KVCache
from owl_wms.sampling.controls import check_controls
from owl_wms.sampling.guidance import Guidance, Unconditional
from owl_wms.sampling.result import SampleResult
from owl_wms.sampling.schedule import custom_deltas, get_sd3_euler, zlerp
from owl_wms.sampling.window import Decode, Progress

# Context frames in one pass: bounds the mask and the activations of a long context without costing speed.
PREFILL_FRAMES = 64


class AVCachingSampler:
    """Cached sampler for causal video models.

    Args:
        n_steps: Euler steps a frame; without effect when a custom schedule says how many there are.
        cfg_scale: guidance; 1 is none, 0 or less ignores the controls.
        num_frames: frames to generate, at most; the controls may end earlier.
        noise_prev: noise level of the history, 0 to 1.
        max_window: frames that attention may span, or None for all (then the clip is bounded by the model's n_frames).
        custom_schedule: noise levels falling from 1.0, for example [1.0, 0.5].
        only_return_generated: leave the context out of the result.
        unconditional: see `owl_wms.sampling.guidance`.
    """

    def __init__(
        self,
        n_steps: int = 16,
        cfg_scale: float = 1.3,
        num_frames: int = 60,
        noise_prev: float = 0.2,
        max_window: int | None = None,
        custom_schedule: Sequence[float] | None = None,
        *,
        only_return_generated: bool = False,
        unconditional: Unconditional = "dropped",
    ) -> None:
        if num_frames < 0 or not 0 <= noise_prev <= 1:
            raise ConfigError(
                f"a sampler needs num_frames >= 0 and noise_prev in 0 to 1, got {num_frames}, {noise_prev}",
                key="train.sampler_kwargs",
            )
        self.deltas = get_sd3_euler(n_steps) if custom_schedule is None else custom_deltas(custom_schedule)
        self.cfg_scale = cfg_scale
        self.num_frames = num_frames
        self.noise_prev = noise_prev
        self.max_window = max_window
        self.only_return_generated = only_return_generated
        self.unconditional: Unconditional = unconditional

    @uncompiled
    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        x: Tensor,
        mouse: Tensor,
        btn: Tensor,
        compile_on_decode: bool = False,
        *,
        decode_fn: Decode | None = None,
        image_scale: float = 1,
        generator: torch.Generator | None = None,
        progress: Progress | None = None,
    ) -> SampleResult:
        """Continue a context.

        Args:
            model: a causal GameRFTCore.
            x: [b, n, c, h, w] context latents in the model's scale.
            mouse: [b, m, 2] of the context and the frames to come; min(num_frames, m - n) are generated.
            btn: [b, m, n_buttons].
            compile_on_decode: run the single-frame passes through torch.compile.
            decode_fn: latents * image_scale to frames.
            image_scale: what the latents were divided by before the model.
            generator: source of noise, on the latents' device.
            progress: called with (frames done, frames to do).

        Returns:
            SampleResult of n + generated frames; the context is returned as it was given.

        Raises:
            ConfigError: the clip is longer than the model's n_frames and there is no max_window, or the model is not
                causal.
            ValueError: mouse and btn are missing, of different length or batch, or shorter than the context.
        """
        check_controls(mouse, btn, x.shape[0])
        context, n_frames = x.shape[1], model.config.n_frames
        generated = min(self.num_frames, mouse.shape[1] - context)
        if generated < 0:
            raise ValueError(f"controls must cover the {context} context frames, got {mouse.shape[1]}")
        if self.max_window is None and context + generated > n_frames:
            raise ConfigError(
                f"{context} + {generated} frames exceed the model's n_frames = {n_frames}; set max_window",
                key="max_window",
            )
        capacity = max(1, context + generated) if self.max_window is None else None
        cache = KVCache(model.config, max_window=self.max_window, capacity=capacity)
        guidance = Guidance(model=model, scale=self.cfg_scale, unconditional=self.unconditional)
        remember(guidance, cache, x, mouse, btn, self.noise_prev, generator)
        if compile_on_decode:
            guidance = Guidance(model=torch.compile(model), scale=self.cfg_scale, unconditional=self.unconditional)
        latents = torch.cat([x, x.new_zeros(x.shape[0], generated, *x.shape[2:])], dim=1)
        for frame in range(context, context + generated):
            controls = mouse[:, frame : frame + 1], btn[:, frame : frame + 1]
            new = denoise(guidance, cache, torch.empty_like(latents[:, :1]), *controls, self.deltas, generator)
            latents[:, frame] = new[:, 0]
            remember(guidance, cache, new, *controls, self.noise_prev, generator)
            if progress is not None:
                progress(frame + 1 - context, generated)
        keep = slice(context if self.only_return_generated else 0, context + generated)
        return SampleResult(
            latents=latents[:, keep],
            mouse=mouse[:, keep],
            buttons=btn[:, keep],
            video=None if decode_fn is None else decode_fn(latents[:, keep] * image_scale),
        )


def remember(
    guidance: Guidance,
    cache: KVCache,
    x: Tensor,
    mouse: Tensor,
    btn: Tensor,
    noise: float,
    generator: torch.Generator | None = None,
) -> None:
    """Noise finished frames to a level and add them to the cache, some frames at a time.

    Args:
        x: [b, n, c, h, w].
        mouse, btn: [b, m, 2], [b, m, n_buttons] with m >= n; those of the n frames come first.
        noise: 0 to 1.
    """
    cache.enable_cache_updates()
    noisy = zlerp(x, noise, generator)
    chunk = min(PREFILL_FRAMES, cache.largest_pass)
    for first in range(0, x.shape[1], chunk):
        part = noisy[:, first : first + chunk]
        span = slice(first, first + part.shape[1])
        t = torch.full(part.shape[:2], noise, dtype=torch.float32, device=x.device)
        guidance.velocity((part,), t, mouse[:, span], btn[:, span], cache)
    cache.disable_cache_updates()


def denoise(
    guidance: Guidance,
    cache: KVCache,
    like: Tensor,
    mouse: Tensor,
    btn: Tensor,
    deltas: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One new frame against the cache, which is left as it was.

    Args:
        like: [b, 1, c, h, w], for its shape, dtype and device.
        mouse, btn: [b, 1, 2], [b, 1, n_buttons].
        deltas: [steps] step sizes adding up to 1.

    Returns:
        The frame, [b, 1, c, h, w].
    """
    cache.disable_cache_updates()
    frame = torch.randn(like.shape, device=like.device, dtype=like.dtype, generator=generator)
    t = torch.ones(frame.shape[:2], dtype=torch.float32, device=frame.device)
    for delta in deltas.tolist():
        (velocity,) = guidance.velocity((frame,), t, mouse, btn, cache)
        frame = frame - delta * velocity
        t = t - delta
    return frame
