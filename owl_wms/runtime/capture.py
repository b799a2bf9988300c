"""Detects that the caller is capturing a CUDA graph. During a capture only PyTorch decodes.

Why it matters: a program has buffers of its own, and the caller's graph would use them again at every replay, possibly
while we run. Building, waiting, timing and storing cannot happen during a capture either.

Usage:
    if capture.underway():
        ...
"""

from __future__ import annotations

import torch


def underway() -> bool:
    """Returns whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
