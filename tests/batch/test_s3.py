"""Input and output on an object server: whole objects, a lock, a second run, and a bucket that refuses.

Run: python -m pytest tests/batch/test_s3.py
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from owl_wms.batch import BlockWorker, Job
from owl_wms.batch.items import LATENT_SUFFIXES, cut, list_items
from owl_wms.batch.ledger import run_name
from owl_wms.batch.lock import held
from owl_wms.batch.run import run, status, verify
from owl_wms.batch.store import Store
from owl_wms.batch.worker import Outcome
from owl_wms.errors import BatchError, DataError
from tests.batch.fake import fake_job, frames_of

pytest.importorskip("s3fs", reason="s3fs comes with the extra dataset")
pytest.importorskip("moto", reason="moto serves the buckets of this test")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of a bucket on a server of this machine, which a proxy must not be asked for."""
    from moto.server import ThreadedMotoServer

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
    texts = {f"{n % 2}/{n}.pt": f"item {n}" for n in range(6)} | {"bad.pt": "bad"}
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
    with held(job, "run"), pytest.raises(BatchError, match="another run is writing here"), held(job, "run"):
        pass
    old = json.dumps({"owner": "gone", "at": time.time() - 1000}).encode()
    fsspec.filesystem("s3").pipe_file(f"{job.out}/_ledger/run.lock", old)
    with held(job, "run"):
        pass


def test_what_cannot_be_reached_is_one_line(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="s3://nowhere/in"):
        list(list_items("s3://nowhere/in", LATENT_SUFFIXES))
    (tmp_path / "a.pt").write_text("a")
    with pytest.raises(BatchError, match=r"s3://nowhere/out.*cannot be written"):
        plain(fake_job("s3://nowhere/out"), str(tmp_path))
