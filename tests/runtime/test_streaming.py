"""A stream: equal to the clip, forked, reset, batched; what fails leaves it where it was."""

from __future__ import annotations

import copy
import dataclasses
import gc
import logging
import pickle
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from owl_wms.configs import TAEHVConfig
from owl_wms.errors import ConfigError, FastPathError, LatentShapeError, NonFiniteError
from owl_wms.request import Request
from owl_wms.runtime import StreamDecode
from owl_wms.runtime.programs import Loaded, Progress
from owl_wms.settings import TensorRTConfig
from owl_wms.state import State
from owl_wms.trt.run import step_graph
from owl_wms.vae import build_decoder, taehv
from owl_wms.vae.taehv import TAEHVDecoder
from tests.trt.graph_stand_in import Replayed


def make(form: str = "normal") -> TAEHVDecoder:
    torch.manual_seed(1)
    decoder = build_decoder(TAEHVConfig(model_id="taehv", latent_channels=4, form=form)).eval().requires_grad_(False)  # type: ignore[arg-type]
    assert isinstance(decoder, TAEHVDecoder)
    with torch.no_grad():
        decoder[22].weight.mul_(4)  # frames that reach across [0, 1]
        decoder[22].bias.fill_(0.5)
    return decoder


DECODER = make()


def clip(n: int, streams: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(streams, n, 4, 3, 2, generator=torch.Generator().manual_seed(seed))


def near(got: Tensor, wanted: Tensor) -> bool:
    return got.shape == wanted.shape and bool((got - wanted).abs().max() < 1e-5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(["step", "steps", "fork", "reset"]), min_size=1, max_size=7), st.integers(1, 2))
def test_any_course_of_a_stream_is_a_clip(course: list[str], streams: int) -> None:
    """Every stream alive, the original and its forks, has decoded the clip of its own latents since its own reset."""
    given_to: list[tuple[StreamDecode, list[Tensor], list[Tensor]]] = [(StreamDecode(DECODER), [], [])]
    for turn, what in enumerate(course):
        stream, latents, frames = given_to[turn % len(given_to)]
        if what == "fork":
            given_to.append((stream.fork(), list(latents), list(frames)))
        elif what == "reset":
            stream.reset()
            latents.clear()
            frames.clear()
        else:
            more = clip(1 if what == "step" else 2, streams, seed=turn)
            latents.append(more)
            frames.append(stream.step(more[:, 0] if what == "step" else more))
    for _, latents, frames in given_to:
        if latents:
            assert near(torch.cat(frames, 1), DECODER(torch.cat(latents, 1)))


def test_one_stream_of_a_batch_begins_anew() -> None:
    stream, latents = StreamDecode(DECODER), clip(4, streams=2)
    stream.step(latents[:, :2])
    stream.reset(1)
    with pytest.raises(ConfigError, match="call step_each"):
        stream.step(latents[:, 2])
    first, second = stream.step_each(latents[:, 2])
    assert (len(first), len(second)) == (4, 1)
    both = stream.step(latents[:, 3])
    whole, begun = DECODER(latents[:1])[0], DECODER(latents[1:, 2:])[0]
    assert near(torch.cat([first, both[0]]), whole[-8:])
    assert near(torch.cat([second, both[1]]), begun)
    with pytest.raises(ConfigError, match="no stream 2; there are 2"):
        stream.reset(2)


