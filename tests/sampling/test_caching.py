"""`av_caching` against the same generation with no cache: every step runs the whole sequence under the mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from owl_wms.errors import ConfigError
from owl_wms.sampling import (
    AVCachingOneStepSampler,
    AVCachingSampler,
    AVWindowSampler,
    SampleResult,
    get_sampler_cls,
    zlerp,
)
from tests.world import inputs, relative, tiny_core


@torch.no_grad()
def uncached(sampler: AVCachingSampler, core, x, mouse, btn, generator) -> torch.Tensor:
    """The definition: history noised once, each new frame denoised against all of it, guidance by dropping."""

    def run(history, times, frame, t, shown: bool):
        seq, ts = torch.cat([history, frame], 1), torch.cat([times, t], 1)
        mask = torch.full((x.shape[0],), shown)
        return core(seq, ts, mouse[:, : seq.shape[1]], btn[:, : seq.shape[1]], has_controls=mask)[:, -1:]

    history = zlerp(x, sampler.noise_prev, generator)
    times = torch.full(history.shape[:2], sampler.noise_prev)
    out = [x]
    for _ in range(sampler.num_frames):
        frame = torch.randn((x.shape[0], 1, *x.shape[2:]), generator=generator)
        t = torch.ones(x.shape[0], 1)
        for delta in sampler.deltas.tolist():
            u = run(history, times, frame, t, False)
            c = run(history, times, frame, t, True)
            frame, t = frame - delta * (u + sampler.cfg_scale * (c - u)), t - delta
        out.append(frame)
        history = torch.cat([history, zlerp(frame, sampler.noise_prev, generator)], 1)
        times = torch.full(history.shape[:2], sampler.noise_prev)
    return torch.cat(out, 1)


@settings(max_examples=12, deadline=None)
@given(
    context=st.integers(0, 9),
    frames=st.integers(1, 8),
    steps=st.integers(1, 4),
    scale=st.sampled_from([1.0, 1.3, 0.0]),
    noise=st.sampled_from([0.0, 0.2]),
    window=st.none() | st.integers(1, 12),
    custom=st.booleans(),
)
def test_cached_equals_uncached(context, frames, steps, scale, noise, window, custom) -> None:
    # With a window: a table of 12 positions for the cached run, a window mask and 40 positions for the reference.
    changes = {} if window is None else {"n_frames": 12}
    core = tiny_core(**changes)
    reference = tiny_core(global_window=window, local_window=min(3, window or 3))
    sampler = AVCachingSampler(steps, scale, frames, noise, window, [1.0, 0.6, 0.3] if custom else None)
    x, _, mouse, btn = inputs(2, context + frames)
    result = sampler(core, x[:, :context], mouse, btn, generator=torch.Generator().manual_seed(5))
    wanted = uncached(sampler, reference, x[:, :context], mouse, btn, torch.Generator().manual_seed(5))
    assert relative(result.latents, wanted) < 1e-3
    assert torch.equal(result.latents[:, :context], x[:, :context]), "the context comes back clean"


@pytest.mark.parametrize("context", [1, 4])
def test_a_model_with_sinks_sees_the_last_of_the_context_first(context: int) -> None:
    core = tiny_core(sink_frames=2)
    sampler = AVCachingSampler(2, 1.3, 5, 0.2)
    x, _, mouse, btn = inputs(2, context + 5)
    result = sampler(core, x[:, :context], mouse, btn, generator=torch.Generator().manual_seed(5))
    order = [*range(context)[-2:], *range(context + 5)]
    first = len(order) - context - 5
    shown = x[:, order[: context + first]], mouse[:, order], btn[:, order]
    wanted = uncached(sampler, core, *shown, torch.Generator().manual_seed(5))
    assert relative(result.latents, wanted[:, first:]) < 1e-3
    assert result.latents.shape[1] == context + 5
    long = [part[:, :1].expand(-1, context + 39, -1) for part in (mouse, btn)]
    with pytest.raises(ConfigError, match=rf"{context + first} \+ 39 frames exceed the model's n_frames = 40"):
        AVCachingSampler(1, 1.0, 39)(core, x[:, :context], *long)


def test_result_covers_the_same_frames_everywhere() -> None:
    core = tiny_core()
    x, _, mouse, btn = inputs(1, 9)
    seen, done = [], []

    def decode(latents):
        seen.append(latents)
        return latents.repeat(1, 1, 1, 4, 4)

    sampler = AVCachingSampler(1, 1.0, 5, only_return_generated=True)
    result = sampler(core, x[:, :4], mouse, btn, decode_fn=decode, image_scale=2.0, progress=lambda *n: done.append(n))
    assert isinstance(result, SampleResult)
    assert [a.shape[1] for a in (result.latents, result.video, result.mouse, result.buttons)] == [5, 5, 5, 5]
    assert torch.equal(result.mouse, mouse[:, 4:])
    assert torch.equal(seen[0], result.latents * 2)
    assert done == [(i, 5) for i in range(1, 6)]
    assert (result.audio, result.latents_audio) == (None, None)
    assert not result.latents.requires_grad


def test_short_controls_end_the_clip() -> None:
    core = tiny_core()
    x, _, mouse, btn = inputs(1, 6)
    assert AVCachingSampler(1, 1.0, 50)(core, x[:, :4], mouse, btn).latents.shape[1] == 6
    with pytest.raises(ValueError, match="cover the 7 context frames"):
        AVCachingSampler(1, 1.0, 50)(core, inputs(1, 7)[0], mouse, btn)


def test_controls_that_do_not_belong_together_are_refused() -> None:
    core = tiny_core()
    x, _, mouse, btn = inputs(2, 6)
    pairs = [(mouse, btn[:, :5]), (mouse[:, :4], btn), (mouse[:1], btn), (None, btn), (mouse, None), (mouse[0], btn[0])]
    for first, second in pairs:
        with pytest.raises(ValueError, match=r"must share \[b, n\], got") as caught:
            AVCachingSampler(1, 1.0, 2)(core, x[:, :4], first, second)
        for part in (first, second):
            assert str(None if part is None else list(part.shape)) in str(caught.value)
        with pytest.raises(ValueError, match=r"must share \[b, n\], got"):
            AVWindowSampler(1, 1.0, 2, 2)(core, x[:, :4], None, first, second)


@pytest.mark.parametrize(("clips", "players"), [(2, 1), (1, 2)])
def test_controls_of_another_batch_are_refused_and_named(clips: int, players: int) -> None:
    core = tiny_core(n_layers=1)
    x, _, mouse, btn = inputs(2, 6)
    context, controls = x[:clips, :4], (mouse[:players], btn[:players])
    message = f"must have the {clips} items of the latents, got {players}"
    with pytest.raises(ValueError, match=message):
        AVCachingSampler(1, 1.0, 2)(core, context, *controls)
    with pytest.raises(ValueError, match=message):
        AVWindowSampler(1, 1.0, 2, 2)(core, context, None, *controls)


def test_zero_controls_are_the_form_of_old() -> None:
    """One history, the conditional one; the unconditional branch sees zero mouse and buttons in the new frame only."""
    core = tiny_core()
    x, _, mouse, btn = inputs(1, 4)
    sampler = AVCachingSampler(1, 2.0, 1, 0.0, unconditional="zero_controls")
    generator = torch.Generator().manual_seed(3)
    got = sampler(core, x[:, :3], mouse, btn, generator=generator).latents[:, 3:]
    generator = torch.Generator().manual_seed(3)
    zlerp(x[:, :3], 0.0, generator)
    noise = torch.randn(x[:, :1].shape, generator=generator)
    sequence, t = torch.cat([x[:, :3], noise], 1), torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    zero_mouse, zero_btn = mouse.clone(), btn.clone()
    zero_mouse[:, 3], zero_btn[:, 3] = 0, 0
    with torch.no_grad():
        c, u = core(sequence, t, mouse, btn)[:, 3:], core(sequence, t, zero_mouse, zero_btn)[:, 3:]
    assert relative(got, noise - (u + 2.0 * (c - u))) < 1e-4
    other = AVCachingSampler(1, 2.0, 1, 0.0)(core, x[:, :3], mouse, btn, generator=torch.Generator().manual_seed(3))
    assert relative(other.latents[:, 3:], got) > 1e-2
    with pytest.raises(ConfigError, match="'dropped' or 'zero_controls'"):
        AVCachingSampler(1, 2.0, 1, unconditional="none")(core, x[:, :3], mouse, btn)


def test_what_cannot_run_is_refused() -> None:
    core = tiny_core(n_frames=6)
    x, _, mouse, btn = inputs(1, 9)
    with pytest.raises(ConfigError, match="set max_window"):
        AVCachingSampler(1, 1.0, 5)(core, x[:, :4], mouse, btn)
    with pytest.raises(ConfigError, match="causal"):
        AVCachingSampler(1, 1.0, 2)(tiny_core(causal=False), x[:, :4], mouse, btn)
    with pytest.raises(ConfigError, match="noise_prev"):
        AVCachingSampler(1, 1.0, 2, 1.5)


@pytest.mark.gpu
def test_compiled_decoding_is_the_same_clip_on_a_gpu() -> None:
    core = tiny_core().cuda()
    x, _, mouse, btn = (a.cuda() for a in inputs(2, 16))
    clips = [
        AVCachingSampler(2, 1.3, 12, max_window=8)(
            core, x[:, :4], mouse, btn, compiled, generator=torch.Generator("cuda").manual_seed(1)
        ).latents
        for compiled in (False, True)
    ]
    assert relative(clips[1], clips[0]) < 2e-2


def test_one_step_is_caching_with_one_step() -> None:
    core = tiny_core()
    x, _, mouse, btn = inputs(1, 9)
    args = (core, x[:, :3], mouse, btn)
    one = AVCachingOneStepSampler(num_frames=4)(*args, generator=torch.Generator().manual_seed(0))
    same = AVCachingSampler(1, 1.0, 4)(*args, generator=torch.Generator().manual_seed(0))
    assert torch.equal(one.latents, same.latents)
    assert get_sampler_cls("av_caching_one_step") is AVCachingOneStepSampler
    with pytest.raises(ConfigError, match="one step per frame, got n_steps 4"):
        AVCachingOneStepSampler(n_steps=4)
