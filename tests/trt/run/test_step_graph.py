"""A step that keeps its state in buffers is a pure function for whoever calls it, whatever they hold and reuse.

Run: python -m pytest tests/trt/run/test_step_graph.py
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from owl_wms.state import KeptState, State
from owl_wms.trt.run import step_graph
from owl_wms.trt.run.step_graph import GraphedStep
from tests.trt.graph_stand_in import Replayed

SHAPE = (2, 3, 2, 2)


def step(latent: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Frames that tell every state from every other; one state is a view into a larger tensor, the other the input."""
    both = torch.stack([a + latent, 0.5 * a + latent + 0.25 * b], 1)
    return torch.stack([latent + a, latent + 3 * b], 1), both[:, 1], a


def latent_of(number: int, device: str = "cpu") -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(number)).double().to(device)


def zeros(device: str = "cpu") -> tuple[Tensor, Tensor]:
    return torch.zeros(SHAPE, device=device).double(), torch.zeros(SHAPE, device=device).double()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def fast(request: pytest.FixtureRequest) -> Iterator[GraphedStep]:
    device: str = request.param
    if device == "cuda":
        yield GraphedStep(step, latent_of(0, device), *zeros(device))
        return
    with mock.patch.object(step_graph, "CapturedGraph", Replayed):
        yield GraphedStep(step, latent_of(0), *zeros())


def same(got: State, wanted: State) -> bool:
    return len(got) == len(wanted) and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def follow(fast: GraphedStep, course: list[tuple[str, int]], device: str = "cpu") -> None:
    """Steps from any state that was ever made, while others are held, dropped, looked at or replaced by tensors."""
    begin = zeros(device)
    alive: list[tuple[State, State]] = [(begin, begin)]  # what the step gave, and what is right
    given_out: list[tuple[Tensor, Tensor]] = []
    for turn, (what, which) in enumerate(course):
        place = which % len(alive)
        state, wanted = alive[place]
        if what == "step":
            latent = latent_of(turn, device)
            frames, state = fast.step_in_place(latent, state)
            right, *wanted_next = step(latent, *wanted)
            given_out.append((frames, right.clone()))
            alive.append((state, tuple(tensor.clone() for tensor in wanted_next)))
        elif what == "drop" and len(alive) > 1:
            del alive[place]
        elif what == "look":
            assert same(state, wanted)
        elif what == "copy":
            alive[place] = tuple(tensor.clone() for tensor in state), wanted
        del state
    assert all(same(state, wanted) for state, wanted in alive)
    assert all(torch.equal(frames, right) for frames, right in given_out), "frames that were handed out changed"


COURSES = st.lists(
    st.tuples(st.sampled_from(["step", "step", "step", "drop", "look", "copy"]), st.integers(0, 8)), max_size=14
)


@settings(max_examples=150, deadline=None)
@given(COURSES)
def test_any_course_is_that_of_a_pure_function(course: list[tuple[str, int]]) -> None:
    with mock.patch.object(step_graph, "CapturedGraph", Replayed):
        follow(GraphedStep(step, latent_of(0), *zeros()), course)


@pytest.mark.gpu
def test_any_course_on_a_gpu() -> None:
    fast = GraphedStep(step, latent_of(0, "cuda"), *zeros("cuda"))
    generator = torch.Generator().manual_seed(3)
    for _ in range(60):
        numbers = torch.randint(0, 9, (14, 2), generator=generator).tolist()
        names = ["step", "step", "step", "drop", "look", "copy"]
        follow(fast, [(names[kind % 6], which) for kind, which in numbers], "cuda")


def test_the_newest_state_of_a_stream_is_never_copied(fast: GraphedStep, monkeypatch: pytest.MonkeyPatch) -> None:
    device = str(fast._device)
    moved: list[str] = []
    load = fast._load
    monkeypatch.setattr(fast, "_load", lambda state: (moved.append("in"), load(state)))
    leave = KeptState.leave
    monkeypatch.setattr(KeptState, "leave", lambda state: (moved.append("out"), leave(state))[1])
    state: State = zeros(device)
    for number in range(6):
        _, state = fast.step_in_place(latent_of(number, device), state)
    assert moved == ["in"]
    old = state
    for number in range(3):  # `old` is the newest at first, then the one before, then its place is wanted
        _, state = fast.step_in_place(latent_of(number, device), state)
    assert moved == ["in", "out"]
    _, again = fast.step_in_place(latent_of(0, device), old)
    assert moved == ["in", "out", "in", "out"], "the newest state moves out, for it is still held"
    assert len(state) == len(again) == 2


def test_a_step_that_fails_leaves_the_state_for_another_way(fast: GraphedStep, monkeypatch: pytest.MonkeyPatch) -> None:
    device = str(fast._device)
    state: State = zeros(device)
    wanted = zeros(device)
    for number in range(4):
        latent = latent_of(number, device)
        if number == 2:
            for graph in fast._graphs:  # the state is written, and then it fails
                replay = graph.replay
                monkeypatch.setattr(graph, "replay", lambda replay=replay: (replay(), 1 / 0))
            with pytest.raises(ZeroDivisionError):
                fast.step_in_place(latent, state)
            assert same(state, wanted)
            monkeypatch.undo()
        frames, state = fast.step_in_place(latent, state)
        right, *following = step(latent, *wanted)
        wanted = following[0].clone(), following[1].clone()
        assert torch.equal(frames, right)
    assert same(state, wanted)


def test_a_state_outlives_its_program_and_fits_no_other(fast: GraphedStep) -> None:
    device = str(fast._device)
    latent = latent_of(1, device)
    _, state = fast.step_in_place(latent, zeros(device))
    _, *wanted = step(latent, *zeros(device))
    with pytest.raises(ValueError, match=r"takes a state of \[\[2, 3, 2, 2\], \[2, 3, 2, 2\]\]; got \[\[1, 3, 2, 2\]"):
        fast.step_in_place(latent, [tensor[:1] for tensor in state])
    frames, *tensors = fast(latent, *state)
    right, *following = step(latent, *wanted)
    assert torch.equal(frames, right)
    assert same(tensors, following)
    del fast
    assert same(state, wanted)


class Captured:
    """Holds what a CUDA graph holds: its results, and neither the step nor what the step reads."""

    def __init__(self, run: Callable[[], tuple[Tensor, ...]], before: object = None) -> None:
        self.results = tuple(run())


def test_what_a_graph_reads_lives_as_long_as_the_graph() -> None:
    class Program:
        def __call__(self, latent: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
            return step(latent, *state)

    program = Program()
    alive = weakref.ref(program)
    with mock.patch.object(step_graph, "CapturedGraph", Captured), mock.patch.object(GraphedStep, "_check"):
        fast = GraphedStep(program, latent_of(0), *zeros())
    del program
    gc.collect()
    assert alive() is not None
    del fast
    gc.collect()
    assert alive() is None


def test_without_a_gpu_there_is_no_graph() -> None:
    made, reason = GraphedStep.attempt(step, (latent_of(0), *zeros()))
    assert made is None
    assert reason == "CUDA graphs need CUDA latents; got cpu"
