"""Decodes a batch by programs of other sizes: split, padded, or not at all, by what is fastest.

Why measured: a program's time does not grow with its batch as PyTorch's does, so neither "pad to the next" nor "split
into the largest" is right for every decoder.

Usage:
    covers(5, (2, 4))                       # [(4, 2), (2, 2, 2), (4, 4)]: sizes of the programs that run, in order
    measured({(4, 2): run, (): eager}, z)   # the fastest of them
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from owl_wms.interrupts import raise_interrupt
from owl_wms.timing import interleaved

Way: TypeAlias = tuple[int, ...]
"""Batch sizes of the programs that decode a batch, in order; the last one may be padded. Empty: PyTorch."""
SECONDS = 1.0
"""Time for measuring all ways of one batch."""
_LOG = logging.getLogger("owl_wms.runtime")


def covers(batch: int, sizes: Sequence[int]) -> list[Way]:
    """Returns ways to decode `batch` frames with programs of `sizes`, each way once: the largest sizes first and the
    smallest that is enough at the end; and each size alone.
    """
    found: list[Way] = []
    left, mixed = batch, []
    for size in sorted(sizes, reverse=True):
        mixed += [size] * (left // size)
        left %= size
    if left:
        mixed.append(min(size for size in sizes if size >= left))
    for way in (tuple(mixed), *((size,) * -(-batch // size) for size in sorted(sizes))):
        if way not in found:
            found.append(way)
    return found


def measured(candidates: Mapping[Way, Callable[[Tensor], Any]], z: Tensor) -> Way:
    """The candidate with the smallest median time on `z`; one that raises is left out."""
    by_name = {str(way): way for way in candidates}

    def guarded(name: str, run: Callable[[], float]) -> float | None:
        try:
            return run()
        except Exception as error:  # PyTorch may need more memory for the whole batch than there is
            raise_interrupt(error)
            _LOG.info("left out %s: %s", name, error)
            return None

    runs = {str(way): run for way, run in candidates.items()}
    times = interleaved(runs, z, rounds=5, budget_seconds=SECONDS, measure=guarded)
    best = min(times, key=times.__getitem__) if times else "()"
    _LOG.info("batches of %d: %s", len(z), {name: f"{ms:.2f} ms" for name, ms in times.items()})
    return by_name.get(best, ())
