"""Finds this process's place among those that a launcher started, and its GPU.

torchrun sets RANK, WORLD_SIZE and LOCAL_RANK; `srun` sets SLURM_PROCID, SLURM_STEP_NUM_TASKS and SLURM_LOCALID. The
items are dealt out by their place in the sorted list, so no rank has to talk to another one.

Usage:
    rank, world = place()
"""

from __future__ import annotations

import torch

from owl_wms import env
from owl_wms.errors import ConfigError

# A step may have fewer tasks than its job.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
)


def place() -> tuple[int, int] | None:
    """Returns `(rank, world)` as a launcher states it, or None without one.

    An sbatch script that does not use `srun` has SLURM_NTASKS and is one process: where this is no task of a step,
    SLURM's variables are passed over.

    Raises:
        ConfigError: a variable is no number, or the rank is not below the world's size.
    """
    for rank_name, world_name in _LAUNCHERS:
        rank, world = env.read(rank_name), env.read(world_name)
        if rank is None or world is None or (rank_name.startswith("SLURM") and not env.is_slurm_task()):
            continue
        if not (rank.isascii() and world.isascii() and rank.isdecimal() and world.isdecimal()) or int(rank) >= int(
            world
        ):
            text = (
                f"{rank_name} must be a number below {world_name}, got {rank!r} and {world!r}; unset both, or mend them"
            )
            raise ConfigError(text, key=rank_name)
        return int(rank), int(world)
    return None


def local_rank() -> int:
    """Returns this process's number on its machine as a launcher states it, or 0.

    Raises:
        ConfigError: LOCAL_RANK is no number.
    """
    local = env.local_rank()
    slurm = env.read("SLURM_LOCALID")
    if local is None and slurm is not None and slurm.isascii() and slurm.isdecimal():
        local = int(slurm)
    return local or 0


def device() -> str | None:
    """Returns this rank's device: `cuda:N` of its local rank, or the only GPU it sees; None without a GPU.

    Raises:
        ConfigError: LOCAL_RANK is no number.
    """
    count = torch.cuda.device_count()
    return f"cuda:{local_rank() % count}" if count else None
