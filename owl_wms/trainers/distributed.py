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
import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from owl_wms import env
from owl_wms.errors import ConfigError
from owl_wms.files import one_line

_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE", "FLUX_JOB_SIZE")
"""Set by the mpirun of Open MPI, of MPICH and Intel, and of MVAPICH, by IBM's jsrun and by Flux."""
_TIMEOUT_SECONDS = 1800.0  # the other ranks wait while rank 0 compiles a decoder and decodes
_SHARE = 0.9  # of that time: when it is over, PyTorch ends the process from C++, and nothing can be saved
_PAUSE = 2e-5  # seconds between two looks at an event
_limit: float | None = None  # of the group that `setup` made


def setup(timeout_seconds: float = _TIMEOUT_SECONDS) -> tuple[int, int, int]:
    """Join the process group that torchrun or srun announces; without a launcher, stay alone.

    Args:
        timeout_seconds: of collectives.

    Returns:
        (global rank, local rank, world size); (0, 0, 1) when no launcher is at work.

    Raises:
        ConfigError: incomplete launcher variables, variables that are no whole numbers, a rank outside the world, a
            local rank without a GPU, or ranks that do not meet: their port is taken, or one of them does not come.
        RuntimeError: whatever else the process group raises; nothing is swallowed.
    """
    found = {name: env.read(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    remedy, address = "use torchrun", None
    if found["WORLD_SIZE"] is None and found["RANK"] is None:
        env.local_rank()  # without a launcher it has no effect, and a bad value is an error all the same
        if not env.is_slurm_task():
            _refuse_mpi()
            return 0, 0, 1
        tasks = "SLURM_NTASKS" if env.read("SLURM_STEP_NUM_TASKS") is None else "SLURM_STEP_NUM_TASKS"
        found = {name: env.read(name) for name in ("SLURM_PROCID", "SLURM_LOCALID", tasks)}
        remedy, address = "start with srun or torchrun", _slurm_address()
    numbers = [number for value in found.values() if (number := _integer(value)) is not None]
    if len(numbers) != len(found) or not numbers[0] < numbers[2]:
        raise ConfigError(
            f"a launcher must set {', '.join(found)} to whole numbers, the first below the last, got {found}; {remedy}"
        )
    rank, local_rank, world_size = numbers
    if address is not None and world_size == 1:
        return 0, 0, 1
    device = choose_device(local_rank)
    if not dist.is_initialized():
        _require_meeting_place(address)
        backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"  # Windows has no NCCL
        timeout = timedelta(seconds=timeout_seconds)
        try:
            dist.init_process_group(backend, address, rank=rank, world_size=world_size, timeout=timeout)
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            where = address or f"tcp://{env.read('MASTER_ADDR')}:{env.read('MASTER_PORT')}"
            remedy = "see the other ranks' errors; if another run has the port, give another MASTER_PORT"
            raise ConfigError(
                f"ranks do not meet at {where}: {one_line(error)}; {remedy}", key="MASTER_PORT"
            ) from error
        global _limit
        _limit = timeout_seconds
    return rank, local_rank, world_size


def _integer(text: str | None) -> int | None:
    """Return a launcher's number; None for other texts. Superscripts are digits too, and int() refuses those."""
    return int(text) if text is not None and re.fullmatch("[0-9]{1,18}", text) else None


def _require_meeting_place(address: str | None) -> None:
    """Raise ConfigError for a port that is none, or if the variables that torch reads itself are absent."""
    host, port = env.read("MASTER_ADDR"), env.read("MASTER_PORT")
    if address is None and (host is None or port is None):
        raise ConfigError(
            f"a launcher must set MASTER_ADDR and MASTER_PORT beside RANK, got {host!r} and {port!r}; use torchrun, or "
            "unset RANK, LOCAL_RANK and WORLD_SIZE to train in one process",
            key="MASTER_PORT" if host else "MASTER_ADDR",
        )
    number = None if port is None else _integer(port)
    if port is not None and (number is None or number > 65_535):
        raise ConfigError(f"MASTER_PORT must be a port from 0 to 65535, got {port!r}", key="MASTER_PORT")


def _refuse_mpi() -> None:
    """Raise ConfigError in one of several processes of mpirun: each alone would write the same checkpoints."""
    for name in _MPI_SIZES:
        count = env.read(name)
        if count is not None and count.isdecimal() and int(count) > 1:
            text = f"{name} is {count}: mpirun started several processes, and does not say where they meet"
            raise ConfigError(f"{text}; start with torchrun or srun", key=name)


def _slurm_address() -> str:
    """Return where ranks meet: MASTER_ADDR and MASTER_PORT, or the step's first node and a port made of its ids.

    Raises:
        ConfigError: neither is known.
    """
    host = env.read("MASTER_ADDR") or first_host(env.read("SLURM_STEP_NODELIST") or env.read("SLURM_NODELIST") or "")
    if not host:
        raise ConfigError("srun names no node in SLURM_STEP_NODELIST; set MASTER_ADDR to the first task's host")
    job, step = (_integer(env.read(name)) or 0 for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return f"tcp://{host}:{env.read('MASTER_PORT') or 20_000 + (job * 7 + step) % 10_000}"


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list: `gpu[007-010,12],big1` -> `gpu007`."""
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def cleanup() -> None:
    """Leave the process group, if there is one; a second call does nothing."""
    if dist.is_initialized():
        # A trainer and its evaluator hold each other, so one that was let go still lives; and gloo may abort the
        # process when its group goes before the reducers of data parallelism do.
        gc.collect()
        dist.destroy_process_group()


def choose_device(local_rank: int) -> torch.device:
    """Make this rank's device the current one and return it: `cuda:{local_rank}` when there is CUDA, else the CPU.

    A launcher may show each process one GPU of its own through CUDA_VISIBLE_DEVICES, as Slurm does with
    `--gpus-per-task=1`. That GPU is `cuda:0` in each of them.

    Raises:
        ConfigError: fewer GPUs than local ranks.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count and not (count == 1 and env.read("CUDA_VISIBLE_DEVICES")):
        raise ConfigError(
            f"local rank {local_rank} has no GPU: {count} are visible; start fewer processes, or show each process one "
            "GPU of its own in CUDA_VISIBLE_DEVICES"
        )
    index = local_rank if local_rank < count else 0
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def is_distributed() -> bool:
    """Return whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def barrier() -> None:
    """Wait for all ranks; nothing to wait for when alone."""
    if is_distributed():
        dist.barrier()


def await_ranks(device: torch.device) -> None:
    """Wait until the GPU has done what is enqueued, collectives with other ranks among it; a CPU has done it already.

    Why not by reading a result: a collective of NCCL waits on the GPU for a rank that is gone, and whoever reads waits
    with it until PyTorch ends the process. An event can be looked at without waiting, so the group is given up before.

    Raises:
        DistBackendError: another rank did not answer within nine tenths of the group's time limit. The group is gone,
            and what was to be averaged over ranks is not to be used.
    """
    if device.type == "cuda" and _limit is not None and is_distributed():
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(device))
        _poll(done.query, _SHARE * _limit)


def _poll(is_done: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not is_done():
        if time.monotonic() > end:
            dist.distributed_c10d._abort_process_group()
            raise dist.DistBackendError(f"no answer in {seconds:g} s")
        time.sleep(_PAUSE)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether `flag` is True on any rank; all ranks must call this, also those that failed."""
    if not is_distributed():
        return flag
    votes = torch.tensor(float(flag), device=device)
    dist.all_reduce(votes)
    return bool(votes > 0)


def gather_to_first(value: Any) -> list[Any]:
    """Return the values of all ranks, in their order, on rank 0; nothing on the others. Tensors must lie on the CPU."""
    if not is_distributed():
        return [value]
    first = dist.get_rank() == 0
    values: list[Any] | None = [None] * dist.get_world_size() if first else None
    dist.gather_object(value, values)
    return values or []
