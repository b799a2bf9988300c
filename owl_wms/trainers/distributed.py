"""Processes, ranks and devices of a training run.

Why it exists: upstream's setup swallows every NCCL error and goes on as world size 1, and puts decoders on GPU 0 of
every rank because the device is chosen too late. Here a launcher's variables mean a process group or an error, and
the device is set first.

Usage:
    rank, local_rank, world_size = setup()
    try: ...
    finally: cleanup()
"""

from __future__ import annotations

import gc
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from owl_wms import env
from owl_wms.errors import ConfigError

_TIMEOUT_SECONDS = 1800.0  # the other ranks wait while rank 0 compiles a decoder and decodes


def setup(timeout_seconds: float = _TIMEOUT_SECONDS) -> tuple[int, int, int]:
    """Join the process group that torchrun announces; without one, stay alone.

    Args:
        timeout_seconds: of collectives.

    Returns:
        (global rank, local rank, world size); (0, 0, 1) when no launcher is at work.

    Raises:
        ConfigError: incomplete launcher variables, a LOCAL_RANK that is no number, or a local rank without a GPU.
        RuntimeError: whatever the process group raises; nothing is swallowed.
    """
    found = {name: env.read(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    if found["WORLD_SIZE"] is None:
        env.local_rank()  # without a launcher it has no effect, and a bad value is an error all the same
        return 0, 0, 1
    # Superscripts are digits too, and int() refuses them.
    numbers = [int(value) for value in found.values() if value is not None and value.isascii() and value.isdigit()]
    if len(numbers) != len(found):
        raise ConfigError(
            f"a launcher must set RANK, LOCAL_RANK and WORLD_SIZE to whole numbers, got {found}; use torchrun"
        )
    rank, local_rank, world_size = numbers
    device = choose_device(local_rank)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_seconds))
    return rank, local_rank, world_size


def cleanup() -> None:
    """Leave the process group, if there is one; a second call does nothing."""
    if dist.is_initialized():
        # A trainer and its evaluator hold each other, so one that was let go still lives; and gloo may abort the
        # process when its group goes before the reducers of data parallelism do.
        gc.collect()
        dist.destroy_process_group()


def choose_device(local_rank: int) -> torch.device:
    """This rank's device, made the current one: `cuda:{local_rank}` when there is CUDA, else the CPU.

    Raises:
        ConfigError: fewer GPUs than local ranks.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} are visible; start fewer processes"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def is_distributed() -> bool:
    """Whether there are other ranks to talk to."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def barrier() -> None:
    """Wait for all ranks; nothing to wait for when alone."""
    if is_distributed():
        dist.barrier()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether any rank says so; all ranks must ask, and none waits for one that failed and said it here."""
    if not is_distributed():
        return flag
    votes = torch.tensor(float(flag), device=device)
    dist.all_reduce(votes)
    return bool(votes > 0)


def gather_to_first(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks, on rank 0; nothing on the others. Tensors must lie on the CPU."""
    if not is_distributed():
        return [value]
    first = dist.get_rank() == 0
    values: list[Any] | None = [None] * dist.get_world_size() if first else None
    dist.gather_object(value, values)
    return values or []
