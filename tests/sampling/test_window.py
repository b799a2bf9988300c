"""`av_window` and its cached forms: equal to each other, controls in step with frames, sound beside the picture."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from owl_wms.errors import ConfigError
from owl_wms.sampling import AVWindowSampler, CausalAVWindowSampler, CausalAVWindowSamplerNoCFG, Guidance
from tests.world import inputs, relative, tiny_core


class Recorder:
    """A model that answers zero and keeps what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __call__(self, x, t, mouse, btn, has_controls=None, kv_cache=None):
        self.calls.append((x.clone(), t.clone(), mouse.clone(), btn.clone(), has_controls))
        return torch.zeros_like(x)


@settings(max_examples=10, deadline=None)
@given(
    context=st.integers(1, 7),
    window=st.integers(1, 6),
    frames=st.integers(1, 4),
    steps=st.integers(1, 3),
    scale=st.sampled_from([1.0, 1.7, 0.0]),
    audio=st.booleans(),
)
def test_caching_the_window_changes_nothing(context, window, frames, steps, scale, audio) -> None:
    core = tiny_core(**({"model_id": "game_rft_audio"} if audio else {}))
    x, _, mouse, btn = inputs(2, context + frames)
    sound = torch.randn(2, context, 3) if audio else None
    results = [
        cls(steps, scale, window, frames)(
            core, x[:, :context], sound, mouse, btn, generator=torch.Generator().manual_seed(1)
        )
        for cls in (AVWindowSampler, CausalAVWindowSampler)
    ]
    assert relative(results[1].latents, results[0].latents) < 1e-3
    if audio:
        assert relative(results[1].latents_audio, results[0].latents_audio) < 1e-3


def test_no_cfg_is_scale_one() -> None:
    core = tiny_core()
    x, _, mouse, btn = inputs(1, 6)
    run = [
        sampler(core, x[:, :4], None, mouse, btn, generator=torch.Generator().manual_seed(1)).latents
        for sampler in (CausalAVWindowSamplerNoCFG(2, 1.8, 3, 2), CausalAVWindowSampler(2, 1.0, 3, 2))
    ]
    assert torch.equal(run[0], run[1])


@pytest.mark.parametrize("context", [2, 4, 9])
def test_frame_k_is_conditioned_on_the_controls_of_frame_k(context: int) -> None:
    """Whatever the window and the context are, the controls of a pass are those of the frames in it."""
    model, frames, window = Recorder(), 5, 4
    total = context + frames
    index = torch.arange(total, dtype=torch.float32)
    x = index[:context].view(1, -1, 1, 1, 1).expand(1, -1, 4, 2, 2).contiguous()
    mouse, btn = index.view(1, -1, 1).expand(1, -1, 2), index.view(1, -1, 1).expand(1, -1, 11)
    AVWindowSampler(1, 1.0, window, frames, noise_prev=0.0)(model, x, None, mouse, btn)
    assert len(model.calls) == frames
    for k, (seen, t, m, b, _) in enumerate(model.calls):
        wanted = list(range(max(0, context + k + 1 - window), context + k + 1))
        assert m[0, :, 0].tolist() == wanted
        assert b[0, :, 0].tolist() == wanted
        known = [f for f in wanted if f < context]
        assert seen[0, : len(known), 0, 0, 0].tolist() == known
        assert t[0].tolist() == [0.0] * (len(wanted) - 1) + [1.0]


def test_guidance_asks_with_and_without_controls() -> None:
    model = Recorder()
    x, _, mouse, btn = inputs(1, 3)
    AVWindowSampler(1, 1.5, 4, 1)(model, x[:, :2], None, mouse, btn)
    seen, _, m, _, shown = model.calls[0]
    assert shown.tolist() == [False, True]
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(m[0], m[1])


def test_sound_and_controls_come_back_in_step() -> None:
    core = tiny_core(model_id="game_rft_audio")
    x, _, mouse, btn = inputs(2, 3)
    result = AVWindowSampler(1, 1.3, 4, 6, only_return_generated=True)(
        core, x, torch.randn(2, 3, 3), mouse, btn, lambda v: v * 0 + 1, lambda a: a.repeat(1, 735, 1)[..., :2], 0.5, 2.0
    )
    assert result.latents.shape == (2, 6, 4, 2, 2)
    assert result.latents_audio.shape == (2, 6, 3)
    assert (result.mouse.shape, result.buttons.shape) == ((2, 6, 2), (2, 6, 11))
    assert result.video.mean() == 1
    assert result.audio.shape == (2, 6 * 735, 2)


def test_the_seed_decides_the_continued_controls_too() -> None:
    x, _, mouse, btn = inputs(8, 2)
    sampler = AVWindowSampler(1, 1.0, 2, 30)
    one, two, other = (
        sampler(Recorder(), x, None, mouse, btn, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(one.mouse, two.mouse)
    assert torch.equal(one.buttons, two.buttons)
    assert torch.equal(one.latents, two.latents)
    assert not torch.equal(one.mouse, other.mouse)


@pytest.mark.gpu
def test_a_gpus_generator_orders_controls_too() -> None:
    x, _, mouse, btn = (a.cuda() for a in inputs(4, 2))
    generators = [torch.Generator("cuda").manual_seed(3) for _ in range(2)]
    runs = [AVWindowSampler(1, 1.0, 2, 6)(Recorder(), x, None, mouse, btn, generator=g) for g in generators]
    assert torch.equal(runs[0].mouse, runs[1].mouse)


def test_what_cannot_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="window_length >= 1"):
        AVWindowSampler(window_length=0)
    x, _, mouse, btn = inputs(1, 4)
    with pytest.raises(ConfigError, match="causal"):
        CausalAVWindowSampler(1, 1.0, 3, 1)(tiny_core(causal=False), x, None, mouse, btn)
    assert AVWindowSampler(1, 1.0, 3, 1)(tiny_core(causal=False), x, None, mouse, btn).latents.shape[1] == 5


@pytest.mark.parametrize("kind", [AVWindowSampler, CausalAVWindowSampler, CausalAVWindowSamplerNoCFG])
def test_a_window_that_moves_on_is_none_of_a_model_with_sinks(kind: type[AVWindowSampler]) -> None:
    """It would take whatever frames the window begins with for those that it never forgets."""
    core, (x, _, mouse, btn) = tiny_core(sink_frames=2), inputs(1, 4)
    with pytest.raises(ConfigError, match=r"window of 5 frames would leave the first of 6, .* with av_caching"):
        kind(1, 1.0, 5, 2)(core, x, None, mouse, btn)
    assert kind(1, 1.0, 6, 2)(core, x, None, mouse, btn).latents.shape[1] == 6


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_guidance_that_is_not_finite_is_refused(scale: float) -> None:
    with pytest.raises(ConfigError, match="cfg_scale must be finite"):
        Guidance(model=None, scale=scale)
