"""The frame loop: fixed shapes give what exact ones give, for ever, in constant memory; captured equals eager."""

from __future__ import annotations

import resource
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from owl_wms.sampling import (
    SAMPLERS,
    AVCachingSampler,
    AVWindowSampler,
    CausalAVWindowSampler,
    Guidance,
    get_sd3_euler,
    zlerp,
)
from owl_wms.sampling import captured as captured_module
from owl_wms.sampling.captured import CALLS_BEFORE, Captured, may_capture
from owl_wms.sampling.frames import FrameLoop
from tests.world import inputs, relative, tiny_core


def play(loop: FrameLoop, frames: int, batch: int = 1, context: int = 3) -> Tensor:
    x, _, mouse, btn = inputs(batch, context + frames)
    generator = torch.Generator().manual_seed(2)
    loop.begin(x[:, :context], mouse, btn, generator)
    out = []
    for frame in range(context, context + frames):
        controls = mouse[:, frame : frame + 1], btn[:, frame : frame + 1]
        out.append(loop.denoise(*controls, generator))
        loop.remember(out[-1], *controls, generator)
    return torch.cat(out, 1)


def make(
    scale: float,
    unconditional: str = "dropped",
    fixed: bool | None = None,
    window: int = 6,
    sinks: int = 0,
    sink_noise: float | None = None,
) -> FrameLoop:
    core = tiny_core(n_frames=12, sink_frames=sinks, sink_noise=sink_noise)
    guidance = Guidance(model=core, scale=scale, unconditional=unconditional)  # type: ignore[arg-type]
    return FrameLoop(guidance, deltas=get_sd3_euler(2), noise_prev=0.2, max_window=window, fixed=fixed)


GUIDED = [(1.0, "dropped"), (1.5, "dropped"), (1.5, "zero_controls"), (0.0, "dropped")]


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize(("scale", "unconditional"), GUIDED)
@torch.no_grad()
def test_fixed_shapes_with_masks_give_what_exact_ones_give(scale: float, unconditional: str, sinks: int) -> None:
    exact, fixed = (make(scale, unconditional, fixed, sinks=sinks) for fixed in (None, True))
    wanted, got = play(exact, 20), play(fixed, 20)
    assert relative(got, wanted) < 1e-3
    assert torch.equal(play(fixed, 20), got), "a second beginning is not touched by the first"


