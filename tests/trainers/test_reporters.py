"""Services that show a run cannot end it: they fail at any call, are not installed, or need no key.

Run: python -m pytest tests/trainers/test_reporters.py
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import signal
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from owl_wms.configs.vae import WandbConfig
from owl_wms.trainers import reporters
from owl_wms.trainers.reporters import Reporter
from owl_wms.trainers.run_log import RunLog
from tests.trainers.test_trainers import build

SECTION = WandbConfig(name="team", project="p", run_name="r")
ALONE = (
    *("WANDB_CONFIG_DIR", "WANDB_DIR", "WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"),
    "WANDB_IDENTITY_TOKEN_FILE",
)


class Service:
    """A stand-in for both services, which fails at the calls of one name from the second on."""

    def __init__(self, failing: str) -> None:
        self.failing, self.calls = failing, []  # type: ignore[var-annotated]

    def _call(self, name: str, *arguments: Any, **_: Any) -> None:
        self.calls.append((name, *arguments))
        if name == self.failing and sum(call[0] == name for call in self.calls) > 1 - (name in ("finish", "close")):
            raise BrokenPipeError("the service process is gone")

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **more: self._call(name, *arguments, **more)


def install(monkeypatch: pytest.MonkeyPatch, service: Any) -> list[dict[str, Any]]:
    """Put the stand-in in the place of wandb and TensorBoard; returns the arguments of `wandb.init`."""
    started: list[dict[str, Any]] = []

    def init(**settings: Any) -> Any:
        started.append(settings)
        return service

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Video=lambda *_, **__: None))
    board = types.SimpleNamespace(SummaryWriter=lambda folder: service)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    for name in ALONE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    return started


@pytest.mark.parametrize("failing", ["log", "add_scalar", "add_text", "finish", "close"])
def test_a_service_that_breaks_down_costs_one_warning(
    tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service(failing)
    install(monkeypatch, service)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    trainer = build(tmp_path, "rft", max_steps=4, tensorboard=True)
    trainer.wandb_cfg = SECTION
    trainer.evaluator._batches = None
    sample = trainer.sample
    calls: list[int] = []

    def once(*arguments: Any) -> Any:  # gives the run_log texts to show
        calls.append(1)
        if len(calls) in (1, 2):
            raise RuntimeError("no clip")
        return sample(*arguments)

    trainer.sample = once  # type: ignore[assignment,method-assign]
    trainer.train_cfg = trainer.train_cfg.model_copy(update={"sample_interval": 1})
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.step == 4
    assert caplog.text.count("failed (the service process is gone): the run goes on") == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "diffusion_loss" in line] == [1, 2, 3, 4]
    after = [call[0] for call in service.calls]
    assert after.count(failing) <= 2, "and it is not called again"


@pytest.mark.parametrize("failed", [False, True])
def test_a_run_that_fails_is_not_shown_as_finished(
    tmp_path: Path, failed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B takes exit code 0 for a finished run, any other for a failed one."""
    codes: list[int] = []
    install(
        monkeypatch, types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda exit_code: codes.append(exit_code))
    )
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    trainer = build(tmp_path, "rft", max_steps=2)
    trainer.wandb_cfg = SECTION
    if failed:
        update, calls = trainer.phases[0].update, iter((True, False))

        def once(*arguments: Any) -> None:
            if not next(calls):
                raise MemoryError
            update(*arguments)

        monkeypatch.setattr(trainer.phases[0], "update", once)
    with pytest.raises(MemoryError) if failed else contextlib.nullcontext():
        trainer.train()
    assert codes == [int(failed)]


@pytest.mark.parametrize(
    ("variables", "starts"),
    [
        ({}, False),
        ({"WANDB_API_KEY": "k"}, True),
        ({"WANDB_MODE": "offline"}, True),
        ({"WANDB_MODE": "DISABLED"}, True),
        ({"WANDB_MODE": "online"}, False),
        ({"NETRC": "netrc"}, True),
        ({"NETRC": "netrc", "WANDB_BASE_URL": "https://wandb.example.org"}, False),
        ({"NETRC": "broken"}, False),
        ({"WANDB_DIR": "offline"}, True),
        ({"WANDB_DIR": "offline", "WANDB_MODE": "online"}, False),
        ({"WANDB_CONFIG_DIR": "offline/wandb"}, True),
        ({"WANDB_IDENTITY_TOKEN_FILE": "token"}, True),
        ({"WANDB_CONFIG_DIR": "key"}, True),
        ({"WANDB_CONFIG_DIR": "token"}, True),
        ({"WANDB_CONFIG_DIR": "host"}, False),
        ({"WANDB_CONFIG_DIR": "host", "NETRC": "netrc"}, False),
        ({"WANDB_CONFIG_DIR": "host", "NETRC": "netrc_of_host"}, True),  # wandb login --host
        ({"WANDB_CONFIG_DIR": "host", "NETRC": "netrc", "WANDB_BASE_URL": "https://api.wandb.ai"}, True),
        ({"WANDB_CONFIG_DIR": "broken"}, False),
    ],
)
def test_wandb_starts_where_it_needs_no_key_or_has_one(
    tmp_path: Path,
    variables: dict[str, str],
    starts: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    started = install(monkeypatch, Service(""))
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / "broken").write_text("machine\n\x00 ???")
    (tmp_path / "offline" / "wandb").mkdir(parents=True)
    (tmp_path / "offline" / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    written = {"key": "api_key = k", "token": "identity_token_file = t", "host": "base_url = https://wandb.example.org"}
    for folder, line in written.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "settings").write_text(f"[default]\n{line}\n")
    (tmp_path / "netrc_of_host").write_text("machine wandb.example.org login user password secret\n")
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value) if name == "NETRC" or name.endswith("DIR") else value)
    with caplog.at_level(logging.WARNING):
        RunLog(tmp_path, SECTION, {}).close()
    assert bool(started) == starts
    assert ("logging to disk only" in caplog.text) == (not starts)


