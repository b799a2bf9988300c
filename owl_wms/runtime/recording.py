"""Whether the caller records a CUDA graph around a decode: then PyTorch's operators and nothing else.

Why it matters: a program has buffers and engines of its own, which the caller's graph would use at any later time, next
to our own runs; and building, waiting, timing and keeping what was made are nothing that a recording can do.

Usage:
    if recording.underway():
        ...
"""

from __future__ import annotations

import torch


def underway() -> bool:
    """Whether the current stream is being recorded."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
