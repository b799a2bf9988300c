"""`av_causal` and `av_causal_no_cfg`: the frames of `av_window`, for causal models, with one whole window per frame.

The first step of a frame runs the window and keeps its keys and values; the newest frame is then dropped from the
cache, since it changes at every step, and the remaining steps run that frame alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from owl_wms.nn.kv_cache import KVCache
from owl_wms.sampling.guidance import Guidance, Parts
from owl_wms.sampling.window import AVWindowSampler


class CausalAVWindowSampler(AVWindowSampler):
    """Arguments, call and result are AVWindowSampler's; the model must be causal."""

    def _denoise(self, guidance: Guidance, window: Parts, t: Tensor, mouse: Tensor, btn: Tensor) -> Parts:
        cache = KVCache(guidance.model.config, capacity=t.shape[1])
        frame, level = tuple(part[:, -1:].clone() for part in window), t[:, -1:].clone()
        for step, delta in enumerate(self.deltas.tolist()):
            if step == 0:
                velocity = guidance.velocity(window, t, mouse, btn, cache)
                cache.drop_newest(1)
                cache.disable_cache_updates()
            else:
                velocity = guidance.velocity(frame, level, mouse[:, -1:], btn[:, -1:], cache)
            for part, v in zip(frame, velocity, strict=True):
                part -= delta * v[:, -1:]
            level -= delta
        return frame


class CausalAVWindowSamplerNoCFG(CausalAVWindowSampler):
    """The sampler without guidance: `cfg_scale` is accepted, for configurations that carry it, and has no effect."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cfg_scale = 1.0
