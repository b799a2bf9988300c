"""`av_caching`: generates with a cache that lives as long as the clip, frame by frame (`FrameLoop`).

The context, and each finished frame, is noised once to `noise_prev`, passed once, and never run again. With
`max_window` attention spans that many frames (the new one included) and the clip may be of any length; the result is
what the whole sequence gives under a window mask of that size (`tests/sampling/test_caching.py`).

`av_caching_one_step` is the same with a single Euler step per frame, for models that were distilled to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from owl_wms.dynamo import uncompiled
from owl_wms.errors import ConfigError
from owl_wms.nn.setting import setting
from owl_wms.sampling.controls import check_controls
from owl_wms.sampling.frames import FrameLoop
from owl_wms.sampling.guidance import Guidance, Unconditional
from owl_wms.sampling.result import SampleResult
from owl_wms.sampling.schedule import check_order, custom_deltas, get_sd3_euler
from owl_wms.sampling.window import Decode, Progress


class AVCachingSampler:
    """Cached sampler for causal video models.

    Args:
        n_steps: Euler steps per frame; without effect when a custom schedule says how many there are.
        cfg_scale: guidance; 1 is none, 0 or less ignores the controls.
        num_frames: frames to generate, at most; the controls may end earlier.
        noise_prev: noise level of the history, 0 to 1.
        max_window: frames that attention may span, or None for all (then the clip is bounded by the model's n_frames).
        custom_schedule: noise levels falling from 1.0, for example [1.0, 0.5].
        only_return_generated: leave the context out of the result.
        unconditional, max_level: see `owl_wms.sampling.guidance`.
        order: of the steps, 1 or 2; see `owl_wms.sampling.schedule.take_step`.
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
        max_level: float = 1.0,
        order: int = 1,
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
        self.max_level = max_level
        self.order = check_order(order)

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
        sinks = min(context, setting(model.config, "sink_frames", 0))  # shown before the context, see `FrameLoop`
        generated = min(self.num_frames, mouse.shape[1] - context)
        if generated < 0:
            raise ValueError(f"controls must cover the {context} context frames, got {mouse.shape[1]}")
        if self.max_window is None and sinks + context + generated > n_frames:
            raise ConfigError(
                f"{sinks + context} + {generated} frames exceed the model's n_frames = {n_frames}; set max_window",
                key="max_window",
            )
        window = max(1, sinks + context + generated) if self.max_window is None else self.max_window
        guidance = Guidance(
            model=model, scale=self.cfg_scale, unconditional=self.unconditional, max_level=self.max_level
        )
        loop = FrameLoop(
            replace(guidance, model=torch.compile(model)) if compile_on_decode else guidance,
            deltas=self.deltas,
            noise_prev=self.noise_prev,
            max_window=window,
            order=self.order,
            fixed=True if compile_on_decode else None,
            prefill=guidance if compile_on_decode else None,
        )
        loop.begin(x, mouse, btn, generator)
        latents = torch.cat([x, x.new_zeros(x.shape[0], generated, *x.shape[2:])], dim=1)
        for frame in range(context, context + generated):
            controls = mouse[:, frame : frame + 1], btn[:, frame : frame + 1]
            new = loop.denoise(*controls, generator)
            latents[:, frame] = new[:, 0]
            loop.remember(new, *controls, generator)
            if progress is not None:
                progress(frame + 1 - context, generated)
        keep = slice(context if self.only_return_generated else 0, context + generated)
        return SampleResult(
            latents=latents[:, keep],
            mouse=mouse[:, keep],
            buttons=btn[:, keep],
            video=None if decode_fn is None else decode_fn(latents[:, keep] * image_scale),
        )


class AVCachingOneStepSampler(AVCachingSampler):
    """`AVCachingSampler` for distilled models: every frame is made in one step of size 1, by default without guidance.

    Args:
        n_steps: accepted because configurations of other samplers have it; 1.
        others: as `AVCachingSampler`.
    """

    def __init__(
        self,
        n_steps: int = 1,
        cfg_scale: float = 1.0,
        num_frames: int = 60,
        noise_prev: float = 0.2,
        max_window: int | None = None,
        *,
        only_return_generated: bool = False,
        unconditional: Unconditional = "dropped",
        max_level: float = 1.0,
    ) -> None:
        if n_steps != 1:
            text = f"av_caching_one_step takes one step per frame, got n_steps {n_steps}; use av_caching"
            raise ConfigError(text, key="train.sampler_kwargs.n_steps")
        super().__init__(
            1,
            cfg_scale,
            num_frames,
            noise_prev,
            max_window,
            only_return_generated=only_return_generated,
            unconditional=unconditional,
            max_level=max_level,
        )
