"""Orders work on buffers that several threads and CUDA streams share.

Why it exists: a lock orders launches alone. Two runs on two CUDA streams would still use one program's memory at once.

Usage:
    order = DeviceOrder()
    with order.turn(z.device):
        buffer.copy_(z)
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch


class DeviceOrder:
    """Lets one thread at a time work, and on a GPU one stream after the other.

    Attributes:
        lock: held during a turn; a thread that holds it may take another turn.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._last: tuple[Any, Any] | None = None

    @contextlib.contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        """Holds the lock; on a GPU, makes `device` the current one and its current stream wait for the turn before."""
        with self.lock:
            if device.type != "cuda":
                yield
                return
            with torch.cuda.device(device):
                stream = torch.cuda.current_stream()
                if self._last is not None and self._last[0] != stream:
                    stream.wait_event(self._last[1])
                try:
                    yield
                finally:
                    event = self._last[1] if self._last is not None else torch.cuda.Event()
                    event.record(stream)
                    self._last = (stream, event)
