"""A step is one unit: what is saved is one whole step with its data position, whatever ends the run.

Run: python -m pytest tests/trainers/test_whole_steps.py
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from owl_wms.data.workers import STOPPING
from owl_wms.errors import CheckpointError, DataError
from owl_wms.trainers import BaseTrainer
from owl_wms.trainers.checkpoints import latest_checkpoint, load_checkpoint, save_output
from owl_wms.trainers.signals import stop_signals
from owl_wms.trainers.undo import Undo
from tests.trainers.helpers import config, train_section, write_table
from tests.trainers.test_signals import TRAIN, runs, start, wait_until
from tests.trainers.test_trainers import build

MUON = {"opt": "Muon", "opt_kwargs": {"lr": 0.02, "adamw_lr": 0.01}}


class Broken(RuntimeError):
    """Raised on purpose."""


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Leaves of nested dictionaries and lists, by path."""
    if isinstance(value, dict):
        return {k: v for name, part in value.items() for k, v in flat(part, f"{key}/{name}").items()}
    if isinstance(value, list):
        return {k: v for name, part in enumerate(value) for k, v in flat(part, f"{key}/{name}").items()}
    return {key: value}


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    a, b = (flat({k: v for k, v in state.items() if k not in ("config", "environment")}) for state in (left, right))
    assert a.keys() == b.keys()
    for key, value in a.items():
        same = torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]
        assert same, key


def in_optimiser(phase: int) -> Callable[[BaseTrainer], None]:
    """Let the third step of a phase's optimiser fail after it has changed the weights."""

    def change(trainer: BaseTrainer) -> None:
        optimiser = trainer.phases[phase].optimiser
        step, done = optimiser.step, []

        def half() -> None:
            step()
            done.append(1)
            if trainer.step == 2:
                raise Broken("no memory")

        optimiser.step = half  # type: ignore[method-assign]

    return change


def in_average(trainer: BaseTrainer) -> None:
    update = trainer.ema.update

    def half(model: torch.nn.Module) -> None:
        update(model)
        if trainer.step == 2:
            raise KeyboardInterrupt

    trainer.ema.update = half  # type: ignore[method-assign]


def in_position(trainer: BaseTrainer) -> None:
    state = trainer.loader.state_dict

    def lost() -> dict[str, int]:
        if trainer.step == 2:
            raise Broken("the loader is gone")
        return state()

    trainer.loader.state_dict = lost  # type: ignore[method-assign]


FAILURES = {"critic": in_optimiser(0), "last optimiser": in_optimiser(-1), "average": in_average, "data": in_position}


@pytest.mark.parametrize("where", FAILURES)
@pytest.mark.parametrize("trainer_id", ["rft", "sforce_vid", "causvid_vid"])
@pytest.mark.parametrize("opt", [{}, MUON], ids=["AdamW", "Muon"])
def test_a_step_that_fails_in_the_middle_was_never_made(
    tmp_path: Path, trainer_id: str, where: str, opt: dict[str, Any]
) -> None:
    whole = build(tmp_path, trainer_id, max_steps=2, checkpoint_dir=str(tmp_path / "whole"), **opt)
    whole.train()
    cut = build(tmp_path, trainer_id, max_steps=9, checkpoint_dir=str(tmp_path / "cut"), **opt)
    FAILURES[where](cut)
    with pytest.raises((Broken, KeyboardInterrupt)):
        cut.train()
    assert cut.step == 2
    assert_same(load_checkpoint(tmp_path / "whole" / "step_2.pt"), load_checkpoint(tmp_path / "cut" / "step_2.pt"))


def test_the_first_step_is_undone_too(tmp_path: Path) -> None:
    trainer = build(tmp_path, "rft", **MUON)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    step = trainer.phases[0].optimiser.step

    def half() -> None:
        step()
        raise Broken

    trainer.phases[0].optimiser.step = half  # type: ignore[method-assign]
    with pytest.raises(Broken):
        trainer.train_step()
    assert all(torch.equal(before[k], v) for k, v in trainer.model.state_dict().items())
    assert not trainer.phases[0].optimiser.state_dict()["muon"]["state"], "state that the step made is gone"


def test_without_memory_for_copies_they_are_made_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "_foreach_copy_", full)
    model = torch.nn.Linear(2, 2)
    before = model.weight.detach().clone()
    with suppress(Broken), Undo() as undo:
        undo.keep(model)
        model.weight.data.add_(1)
        raise Broken
    assert torch.equal(model.weight, before)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has the first two")
