"""SIGTERM as a scheduler sends it, to every process of a job: the run still ends whole.

torchrun and Slurm signal the whole group, loader's workers included.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from owl_wms.data.loaders import get_loader
from owl_wms.trainers.checkpoints import latest_checkpoint, load_checkpoint
from tests.trainers.helpers import config, train_section, write_table
from tests.trainers.test_trainers import build

ROOT = Path(__file__).parents[2]
TRAIN = """
import sys, torch
from owl_wms.configs.world import load_world_config
from owl_wms.trainers import get_trainer_cls
torch.set_num_threads(1)
cfg = load_world_config(sys.argv[1])
trainer = get_trainer_cls("rft")(cfg.train, None, cfg.model)
trainer.train()
"""
READ = """
import sys, time
from owl_wms.data.loaders import get_loader
loader = get_loader("cod", 1, dataset_path=sys.argv[1], window_length=6, batch_columns=("mouse",), num_workers=2)
batches = iter(loader)
next(batches)
print(*(worker.pid for worker in loader._loader._iterator._workers), flush=True)
time.sleep(60)
"""


def start(code: str, argument: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(argument)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(met: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not met():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a signal does not say who sent it")
def test_a_group_that_is_told_to_end_saves_and_ends_in_order(tmp_path: Path) -> None:
    write_table(tmp_path, clips=40)
    data = {**train_section(tmp_path, "rft")["data_kwargs"], "num_workers": 2}  # type: ignore[dict-item]
    config(tmp_path, "rft", data_kwargs=data, sample_interval=10**9, max_steps=10**9)
    log = tmp_path / "run" / "log.jsonl"
    run = start(TRAIN, tmp_path / "rft.yml")
    try:
        wait_until(lambda: run.poll() is not None or (log.exists() and log.read_text().count('"diffusion_loss"') >= 3))
        os.killpg(run.pid, signal.SIGTERM)
        _, errors = run.communicate(timeout=60)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 0, errors[-2000:]
    last = latest_checkpoint(tmp_path / "run")
    assert last is not None
    assert load_checkpoint(last)["steps"] == log.read_text().count('"diffusion_loss"')


def test_a_signal_while_the_ranks_agree_is_not_forgotten(tmp_path: Path) -> None:
    """On a GPU nearly all of a step is this wait; what arrives in it must count at the end of the next step."""
    trainer = build(tmp_path, "rft", max_steps=6)
    pop = trainer.metrics.pop

    def popped(*, stop: bool = False) -> tuple[dict[str, float], bool]:
        agreed = pop(stop=stop)
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return agreed

    trainer.metrics.pop = popped  # type: ignore[method-assign]
    trainer.train()
    assert trainer.step == 3


def test_a_run_that_was_stopped_goes_on_when_it_is_called_again(tmp_path: Path) -> None:
    """In a notebook: with the weights that it had, not with those that it began with."""
    torch.save(build(tmp_path, "rft").model.state_dict(), tmp_path / "begin.pt")
    trainer = build(tmp_path, "rft", max_steps=3, init_ckpt=str(tmp_path / "begin.pt"))
    pop = trainer.metrics.pop
    trainer.metrics.pop = lambda **_: (pop(stop=False)[0], trainer.step == 2)  # type: ignore[method-assign]
    trainer.train()
    weights = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    assert trainer.step == 2
    taken = []
    step = trainer.train_step

    def looked() -> dict[str, float]:
        taken.append(all(torch.equal(value, weights[key]) for key, value in trainer.model.state_dict().items()))
        return step()

    trainer.train_step = looked  # type: ignore[method-assign]
    trainer.train()
    assert taken == [True]
    assert {path.name for path in (tmp_path / "run").glob("*[!l]")} == {"step_2.pt", "step_3.pt"}


def test_a_run_that_was_interrupted_while_it_read_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What raises in a generator ends it: there would be no further batch, and no word about it."""
    trainer = build(tmp_path, "rft", max_steps=3)
    loader = type(trainer.loader)
    read = loader.__iter__

    def interrupted(self: Any) -> Iterator[Any]:
        yield from itertools.islice(read(self), 1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loader, "__iter__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    assert trainer.step == 1
    trainer.train()
    assert trainer.step == 3


def test_a_run_that_failed_goes_on_from_the_step_that_was_rescued(tmp_path: Path) -> None:
    trainer = build(tmp_path, "rft", max_steps=3)
    step = trainer.train_step

    def fails() -> dict[str, float]:
        if trainer.step == 1:
            raise RuntimeError("the disk of the data is gone")
        return step()

    trainer.train_step = fails  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="is gone"):
        trainer.train()
    trainer.train_step = step  # type: ignore[method-assign]
    trainer.train()
    assert trainer.step == 3
    assert {path.name for path in (tmp_path / "run").glob("*[!l]")} == {"step_1.pt", "step_3.pt"}
    rest = build(tmp_path, "rft", max_steps=4, resume_ckpt="latest")
    rest.train_step()  # by hand, to see whether it runs
    rest.train()
    assert {path.name for path in (tmp_path / "run").glob("*[!l]")} == {"step_1.pt", "step_3.pt", "step_4.pt"}


def test_a_signal_between_steps_waits_for_the_other_ranks(tmp_path: Path) -> None:
    """A rank that left the loop by itself would leave the others waiting for it in their next step."""
    trainer = build(tmp_path, "rft", max_steps=6, save_interval=2)
    said: list[bool] = []
    pop, save = trainer.metrics.pop, trainer.save

    def popped(*, stop: bool = False) -> tuple[dict[str, float], bool]:
        said.append(stop)
        return pop(stop=stop)

    def saved() -> None:
        save()
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.metrics.pop, trainer.save = popped, saved  # type: ignore[method-assign]
    trainer.train()
    assert said == [False, False, True]


def test_workers_do_not_outlive_a_reader_that_dies_of_the_signal(tmp_path: Path) -> None:
    run = start(READ, write_table(tmp_path))
    try:
        assert run.stdout is not None
        workers = [int(pid) for pid in run.stdout.readline().split()]
        assert len(workers) == 2
        os.killpg(run.pid, signal.SIGTERM)
        assert run.wait(timeout=30) == -signal.SIGTERM
        wait_until(lambda: not any(runs(pid) for pid in workers), 30)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_worker_ends_when_its_own_trainer_says_so(tmp_path: Path, method: str) -> None:
    loader = get_loader(
        "cod", 1, dataset_path=write_table(tmp_path), window_length=6, batch_columns=("mouse",), num_workers=1
    )
    loader._loader.multiprocessing_context = method  # type: ignore[attr-defined]
    batches = iter(loader)
    next(batches)
    (worker,) = loader._loader._iterator._workers  # type: ignore[attr-defined]
    worker.terminate()
    worker.join(20)
    assert not worker.is_alive()
