"""Ray itself, as a local cluster of two CPU workers: the same outputs, also when an actor dies.

Run: python -m pytest tests/batch/test_on_ray.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from owl_wms.batch.items import LATENT_SUFFIXES
from owl_wms.batch.run import run, status
from tests.batch.fake import fake_job, frames_of, make_inputs, outputs_of

ray = pytest.importorskip("ray", reason="Ray comes with the extra ray")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A cluster of two CPUs whose processes find this checkout."""
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False,
        runtime_env={"env_vars": environment},
    )  # fmt: skip
    yield
    ray.shutdown()


def test_each_item_once_although_actors_die(tmp_path: Path) -> None:
    texts = {f"{n:02}.pt": f"item {n}" for n in range(40)}
    texts |= {"03.pt": "bad", "20.pt": f"die-once:{tmp_path / 'died'}"}
    folder, job = make_inputs(tmp_path / "in", texts), fake_job(tmp_path / "out")
    outcomes = [o for o in run(job, str(folder), LATENT_SUFFIXES, engine="ray", workers=2) if o.key]
    assert (tmp_path / "died").exists()
    assert sorted(os.path.basename(o.item) for o in outcomes) == sorted(texts)
    assert [o.reason for o in outcomes if o.state == "failed"] == ["it is bad"]
    found = outputs_of(job)
    assert set(found) == {f"{name}.npy" for name in texts if name != "03.pt"}
    for name, data in found.items():
        assert data.endswith(frames_of(texts[name.removesuffix(".npy")]).numpy().tobytes())
    state = status(job, str(folder), LATENT_SUFFIXES)
    assert (state.done, state.failed, state.left) == (39, 1, 1)
