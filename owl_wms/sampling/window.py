"""`av_window`: generate frame after frame, running the whole window of history at every step.

No cache, so the model may look both ways. Each new frame is denoised against its history noised to `noise_prev`, which
hides the model's own small errors from it. Frame k is conditioned on the controls of frame k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from owl_wms.dynamo import uncompiled
from owl_wms.errors import ConfigError
from owl_wms.nn.limits import within_limits
from owl_wms.nn.setting import setting
from owl_wms.sampling.captured import Captured, may_capture
from owl_wms.sampling.controls import batch_permute_to_length, check_controls
from owl_wms.sampling.guidance import Guidance, Parts
from owl_wms.sampling.result import SampleResult
from owl_wms.sampling.schedule import get_sd3_euler, zlerp

Decode = Callable[[Tensor], Tensor]
Progress = Callable[[int, int], None]


class AVWindowSampler:
    """Sliding-window sampler for video, or video with audio.

    Args:
        n_steps: Euler steps per frame.
        cfg_scale: guidance; 1 is none, 0 or less ignores the controls.
        window_length: frames the model sees at once, the new one included.
        num_frames: frames to generate.
        noise_prev: noise level of the history, 0 to 1.
        only_return_generated: leave the context out of the result.
        max_level: see `owl_wms.sampling.guidance`.
    """

    def __init__(
        self,
        n_steps: int = 20,
        cfg_scale: float = 1.3,
        window_length: int = 60,
        num_frames: int = 60,
        noise_prev: float = 0.2,
        only_return_generated: bool = False,
        *,
        max_level: float = 1.0,
    ) -> None:
        if window_length < 1 or num_frames < 0 or not 0 <= noise_prev <= 1:
            raise ConfigError(
                "a sampler needs window_length >= 1, num_frames >= 0 and noise_prev in 0 to 1, "
                f"got {window_length}, {num_frames}, {noise_prev}",
                key="train.sampler_kwargs",
            )
        self.deltas = get_sd3_euler(n_steps)
        self.cfg_scale = cfg_scale
        self.window_length = window_length
        self.num_frames = num_frames
        self.noise_prev = noise_prev
        self.only_return_generated = only_return_generated
        self.max_level = max_level

    @uncompiled
    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        dummy_batch: Tensor,
        audio: Tensor | None,
        mouse: Tensor,
        btn: Tensor,
        decode_fn: Decode | None = None,
        audio_decode_fn: Decode | None = None,
        image_scale: float = 1,
        audio_scale: float = 1,
        *,
        generator: torch.Generator | None = None,
        progress: Progress | None = None,
    ) -> SampleResult:
        """Continue a context.

        Args:
            model: a core; one with audio needs `audio`, one without needs None.
            dummy_batch: [b, n, c, h, w] context latents in the model's scale (upstream's name for them).
            audio: [b, n, c_a] context, or None.
            mouse: [b, m, 2]; continued by `batch_permute_to_length` when m < n + num_frames.
            btn: [b, m, n_buttons].
            decode_fn: latents * image_scale to frames.
            audio_decode_fn: audio latents * audio_scale to samples.
            image_scale, audio_scale: what the latents were divided by before the model.
            generator: source of noise and of the order in which controls are continued, on the latents' device.
            progress: called with (frames done, frames to do).

        Returns:
            SampleResult; frame k of every member belongs together.

        Raises:
            ConfigError: the window would move on, and the model takes the first frames of any for its `sink_frames`.
            ValueError: mouse and btn are missing, empty, or of different length or batch.
        """
        check_controls(mouse, btn, dummy_batch.shape[0])
        context = dummy_batch.shape[1]
        total = context + self.num_frames
        if setting(getattr(model, "config", None), "sink_frames", 0) and total > self.window_length:
            text = f"the window of {self.window_length} frames would leave the first of {total}, which a model with"
            raise ConfigError(f"{text} sink_frames never forgets; sample it with av_caching", key="train.sampler_id")
        mouse, btn = batch_permute_to_length(mouse, btn, total, generator)
        parts: Parts = (dummy_batch,) if audio is None else (dummy_batch, audio)
        whole = tuple(torch.cat([p, p.new_zeros(p.shape[0], self.num_frames, *p.shape[2:])], dim=1) for p in parts)
        guidance = Guidance(model=model, scale=self.cfg_scale, max_level=self.max_level)

        def denoise(*inputs: Tensor) -> Parts:
            video, *sound = self._denoise(guidance, inputs[:-3], *inputs[-3:])
            return within_limits(model, video), *sound

        # Once the window is as long as it gets, all frames have the same shapes.
        captured = Captured(denoise, allowed=may_capture(model))
        for frame in range(context, total):
            first = max(0, frame + 1 - self.window_length)
            seen = slice(first, frame + 1)
            window, t = self._noisy_window(tuple(p[:, seen] for p in whole), generator)
            done = captured(None, *window, t, mouse[:, seen], btn[:, seen])
            for part, new in zip(whole, done, strict=True):
                part[:, frame] = new[:, 0]
            if progress is not None:
                progress(frame + 1 - context, self.num_frames)
        keep = slice(context if self.only_return_generated else 0, None)
        latents, sound = whole[0][:, keep], whole[1][:, keep] if len(whole) > 1 else None
        return SampleResult(
            latents=latents,
            mouse=mouse[:, keep],
            buttons=btn[:, keep],
            video=None if decode_fn is None else decode_fn(latents * image_scale),
            latents_audio=sound,
            audio=None if audio_decode_fn is None or sound is None else audio_decode_fn(sound * audio_scale),
        )

    def _noisy_window(self, parts: Parts, generator: torch.Generator | None) -> tuple[Parts, Tensor]:
        """History at noise_prev and the last frame as pure noise, with the noise levels [b, n] in fp32."""
        noisy = tuple(
            torch.cat([zlerp(p[:, :-1], self.noise_prev, generator), zlerp(p[:, -1:], 1.0, generator)], dim=1)
            for p in parts
        )
        t = torch.full(parts[0].shape[:2], self.noise_prev, dtype=torch.float32, device=parts[0].device)
        t[:, -1] = 1.0
        return noisy, t

    def _denoise(self, guidance: Guidance, window: Parts, t: Tensor, mouse: Tensor, btn: Tensor) -> Parts:
        """The last frame of the window, [b, 1, ...] of each part, taken from noise to data."""
        for delta in self.deltas.tolist():
            velocity = guidance.velocity(window, t, mouse, btn)
            for part, v in zip(window, velocity, strict=True):
                part[:, -1] -= delta * v[:, -1]
            t[:, -1] -= delta
        return tuple(part[:, -1:] for part in window)
