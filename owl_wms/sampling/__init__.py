"""Samplers: context latents and controls in, generated latents out, by the ids that configurations use.

| id | sees | history | guidance | audio |
|---|---|---|---|---|
| `av_window` | a window, run whole at every step | noised anew for every frame | yes | optional |
| `av_causal` | the same window, cached between the steps of a frame | noised anew for every frame | yes | optional |
| `av_causal_no_cfg` | as av_causal | as av_causal | no | optional |
| `av_caching` | everything, or `max_window` frames, cached for good | noised once | yes | no |
| `av_caching_one_step` | as av_caching; one step per frame | noised once | yes | no |

Usage:
    sampler = get_sampler_cls("av_caching")(n_steps=16, num_frames=60)
    result = sampler(model.core, context, mouse, buttons)      # SampleResult
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from owl_wms.configs.strict import choose
from owl_wms.sampling.caching import AVCachingOneStepSampler, AVCachingSampler
from owl_wms.sampling.causal import CausalAVWindowSampler, CausalAVWindowSamplerNoCFG
from owl_wms.sampling.controls import batch_permute, batch_permute_to_length
from owl_wms.sampling.guidance import Guidance
from owl_wms.sampling.result import SampleResult
from owl_wms.sampling.schedule import custom_deltas, get_sd3_euler, zlerp
from owl_wms.sampling.window import AVWindowSampler

SAMPLERS: dict[str, type[AVWindowSampler] | type[AVCachingSampler]] = {
    "av_window": AVWindowSampler,
    "av_causal": CausalAVWindowSampler,
    "av_causal_no_cfg": CausalAVWindowSamplerNoCFG,
    "av_caching": AVCachingSampler,
    "av_caching_one_step": AVCachingOneStepSampler,
}

__all__ = [
    "SAMPLERS",
    "AVCachingOneStepSampler",
    "AVCachingSampler",
    "AVWindowSampler",
    "CausalAVWindowSampler",
    "CausalAVWindowSamplerNoCFG",
    "Guidance",
    "SampleResult",
    "batch_permute",
    "batch_permute_to_length",
    "continue_video",
    "custom_deltas",
    "get_sampler_cls",
    "get_sd3_euler",
    "zlerp",
]


def get_sampler_cls(sampler_id: str) -> type[AVWindowSampler] | type[AVCachingSampler]:
    """The class that a `sampler_id` names.

    Raises:
        ConfigError: no such id; the message lists the ids.
    """
    return choose(SAMPLERS, sampler_id, "train.sampler_id")


def continue_video(sampler: Any, model: Any, x: Tensor, mouse: Tensor, btn: Tensor, **options: Any) -> SampleResult:
    """Continues a context without sound by any sampler: those of windows take sound before the controls.

    Args:
        sampler: made by a class of SAMPLERS.
        model: a core without audio.
        x: [b, n, c, h, w] context latents in the model's scale.
        mouse, btn: [b, m, 2] and [b, m, n_buttons].
        options: what else the sampler takes, such as `generator`.
    """
    sound = (None,) if isinstance(sampler, AVWindowSampler) else ()
    result: SampleResult = sampler(model, x, *sound, mouse, btn, **options)
    return result
