"""Rotary positions inside attention: moving a clip in time changes nothing, moving one frame does; bf16 or not.

Run: python -m pytest sanity/test_rope.py -v
"""

from __future__ import annotations

import pytest
import torch

from owl_wms.nn.kv_cache import KVCache
from tests.world import inputs, relative, tiny_core


@torch.no_grad()
@pytest.mark.parametrize("impl", ["motion", "ortho"])
def test_a_clip_looks_the_same_at_any_time(impl: str) -> None:
    core = tiny_core(rope_impl=impl)
    data = inputs(1, 6)
    early, late = KVCache(core.config), KVCache(core.config)
    # Frames that are forgotten again leave the clip at a later position.
    core(*inputs(1, 9, seed=8), kv_cache=late)
    late.drop_oldest(9)
    assert (early.end, late.end) == (0, 9)
    assert relative(core(*data, kv_cache=late), core(*data, kv_cache=early)) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("impl", ["motion", "ortho"])
def test_the_order_of_frames_matters(impl: str) -> None:
    core = tiny_core(rope_impl=impl, causal=False, global_window=None, local_window=None)
    data = inputs(1, 4)
    swapped = [a[:, [1, 0, 2, 3]] for a in data]
    assert relative(core(*swapped)[:, 3], core(*data)[:, 3]) > 1e-3


@torch.no_grad()
def test_bfloat16_keeps_positions_exact() -> None:
    core = tiny_core()
    exact = core.transformer.rope.cos.clone()
    # The same values in both: rounding a movement by one part in 256 turns the embedding's fastest sine by radians.
    data = [a.bfloat16().float() for a in inputs(1, 8)]
    full = core(*data)
    half = core.bfloat16()(*(a.bfloat16() for a in data))
    assert torch.equal(core.transformer.rope.cos, exact)
    assert relative(half.float(), full) < 5e-2
