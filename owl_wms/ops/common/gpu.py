"""Facts about a CUDA device that decide which kernels it runs and how they are cut into blocks.

A kernel is chosen operator by operator: where the fastest form needs Hopper's instructions, older and newer GPUs take a
simpler kernel, not the whole decoder PyTorch.

Usage:
    if is_hopper(x.device): ...
    tile = next(tile for tile in TILES if bytes_of(tile) <= shared_limit(x.device))
    with treated_as((8, 0)): ...        # a newer GPU runs what an A100 would run, translated by its driver
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

Capability = tuple[int, int]
# Tensor-core products of 16x8x16 in bf16, and asynchronous copies to shared memory.
OLDEST: Capability = (8, 0)
HOPPER: Capability = (9, 0)
# Bytes of shared memory that one block may have (CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability"); a capability that is not listed gets the smallest of them.
SHARED_LIMITS: dict[Capability, int] = {
    (8, 0): 163 * 1024,
    (8, 6): 99 * 1024,
    (8, 7): 163 * 1024,
    (8, 9): 99 * 1024,
    (9, 0): 227 * 1024,
    (10, 0): 227 * 1024,
    (10, 3): 227 * 1024,
    (12, 0): 99 * 1024,
}
_pretended: Capability | None = None


def capability(device: torch.device) -> Capability:
    """Compute capability of a CUDA device, or the one it is treated as."""
    return _pretended or torch.cuda.get_device_capability(device)


def is_hopper(device: torch.device) -> bool:
    """Returns whether `device` runs machine code for sm_90a: warpgroup products, the tensor memory accelerator."""
    return capability(device) == HOPPER


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that one block may have."""
    return SHARED_LIMITS.get(capability(device), min(SHARED_LIMITS.values()))


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def architecture(device: torch.device, suffix: str = "") -> str:
    """Compiler target for a device: machine code (`sm_90a`), or intermediate code (`compute_80`) where the device is
    treated as an older one and its driver must translate.
    """
    major, minor = capability(device)
    return f"{'sm' if _pretended is None else 'compute'}_{major}{minor}{suffix}"


@contextlib.contextmanager
def treated_as(older: Capability) -> Iterator[None]:
    """Inside the block, every CUDA device is taken for one of compute capability `older`: for tests and benchmarks that
    execute an older GPU's kernels on a newer one. Holds for all threads of the process.
    """
    global _pretended
    before, _pretended = _pretended, older
    try:
        yield
    finally:
        _pretended = before
