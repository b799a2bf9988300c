"""The place of a process among those of torchrun and of Slurm's steps, and what cannot be one."""

from __future__ import annotations

import os

import pytest

from owl_wms.batch.ranks import place
from owl_wms.errors import ConfigError

SCRIPT = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
JOB = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4", "SLURM_PROCID": "1"}


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, None),
        (SCRIPT, None),  # the script of sbatch, which is no task of a step
        ({**SCRIPT, "SLURM_STEP_ID": "4294967291"}, None),  # the same, where it has the number of such scripts
        ({**SCRIPT, "SLURM_STEP_ID": "batch"}, None),
        ({**SCRIPT, "SLURM_STEP_ID": "0"}, (0, 4)),
        ({**JOB, "SLURM_STEP_ID": "0"}, (1, 4)),
        ({**JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}, (1, 2)),  # `srun -n 2` within a job of four
        ({**JOB, "SLURM_STEP_ID": "0", "RANK": "7", "WORLD_SIZE": "8"}, (7, 8)),
    ],
)
def test_places(variables: dict[str, str], found: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the job's number of tasks instead of the step's, half of the items would be nobody's."""
    for name in [name for name in os.environ if name.startswith("SLURM_")] + ["RANK", "WORLD_SIZE"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert place() == found
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="RANK must be a number below WORLD_SIZE, got '2' and '2'"):
        place()
