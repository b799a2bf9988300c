"""Ranks of torchrun and of srun: each item once, one list of failures, and a killed rank's items at the next start.

Run: python -m pytest tests/batch/test_ranks.py
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from owl_wms.batch import Job
from owl_wms.batch.items import LATENT_SUFFIXES
from owl_wms.batch.lock import held
from owl_wms.batch.progress import Tally
from owl_wms.batch.run import choose_engine, run, status
from owl_wms.errors import BatchError
from tests.batch.fake import fake_job, frames_of, make_inputs, outputs_of, parts

FORK: Any = multiprocessing.get_context("fork")
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_ID")
TEXTS = {f"{n % 3}/{n:02}.pt": f"item {n}" for n in range(22)} | {"0/bad.pt": "bad", "2/bad.pt": "bad"}


def one_rank(job: Job, folder: Path) -> Tally:
    """What every process of the launcher runs; returns what it would show."""
    tally = Tally()
    for _ in run(job, str(folder), LATENT_SUFFIXES, tally=tally):
        pass
    return tally


def launched(names: tuple[str, ...], job: Job, folder: Path, world: int) -> list[int | None]:
    """Starts ranks with a launcher's variables, as forks; returns their exit statuses."""
    ranks = []
    for rank in range(world):
        variables = dict(zip(names, (rank, world, rank, 0), strict=False))

        def body(variables: dict[str, int] = variables) -> None:
            os.environ.update({name: str(value) for name, value in variables.items()})
            assert choose_engine(None) == "ranks"
            one_rank(job, folder)

        ranks.append(FORK.Process(target=body))
        ranks[-1].start()
    for process in ranks:
        process.join(60)
    return [process.exitcode for process in ranks]


def check(job: Job, texts: dict[str, str]) -> None:
    good = {name: text for name, text in texts.items() if text != "bad"}
    assert set(outputs_of(job)) == {f"{name}.npy" for name in good}, "complete, and no temporary file"
    for name, text in good.items():
        assert np.array_equal(np.load(Path(job.out) / f"{name}.npy"), frames_of(text).numpy())
    done = Counter(line["key"] for line in parts(job) if line["event"] == "done")
    assert set(done.values()) == {1}, "none was decoded twice"
    told = (Path(job.out) / "_ledger/failed.jsonl").read_text().splitlines()
    failed = {name for name, text in texts.items() if text == "bad"}
    assert sorted(Path(json.loads(line)["item"]).name for line in told) == sorted(Path(name).name for name in failed)


@pytest.fixture
def unlaunched(monkeypatch: pytest.MonkeyPatch, forked: None) -> None:
    for name in (*TORCHRUN, *SLURM):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("unlaunched")
def test_four_ranks_of_srun_and_then_two(tmp_path: Path) -> None:
    folder, job = make_inputs(tmp_path / "in", TEXTS), fake_job(tmp_path / "out")
    assert launched(SLURM, job, folder, 4) == [0] * 4
    check(job, TEXTS)
    by_rank = Counter(path.name.split("-")[2] for path in (Path(job.out) / "_ledger/parts").iterdir())
    assert set(by_rank) == set("0123"), "every rank did a share"
    new = {"1/99.pt": "item 99", "0/bad.pt": "good now"}
    make_inputs(folder, new)
    assert launched(SLURM, job, folder, 2) == [0] * 2, "fewer ranks go on"
    check(job, TEXTS | new)
    state = status(job, str(folder), LATENT_SUFFIXES)
    assert (state.done, state.failed, state.left) == (24, 1, 1)


@pytest.mark.usefixtures("unlaunched")
def test_a_rank_of_torchrun_that_is_killed(tmp_path: Path) -> None:
    mark = tmp_path / "died"
    texts = {**TEXTS, "1/98.pt": f"die-parent-once:{mark}"}
    folder, job = make_inputs(tmp_path / "in", texts), fake_job(tmp_path / "out")
    assert sorted(launched(TORCHRUN, job, folder, 4)) == [-signal.SIGKILL, 0, 0, 0]
    assert mark.exists()
    assert launched(TORCHRUN, job, folder, 4) == [0] * 4
    check(job, texts)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_torchrun_itself(tmp_path: Path, world: int) -> None:
    texts = {**TEXTS, "1/98.pt": f"die-parent-once:{tmp_path / 'died'}"}
    folder, job = make_inputs(tmp_path / "in", texts), fake_job(tmp_path / "out")
    script = tmp_path / "rank.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom tests.batch.fake import fake_job\n"
        "from tests.batch.test_ranks import one_rank\n"
        "if __name__ == '__main__':\n    one_rank(fake_job(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    statuses = []
    for _ in range(2):
        arguments = [*command, str(script), str(tmp_path / "out"), str(folder)]
        statuses.append(subprocess.run(arguments, env=environment, timeout=280, check=False).returncode)
    assert statuses == [1, 0], "torchrun ends all ranks when one dies; the next start goes on"
    check(job, texts)


@pytest.mark.usefixtures("unlaunched")
def test_a_run_and_ranks_keep_each_other_out(tmp_path: Path) -> None:
    job = fake_job(tmp_path / "out")
    with held(job, 1), held(job, 3), pytest.raises(BatchError, match="another run is writing here"), held(job):
        pass
    with held(job, 1), pytest.raises(BatchError, match="another run is writing here"), held(job, 1):
        pass
    with held(job), pytest.raises(BatchError, match="another run is writing here"), held(job, 3):
        pass