@pytest.mark.parametrize("sink_noise", [None, 0.02])
@torch.no_grad()
def test_the_last_true_frames_are_never_forgotten(sink_noise: float | None) -> None:
    """They are shown first, with their controls: as a loop that begins with them, and a model that marks them."""
    x, _, mouse, btn = inputs(1, 5)
    loops = [make(1.0, sinks=2, sink_noise=sink_noise) for _ in range(2)]
    order = [3, 4, 0, 1, 2, 3, 4]
    seen = [part[:, order] for part in (x, mouse, btn)]
    loops[0].begin(x, mouse, btn, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    noisy, levels = zlerp(seen[0], 0.2, generator), [0.2] * 7
    if sink_noise is not None:
        noisy[:, :2], levels[:2] = zlerp(seen[0][:, :2], sink_noise, generator), [sink_noise] * 2
    loops[1]._like = x[:, :1]
    for k, level in enumerate(levels):
        now, *controls = (part[:, k : k + 1] for part in (noisy, *seen[1:]))
        loops[1]._keep(loops[1]._store, now, level, *controls)
    frames = [loop.denoise(mouse[:, :1], btn[:, :1], torch.Generator().manual_seed(4)) for loop in loops]
    assert torch.equal(*frames)
    loops[0].begin(x[:, :1], mouse, btn)  # of one frame only: it is shown twice
    assert len(loops[0].ring) == 2


@torch.no_grad()
def test_steps_of_order_two_use_the_velocity_before() -> None:
    core, (x, _, mouse, btn) = tiny_core(n_frames=12), inputs(1, 5)
    deltas = get_sd3_euler(3)
    settings = {"deltas": deltas, "noise_prev": 0.2, "max_window": 6}
    loop, euler = FrameLoop(Guidance(model=core), order=2, **settings), FrameLoop(Guidance(model=core), **settings)
    for each in (loop, euler):
        each.begin(x, mouse, btn, torch.Generator().manual_seed(3))
    got = loop.denoise(mouse[:, :1], btn[:, :1], torch.Generator().manual_seed(4))
    assert relative(got, euler.denoise(mouse[:, :1], btn[:, :1], torch.Generator().manual_seed(4))) > 1e-3
    frame, level, before = torch.randn(1, 1, 4, 2, 2, generator=torch.Generator().manual_seed(4)), 1.0, None
    for delta, shorter in zip(deltas.tolist(), [None, *deltas.tolist()], strict=False):
        v = core(frame, torch.full((1, 1), level), mouse[:, :1], btn[:, :1], kv_cache=loop.ring)
        used = v if before is None else v + delta / shorter / 2 * (v - before)
        frame, level, before = frame - delta * used, level - delta, v
    torch.testing.assert_close(got, frame)


@torch.no_grad()
def test_finished_frames_stay_within_the_models_limits() -> None:
    core, free = tiny_core(n_frames=12, frame_limits=True), tiny_core(n_frames=12)
    core.limits.fit(0.1 * torch.randn(2000, 4, 2, 2, generator=torch.Generator().manual_seed(9)))
    settings = {"deltas": get_sd3_euler(2), "noise_prev": 0.2, "max_window": 6}
    limited, usual = (FrameLoop(Guidance(model=model), **settings) for model in (core, free))
    frames, others = play(limited, 3), play(usual, 3)
    assert torch.equal(frames[:, :1], core.limits(others[:, :1]))
    assert not torch.equal(frames[:, 1:], core.limits(others[:, 1:])), "they go on behind limited frames"
    assert frames.abs().max() < 0.5 * others.abs().max()
    x, _, mouse, btn = inputs(1, 5)
    for sampler in (AVWindowSampler, CausalAVWindowSampler):
        made = [
            sampler(2, 1.0, 6, 1)(model, x[:, :4], None, mouse, btn, generator=torch.Generator().manual_seed(1)).latents
            for model in (core, free)
        ]
        torch.testing.assert_close(made[0][:, 4:], core.limits(made[1][:, 4:]))
        assert torch.equal(made[0][:, :4], x[:, :4]), "the context is as it was given"


@torch.no_grad()
def test_a_frame_is_the_same_when_it_is_asked_for_twice() -> None:
    """What a capture rests on: the functions write to the same places, with the same values."""
    loop = make(1.3, sinks=1)
    play(loop, 9)
    _, _, mouse, btn = inputs(1, 1)
    frames = [loop.denoise(mouse, btn, torch.Generator().manual_seed(1)) for _ in range(3)]
    assert torch.equal(frames[0], frames[2])


@torch.no_grad()
def run_long(frames: int) -> None:
    core = tiny_core(n_frames=12, n_layers=2, d_model=32, control_hidden=8)
    loop = FrameLoop(Guidance(model=core, scale=1.0), deltas=get_sd3_euler(1), noise_prev=0.3, max_window=6)
    x, _, mouse, btn = inputs(1, 3)
    loop.begin(x, mouse, btn)
    size, sizes = loop.ring.nbytes, []
    for frame in range(frames):
        latent = loop.denoise(mouse[:, :1], btn[:, :1])
        loop.remember(latent, mouse[:, :1], btn[:, :1])
        if frame % (frames // 10) == frames // 20:
            sizes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert latent.isfinite().all()
    assert (loop.ring.nbytes, len(loop.ring)) == (size, 5)
    assert int(loop.ring._position) == frames + 3
    assert sizes[-1] - sizes[1] < 4096, f"KiB at each tenth: {sizes}"


def test_memory_stays_flat() -> None:
    run_long(1500)


@pytest.mark.slow
def test_memory_stays_flat_for_20000_frames() -> None:
    run_long(20_000)


@pytest.mark.parametrize("sinks", [0, 2])
def test_a_compiled_model_is_traced_once_for_filling_and_once_for_full(sinks: int) -> None:
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    core = tiny_core(n_frames=12, sink_frames=sinks)
    torch._dynamo.reset()
    compiled = torch.compile(core, backend=backend, fullgraph=True, dynamic=False)
    loops = [
        FrameLoop(Guidance(model=model, scale=1.5), deltas=get_sd3_euler(2), noise_prev=0.2, max_window=6, fixed=True)
        for model in (core, compiled)
    ]
    with torch.no_grad():
        clips = [play(loop, 25) for loop in loops]
    assert relative(clips[1], clips[0]) < 1e-3
    assert len(traced) == 3, "the first pass also makes the storage"


@torch.no_grad()
def test_a_context_may_be_stored_by_another_form_of_the_model() -> None:
    calls: list[int] = []

    class Counted(nn.Module):
        def __init__(self, core) -> None:
            super().__init__()
            self.core, self.config = core, core.config

        def forward(self, *args, **kwargs):
            calls.append(1)
            return self.core(*args, **kwargs)

    core = tiny_core(n_frames=12)
    plain, counted = Guidance(model=core), Guidance(model=Counted(core))
    options = {"deltas": get_sd3_euler(2), "noise_prev": 0.2, "max_window": 6}
    wanted = play(FrameLoop(plain, **options), 5)
    assert torch.equal(play(FrameLoop(counted, **options, prefill=plain), 5), wanted)
    assert len(calls) == 5 * 3, "two steps and a store per frame; none for the context"


class FakeGraph:
    """Counts as a capture and calls the function: what `Captured` does around one can be seen on a CPU."""

    def __init__(self, function, inputs) -> None:
        self.function = function

    def __call__(self, inputs):
        return self.function(*inputs)


def test_every_shape_and_key_has_its_own_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(
        captured_module, "_Graph", lambda f, inputs: made.append(inputs[0].shape) or FakeGraph(f, inputs)
    )
    step = Captured(lambda x: (x * 2,), allowed=True)
    for key, size in [("a", 1)] * 4 + [("b", 1)] * 4 + [("a", 2)] * 2:
        (out,) = step(key, torch.ones(size))
        assert out.tolist() == [2.0] * size
    assert made == [(1,), (1,)]
    assert step.replayed == 2 * (4 - CALLS_BEFORE)


def test_a_capture_that_fails_is_told_once_and_the_function_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    step = Captured(lambda x: (x + 1,), allowed=True)  # on a CPU every capture fails
    with caplog.at_level("WARNING"):
        assert [int(step(None, torch.tensor(n))[0]) for n in range(6)] == [1, 2, 3, 4, 5, 6]
    assert len(caplog.records) == 1
    assert "without a CUDA graph" in caplog.text
    assert (step.replayed, bool(step.reason)) == (0, True)


def test_only_plain_models_on_a_gpu_are_captured() -> None:
    assert not may_capture(tiny_core())
    assert not may_capture(lambda x: x)
    assert not may_capture(nn.Identity())


def sampled(name: str, core: nn.Module, clip: tuple[Tensor, ...], frames: int) -> Tensor:
    """Latents of `name`: 4 frames of context and `frames` more, over a window of 8, with guidance."""
    x, mouse, btn = clip
    caching = issubclass(SAMPLERS[name], AVCachingSampler)
    steps = 1 if name == "av_caching_one_step" else 2
    options: dict[str, Any] = {"max_window": 8} if caching else {"window_length": 8}
    sampler = SAMPLERS[name](n_steps=steps, cfg_scale=1.3, num_frames=frames, **options)
    audio = () if caching else (None,)
    generator = torch.Generator(x.device).manual_seed(1)
    latents: Tensor = sampler(core, x[:, :4], *audio, mouse, btn, generator=generator).latents  # type: ignore[arg-type]
    return latents.float()


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_sampler_makes_the_same_frames_from_the_same_seed(name: str) -> None:
    x, _, mouse, btn = inputs(1, 10)
    core = tiny_core(n_frames=64)
    clips = [sampled(name, core, (x, mouse, btn), 6) for _ in range(2)]
    assert clips[0].shape[1] == 10
    assert torch.equal(*clips)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "sinks"), [*((name, 0) for name in sorted(SAMPLERS)), ("av_caching", 2)])
