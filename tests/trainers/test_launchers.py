"""Ranks from torchrun and from srun, and the GPU that each of them takes.

Run: python -m pytest tests/trainers/test_launchers.py
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from owl_wms.errors import ConfigError
from owl_wms.trainers.distributed import choose_device, first_host, setup

STEP = {
    **{"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "2"},
    **{"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "gpu[007-008]"},
}
MASTER = {"MASTER_ADDR": "head", "MASTER_PORT": "5000"}
ALONE = {**MASTER, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
SCRIPT = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `init_process_group` was called with, in an environment without launchers."""
    for name in [n for n in os.environ if n.startswith(("SLURM_", "MASTER_", "OMPI_", "PMI_", "JSM_", "FLUX_"))] + [
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
    ]:
        monkeypatch.delenv(name, raising=False)
    calls: list[Any] = []
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *a, **k: calls.append((a, k)))
    return calls


@pytest.mark.parametrize(
    ("variables", "found", "address"),
    [
        ({}, (0, 0, 1), None),
        (STEP, (1, 0, 2), "tcp://gpu007:22979"),
        ({**STEP, "MASTER_ADDR": "head", "MASTER_PORT": "5000"}, (1, 0, 2), "tcp://head:5000"),
        ({k: v for k, v in STEP.items() if k != "SLURM_STEP_NUM_TASKS"}, (1, 0, 4), "tcp://gpu007:22979"),
        ({**STEP, "PMI_SIZE": "2"}, (1, 0, 2), "tcp://gpu007:22979"),  # srun --mpi=pmi2
        ({"OMPI_COMM_WORLD_SIZE": "1"}, (0, 0, 1), None),
        ({"FLUX_JOB_SIZE": "1"}, (0, 0, 1), None),
        ({**MASTER, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "JSM_NAMESPACE_SIZE": "2"}, (0, 0, 2), "env"),
        (SCRIPT, (0, 0, 1), None),  # the script of sbatch, which is no task of a step
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, (0, 0, 1), None),  # an interactive step
        ({**SCRIPT, "SLURM_STEP_ID": "4294967291"}, (0, 0, 1), None),  # the same, by its number for such scripts
        ({**SCRIPT, "SLURM_STEP_ID": "batch"}, (0, 0, 1), None),
        ({**STEP, **MASTER, "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}, (3, 1, 8), "env"),  # torchrun in srun
    ],
)
def test_ranks(
    variables: dict[str, str],
    found: tuple[int, int, int],
    address: str | None,
    joined: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert setup() == found
    if address is None:
        assert not joined
    else:
        ((arguments, settings),) = joined
        assert arguments == ("gloo", None if address == "env" else address)
        assert (settings["rank"], settings["world_size"]) == (found[0], found[2])


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({**STEP, "SLURM_PROCID": "x"}, "SLURM_PROCID.*whole numbers"),
        ({**STEP, "SLURM_PROCID": "2"}, "the first below the last"),
        ({**STEP, "SLURM_STEP_NODELIST": ""}, "set MASTER_ADDR"),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "the first below the last"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "mpirun started several.*torchrun or srun"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE is 2"),
        ({"JSM_NAMESPACE_SIZE": "2", "JSM_NAMESPACE_RANK": "0"}, "JSM_NAMESPACE_SIZE is 2"),
        ({"FLUX_JOB_SIZE": "8", "FLUX_TASK_RANK": "0"}, "FLUX_JOB_SIZE is 8"),
        ({"RANK": "0"}, "must set RANK, LOCAL_RANK, WORLD_SIZE"),  # each would take itself for the only process
        ({"RANK": "1", "LOCAL_RANK": "1"}, "must set RANK, LOCAL_RANK, WORLD_SIZE"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "9" * 5000}, "whole numbers"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT.*use torchrun, or unset"),
        ({**STEP, "MASTER_PORT": "http"}, "MASTER_PORT must be a port"),
        ({**STEP, "MASTER_PORT": "99999"}, "MASTER_PORT must be a port"),
    ],
)
def test_variables_that_cannot_be(
    variables: dict[str, str], message: str, joined: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        setup()
    assert not joined


@pytest.mark.parametrize("kind", [torch.distributed.DistNetworkError, torch.distributed.DistStoreError])
@pytest.mark.parametrize(("variables", "where"), [(STEP, "gpu007:22979"), (ALONE, "head:5000")])
def test_ranks_that_do_not_meet(
    kind: type[Exception],
    variables: dict[str, str],
    where: str,
    joined: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def taken(*_: object, **__: object) -> None:
        raise kind("The server socket has failed to listen,\naddress already in use")

    monkeypatch.setattr("torch.distributed.init_process_group", taken)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    text = f"ranks do not meet at tcp://{where}: The server socket has failed to listen, address already in use; see"
    with pytest.raises(ConfigError, match=f"{text} .* give another MASTER_PORT"):
        setup()


def test_first_hosts() -> None:
    lists = {"gpu[007-010,12],big1": "gpu007", "a1,b[1-2]": "a1", "n[1,3]-ib": "n1-ib", "r[1-2]n[3-4]": "r1n3"}
    assert {nodes: first_host(nodes) for nodes in lists} == lists


@pytest.mark.parametrize(
    ("local_rank", "count", "shown", "index"),
    [(0, 1, None, 0), (3, 8, None, 3), (3, 1, "2", 0), (3, 1, None, None), (3, 2, "0,1", None)],
)
def test_one_visible_gpu_per_process(
    local_rank: int, count: int, shown: str | None, index: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    if index is None:
        with pytest.raises(ConfigError, match=f"local rank {local_rank} has no GPU: {count} are visible"):
            choose_device(local_rank)
    else:
        assert choose_device(local_rank) == torch.device("cuda", index)
        assert taken == [index]
