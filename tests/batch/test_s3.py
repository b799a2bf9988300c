"""Input and output on an object server: whole objects, a lock, a second run, and a bucket that refuses.

Run: python -m pytest tests/batch/test_s3.py
"""

from __future__ import annotations

import json
import multiprocessing
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from owl_wms.batch import BlockWorker, Job, lock
from owl_wms.batch.items import LATENT_SUFFIXES, cut, list_items
from owl_wms.batch.ledger import run_name
from owl_wms.batch.lock import held
from owl_wms.batch.run import run, status, verify
from owl_wms.batch.store import Store
from owl_wms.batch.worker import Outcome
from owl_wms.errors import BatchError, ConfigError, DataError
from tests.batch.fake import fake_job, frames_of, make_inputs

pytest.importorskip("s3fs", reason="s3fs comes with the extra dataset")
pytest.importorskip("moto", reason="moto serves the buckets of this test")


class Gate:
    """Stands before the server: one request at a time, as S3 decides on conditions, and no writing if it is closed."""

    closed_to = ""

    def __init__(self, application: Any) -> None:
        self._application, self._one = application, threading.Lock()

    def __call__(self, request: dict[str, Any], respond: Any) -> Any:
        writes = request["REQUEST_METHOD"] in ("PUT", "POST", "DELETE")
        if writes and Gate.closed_to and Gate.closed_to in request["PATH_INFO"]:
            respond("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        with self._one:
            return self._application(request, respond)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of a bucket on a server of this machine, which a proxy must not be asked for."""
    from moto.moto_server import threaded_moto_server
    from moto.server import ThreadedMotoServer

    dispatcher = threaded_moto_server.DomainDispatcherApplication
    monkeypatch.setattr(threaded_moto_server, "DomainDispatcherApplication", lambda make: Gate(dispatcher(make)))
    monkeypatch.setattr(Gate, "closed_to", "")

    process = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    process.start()
    _, port = process.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    name = f"bucket-{port}"  # servers of one process share their buckets
    fsspec.filesystem("s3").mkdir(name)
    yield f"s3://{name}"
    process.stop()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def plain(job: Job, source: str) -> list[Outcome]:
    worker, name = BlockWorker(job), run_name()
    blocks = ((f"{name}-{n}", block) for n, block in enumerate(cut(list_items(source, LATENT_SUFFIXES))))
    return [o for o in worker.run(blocks) if o.key]


def test_from_a_bucket_to_a_bucket_and_once_more(bucket: str) -> None:
    fs = fsspec.filesystem("s3")
    texts = {f"{n % 2}/a::{n}.pt": f"item {n}" for n in range(6)} | {"bad.pt": "bad"}
    for name, text in texts.items():
        fs.pipe_file(f"{bucket}/in/{name}", text.encode())
    fs.pipe_file(f"{bucket}/in/notes.md", b"no input")
    job = fake_job(f"{bucket}/out")
    assert [o.state for o in plain(job, f"{bucket}/in")].count("done") == 6
    for name in set(texts) - {"bad.pt"}:
        with fs.open(f"{job.out}/{name}.npy") as file:
            assert np.array_equal(np.load(file), frames_of(texts[name]).numpy())
    assert list(verify(job)) == []
    state = status(job, f"{bucket}/in", LATENT_SUFFIXES)
    assert (state.done, state.failed, state.left) == (6, 1, 1)
    fs.pipe_file(f"{bucket}/in/bad.pt", b"good now")
    outcomes = [o for o in run(job, f"{bucket}/in", LATENT_SUFFIXES, engine="local") if o.key]
    assert [(o.item, o.state) for o in outcomes] == [(f"{bucket}/in/bad.pt", "done")]
    assert not [name for name in fs.find(job.out) if "staging" in name or name.endswith(".lock")]
    assert not [p for p in Store(job.out).staging("").rglob("*") if p.is_file()]


def test_a_second_run_refuses_and_an_old_lock_is_taken(bucket: str) -> None:
    job = fake_job(f"{bucket}/out")
    fs = fsspec.filesystem("s3")
    for mine, other in ((None, None), (None, 1), (1, None), (1, 1)):
        with held(job, mine), pytest.raises(BatchError, match="another run is writing here"), held(job, other):
            pass
    with held(job, 1), held(job, 2):
        pass
    old = json.dumps({"owner": "gone", "at": time.time() - 1000}).encode()
    fs.pipe_file(f"{job.out}/_ledger/run.lock", old)
    with held(job):
        pass
    # Of several that find the old lock at once, one takes it.
    fs.pipe_file(f"{job.out}/_ledger/run.lock", old)
    barrier, taken = threading.Barrier(6), list[int]()
    threads = [threading.Thread(target=take_or_wait, args=(job, barrier, taken)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert taken == [1]
    assert fs.find(job.out) == []


def take_or_wait(job: Job, barrier: threading.Barrier, taken: list[int]) -> None:
    """Tries to take the lock at the same time as others; nobody goes on before all have tried."""
    barrier.wait(30)
    try:
        with held(job):
            taken.append(1)
            barrier.wait(30)
    except BatchError:
        barrier.wait(30)


def test_a_lock_that_another_run_took_ends_this_one(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"{bucket}/out")
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.04)
    mine = lock._Object(store, "run.lock")
    mine.take()
    mine.check()
    store.write("run.lock", json.dumps({"owner": "another", "at": time.time() + 1000}).encode())
    mine.renew()  # returns at the first renewal that finds another owner
    with pytest.raises(BatchError, match="another run took over"):
        mine.check()
    mine.release()
    assert store.read("run.lock") is not None, "the other one's lock stays"


@pytest.mark.usefixtures("forked")
def test_a_bucket_that_refuses_and_then_does_not(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {f"{n:02}.pt": f"item {n}" for n in range(20)}
    folder, job = make_inputs(tmp_path / "in", texts), fake_job(f"{bucket}/out")
    fs = fsspec.filesystem("s3")
    for closed in ("/out/", "09.pt.npy"):  # nothing can be written; the bucket closes in the middle of a run
        monkeypatch.setattr(Gate, "closed_to", closed)
        with pytest.raises(BatchError, match=r"s3://.*out/generation-\w+: cannot be written: .*Access Denied"):
            list(run(job, str(folder), LATENT_SUFFIXES, engine="local"))
    assert f"{job.out}/09.pt.npy" not in fs.find(job.out, withdirs=False)
    monkeypatch.setattr(Gate, "closed_to", "")
    outcomes = [o for o in run(job, str(folder), LATENT_SUFFIXES, engine="local") if o.key]
    assert {o.state for o in outcomes} == {"done"}
    names = sorted(name.rpartition("/")[2] for name in fs.find(job.out) if name.endswith(".npy"))
    assert names == sorted(f"{name}.npy" for name in texts)
    for name, text in texts.items():
        with fs.open(f"{job.out}/{name}.npy") as file:
            assert np.array_equal(np.load(file), frames_of(text).numpy())
    assert not [p for p in Store(job.out).staging("").rglob("*") if p.is_file()]


@pytest.mark.usefixtures("forked")
def test_two_runs_at_once_on_a_bucket(bucket: str, tmp_path: Path) -> None:
    texts = {f"{n:02}.pt": f"item {n}" for n in range(8)}
    folder, fork = make_inputs(tmp_path / "in", texts), multiprocessing.get_context("fork")
    for kind in ("threads", "processes"):
        job = fake_job(f"{bucket}/{kind}")
        barrier: Any = threading.Barrier(2) if kind == "threads" else fork.Barrier(2)
        said: Any = [] if kind == "threads" else fork.Manager().list()

        def one(job: Job = job, barrier: Any = barrier, said: Any = said) -> None:
            barrier.wait(30)
            try:
                said.append(len([o for o in run(job, str(folder), LATENT_SUFFIXES, engine="local") if o.key]))
            except BatchError as error:
                said.append(str(error))

        both: Any = [(threading.Thread if kind == "threads" else fork.Process)(target=one) for _ in range(2)]
        for each in both:
            each.start()
        for each in both:
            each.join(60)
        assert len(said) == 2
        assert all(outcome in (0, 8) or "another run is writing here" in outcome for outcome in said), list(said)
        state = status(job, str(folder), LATENT_SUFFIXES)
        if state.left:  # each saw the other's lock and neither went on
            assert not [outcome for outcome in said if outcome in (0, 8)]
            assert len([o for o in run(job, str(folder), LATENT_SUFFIXES, engine="local") if o.key]) == 8
        done = [line["key"] for line in job.ledger().lines() if line["event"] == "done"]
        assert len(done) == len(set(done)) == 8
        assert list(verify(job)) == []


def test_what_cannot_be_reached_is_one_line(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="s3://nowhere/in"):
        list(list_items("s3://nowhere/in", LATENT_SUFFIXES))
    (tmp_path / "a.pt").write_text("a")
    with pytest.raises(BatchError, match=r"s3://nowhere/out.*cannot be written"):
        plain(fake_job("s3://nowhere/out"), str(tmp_path))


def test_a_server_that_does_not_answer_is_one_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its library's errors are no OSError."""
    job = fake_job(f"{bucket}/out")
    fsspec.filesystem("s3").pipe_file(f"{bucket}/in/a.pt", b"unreadable")
    assert [o.reason for o in plain(job, f"{bucket}/in")] == ["is unreadable"], "without the path of the local copy"
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        with pytest.raises(DataError, match="/in: cannot be listed: Could not connect"):
            list(list_items(f"{bucket}/in", LATENT_SUFFIXES))
        with pytest.raises(ConfigError, match="/other: cannot be used: Could not connect"):
            fake_job(f"{bucket}/other")
        with pytest.raises(BatchError, match="cannot be written: Could not connect"), held(job):
            pass
        with pytest.raises(BatchError, match="cannot be written: Could not connect"):
            status(job, f"{bucket}/in", LATENT_SUFFIXES)