def test_a_failed_step_leaves_the_stream_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, latents = StreamDecode(DECODER), clip(3)
    frames = [stream.step(latents[:, 0])]
    original = TAEHVDecoder.step

    def lost(self: TAEHVDecoder, latent: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        original(self, latent, state)  # the new state is there when it fails
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr(TAEHVDecoder, "step", lost)
        with pytest.raises(RuntimeError, match="device lost"):
            stream.step(latents[:, 1])
    with pytest.raises(LatentShapeError, match=r"streams \[1, 4, 3, 2\]; call reset\(\)"):
        stream.step(torch.zeros(1, 4, 3, 3))
    with pytest.raises(LatentShapeError, match="b and n of at least 1"):
        stream.step(latents[:, :0])
    frames += [stream.step(latents[:, 1]), stream.step(latents[:, 2])]
    assert near(torch.cat(frames, 1), DECODER(latents))


def test_new_weights_begin_a_new_video(caplog: pytest.LogCaptureFixture) -> None:
    decoder = make()
    stream, latents = StreamDecode(decoder), clip(3)
    stream.step(latents[:, :2])
    with torch.no_grad():
        decoder[1].weight.mul_(1.5)
    with caplog.at_level(logging.WARNING, logger="owl_wms.runtime"):
        frames = [stream.step(latents[:, 1]), stream.step(latents[:, 2])]
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    assert "begin anew" in caplog.records[0].message
    assert near(torch.cat(frames, 1), decoder(latents[:, 1:]))


class Odd(nn.Parameter):
    """A weight whose changes would not show, like those of quantising libraries."""


def test_a_stream_goes_on_where_changes_of_weights_do_not_show(caplog: pytest.LogCaptureFixture) -> None:
    decoder, programs, latents = make(), Programs(), clip(4)
    decoder[1].weight = Odd(decoder[1].weight.data, requires_grad=False)
    stream = StreamDecode(decoder, settings=SETTINGS, toolchain=programs)
    frames = [stream.step(latents[:, :2]), stream.fork().step(latents[:, 2])]
    assert near(torch.cat(frames, 1), decoder(latents[:, :3]))
    assert "begin anew" not in caplog.text
    assert not programs.obtained
    assert "no plain tensor" in stream.stats().programs[0]["reason"]
    decoder[1].weight = nn.Parameter(decoder[1].weight.data * 2, requires_grad=False)
    assert near(stream.step(latents[:, 3]), decoder(latents[:, 3:]))


def test_dtype_and_device_are_the_decoders_and_the_latents() -> None:
    decoder = make().to(torch.bfloat16)
    frames = StreamDecode(decoder).step(clip(2).double())
    assert frames.dtype == torch.bfloat16
    assert frames.shape == (1, 5, 3, 24, 16)
    wanted = DECODER(clip(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert near(StreamDecode(DECODER).step(clip(2)), wanted)


def test_threads_take_turns() -> None:
    stream, latents = StreamDecode(DECODER), clip(1)
    done: list[Any] = []
    threads = [threading.Thread(target=lambda: done.append(stream.step(latents).shape[1])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [1, 4, 4, 4]


class Programs:
    """A toolchain whose program is the step itself in another dtype, or what `fault` makes of it."""

    name = "stand-in"
    background = False

    def __init__(self, fault: Callable[[int, tuple[Tensor, ...]], Any] = lambda call, answered: answered) -> None:
        self.fault, self.calls, self.obtained = fault, 0, list[Request]()
        self.dtype = torch.float64

    def obtain(
        self, decoder: nn.Module, request: Request, settings: TensorRTConfig, progress: Progress | None
    ) -> Loaded:
        self.obtained.append(request)
        step = copy.deepcopy(decoder).to(self.dtype)

        def program(z: Tensor, *state: Tensor) -> Any:
            self.calls += 1
            return self.fault(self.calls, step(z.to(self.dtype), *(tensor.to(self.dtype) for tensor in state)))

        return Loaded(
            program=program,
            built=True,
            name="x_1",
            not_kept="",
            report={},
            file_bytes=0,
            build_seconds=0,
            load_seconds=0,
        )


class Graphed(Programs):
    """The program keeps the state in its own buffers, as a captured one does."""

    def obtain(
        self, decoder: nn.Module, request: Request, settings: TensorRTConfig, progress: Progress | None
    ) -> Loaded:
        loaded = super().obtain(decoder, request, settings, progress)
        example = [torch.zeros(shape, dtype=self.dtype) for shape in (request.input_shape, *request.state)]
        with mock.patch.object(step_graph, "CapturedGraph", Replayed):
            graphed = step_graph.GraphedStep(loaded.program, *example)
        self.calls = 0
        return dataclasses.replace(loaded, program=graphed)


SETTINGS = TensorRTConfig()
COURSE = ("again", "fork", "reset", "row")


@pytest.mark.usefixtures("narrow")
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from(["step", "step", "again", "fork", "reset", "row"]), st.integers(0, 4)), max_size=8
    )
)
def test_any_course_of_streams_that_share_a_captured_program(course: list[tuple[str, int]]) -> None:
    """Two videos in each batch; every stream and fork has decoded the latents since its own beginning, row by row.

    `again`: a step from the state before the last one, which somebody has held; the stream itself does not move.
    """
    decoder = make()
    stream = StreamDecode(decoder, settings=SETTINGS, toolchain=Graphed(), check="always")
    rows: list[tuple[StreamDecode, list[list[Tensor]], list[State]]] = [(stream, [[], []], [])]
    for turn, (what, which) in enumerate(course):
        stream, since, held = rows[which % len(rows)]
        if what == "fork":
            rows.append((stream.fork(), [list(row) for row in since], list(held)))
        elif what == "reset":
            stream.reset()
            since[:] = [], []
        elif what == "row" and since[1]:
            stream.reset(1)
            since[1] = []
        elif what == "again" and min(map(len, since)) > 1:
            frames, _ = stream._steps.run(since_last(since), held[-1])
            for row, decoded in zip(since, frames, strict=True):
                assert near(decoded[-4:], decoder(torch.stack(row, 1))[0, -4:])
        else:
            latent = clip(1, streams=2, seed=turn)[:, 0]
            held.append(stream._state)
            decoded_rows = stream.step_each(latent)
            for row, one, frames in zip(since, latent, decoded_rows, strict=True):
                row.append(one[None])
                assert near(frames, decoder(torch.stack(row, 1))[0, -len(frames) :])
    assert stream.stats().chunks_pytorch == stream.stats().fallbacks == 0


def since_last(since: list[list[Tensor]]) -> Tensor:
    """The newest latent of every row."""
    return torch.cat([row[-1] for row in since])


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("kind", ["raises", "nan"])
def test_pytorch_takes_over_from_the_buffers_of_a_captured_program(kind: str) -> None:
    """The step that fails has written the next state; PyTorch and a fork go on from the one before."""
    latents, others = clip(6), clip(2, seed=1)
    decoder, programs = make(), Graphed()

    def fault(call: int, answered: tuple[Tensor, ...]) -> Any:
        if not armed:
            return answered
        if kind == "raises":
            raise RuntimeError("device lost")
        return nan_in_the_state(answered)

    armed: list[bool] = []
    programs.fault = fault
    stream = StreamDecode(decoder, settings=SETTINGS, toolchain=programs, check="always")
    first = decoded(stream, latents[:, :3])
    fork = stream.fork()
    armed.append(True)
    rest = decoded(stream, latents[:, 3:])
    assert near(torch.cat([first, rest], 1), decoder(latents))
    assert stream.stats().fallbacks == 3
    assert near(decoded(fork, others), decoder(torch.cat([latents[:, :3], others], 1))[:, -8:])


def decoded(stream: StreamDecode, latents: Tensor) -> Tensor:
    return torch.cat([stream.step(latent) for latent in latents.unbind(1)], 1)


def test_a_program_decodes_and_forks_share_it() -> None:
    programs, latents = Programs(), clip(4, streams=2)
    stream = StreamDecode(DECODER, settings=SETTINGS, toolchain=programs)
    first = decoded(stream, latents[:, :2])
    fork = stream.fork()
    rest, again = decoded(stream, latents[:, 2:]), decoded(fork, latents[:, 2:])
    assert near(torch.cat([first, rest], 1), DECODER(latents))
    assert torch.equal(rest, again)
    assert rest.dtype == torch.float32
    (request,) = programs.obtained
    assert request.input_shape == (2, 4, 3, 2)
    assert request.state == tuple(spec.shape for spec in DECODER.state_specs((2, 4, 3, 2)))
    stats = fork.stats()
    assert (stats.decodes, stats.chunks_program, stats.chunks_pytorch, stats.builds) == (6, 6, 0, 1)
    stream.reset()
    stream.step(clip(1, streams=1))
    assert [asked.input_shape[0] for asked in programs.obtained] == [2, 1]


def nan_in_the_state(answered: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    broken = answered[5].clone()
    broken[0, 0, 0, 0] = torch.nan
    return (*answered[:5], broken, *answered[6:])


@pytest.mark.parametrize("kind", ["raises", "nan", "other state"])
def test_pytorch_takes_over_in_mid_stream(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """From step 3 on the program fails: that very step is PyTorch's, from a state that nobody has touched."""

    def fault(call: int, answered: tuple[Tensor, ...]) -> Any:
        if call < 3:
            return answered
        if kind == "raises":
            raise RuntimeError("device lost")
        return nan_in_the_state(answered) if kind == "nan" else 7

    programs, latents = Programs(fault), clip(7)
    stream = StreamDecode(DECODER, settings=SETTINGS, toolchain=programs, check="always")
    with caplog.at_level(logging.WARNING, logger="owl_wms.runtime"):
        frames = decoded(stream, latents)
    assert near(frames, DECODER(latents))
    stats = stream.stats()
    assert (stats.chunks_program, stats.chunks_pytorch, stats.fallbacks) == (2, 5, 3)
    assert programs.calls == 5, "after three failures the program is left alone"
    assert stats.backend == "pytorch"
    assert "switched off after 3 failed runs" in stats.reason
    assert sum("PyTorch decodes instead" in record.message for record in caplog.records) == 1


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoders of a few thousand weights, where a step takes a millisecond."""
    monkeypatch.setattr(taehv, "WIDTHS", dict.fromkeys(taehv.WIDTHS, (16, 8, 8, 8)))


def steps_by_pytorch(decoder: TAEHVDecoder, state: State, latents: Tensor) -> Tensor:
    parts, state = [], tuple(tensor.float() for tensor in state)
    for latent in latents.unbind(1):
        frames, state = decoder.step(latent, state)
        parts.append(frames)
    return torch.cat(parts, 1)


@pytest.mark.usefixtures("narrow")
def test_a_program_lost_at_step_500_leaves_streams_and_forks_to_pytorch(caplog: pytest.LogCaptureFixture) -> None:
    """From that very step on, two streams in one batch and a fork of them are PyTorch's, bit for bit."""
    lost_at, after = 500, 6

    def fault(call: int, answered: tuple[Tensor, ...]) -> Any:
        if call >= lost_at:
            raise RuntimeError("device lost")
        return answered

    decoder, programs = make(), Programs(fault)
    latents, others = clip(lost_at + after, streams=2), clip(after, streams=2, seed=1)
    stream = StreamDecode(decoder, settings=SETTINGS, toolchain=programs)
    first = torch.cat([stream.step(latent) for latent in latents[:, : lost_at - 1].unbind(1)], 1)
    assert stream.stats().chunks_program == lost_at - 1
    assert near(first[:, -8:], decoder(latents[:, : lost_at - 1])[:, -8:])
    state, fork = stream._state, stream.fork()
    with caplog.at_level(logging.WARNING, logger="owl_wms.runtime"):
        rest = decoded(stream, latents[:, lost_at - 1 :])
    assert torch.equal(rest, steps_by_pytorch(decoder, state, latents[:, lost_at - 1 :]))
    assert torch.equal(decoded(fork, others), steps_by_pytorch(decoder, state, others))
    assert torch.equal(stream.fork().step(others[:, 0]), steps_by_pytorch(decoder, stream._state, others[:, :1]))
    stats = stream.stats()
    assert (stats.chunks_program, stats.fallbacks, stats.backend) == (lost_at - 1, 3, "pytorch")
    assert "device lost" in caplog.text


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("steps", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_error_and_memory_stay_flat(steps: int) -> None:
    """A bf16 program against fp32 PyTorch: a state is worth nothing if what it carries grows."""
    decoder, programs = make(), Programs()
    programs.dtype = torch.bfloat16
    by_program = StreamDecode(decoder, settings=SETTINGS, toolchain=programs)
    exact = StreamDecode(decoder, settings=TensorRTConfig(enabled=False))
    latents = clip(64)
    errors: list[float] = []
    tensors: list[int] = []
    for i in range(steps):
        got, wanted = (stream.step(latents[:, i % 64]) for stream in (by_program, exact))
        errors.append(float((got - wanted).norm() / wanted.norm()))
        del got, wanted
        if i in (149, steps - 1):
            gc.collect()
            tensors.append(sum(issubclass(type(each), Tensor) for each in gc.get_objects()))
    begin, end = (sum(errors[at : at + 64]) / 64 for at in (64, steps - 64))  # the same latents
    assert 1e-5 < begin < 0.05
    assert end <= 1.05 * begin
    assert max(errors[64:]) <= 1.5 * max(errors[:64])
    assert tensors[1] <= tensors[0]
    assert by_program.stats().chunks_program == steps


def test_strict_raises_and_keeps_the_state() -> None:
    def fault(call: int, answered: tuple[Tensor, ...]) -> Any:
        if call == 2:
            raise RuntimeError("device lost")
        return answered

    latents = clip(3)
    stream = StreamDecode(DECODER, settings=SETTINGS, toolchain=Programs(fault), strict=True)
    frames = [stream.step(latents[:, 0])]
    with pytest.raises(FastPathError, match="device lost"):
        stream.step(latents[:, 1])
    frames += [stream.step(latents[:, 1]), stream.step(latents[:, 2])]
    assert near(torch.cat(frames, 1), DECODER(latents))


def test_new_weights_drop_the_program() -> None:
    decoder, programs, latents = make(), Programs(), clip(2)
    stream = StreamDecode(decoder, settings=SETTINGS, toolchain=programs)
    stream.step(latents[:, 0])
    with torch.no_grad():
        decoder[1].weight.mul_(1.5)
    assert near(stream.step(latents[:, 1]), decoder(latents[:, 1:]))
    assert len(programs.obtained) == 2


def test_switched_off_and_without_a_gpu() -> None:
    off = StreamDecode(DECODER, settings=TensorRTConfig(enabled=False), toolchain=Programs())
    assert near(off.step(clip(2)), DECODER(clip(2)))
    assert off.stats().reason == "compiled programs are switched off by the settings (enabled=False)"
    plain = StreamDecode(DECODER, settings=SETTINGS)
    plain.step(clip(1))
    assert plain.stats().backend == "pytorch"
    assert "no CUDA device" in plain.stats().reason
    with pytest.raises(ConfigError, match="check must be one of"):
        StreamDecode(DECODER, check="never")


def test_a_decoder_without_a_state_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear has none; decode it with"):
        StreamDecode(torch.nn.Linear(1, 1))


def test_frames_that_are_not_finite_are_an_error_where_asked() -> None:
    decoder = make()
    with torch.no_grad():
        decoder[22].bias.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="not finite"):
        StreamDecode(decoder, check="error").step(clip(1))


@pytest.mark.parametrize("enabled", [True, False])
def test_frames_that_are_not_finite_are_told_once(caplog: pytest.LogCaptureFixture, enabled: bool) -> None:
    decoder = make()
    with torch.no_grad():
        decoder[22].bias.fill_(torch.nan)
    stream = StreamDecode(decoder, settings=TensorRTConfig(enabled=enabled), toolchain=Programs())
    for _ in range(3):
        stream.step(clip(1))
    (said,) = [record.message for record in caplog.records if "not finite" in record.message]
    assert said.startswith("frames from 0 on have values that are not finite")
    stats = stream.stats()
    assert stats.non_finite == stats.frames
    assert stats.fallbacks == 0, "a program that computes what PyTorch does is not at fault"


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_go_on_from_here_by_themselves(clone: Any) -> None:
    decoder, latents = make(), clip(6)
    wanted = StreamDecode(decoder).step(latents)
    stream = StreamDecode(decoder, check="always", strict=False)
    clone(stream).step(latents)  # of a stream that has not begun
    begun = [stream.step(latents[:, :3])]
    other = clone(stream)
    other.step(clip(2, seed=5))
    twin = clone(stream)
    assert (twin.decoder is decoder) == (clone is copy.copy)
    assert near(torch.cat([*begun, stream.step(latents[:, 3:])], 1), wanted)
    assert near(torch.cat([*begun, twin.step(latents[:, 3:])], 1), wanted)


def test_a_copy_has_no_state_of_old_weights() -> None:
    decoder = make()
    stream = StreamDecode(decoder)
    stream.step(clip(2))
    with torch.no_grad():
        decoder[22].bias.add_(0.1)
    assert torch.equal(copy.deepcopy(stream).step(clip(2)), StreamDecode(decoder).step(clip(2)))
