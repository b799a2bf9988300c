"""The self-forcing rollout: a model generates on its own outputs, gradients pass through each frame's last step only.

Run: python -m pytest sanity/test_self_forcing.py -v
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from owl_wms.nn.kv_cache import KVCache
from tests.world import inputs, relative, tiny_core

CONTEXT, FRAMES, STEPS = 3, 3, 3


def rollout(core, x: Tensor, mouse: Tensor, btn: Tensor, noise: Tensor) -> Tensor:
    """[b, FRAMES, c, h, w], each frame's last step with gradients, its history cached clean and without them."""
    cache = KVCache(core.config)
    level = torch.zeros(x.shape[0], CONTEXT)
    with torch.no_grad():
        core(x, level, mouse[:, :CONTEXT], btn[:, :CONTEXT], kv_cache=cache)
    made = []
    for frame in range(FRAMES):
        at = slice(CONTEXT + frame, CONTEXT + frame + 1)
        sample, t = noise[:, frame : frame + 1], torch.ones(x.shape[0], 1)
        cache.disable_cache_updates()
        with torch.no_grad():
            for _ in range(STEPS - 1):
                sample = sample - core(sample, t, mouse[:, at], btn[:, at], kv_cache=cache) / STEPS
                t = t - 1 / STEPS
        sample = sample - t[:, :, None, None, None] * core(sample, t, mouse[:, at], btn[:, at], kv_cache=cache)
        made.append(sample)
        cache.enable_cache_updates()
        with torch.no_grad():
            core(sample.detach(), torch.zeros_like(t), mouse[:, at], btn[:, at], kv_cache=cache)
    assert len(cache) == CONTEXT + FRAMES
    return torch.cat(made, 1)


@pytest.fixture
def data() -> tuple[Tensor, ...]:
    x, _, mouse, btn = inputs(2, CONTEXT + FRAMES)
    return x[:, :CONTEXT], mouse, btn, torch.randn(2, FRAMES, 4, 2, 2)


def test_the_rollout_is_generation_without_a_cache(data: tuple[Tensor, ...]) -> None:
    core = tiny_core()
    x, mouse, btn, noise = data
    got = rollout(core, x, mouse, btn, noise).detach()
    history = x
    with torch.no_grad():
        for frame in range(FRAMES):
            sample, level = noise[:, frame : frame + 1], 1.0
            for _ in range(STEPS):
                sequence, n = torch.cat([history, sample], 1), CONTEXT + frame + 1
                t = torch.cat([torch.zeros(2, n - 1), torch.full((2, 1), level)], 1)
                sample = sample - core(sequence, t, mouse[:, :n], btn[:, :n])[:, -1:] / STEPS
                level -= 1 / STEPS
            history = torch.cat([history, sample], 1)
    assert relative(got, history[:, CONTEXT:]) < 1e-3


def test_gradients_reach_the_weights_and_stay_in_their_frame(data: tuple[Tensor, ...]) -> None:
    core = tiny_core()
    x, mouse, btn, noise = data
    noise.requires_grad_()
    made = rollout(core, x, mouse, btn, noise)
    made[:, 2].square().mean().backward()
    assert core.proj_in.weight.grad.abs().sum() > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in core.parameters())
    assert noise.grad is None, "earlier steps are constants"
