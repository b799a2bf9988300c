"""The cache against the model without one: any cutting into passes, any truncation, any number of frames."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from owl_wms.errors import ConfigError
from owl_wms.nn.kv_cache import KVCache
from tests.world import inputs, relative, tiny_core

TOLERANCE = 1e-4  # the float noise of a fp32 model whose sines have arguments up to 1000


@pytest.fixture(scope="module", params=["motion", "ortho"])
def core(request: pytest.FixtureRequest):
    return tiny_core(rope_impl=request.param)


@pytest.fixture(scope="module")
def sequence(core):
    x, t, mouse, buttons = inputs(2, 24)
    with torch.no_grad():
        return (x, t, mouse, buttons), core(x, t, mouse, buttons)


def run(core, cache: KVCache, data, first: int, last: int) -> torch.Tensor:
    with torch.no_grad():
        return core(*(a[:, first:last] for a in data), kv_cache=cache)


@settings(max_examples=15, deadline=None)
@given(passes=st.lists(st.integers(1, 7), min_size=1, max_size=12))
def test_any_cutting_into_passes_gives_the_whole(core, sequence, passes: list[int]) -> None:
    data, whole = sequence
    cache, at, out = KVCache(core.config), 0, []
    for frames in passes:
        frames = min(frames, 24 - at)
        if frames:
            out.append(run(core, cache, data, at, at + frames))
            at += frames
    assert len(cache) == at
    assert relative(torch.cat(out, 1), whole[:, :at]) < TOLERANCE


@settings(max_examples=10, deadline=None)
@given(drops=st.lists(st.integers(0, 3), min_size=5, max_size=5))
def test_dropping_the_newest_takes_back_their_positions(core, sequence, drops: list[int]) -> None:
    data, whole = sequence
    cache, at = KVCache(core.config), 0
    for drop in drops:
        assert relative(run(core, cache, data, at, at + 4), whole[:, at : at + 4]) < TOLERANCE
        cache.drop_newest(drop)
        at += 4 - drop
        assert (len(cache), cache.end) == (at, at)


def test_frames_passed_without_updates_leave_no_trace(core, sequence) -> None:
    data, whole = sequence
    cache = KVCache(core.config)
    run(core, cache, data, 0, 5)
    cache.disable_cache_updates()
    for _ in range(3):
        noise = [torch.randn_like(a) for a in data]
        run(core, cache, noise, 5, 7)
    assert len(cache) == 5
    assert relative(run(core, cache, data, 5, 6), whole[:, 5:6]) < TOLERANCE


@pytest.mark.parametrize(("window", "positions"), [(4, 8), (4, 5), (4, 4), (7, 9), (1, 2)])
def test_a_window_runs_for_ever_in_few_positions(window: int, positions: int) -> None:
    """Equal to the whole sequence under a window mask, with a table that is far too short for it."""
    core, long = tiny_core(n_frames=positions), tiny_core(global_window=window, local_window=min(3, window))
    data = inputs(2, 33)
    with torch.no_grad():
        whole = long(*data)
    cache = KVCache(core.config, max_window=window)
    out = torch.cat([run(core, cache, data, i, i + 1) for i in range(33)], 1)
    assert relative(out, whole) < TOLERANCE
    assert cache.end <= positions


def test_dropping_the_oldest_forgets_them_and_keeps_distances(core, sequence) -> None:
    """With one layer a frame's key depends on that frame alone, so forgetting equals never having seen."""
    short = tiny_core(n_layers=1)
    data, _ = sequence
    cache, fresh = KVCache(short.config), KVCache(short.config)
    run(short, cache, data, 0, 8)
    cache.drop_oldest(5)
    run(short, fresh, data, 5, 8)
    assert (len(cache), len(fresh)) == (3, 3)
    assert relative(run(short, cache, data, 8, 10), run(short, fresh, data, 8, 10)) < TOLERANCE


def test_storage_is_allocated_once_and_a_clone_is_independent(core, sequence) -> None:
    data, whole = sequence
    cache = KVCache(core.config, capacity=12)
    run(core, cache, data, 0, 3)
    size, place = cache.nbytes, cache._keys.data_ptr()
    run(core, cache, data, 3, 10)
    assert (cache.nbytes, cache._keys.data_ptr()) == (size, place)
    twin = cache.clone()
    run(core, twin, [torch.randn_like(a) for a in data], 10, 12)
    assert (len(cache), len(twin)) == (10, 12)
    assert relative(run(core, cache, data, 10, 11), whole[:, 10:11]) < TOLERANCE


def test_gradients_flow_through_new_frames_and_survive_later_passes(core, sequence) -> None:
    data, whole = sequence
    cache = KVCache(core.config)
    run(core, cache, data, 0, 4)
    cache.disable_cache_updates()
    x = data[0][:, 4:5].clone().requires_grad_()
    y = core(x, *(a[:, 4:5] for a in data[1:]), kv_cache=cache)
    assert relative(y.detach(), whole[:, 4:5]) < TOLERANCE
    cache.enable_cache_updates()
    run(core, cache, data, 4, 8)  # overwrites the place where frame 4 would have been kept
    y.sum().backward()
    reference = data[0][:, :5].clone().requires_grad_()
    core(reference, *(a[:, :5] for a in data[1:]))[:, 4:].sum().backward()
    assert relative(x.grad, reference.grad[:, 4:5]) < TOLERANCE


def test_bfloat16_needs_no_help(core) -> None:
    half = tiny_core().bfloat16()
    data = tuple(a.bfloat16() for a in inputs(1, 6))
    cache = KVCache(half.config)
    out = torch.cat([run(half, cache, data, i, i + 1) for i in range(6)], 1)
    assert out.dtype == torch.bfloat16
    with torch.no_grad():
        assert relative(out.float(), half(*data).float()) < 5e-2


def test_what_cannot_be_cached_is_refused(core, sequence) -> None:
    data, _ = sequence
    with pytest.raises(ConfigError, match="max_window"):
        KVCache(core.config, max_window=41)
    with pytest.raises(ConfigError, match="capacity"):
        KVCache(core.config, max_window=5, capacity=4)
    cache = KVCache(core.config, capacity=4)
    run(core, cache, data, 0, 3)
    with pytest.raises(ConfigError, match="set max_window"):
        run(core, cache, data, 3, 5)
    with pytest.raises(ValueError, match="can drop 0 to 3"):
        cache.drop_newest(4)
    with pytest.raises(ValueError, match="the cache holds"):
        run(core, cache, [a[:1] for a in data], 3, 4)
    with pytest.raises(ConfigError, match="causal"):
        run(tiny_core(causal=False), KVCache(core.config), data, 0, 1)
    with pytest.raises(ValueError, match="one document"):
        core(*data, torch.zeros(2, 24), kv_cache=KVCache(core.config))


@pytest.mark.parametrize("first", ["made", "cloned"])
def test_a_cache_made_in_inference_mode_goes_on_outside_of_it(core, sequence, first: str) -> None:
    data, whole = sequence
    cache = KVCache(core.config)
    if first == "cloned":
        run(core, cache, data, 0, 3)
    with torch.inference_mode():
        cache = cache.clone()
        if first == "made":
            run(core, cache, data, 0, 3)
    assert relative(run(core, cache, data, 3, 6), whole[:, 3:6]) < TOLERANCE
    trained = core(*(a[:, 6:8] for a in data), kv_cache=cache)
    trained.sum().backward()
    core.zero_grad()
    assert relative(trained.detach(), whole[:, 6:8]) < TOLERANCE
