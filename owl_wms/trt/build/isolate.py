"""The smallest set of modules that must stay in PyTorch for the rest to build and run.

Why it exists: that a converter claims an operator does not make it runnable. The sana decoder in bf16 builds one
engine, and then no execution context can be created, because of its depthwise convolutions; neither Torch-TensorRT nor
TensorRT says which node is to blame. So the search is by experiment: build with some modules left in PyTorch, see
whether it works, and narrow down.

Method. `works(kept)` is assumed monotone (keeping more never breaks what worked). QuickXplain (U. Junker, "QuickXplain:
preferred explanations and relaxations for over-constrained problems", AAAI 2004) then finds an irreducible set in O(k
log(n/k)) tries for k culprits among n. It runs over classes of modules first, since a build takes up to a minute and
there are a dozen classes (depthwise convolutions of every size are one). Inside what it finds it runs over *groups* of
like modules, and inside those over single ones. Modules that already failed when built alone are suspects, and are left
there first, which mostly ends the search at the first try. Tries and time are bounded; when they run out the smallest
set seen to work is the answer, marked as not minimal.

Usage:
    classes = [[["a.depth", "b.depth"], ["c.depth"]], [["a.point"]]]
    found = smallest_kept(classes, works, max_tries=16, deadline=time.monotonic() + 60)
    found.kept, found.minimal, found.attempts
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

ModulePath = str
Works = Callable[[frozenset[ModulePath]], str]
"""Build and run with these modules left in PyTorch; "" when that works, else the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """Describes one try: the modules left in PyTorch, why it failed ("" when it worked), how long it took."""

    kept: tuple[ModulePath, ...]
    reason: str
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Isolation:
    """The result of a search.

    Attributes:
        kept: modules that stay in PyTorch, sorted; None when no set short of all of them was seen to work.
        minimal: whether the search ended by itself; no module can leave `kept` then (for a monotone `works`).
        attempts: every try in order.
    """

    kept: tuple[ModulePath, ...] | None
    minimal: bool
    attempts: tuple[Attempt, ...]


class _OutOfBudget(Exception):
    pass


@dataclass(kw_only=True)
class _Search:
    works: Works
    everything: frozenset[ModulePath]
    max_tries: int
    deadline: float
    attempts: list[Attempt] = field(default_factory=list)
    known: dict[frozenset[ModulePath], str] = field(default_factory=dict)

    def ok(self, kept: frozenset[ModulePath]) -> bool:
        """Returns whether `kept` works; answers what follows from earlier tries by monotonicity without trying."""
        if kept == self.everything or any(not reason and good <= kept for good, reason in self.known.items()):
            return True
        if any(reason and kept <= bad for bad, reason in self.known.items()):
            return False
        if len(self.attempts) >= self.max_tries or time.monotonic() >= self.deadline:
            raise _OutOfBudget
        begin = time.monotonic()
        reason = self.works(kept)
        self.attempts.append(Attempt(kept=tuple(sorted(kept)), reason=reason, seconds=time.monotonic() - begin))
        self.known[kept] = reason
        return not reason

    def explain(self, parts: list[frozenset[ModulePath]], base: frozenset[ModulePath]) -> list[frozenset[ModulePath]]:
        """Irreducible subset of `parts` that works together with `base`; `base` alone does not, with all `parts` it
        does.
        """
        if len(parts) == 1:
            return parts
        left, right = parts[: len(parts) // 2], parts[len(parts) // 2 :]
        if self.ok(base | _union(left)):
            return self.explain(left, base)
        if self.ok(base | _union(right)):
            return self.explain(right, base)
        first = self.explain(left, base | _union(right))
        return first + self.explain(right, base | _union(first))

    def best(self) -> frozenset[ModulePath] | None:
        good = [kept for kept, reason in self.known.items() if not reason]
        return min(good, key=len, default=None)


def smallest_kept(
    classes: Sequence[Sequence[Sequence[ModulePath]]],
    works: Works,
    *,
    max_tries: int,
    deadline: float,
    suspects: Iterable[ModulePath] = (),
    reason: str = "failed",
) -> Isolation:
    """Find which modules must stay in PyTorch, given that leaving nothing there fails.

    Args:
        classes: all modules, in groups of like ones, and groups of one class together. Keeping all of them is PyTorch
            itself and is taken to work, but is no answer.
        works: one try; must not raise.
        max_tries: most calls of `works`.
        deadline: `time.monotonic()` after which no further try begins.
        suspects: modules that failed when built alone; tried first, and taken as necessary if they suffice.
        reason: of the failure with nothing left in PyTorch.
    """
    levels = [
        [_union(map(frozenset, groups)) for groups in classes],
        [frozenset(group) for groups in classes for group in groups],
        [frozenset([path]) for groups in classes for group in groups for path in sorted(group)],
    ]
    everything = _union(levels[0])
    search = _Search(works=works, everything=everything, max_tries=max_tries, deadline=deadline)
    search.known[frozenset()] = reason
    if not everything:
        return Isolation(kept=None, minimal=True, attempts=())
    suspected = frozenset(suspects) & everything
    kept: frozenset[ModulePath] | None = None
    minimal = True
    try:
        if suspected and suspected != everything and search.ok(suspected):
            return _found(suspected, True, search)
        for level in levels:
            parts = [part for part in level if part and (kept is None or part <= kept)]
            if kept is None or len(parts) > 1:
                kept = _union(search.explain(sorted(parts, key=lambda part: not part & suspected), frozenset()))
    except _OutOfBudget:
        minimal = False
        best = search.best()
        kept = best if kept is None or (best is not None and len(best) < len(kept)) else kept
    if kept is not None and kept != everything and kept not in search.known:
        # An answer that follows from monotonicity alone has never been built: build it before saying that it works.
        begin = time.monotonic()
        failure = works(kept)
        search.attempts.append(Attempt(kept=tuple(sorted(kept)), reason=failure, seconds=time.monotonic() - begin))
        kept = search.best() if failure else kept
    return _found(kept, minimal, search)


def _found(kept: frozenset[ModulePath] | None, minimal: bool, search: _Search) -> Isolation:
    usable = kept is not None and kept != search.everything
    return Isolation(
        kept=tuple(sorted(kept)) if usable and kept is not None else None,
        minimal=minimal,
        attempts=tuple(search.attempts),
    )


def _union(parts: Iterable[frozenset[ModulePath]]) -> frozenset[ModulePath]:
    return frozenset().union(*parts)