def test_which_signals_ask_for_the_end() -> None:
    """Those of terminals, of Slurm and submitit (USR1, USR2), and of Grid Engine (XCPU); each is in the test below."""
    names = {"SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"}
    assert {number.name for number in STOPPING} == names
    before = {name: signal.getsignal(getattr(signal, name)) for name in names}
    with stop_signals() as asked:
        os.kill(os.getpid(), signal.SIGXCPU)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert asked
        assert asked.by == "SIGXCPU"
    assert {name: signal.getsignal(getattr(signal, name)) for name in names} == before


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_every_signal_that_asks_for_the_end_saves_the_step(tmp_path: Path, number: signal.Signals) -> None:
    write_table(tmp_path, clips=40)
    data = {**train_section(tmp_path, "rft")["data_kwargs"], "num_workers": 1}  # type: ignore[dict-item]
    config(tmp_path, "rft", data_kwargs=data, sample_interval=10**9, max_steps=10**9)
    log = tmp_path / "run" / "log.jsonl"
    reset = f"import signal; [signal.signal(n, signal.SIG_DFL) for n in ({int(number)},)]\n"
    if number == signal.SIGINT:
        reset = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    run = start(reset + TRAIN, tmp_path / "rft.yml")
    try:
        wait_until(lambda: run.poll() is not None or (log.exists() and log.read_text().count('"diffusion_loss"') >= 3))
        os.killpg(run.pid, number)
        _, errors = run.communicate(timeout=60)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 0, errors[-2000:]
    assert f"{number.name}: the run ends after step" in errors
    last = latest_checkpoint(tmp_path / "run")
    assert last is not None
    assert load_checkpoint(last)["steps"] == log.read_text().count('"diffusion_loss"')


def test_what_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    write_table(tmp_path, clips=40)
    config(tmp_path, "rft", sample_interval=10**9, max_steps=10**9)
    log = tmp_path / "run" / "log.jsonl"
    run = start("import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + TRAIN, tmp_path / "rft.yml")
    lines = lambda: log.read_text().count('"diffusion_loss"') if log.exists() else 0  # noqa: E731
    try:
        wait_until(lambda: run.poll() is not None or lines() >= 3)
        os.kill(run.pid, signal.SIGHUP)
        wait_until(lambda: run.poll() is not None or lines() >= 12)
        assert runs(run.pid)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate(timeout=60)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_step_and_saves_the_one_before(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
    second: signal.Signals,
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr("owl_wms.trainers.signals._SECOND_AFTER_SECONDS", {signal.SIGINT: 0.0, signal.SIGTERM: 0.0})
    # What is ignored when a run begins stays ignored, and a shell ignores SIGINT for jobs in the background.
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    trainer = build(tmp_path, "sforce_vid", max_steps=9)
    update = trainer.phases[1].update

    def patient(*arguments: Any) -> None:
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), second)
        update(*arguments)

    trainer.phases[1].update = patient  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    said = "SIGINT: the run ends and saves after this step; at once by a second Ctrl-C, or SIGTERM after 0 s"
    assert [record.getMessage() for record in caplog.records][-2:] == [
        said,
        f"the run was stopped; step 2 was saved to {tmp_path / 'run'} first",
    ]
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "step_2.pt"
    build(tmp_path, "sforce_vid", max_steps=2, checkpoint_dir=str(tmp_path / "whole")).train()
    assert_same(*(load_checkpoint(tmp_path / name / "step_2.pt") for name in ("run", "whole")))


def test_a_signal_during_the_last_save_does_not_tear_it(tmp_path: Path) -> None:
    trainer = build(tmp_path, "rft", max_steps=2)
    write = trainer.write_checkpoint

    def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write()

    trainer.write_checkpoint = interrupted  # type: ignore[method-assign]
    trainer.train()
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "step_2.pt"


