"""Keep torch.compile out of a function, without importing torch.compile.

Why it exists: whoever compiles a function that decodes has Dynamo trace what it meets there: our locks, events and
marks of weights, and the very program that passed the parity check, which Inductor would then compile once more.
`torch.compiler.disable` says no to that, but imports a second's worth of Dynamo into processes that compile nothing.

Usage:
    @uncompiled
    def __call__(self, latents): ...
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """`function`, run as it stands with all that it calls, also inside a compiled caller (which gets a graph break)."""
    disabled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            disable = getattr(sys.modules.get("torch._dynamo"), "disable", None)
            if disable is None:  # nobody has compiled anything in this process
                return function(*args, **kwargs)
            disabled = disable(function)
        return disabled(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # what Dynamo looks for before it traces into a call
    return call  # type: ignore[return-value]
