"""Describes one op at one shape, as `benchmarks.ops` times it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Says how to make an op's arguments, what to run, and the least it must move.

    Args:
        name: for the table.
        make: batch size -> arguments, fresh ones each time.
        run: the op.
        reference: the same in plain PyTorch.
        bytes_moved: every input once, every output once.
        flops: multiply-adds times two, 0 where memory is all there is.
        compare: error for arguments, where the general rule does not fit; may change them.
        limit: of the error, where the general one does not fit.
    """

    name: str
    make: Callable[[int], tuple]
    run: Callable[..., Tensor | None]
    reference: Callable[..., Tensor | None]
    bytes_moved: int
    flops: int = 0
    compare: Callable[[tuple], float] | None = None
    limit: float | None = None
