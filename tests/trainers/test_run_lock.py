"""Two runs in one checkpoint folder: the second is refused, and whoever may begin is never kept out.

Run: python -m pytest tests/trainers/test_run_lock.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from owl_wms.errors import ConfigError, TrainingError
from owl_wms.process import Process
from owl_wms.trainers import get_trainer_cls, run_lock
from owl_wms.trainers.run_lock import FILE, RunLock
from tests.trainers.helpers import FixedLoader, batch_for, config, write_table


@contextlib.contextmanager
def other_process(body: Callable[[], None]) -> Iterator[int]:
    """Runs `body` in a forked process that then waits; yields its number once the body is done."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            body()
            os.write(write, b"x")
            time.sleep(60)
            status = 0
        os._exit(status)
    os.close(write)
    try:
        assert os.read(read, 1) == b"x"
        yield pid
    finally:
        os.close(read)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def taken_over(folder: Path) -> bool:
    """Returns whether a new run may begin in the folder; gives it back."""
    lock = RunLock(folder)
    lock.look()
    lock.take()
    name = json.loads((folder / FILE).read_text())["name"]
    lock.release()
    return Process.parse(name) == Process.current() and not (folder / FILE).exists()


def test_a_second_run_is_refused_while_the_first_lives_and_let_in_after_its_kill(tmp_path: Path) -> None:
    with other_process(lambda: RunLock(tmp_path).take()) as pid:
        before = (tmp_path / FILE).read_bytes()
        for begin in (RunLock(tmp_path).look, RunLock(tmp_path).take):
            with pytest.raises(
                ConfigError, match=rf"process {pid} on .* has been training here since .*; wait"
            ) as error:
                begin()
            assert (error.value.key, error.value.path) == ("train.checkpoint_dir", tmp_path)
        assert (tmp_path / FILE).read_bytes() == before
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # its parent has not asked yet
        assert taken_over(tmp_path)


def test_a_stopped_run_is_alive(tmp_path: Path) -> None:
    with other_process(lambda: RunLock(tmp_path).take()) as pid:
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
        with pytest.raises(ConfigError, match="and is stopped; wait for its end, stop it"):
            RunLock(tmp_path).look()


def test_forked_workers_do_not_keep_the_folder(tmp_path: Path) -> None:
    def trains_with_a_worker() -> None:
        RunLock(tmp_path).take()
        if os.fork() == 0:
            time.sleep(5)
            os._exit(0)

    with other_process(trains_with_a_worker) as pid:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert taken_over(tmp_path)


def test_the_same_process_trains_once_at_a_time(tmp_path: Path) -> None:
    first = RunLock(tmp_path)
    first.take()
    with pytest.raises(ConfigError, match="has been training here"):
        RunLock(tmp_path).look()
    first.release()
    assert taken_over(tmp_path)
    first.take()
    run_lock._held.clear()  # as after execv, which keeps number and start
    assert taken_over(tmp_path)
    first.release()


def record(folder: Path, **changes: Any) -> dict[str, Any]:
    """Writes what a run of this process that lives no more has left, with fields of its process or file replaced."""
    process = {key: changes.pop(key) for key in ("host", "boot", "namespace", "pid", "start") if key in changes}
    name = dataclasses.replace(Process.current(), **process).unique_name()
    found = {"name": name, "host": "node7", "since": "2026-01-01", "beat": 3, "at": time.time(), **changes}
    (folder / FILE).write_text(json.dumps(found))
    return found


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE_SECONDS", 0.2)


LEFT = {
    "no such process": {"pid": 2**22 + 1},
    "no such number": {"pid": 2**70},
    "a number of no process": {"pid": 0},
    "its number is another's": {"pid": os.getppid(), "start": 1},
    "the machine was started again": {"boot": "00000000"},
    "another machine, long ago": {"host": "0a0a0a0a", "boot": "00000000", "at": 1e9},
    "another machine that gives no sign": {"host": "0a0a0a0a", "boot": "00000000"},
    "another container": {"namespace": "00000000"},
    "a process that trains no more": {"pid": os.getppid(), "start": 0, "at": 0.0},
    "no beat": {"beat": "x"},
    "an endless beat": {"beat": float("inf")},
    "another name": {"name": "../../etc/passwd"},
    "no time": {"at": None},
}


@pytest.mark.parametrize("changes", LEFT.values(), ids=LEFT.keys())
def test_what_a_dead_run_left_keeps_nobody_out(tmp_path: Path, hurried: None, changes: dict[str, Any]) -> None:
    record(tmp_path, **changes)
    assert taken_over(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\0" * 512, b"[" * 5000, b"{}", b'{"name": 1}', b"\xff\xfe"])
def test_a_damaged_file_keeps_nobody_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    assert taken_over(tmp_path)


def test_a_run_of_another_machine_is_seen_by_its_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = record(tmp_path, host="0a0a0a0a", boot="00000000")

    def sleep(seconds: float) -> None:
        (tmp_path / FILE).write_text(json.dumps({**found, "beat": 4}))

    monkeypatch.setattr(run_lock.time, "sleep", sleep)
    with pytest.raises(ConfigError, match=r"process \d+ on node7 has been training here since 2026-01-01; wait"):
        RunLock(tmp_path).look()
    assert "waiting for a sign of life" in caplog.text


def test_the_number_rises_and_comes_back_after_a_deletion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.01)
    lock = RunLock(tmp_path)
    lock.take()
    (tmp_path / FILE).unlink()
    end = time.monotonic() + 20
    while not ((found := run_lock._read(tmp_path / FILE)) and found.beat > 2) and time.monotonic() < end:
        time.sleep(0.01)
    assert found is not None
    assert found.beat > 2
    lock.release()
    assert not (tmp_path / FILE).exists()


def test_a_run_that_was_taken_for_dead_writes_nothing_more(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.take()
    lock.check(3)
    other = record(tmp_path, pid=os.getppid())
    with pytest.raises(TrainingError, match=r"on node7 has been training here .* gave no sign of life") as error:
        lock.check(3)
    assert error.value.step == 3
    assert lock.lost
    lock.release()
    assert json.loads((tmp_path / FILE).read_text()) == other


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE).mkdir()
    lock = RunLock(tmp_path)
    lock.look()
    lock.take()
    lock.check(1)
    lock.release()
    assert "a second run would not be kept out" in caplog.text


def test_a_trainer_leaves_the_folder_of_another_as_it_is(tmp_path: Path) -> None:
    write_table(tmp_path)
    cfg = config(tmp_path, "rft", max_steps=1)
    folder = tmp_path / "run"
    folder.mkdir()
    arguments = ("rft", cfg.train, cfg.wandb, cfg.model)

    def trainer() -> Any:
        return get_trainer_cls(arguments[0])(*arguments[1:], loader=FixedLoader(batch_for("rft")))

    late = trainer()  # it began to build before the other one had its first step
    lock = RunLock(folder)
    lock.take()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match="has been training here"):
        trainer()
    with pytest.raises(ConfigError, match="has been training here"):
        late.train()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    lock.release()
    trainer().train()
    left = {path.name for path in folder.iterdir()}
    assert left >= {"log.jsonl", "step_1.pt"}
    assert FILE not in left
