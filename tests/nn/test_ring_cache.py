"""The ring against the model without a cache, over several turns and far beyond the table of positions."""

from __future__ import annotations

import pytest
import torch

from owl_wms.errors import ConfigError
from owl_wms.nn.attention import Masks
from owl_wms.nn.kv_cache import KVCache
from owl_wms.nn.ring_cache import RingCache
from tests.world import inputs, relative, tiny_core

TOLERANCE = 1e-4  # the float noise of a fp32 model whose sines have arguments up to 1000


def one(core, ring, data, frame: int) -> torch.Tensor:
    with torch.no_grad():
        return core(*(a[:, frame : frame + 1] for a in data), kv_cache=ring)


@pytest.mark.parametrize("rope", ["motion", "ortho"])
@pytest.mark.parametrize("round_to", [1, 4, 64])
@pytest.mark.parametrize(("window", "local", "positions"), [(6, 3, 6), (4, 7, 9), (1, 1, 2), (9, 2, 40)])
def test_many_turns_equal_the_whole_sequence(rope: str, round_to: int, window: int, local: int, positions: int) -> None:
    """40 frames: up to 40 turns of a ring, in a table of positions that is far too short for the sequence."""
    core = tiny_core(n_frames=positions, rope_impl="motion", local_window=local)
    long = tiny_core(n_frames=40, rope_impl="motion", global_window=window, local_window=min(local, window))
    if rope == "ortho":  # its frequencies depend on n_frames, so both need the same table
        core = tiny_core(n_frames=40, rope_impl=rope, local_window=local)
        long = tiny_core(n_frames=40, rope_impl=rope, global_window=window, local_window=min(local, window))
    data = inputs(2, 40)
    with torch.no_grad():
        whole = long(*data)
    ring = RingCache(core.config, max_window=window, round_to=round_to)
    addresses = set()
    for frame in range(40):
        noise = [torch.randn_like(a) for a in data]
        one(core, ring, noise, frame)  # a pass that is not kept leaves no trace
        got = one(core, ring, data, frame)
        assert relative(got, whole[:, frame : frame + 1]) < TOLERANCE, frame
        ring.advance()
        addresses.add(tuple(t.data_ptr() for t in ring._keys))
    assert len(addresses) == 1
    assert len(ring) == min(window - 1, 40)


@torch.no_grad()
def recomputed(core, data, window: int, sinks: int) -> torch.Tensor:
    """Every frame of every layer from what it may see, gathered into one short sequence and passed without a cache."""
    x, t, mouse, btn = data
    cond = core.condition(t, mouse, btn, None)
    transformer, tokens = core.transformer, core.video_tokens(x)
    marked = transformer.marked(cond)
    assert not torch.equal(marked[:, :sinks], cond[:, :sinks])
    assert torch.equal(marked[:, sinks:], cond[:, sinks:])
    for block in transformer.blocks:
        made = []
        for frame in range(x.shape[1]):
            seen = [*range(sinks), *range(max(sinks, frame + 1 - (window - sinks)), frame + 1)][: frame + 1]
            if block.attn.window is not None and block.attn.window < window:
                seen = list(range(max(0, frame + 1 - block.attn.window), frame + 1))
            masks = Masks(x.device, "sdpa")
            made.append(block(tokens[:, seen], marked[:, seen], transformer.rope, masks, None, None)[:, -1])
        tokens = torch.stack(made, dim=1)
    out = core.proj_out(tokens, cond).transpose(2, 3).unflatten(3, x.shape[3:])
    return out


@pytest.mark.parametrize("rope", ["motion", "ortho"])
@pytest.mark.parametrize("round_to", [1, 64])
@pytest.mark.parametrize(("window", "local", "sinks"), [(6, 3, 2), (5, 9, 1), (4, 1, 3)])
def test_sinks_and_the_last_frames_are_one_window(
    rope: str, round_to: int, window: int, local: int, sinks: int
) -> None:
    """Over several turns of the ring, also far from the sinks, and again for a second video."""
    core = tiny_core(n_frames=9, rope_impl=rope, local_window=local, sink_frames=sinks)
    ring = RingCache(core.config, max_window=window, round_to=round_to)
    addresses = set()
    for seed in (1, 2):
        data = inputs(2, 4 * window, seed=seed)
        wanted = recomputed(core, data, window, sinks)
        for frame in range(4 * window):
            one(core, ring, [torch.randn_like(a) for a in data], frame)  # a pass that is not kept leaves no trace
            got = one(core, ring, data, frame)
            assert relative(got, wanted[:, frame : frame + 1]) < TOLERANCE, (seed, frame)
            ring.advance()
            addresses.add(tuple(t.data_ptr() for t in (*ring._keys, *ring._values)))
        ring.reset()
    assert len(addresses) == 1, "a captured pass serves all frames"


def test_a_window_that_begins_with_sinks_needs_no_cache() -> None:
    """With one layer, what training passes at once: the sinks and the last frames, whatever lies between them."""
    core, data = tiny_core(n_layers=1, sink_frames=2), inputs(1, 30)
    ring = RingCache(core.config, max_window=6)
    for frame in range(30):
        got = one(core, ring, data, frame)
        ring.advance()
        seen = [*range(min(2, frame + 1)), *range(max(2, frame - 3), frame + 1)]
        with torch.no_grad():
            assert relative(got, core(*(a[:, seen] for a in data))[:, -1:]) < TOLERANCE, frame


