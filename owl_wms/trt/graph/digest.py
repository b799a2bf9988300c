"""SHA-256 over a decoder's weights, by as many threads as help.

Why it exists: the cache key must hold every byte of every weight, and one thread hashes about 1.5 GB per second: 0.6 s
for the larger decoder in fp32. So the bytes are hashed in pieces side by side (hashlib lets go of the interpreter
meanwhile), and the digest is taken over the digests of the pieces. Pieces have a fixed size, so the answer does not
depend on the number of threads.

Not remembered between calls, although a key for a second shape asks again: writes through `tensor.data` show in no
version counter, and a remembered digest would file a program of the new weights under the old ones for good.

Usage:
    key["weights"] = weights_digest(decoder)
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from owl_wms.trt.graph.shapes import named_tensors

PIECE_BYTES = 1 << 23
MAX_THREADS = 12  # beyond this, copying from the GPU is what takes the time


def weights_digest(decoder: nn.Module) -> str:
    """SHA-256 over name, shape, dtype and bytes of every parameter, buffer and plain tensor attribute, by name.

    Reads in the caller's thread and on its current stream, so it sees what was enqueued before.
    """
    found = dict(named_tensors(decoder))
    parts: list[bytes | Future[bytes]] = []
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), "owl-wms-digest") as pool:
        lend = _Buffers()
        for name, tensor in sorted(found.items()):
            parts.append(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            for piece in _pieces(tensor):
                if _on_host(piece):
                    parts.append(pool.submit(_digest, piece))
                    continue
                buffer = lend.free()[: piece.numel()]
                job = pool.submit(_digest, buffer.copy_(piece))
                lend.use_until(job)
                parts.append(job)
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part if isinstance(part, bytes) else part.result())
    return digest.hexdigest()


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), PIECE_BYTES):
        yield flat[start : start + PIECE_BYTES]


def _on_host(piece: Tensor) -> bool:
    return piece.device.type == "cpu"


def _digest(piece: Tensor) -> bytes:
    return hashlib.sha256(piece.numpy().data).digest()


class _Buffers:
    """Host memory that pieces from a GPU pass through; used again, so that 500 MB need not be allocated to be read."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._jobs: list[Future[bytes]] = []

    def free(self) -> Tensor:
        """A buffer that nobody reads; the oldest, waited for, once there are enough."""
        if len(self._buffers) < 2 * MAX_THREADS:
            self._buffers.append(torch.empty(PIECE_BYTES, dtype=torch.uint8, device="cpu"))
        else:
            self._jobs.pop(0).result()
            self._buffers.append(self._buffers.pop(0))
        return self._buffers[-1]

    def use_until(self, job: Future[bytes]) -> None:
        """The buffer given last is read by `job`."""
        self._jobs.append(job)
