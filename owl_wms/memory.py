"""Recognises that memory ran out: torch's allocator on a CPU raises a RuntimeError, and so does TensorRT.

Usage:
    is_out_of_memory(error)         # of an exception that was caught; True for a MemoryError too
"""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an exception means that memory ran out, on either kind of device and from TensorRT too."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