def test_sinks_are_as_exact_in_bfloat16_after_a_day_as_at_first() -> None:
    core, data = tiny_core(sink_frames=2).bfloat16(), [a.bfloat16() for a in inputs(1, 3)]
    ring = RingCache(core.config, max_window=4)
    for frame in range(3):
        one(core, ring, data, frame)
        ring.advance()
    first = [keys[:, :, :2].clone() for keys, _ in ring._first]
    ring._stored = 2_000_000
    ring.advance()
    for (keys, _), wanted in zip(ring._first, first, strict=True):
        back = core.transformer.rope.shift(keys[:, :, :2], 3 - 2_000_001)
        assert relative(back, wanted) < 0.01, "two roundings"


def test_no_room_beside_sinks_is_refused_and_nothing_forgets_them() -> None:
    core, data = tiny_core(sink_frames=2), inputs(1, 6)
    with pytest.raises(ConfigError, match="max_window must be above the model's sink_frames = 2, got 2"):
        RingCache(core.config, max_window=2)
    with pytest.raises(ConfigError, match="may not forget the first"):
        KVCache(core.config, max_window=4)
    with pytest.raises(ConfigError, match="one clip a row"), torch.no_grad():
        core(*data, doc_id=torch.zeros(1, 6, dtype=torch.long))
    whole, parts = KVCache(core.config), []
    with torch.no_grad():
        for span in (slice(0, 1), slice(1, 4), slice(4, 6)):
            parts.append(core(*(a[:, span] for a in data), kv_cache=whole))
        assert relative(torch.cat(parts, dim=1), core(*data)) < TOLERANCE


def test_without_sinks_a_model_has_no_weights_for_them() -> None:
    names = [set(tiny_core(sink_frames=sinks).state_dict()) for sinks in (0, 2)]
    assert names[1] - names[0] == {"transformer.sink_mark"}


def test_reset_forgets_and_keeps_its_storage() -> None:
    core, data = tiny_core(), inputs(1, 12)
    ring = RingCache(core.config, max_window=5, round_to=64)
    first = []
    for turn in range(2):
        for frame in range(12):
            got = one(core, ring, data, frame)
            if turn:
                assert torch.equal(got, first[frame])
            first.append(got)
            ring.advance()
        size = ring.nbytes
        ring.reset()
        assert (len(ring), ring.nbytes) == (0, size)


def test_far_positions_are_as_exact_as_near_ones() -> None:
    """Two months of play at 20 frames per second: keys rotated there still differ by distances alone."""
    core, data = tiny_core(), inputs(1, 12)
    near, far = (RingCache(core.config, max_window=6) for _ in range(2))
    far._position = torch.tensor([100_000_002])
    assert 100_000_002 % 6 == 100_000_002 % 3 == 0, "the same slots are empty in both"
    for frame in range(12):
        assert relative(one(core, far, data, frame), one(core, near, data, frame)) < TOLERANCE
        near.advance()
        far.advance()


def test_a_local_layer_keeps_its_own_window_only() -> None:
    core, data = tiny_core(local_window=2), inputs(1, 3)
    ring = RingCache(core.config, max_window=8)
    for frame in range(3):
        one(core, ring, data, frame)
        ring.advance()
    assert sorted({t.shape[2] for t in ring._keys}) == [2, 8]
    whole = KVCache(core.config, max_window=8, capacity=8)
    with torch.no_grad():
        core(*data, kv_cache=whole)
    assert ring.nbytes < whole.nbytes


def test_shapes_are_few_when_rounded() -> None:
    ring = RingCache(tiny_core().config, max_window=40, round_to=16)
    ring._position = torch.zeros(1, dtype=torch.int64)
    shapes = []
    for _ in range(60):
        shapes.append(ring.shape)
        ring.advance()
    assert shapes[0] == (16, True)
    assert shapes[15] == (16, False)
    assert shapes[16] == (32, True)
    assert shapes[-1] == (40, False)
    assert len(set(shapes)) == 6


def test_what_cannot_be_stored_is_refused() -> None:
    core, data = tiny_core(), inputs(2, 4)
    for window in (0, 41):
        with pytest.raises(ConfigError, match="max_window must be 1 to n_frames = 40"):
            RingCache(core.config, max_window=window)
    ring = RingCache(core.config, max_window=4)
    with pytest.raises(ValueError, match="no frame"):
        ring.advance()
    with pytest.raises(ValueError, match="one frame per pass, got 2"):
        core(*(a[:, :2] for a in data), kv_cache=ring)
    one(core, ring, data, 0)
    with pytest.raises(ValueError, match="the ring holds"):
        one(core, ring, [a[:1] for a in data], 1)
    with pytest.raises(ConfigError, match="causal"):
        one(tiny_core(causal=False), RingCache(core.config, max_window=4), data, 0)


def test_a_ring_made_in_inference_mode_goes_on_outside_of_it() -> None:
    core, data = tiny_core(), inputs(1, 4)
    ring, wanted = (RingCache(core.config, max_window=4) for _ in range(2))
    with torch.inference_mode():
        one(core, ring, data, 0)
        ring.advance()
    one(core, wanted, data, 0)
    wanted.advance()
    assert torch.equal(one(core, ring, data, 1), one(core, wanted, data, 1))
    assert not one(core, ring, data, 1).is_inference()
