"""Compares one frame of many with PyTorch's while a program is in use (`check="canary"`).

Why it exists: the parity check and the recorded output show that a program was right when it was built and when it was
loaded. A GPU whose memory loses a bit, or a driver that begins to fail, gives finite and wrong frames after that.
PyTorch computes from weights of its own, so one of its frames now and then shows it.

Usage:
    canary = Canary()
    frame = canary.due(len(frames))             # None most of the time
    problem = difference(out.tensor[frame], truth, "bf16", loaded.report)       # "" where they agree
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

EVERY = 16384
"""Frames per comparison. PyTorch's single frame takes some 10 ms where a program takes 0.33 ms per frame (`dist`, H200,
batch 8), so one of 16,384 costs less than 0.2 %. At 20 frames per second that is one in 14 minutes.
"""
FACTOR = 2.0
"""The limits of the parity check are for a program against fp32; here both sides have an error of their own."""
EIGHT_BIT_RMS = 0.02
"""What fp8 and int8 may differ by: twice the rms error of 40 dB."""
_QUANTUM = {"bf16": 2.0**-8, "uint8": 1 / 127.5}
_UNKNOWN_LIMIT = 16 * torch.finfo(torch.bfloat16).eps  # of a report without a parity check: the most that bf16 may have


class Canary:
    """Chooses the frames. Thread-safe."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._seen, self._next = 0, EVERY

    def due(self, count: int) -> int | None:
        """Returns which of the next `count` frames is compared, another place each time; None for none of them."""
        with self._guard:
            self._seen += count
            if self._seen < self._next:
                return None
            self._next = self._seen + EVERY
            return self._seen % count


def difference(frame: Tensor, truth: Tensor, kind: str, report: Mapping[str, Any]) -> str:
    """Returns how a program's frame differs from PyTorch's beyond what its build allows; empty where it does not.

    Args:
        frame: as the program's decode gives it.
        truth: PyTorch's, in the same form.
        kind: `bf16` or `uint8`.
        report: of the program's build.
    """
    found, wanted = _values(frame, kind), _values(truth, kind)
    if not wanted.isfinite().all():
        return ""
    scales = report.get("parity", {}).get("scales", ())
    relative = next((row["relative_limit"] for row in scales if row["scale"] == 1), None)
    eight_bits = report.get("precision") in ("fp8", "int8")
    size = wanted.square().mean().sqrt().item()
    limit = FACTOR * (EIGHT_BIT_RMS if eight_bits else (_UNKNOWN_LIMIT if relative is None else relative) * size)
    limit += _QUANTUM[kind] * (size if kind == "bf16" else 1)
    rms = (found - wanted).square().mean().sqrt().item()
    return "" if rms <= limit else f"rms difference {rms:.2e}, at most {limit:.2e}"  # also where rms is NaN


def _values(frame: Tensor, kind: str) -> Tensor:
    return frame.float() if kind == "bf16" else frame.float() / 127.5 - 1