@pytest.mark.parametrize("opt", [{"opt_kwargs": {"lr": 1e-2}}, {"opt": "Muon", "opt_kwargs": {"lr": 0.02}}])
def test_configured_rates_hold_after_a_resume(
    tmp_path: Path, opt: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    build(tmp_path, "rft", max_steps=1, **opt).train()
    changed = {**opt, "opt_kwargs": {"lr": 1e-5, "weight_decay": 0.5}}
    with caplog.at_level(logging.INFO):
        rest = build(tmp_path, "rft", max_steps=2, resume_ckpt="latest", **changed)
        rest.train()
    group = rest.phases[0].optimiser.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (1e-5, 0.5)
    assert (
        f"train.opt_kwargs.lr is 1e-05 from here on, and was {opt['opt_kwargs']['lr']} in the checkpoint" in caplog.text
    )
    assert rest.phases[0].optimiser.state_dict(), "momenta are the checkpoint's"


def test_the_critics_rate_holds_too(tmp_path: Path) -> None:
    build(tmp_path, "sforce_vid", max_steps=1).train()
    rest = build(tmp_path, "sforce_vid", max_steps=2, resume_ckpt="latest")
    rest.phases[0].optimiser.param_groups[0]["lr"] = 7e-4  # as the configuration would
    rest.resume()
    assert rest.phases[0].optimiser.param_groups[0]["lr"] == 7e-4


OTHER_OPTIMISERS = [
    ({}, {"opt": "SGD", "opt_kwargs": {"lr": 0.1}}, "belongs to another class than train.opt"),
    ({}, MUON, "is a torch.optim class's, and train.opt names another"),
    (MUON, {}, "is Muon's, and train.opt names another"),
    ({}, {"opt_kwargs": {"lr": 0.1, "amsgrad": True}}, "without amsgrad, which train.opt_kwargs adds"),
    (MUON, {**MUON, "opt_kwargs": {"lr": 0.02, "adamw_keys": ["core.proj_in"]}}, "does not continue this run"),
]


@pytest.mark.parametrize(("first", "then", "message"), OTHER_OPTIMISERS)
def test_another_optimiser_is_one_line(
    tmp_path: Path, first: dict[str, Any], then: dict[str, Any], message: str
) -> None:
    build(tmp_path, "rft", max_steps=1, **first).train()
    with pytest.raises(CheckpointError, match=message) as caught:
        build(tmp_path, "rft", resume_ckpt="latest", **then).resume()
    assert "\n" not in str(caught.value)


def test_another_width_is_one_line_and_a_count(tmp_path: Path) -> None:
    build(tmp_path, "rft", max_steps=1).train()
    wider = build(tmp_path, "rft", resume_ckpt="latest")
    wider.model = type(wider.model)(wider.model_cfg.model_copy(update={"d_model": 64}))
    with pytest.raises(CheckpointError, match=r"in the file and .* in the configured model \(the first of \d+ mism"):
        wider.resume()


def test_a_checkpoint_of_another_trainer_says_what_it_lacks(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(
        CheckpointError, match=r"has no 'model', so it does not continue a run of 'rft'; train.init_ckpt"
    ):
        build(tmp_path, "rft", resume_ckpt=str(tmp_path / "weights.pt")).resume()


def test_a_run_starts_from_weights_alone(tmp_path: Path) -> None:
    source = build(tmp_path, "rft", max_steps=3, output_path=str(tmp_path / "out.safetensors"))
    source.train()
    begun = build(tmp_path, "rft", init_ckpt=str(tmp_path / "out.safetensors"), checkpoint_dir=str(tmp_path / "b"))
    begun.resume()
    assert begun.step == 0
    for mine, theirs in zip(begun.model.parameters(), source.ema.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for mine, averaged in zip(begun.model.parameters(), begun.ema.model.parameters(), strict=True):
        assert torch.equal(mine, averaged)
    # A run that continues another takes that one's weights, and does not look at the file.
    again = build(tmp_path, "rft", init_ckpt=str(tmp_path / "gone.pt"), resume_ckpt="latest")
    again.resume()
    assert again.step == 3


def test_tied_parameters_are_saved_under_both_names(tmp_path: Path) -> None:
    shared = torch.randn(4, 4)
    save_output(tmp_path / "tied.safetensors", {"a": shared, "b": shared, "c": shared.T})
    from safetensors.torch import load_file

    found = load_file(tmp_path / "tied.safetensors")
    assert torch.equal(found["a"], shared)
    assert torch.equal(found["b"], shared)
    assert torch.equal(found["c"], shared.T)


def test_workers_ignore_a_terminal_that_closes(tmp_path: Path) -> None:
    """The signals of a terminal reach loader processes too; they must live until the last step is saved."""
    code = (
        "import signal; from owl_wms.data.workers import STOPPING, keep_reading; keep_reading(0)\n"
        "import os\nfor n in STOPPING:\n    n != signal.SIGTERM and os.kill(os.getpid(), n)\nprint('alive')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "alive", done.stderr


def test_training_goes_on_in_the_same_process_after_a_step_that_was_stopped(tmp_path: Path) -> None:
    whole = build(tmp_path, "rft", max_steps=4, target_batch_size=4, checkpoint_dir=str(tmp_path / "whole"))
    whole.train()
    trainer = build(tmp_path, "rft", max_steps=4, target_batch_size=4)
    step, stopped = trainer.phases[0].optimiser.step, []

    def once() -> None:
        if trainer.step == 2 and not stopped:
            stopped.append(1)
            raise KeyboardInterrupt
        step()

    trainer.phases[0].optimiser.step = once  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert_same(*(load_checkpoint(tmp_path / name / "step_4.pt") for name in ("run", "whole")))
    cut, undisturbed = ([{**v, "time": 0.0} for v in run.losses] for run in (trainer, whole))
    assert cut == undisturbed


@pytest.mark.parametrize("part", [{"steps": -5}, {"data": {"epoch": float("inf"), "samples": 0}}])
def test_positions_that_cannot_be_are_one_line(tmp_path: Path, part: dict[str, Any]) -> None:
    build(tmp_path, "rft", max_steps=1).train()
    torch.save({**load_checkpoint(tmp_path / "run" / "step_1.pt"), **part}, tmp_path / "bad.pt")
    trainer = build(tmp_path, "rft", resume_ckpt=str(tmp_path / "bad.pt"))
    trainer.loader.load_state_dict = lambda state: int(state.get("epoch", 0))  # type: ignore
    with pytest.raises(CheckpointError, match="does not continue this run"):
        trainer.resume()


def test_a_loader_without_batches_is_not_asked_for_ever(tmp_path: Path) -> None:
    trainer = build(tmp_path, "rft")
    trainer._batches = trainer.endless([], "data_kwargs")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="gives no batches"):
        trainer.train_step()
