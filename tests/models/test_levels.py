"""Noise levels that training draws: those that sampling uses are among them, and only learnable frames count.

Run: python -m pytest tests/models/test_levels.py
"""

from __future__ import annotations

import pytest
import torch

from owl_wms.configs.levels import LevelsConfig
from owl_wms.configs.strict import parse
from owl_wms.errors import ConfigError
from owl_wms.models.flow import clip_bounds, counted_mse, draw_levels, frame_times
from owl_wms.sampling import SAMPLERS, get_sampler_cls, get_sd3_euler

N = 12


def drawn(clips: int = 4000, frames: int = N, **changes: object) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return draw_levels(torch.zeros(clips, frames, 1), parse(LevelsConfig, changes))


@pytest.mark.parametrize("sampler_id", sorted(SAMPLERS))
@pytest.mark.parametrize("noise_prev", [0.05, 0.15, 0.2, 0.3])
def test_levels_that_sampling_uses_are_levels_that_training_draws(sampler_id: str, noise_prev: float) -> None:
    """A new frame at every level of the sampler's schedule, behind a history that is all at `noise_prev`."""
    steps = 1 if sampler_id == "av_caching_one_step" else 4
    sampler = get_sampler_cls(sampler_id)(n_steps=steps, noise_prev=noise_prev)
    levels, counted = drawn()
    length = (~counted).sum(dim=1)
    clips = length > 0  # a causal model sees behind the first frame that counts nothing but the history
    history, new = levels[clips, 0], levels[clips].gather(1, length[clips, None])[:, 0]
    at = 1.0
    for delta in sampler.deltas.tolist():
        near = (new - at).abs() < (1e-6 if at == 1.0 else 0.05)
        found = int((near & ((history - noise_prev).abs() < 0.05)).sum())
        assert found > 15, f"level {at} behind a history at {noise_prev}: {found} clips"
        at -= delta


@pytest.mark.parametrize("prefix", [0.0, 0.5])
def test_sinks_are_history_in_every_clip(prefix: float) -> None:
    torch.manual_seed(0)
    levels = parse(LevelsConfig, {"prefix": prefix, "context": [0.1, 0.2], "context_low_share": 0.0})
    history = torch.arange(-500, 500).clamp(-1, 5)
    times, counted = draw_levels(torch.zeros(1000, N, 1), levels, None, history, sinks=2)
    assert not counted[:, :2].any()
    assert ((times[:, :2] >= 0.1) & (times[:, :2] <= 0.2)).all()
    assert torch.equal(times[:, 0], times[:, 1])
    lengths = (~counted).sum(dim=1)
    assert (lengths[:500] == 2).float().mean() == pytest.approx(1 - prefix * (N - 3) / (N - 2), abs=0.05)
    assert torch.equal(lengths[501:], history[501:].clamp(min=2)), "what is known beforehand, and the sinks at least"
    torch.manual_seed(0)
    clean = draw_levels(torch.zeros(1000, N, 1), levels, None, history, sinks=2, sink_level=0.02)
    assert (clean[0][:, :2] == 0.02).all()
    assert torch.equal(clean[0][:, 2:], times[:, 2:])
    assert torch.equal(clean[1], counted)
    short = draw_levels(torch.zeros(9, 2, 1), levels, sinks=2)[1]
    assert short.sum(dim=1).tolist() == [1] * 9, "a frame remains to be learnt from"


def test_what_was_drawn_before_lacks_them() -> None:
    torch.manual_seed(0)
    levels = frame_times(torch.zeros(4000, N, 1))
    assert (levels == 1.0).sum() == 0
    assert ((levels[:, :-1] - 0.2).abs() < 0.05).all(dim=1).sum() == 0


def test_shares_are_as_configured() -> None:
    levels, counted = drawn(prefix=0.0, uniform=0.5, ones=0.25, mean=0.0, std=1e-3)
    assert counted.all()
    assert (levels == 1.0).float().mean() == pytest.approx(0.25, abs=0.01)
    assert ((levels - 0.5).abs() < 0.01).float().mean() == pytest.approx(0.25 + 0.5 * 0.02, abs=0.01)
    levels, counted = drawn(prefix=1.0, prefix_min=4, prefix_ones=0.3, context=[0.1, 0.2], context_low_share=0.5)
    lengths = (~counted).sum(dim=1)
    assert (lengths.min(), lengths.max()) == (4, N - 1)
    assert lengths.float().mean() == pytest.approx((4 + N - 1) / 2, abs=0.1)
    first = levels[:, 0]
    assert torch.isclose(first, torch.tensor(0.02)).float().mean() == pytest.approx(0.5, abs=0.03)
    assert ((first >= 0.1) & (first <= 0.2)).float().mean() == pytest.approx(0.5, abs=0.03)
    assert (levels[counted] == 1.0).float().mean() == pytest.approx(0.3, abs=0.02)
    # One level for a whole history, and frames that count are behind it.
    assert all((row[~flags] == row[0]).all() for row, flags in zip(levels[:50], counted[:50], strict=True))
    assert all(not flags[:4].any() and flags[-1] for flags in counted[:50])


def test_a_shift_draws_as_the_samplers_schedule_steps() -> None:
    levels, counted = drawn(prefix=1.0, prefix_ones=0.0, shift=3.0)
    quantiles = levels[counted].quantile(torch.tensor([0.25, 0.5, 0.75]))
    steps = get_sd3_euler(4)
    expected = torch.tensor([float(steps[k:].sum()) for k in (3, 2, 1)])
    torch.testing.assert_close(quantiles, expected, atol=0.01, rtol=0)


def test_every_clip_of_a_packed_sequence_has_a_history_of_its_own() -> None:
    doc = torch.tensor([[7, 7, 7, 7, 7, 2, 5, 5, 5, 5, 5, 5]]).expand(3000, -1)
    first, length = clip_bounds(doc.shape, doc, doc.device)
    assert first[0].tolist() == [0] * 5 + [5] + [6] * 6
    assert length[0].tolist() == [5] * 5 + [1] + [6] * 6
    torch.manual_seed(0)
    levels, counted = draw_levels(torch.zeros(3000, N, 1), LevelsConfig(prefix=1.0, prefix_min=2), doc)
    assert counted[:, 5].all(), "a clip of one frame has no history"
    assert not counted[:, [0, 1, 6, 7]].any()
    assert counted[:, [4, 11]].all()
    assert (levels[:, 0] != levels[:, 6]).float().mean() > 0.9


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_short_clips_keep_a_frame_to_learn_from(frames: int) -> None:
    levels, counted = drawn(200, frames, prefix=1.0, prefix_min=24)
    assert counted[:, -1].all()
    assert counted.sum() == 200
    assert levels.isfinite().all()


def test_frames_that_do_not_count_have_no_gradient() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    counted = torch.tensor([[False, True, True], [True, False, True]])
    counted_mse(x, torch.zeros_like(x), counted).backward()
    assert x.grad is not None
    assert (x.grad[~counted] == 0).all()
    assert (x.grad[counted] != 0).all()
    whole = counted_mse(x, torch.zeros_like(x), torch.ones_like(counted))
    torch.testing.assert_close(whole, x.square().mean())


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"ones": 1.5}, "ones"),
        ({"uniform": 0.8, "ones": 0.4}, "ones"),
        ({"context": [0.3, 0.1]}, "context"),
        ({"shift": 0.0}, "shift"),
        ({"std": 0.0}, "std"),
        ({"prefix_min": 0}, "prefix_min"),
    ],
)
def test_levels_that_cannot_be(changes: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(LevelsConfig, changes)
    assert caught.value.key == key