def test_services_that_are_not_installed_cost_a_warning_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, Service(""))
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with caplog.at_level(logging.WARNING):
        run_log = RunLog(tmp_path, SECTION, {}, tensorboard=True)
    run_log.log(1, {"loss": 1.0})
    run_log.close()
    assert "Weights & Biases is not available" in caplog.text
    assert "TensorBoard is not available" in caplog.text
    assert json.loads((tmp_path / "log.jsonl").read_text())["loss"] == 1.0


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    run_log = RunLog(tmp_path, None, {})
    run_log._file.close()
    run_log._file = full.open("a", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        run_log.log(1, {"loss": 1.0})
        run_log.log(2, {"loss": 1.0})
        run_log.close()
    assert caplog.text.count("no more lines are written: No space left on device") == 1


def test_lines_are_written_again_once_the_disk_has_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_log = RunLog(tmp_path, None, {})
    flush, full = run_log._file.flush, [True, True, False, True, False]

    def flushed() -> None:
        if full.pop(0):
            raise OSError(errno.ENOSPC, "No space left on device")
        flush()

    run_log._file = types.SimpleNamespace(  # type: ignore[assignment]
        write=run_log._file.write, flush=flushed, close=run_log._file.close, name="log.jsonl"
    )
    with caplog.at_level(logging.WARNING):
        for step in range(1, 6):
            run_log.log(step, {"loss": 1.0})
    run_log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5], "what was in the buffer is not lost either"
    assert caplog.text.count("no more lines are written") == 2, "once each time that it is full"


def test_scalars_and_texts_reach_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service("")
    install(monkeypatch, service)
    run_log = RunLog(tmp_path, None, {}, tensorboard=True)
    run_log.log(3, {"loss": 0.5, "bad": float("nan"), "none": None})
    run_log.clips(3, [tmp_path / "a.mp4"], "eager")
    run_log.close()
    assert ("add_scalar", "loss", 0.5, 3) in service.calls
    assert ("add_text", "bad", "nan", 3) in service.calls
    assert ("close",) in service.calls


@pytest.mark.parametrize("error", [SystemExit, asyncio.CancelledError, GeneratorExit])
@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_a_service_that_raises_no_exception_ends_nothing(
    tmp_path: Path,
    failing: str,
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`sys.exit` in a library, and the cancelled tasks of its event loop, are no `Exception`."""

    def leave(*_: Any, **__: Any) -> None:
        raise error("two\nlines")

    service = types.SimpleNamespace(
        **{name: leave if name == failing else (lambda *_, **__: None) for name in ("log", "finish")}
    )
    install(monkeypatch, service)
    if failing == "init":
        monkeypatch.setattr(sys.modules["wandb"], "init", leave)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    with caplog.at_level(logging.WARNING):
        run_log = RunLog(tmp_path, SECTION, {})
        run_log.log(1, {"loss": 1.0})
        run_log.close()
    (said,) = [record.getMessage() for record in caplog.records if "Weights & Biases" in record.getMessage()]
    assert "two lines" in said
    assert json.loads((tmp_path / "log.jsonl").read_text())["loss"] == 1.0


class OutOfTimeError(Exception):
    pass


def out_of_time(*_: object) -> None:
    raise OutOfTimeError


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGALRM])
def test_what_the_user_asks_for_passes_through_a_service(number: signal.Signals) -> None:
    """Ctrl-C, and the exception of the caller's own signal handler."""
    before = signal.signal(number, out_of_time if number == signal.SIGALRM else signal.default_int_handler)
    try:
        reporter = Reporter("x", types.SimpleNamespace(log=lambda *_: signal.raise_signal(number)))  # type: ignore[arg-type]
        with pytest.raises((KeyboardInterrupt, OutOfTimeError)):
            reporter.log(1, {})
    finally:
        signal.signal(number, before)


def test_a_service_that_never_answers_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reporters, "SECONDS", 0.05)
    ended = threading.Event()
    calls: list[str] = []

    def hang(failed: bool) -> None:
        calls.append("close")
        ended.wait(60)

    reporter = Reporter("x", types.SimpleNamespace(close=hang))  # type: ignore[arg-type]
    reporter.close()
    reporter.close()
    ended.set()
    assert calls == ["close"]
    assert caplog.text.count("x failed (no answer in 0.05 s): the run goes on") == 1
