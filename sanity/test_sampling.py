"""Sampling: cached against uncached over a long clip, and a sampled frame decoded by a decoder of the project.

Run: python -m pytest sanity/test_sampling.py -v
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from owl_wms.inference.pixels import to_uint8
from owl_wms.sampling import AVCachingSampler, AVWindowSampler, CausalAVWindowSampler
from owl_wms.utils.owl_vae_bridge import get_decoder_only, make_batched_decode_fn
from tests.world import inputs, relative, tiny_core

DEMO = Path(__file__).parents[1] / "examples" / "demo"


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def test_thirty_frames_with_and_without_a_cache() -> None:
    core = tiny_core()
    x, _, mouse, btn = inputs(1, 34)
    plain, cached = (
        kind(2, 1.3, 8, 30)(core, x[:, :4], None, mouse, btn, generator=seeded()).latents
        for kind in (AVWindowSampler, CausalAVWindowSampler)
    )
    assert relative(cached, plain) < 1e-3
    assert cached[:, 4:].std() > 0.1


def test_a_clip_far_longer_than_the_positions() -> None:
    """A table of 10 positions and one of 80 give one clip, 70 frames long."""
    x, _, mouse, btn = inputs(1, 74)
    short, long = (
        AVCachingSampler(1, 1.0, 70, max_window=5)(
            tiny_core(n_frames=n), x[:, :4], mouse, btn, generator=seeded()
        ).latents
        for n in (10, 80)
    )
    assert short.shape[1] == 74
    assert relative(short, long) < 1e-3


@pytest.mark.parametrize("sampler", [AVCachingSampler(2, 1.3, 2), AVWindowSampler(2, 1.3, 4, 2)])
def test_a_sampled_frame_is_decoded(sampler: AVCachingSampler | AVWindowSampler) -> None:
    core = tiny_core(sample_size=8, tokens_per_frame=64, channels=128, n_layers=2)
    decoder = get_decoder_only(
        None, DEMO / "demo_vae.yml", DEMO / "demo_vae.safetensors", device="cpu", dtype=torch.float32
    )
    decode = make_batched_decode_fn(decoder, 2, use_tensorrt=False)
    x, _, mouse, btn = inputs(1, 4, channels=128, side=8)
    audio = () if isinstance(sampler, AVCachingSampler) else (None,)
    latents = sampler(core, x[:, :2], *audio, mouse, btn).latents
    frames = decode(latents[:, 2:])
    assert frames.shape == (1, 2, 4, 360, 640)
    assert to_uint8(frames[0, 0]).float().std() > 1
    assert decode.stats().backend == "pytorch"
