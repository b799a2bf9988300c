"""The search for what must stay in PyTorch, against random culprits and a build that fails when one of them is
compiled.
"""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from owl_wms.trt.build.isolate import smallest_kept

FAR = 1e9


Classes = list[list[list[str]]]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Classes, set[str], set[str]]:
    sizes = draw(st.lists(st.integers(1, 5), min_size=2, max_size=8))
    groups = [[f"g{i}.m{j}" for j in range(size)] for i, size in enumerate(sizes)]
    cuts = sorted(draw(st.sets(st.integers(1, len(groups) - 1))))
    classes = [groups[a:b] for a, b in zip([0, *cuts], [*cuts, len(groups)], strict=True)]
    units = [unit for group in groups for unit in group]
    culprits = set(draw(st.lists(st.sampled_from(units), min_size=1, max_size=len(units) - 1, unique=True)))
    suspects = set(draw(st.lists(st.sampled_from(sorted(culprits)), unique=True)))
    return classes, culprits, suspects


def builder(culprits: set[str]):  # type: ignore[no-untyped-def]
    def works(kept: frozenset[str]) -> str:
        compiled = culprits - kept
        return f"{min(compiled)} cannot run" if compiled else ""

    return works


@given(problems())
def test_finds_exactly_the_culprits(problem: tuple[Classes, set[str], set[str]]) -> None:
    classes, culprits, suspects = problem
    units = {unit for groups in classes for group in groups for unit in group}
    found = smallest_kept(classes, builder(culprits), max_tries=500, deadline=FAR, suspects=suspects)
    assert found.minimal
    assert set(found.kept or ()) == culprits if culprits != units else found.kept is None
    assert all(a.reason.endswith("cannot run") for a in found.attempts if not set(a.kept) >= culprits)


@given(problems(), st.integers(0, 6))
def test_bounded_tries_end_in_something_that_was_built_or_in_nothing(problem, tries) -> None:  # type: ignore[no-untyped-def]
    classes, culprits, suspects = problem
    calls: list[frozenset[str]] = []
    works = builder(culprits)

    def counted(kept: frozenset[str]) -> str:
        calls.append(kept)
        return works(kept)

    found = smallest_kept(classes, counted, max_tries=tries, deadline=FAR, suspects=suspects)
    assert len(calls) == len(found.attempts) <= tries + 1
    if found.kept is not None:
        assert frozenset(found.kept) in calls
        assert set(found.kept) >= culprits
    if not found.minimal:
        assert len(calls) >= tries


def test_suspects_that_suffice_end_the_search_at_once() -> None:
    groups = [[f"depth{i}" for i in range(9)], [f"point{i}" for i in range(9)], ["norm"]]
    found = smallest_kept([groups], builder(set(groups[0])), max_tries=16, deadline=FAR, suspects=groups[0])
    assert found.kept == tuple(sorted(groups[0]))
    assert len(found.attempts) == 1


def test_a_culprit_needing_two_units_at_once_is_still_found() -> None:
    classes = [[[name]] for name in "abcdefgh"]
    found = smallest_kept(
        classes, lambda kept: "" if kept & {"b"} or kept >= {"f", "g"} else "no", max_tries=99, deadline=FAR
    )
    assert found.kept in (("b",), ("f", "g"))


def test_time_is_bounded() -> None:
    found = smallest_kept([[["a"]], [["b"]]], builder({"a"}), max_tries=99, deadline=time.monotonic() - 1)
    assert found.kept is None
    assert not found.minimal
    assert found.attempts == ()


def test_nothing_left_for_tensorrt_is_no_answer() -> None:
    found = smallest_kept([[["a"]], [["b"]]], builder({"a", "b"}), max_tries=99, deadline=FAR)
    assert found.kept is None


def test_a_class_is_found_in_few_builds_although_nothing_failed_alone() -> None:
    """Thirty kinds of modules in ten classes, and the culprits are one class of three kinds."""
    classes = [[[f"c{i}.k{j}.m{n}" for n in range(6)] for j in range(3)] for i in range(10)]
    culprits = {unit for group in classes[0] for unit in group}
    found = smallest_kept(classes, builder(culprits), max_tries=4, deadline=FAR)
    assert set(found.kept or ()) == culprits
    assert len(found.attempts) == 4