def test_captured_sampling_equals_eager(
    name: str, sinks: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = tiny_core(n_frames=64, sink_frames=sinks).cuda().to(dtype)
    x, _, mouse, btn = (a.cuda().to(dtype) for a in inputs(2, 44))
    made: list[Captured] = []
    original = Captured.__init__

    def noted(self, function, *, allowed: bool) -> None:
        original(self, function, allowed=allowed and len(clips) == 1)
        made.append(self)

    monkeypatch.setattr(Captured, "__init__", noted)
    clips, replayed = [], []
    for _ in range(2):  # the second time captured
        made.clear()
        clips.append(sampled(name, core, (x, mouse, btn), 40))
        replayed.append(sum(step.replayed for step in made))
        assert not any(step.reason for step in made)
    assert replayed[0] == 0
    assert replayed[1] > 20
    assert relative(clips[1], clips[0]) < (1e-3 if dtype == torch.float32 else 0.1)


@pytest.mark.gpu
def test_an_unbounded_clip_is_captured_in_few_lengths() -> None:
    core = tiny_core(n_frames=200).cuda()
    x, _, mouse, btn = (a.cuda() for a in inputs(1, 150))
    clips = [
        AVCachingSampler(2, 1.0, 146)(model, x[:, :4], mouse, btn, generator=torch.Generator("cuda").manual_seed(1))
        for model in (core, _Hooked(core))
    ]
    assert relative(clips[0].latents, clips[1].latents) < 1e-3


class _Hooked(nn.Module):
    """The same model with a hook, which is called for every pass: so it is never captured."""

    def __init__(self, core) -> None:
        super().__init__()
        self.core, self.config = core, core.config
        self.register_forward_hook(lambda *_: None)

    def forward(self, *args, **kwargs):
        return self.core(*args, **kwargs)
