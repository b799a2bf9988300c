"""Running what may fail on a GPU: run and wait, say what went wrong, notice a context that is beyond repair.

Why it exists: an engine that fails may leave a CUDA error that fails everything after it. An attempt that cannot tell
this from its own failure would blame every later plan for it.

Usage:
    try:
        x = run(program, z)
    except Exception as error:
        reason = reason_of(error)
        check_context(z.device)          # BrokenContext: this process must end
"""

from __future__ import annotations

import gc
from typing import Any

import torch


class BrokenContext(BaseException):
    """The CUDA context is unusable; not an Exception, so that no attempt mistakes it for its own failure."""


def run(program: Any, z: torch.Tensor, *state: torch.Tensor) -> Any:
    """`program(z, *state)`, waited for, so that what fails on the device fails here."""
    with torch.no_grad():
        x = program(z, *state)
    if z.device.type == "cuda":
        torch.cuda.synchronize(z.device)
    return x


def check_context(device: torch.device) -> None:
    """After a failure: a CUDA context with a sticky error fails everything from now on, so the process must end.

    Raises:
        BrokenContext: it has one.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).add_(1).item()
    except Exception as error:
        raise BrokenContext(reason_of(error)) from error


def release() -> None:
    """Give freed engines and activations back to the GPU, so that the next build finds the memory."""
    gc.collect()
    torch.cuda.empty_cache()


def reason_of(error: BaseException) -> str:
    """An error's type and first lines on one line of at most 600 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' | '.join(lines[:3])}"[:600] if lines else type(error).__name__
