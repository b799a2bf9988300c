"""Ray itself, as a local cluster of two CPU workers: the same outputs, also when an actor dies.

Run: python -m pytest tests/batch/test_on_ray.py
"""

from __future__ import annotations

import json
import os
import re
import runpy
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from owl_wms.batch import DecodeClips, lock
from owl_wms.batch.items import LATENT_SUFFIXES, list_items
from owl_wms.batch.job import announce
from owl_wms.batch.lock import at_work, held, quiet
from owl_wms.batch.on_ray import _RayWorker, join
from owl_wms.batch.progress import Tally
from owl_wms.batch.run import run, status
from owl_wms.batch.store import Store
from owl_wms.batch.worker import Outcome
from owl_wms.errors import BatchError, ConfigError
from owl_wms.media.arrays import save_array
from owl_wms.media.pictures import to_bytes
from owl_wms.utils.owl_vae_bridge import get_decoder_only
from tests.batch.fake import fake_job, frames_of, make_inputs, outputs_of
from tests.batch.test_clips import latents

ray = pytest.importorskip("ray", reason="Ray comes with the extra ray")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A cluster of two CPUs whose processes find this checkout; `local` never joins one that runs on this machine."""
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False,
        runtime_env={"env_vars": environment},
    )  # fmt: skip
    yield
    ray.shutdown()


def test_each_item_once_although_actors_die(tmp_path: Path) -> None:
    texts = {f"{n:02}.pt": f"item {n}" for n in range(39)} | {"no UTF-8: \udcff.pt": "item 39"}
    texts |= {"03.pt": "bad", "20.pt": f"die-once:{tmp_path / 'died'}"}
    folder, job, tally = make_inputs(tmp_path / "in", texts), fake_job(tmp_path / "out"), Tally()
    outcomes = [o for o in run(job, str(folder), LATENT_SUFFIXES, engine="ray", workers=2, tally=tally) if o.key]
    assert (tmp_path / "died").exists()
    assert tally.sum()[:3] == (39, 1, 78)
    assert len({worker for worker in tally.workers if worker}) >= 2, "two actors worked"
    assert sorted(os.path.basename(o.item) for o in outcomes) == sorted(texts)
    assert [o.reason for o in outcomes if o.state == "failed"] == ["it is bad"]
    found = outputs_of(job)
    assert set(found) == {f"{name}.npy" for name in texts if name != "03.pt"}
    for name, data in found.items():
        assert data.endswith(frames_of(texts[name.removesuffix(".npy")]).numpy().tobytes())
    state = status(job, str(folder), LATENT_SUFFIXES)
    assert (state.done, state.failed, state.left) == (39, 1, 1)


def test_what_ends_a_run_is_told_as_it_is(tmp_path: Path) -> None:
    folder, job = make_inputs(tmp_path / "in", {"a.pt": "unstored", "b.pt": "b"}), fake_job(tmp_path / "out")
    with pytest.raises(BatchError, match=r"^the bucket is gone$"):
        list(run(job, str(folder), LATENT_SUFFIXES, engine="ray", workers=1))


def test_what_the_cluster_has_counts_and_an_absent_one_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)  # the driver's machine
    for have in ({"CPU": 2.0}, {"CPU": 64.0, "GPU": 16.0}):
        monkeypatch.setattr(ray, "cluster_resources", lambda have=have: have)
        gpus = int(have.get("GPU", 0))
        assert join(None, None) == (gpus or 1, float(bool(gpus)))
        assert join(4, None) == (4, float(bool(gpus)))
    assert join(4, True) == (4, 1.0)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(ConfigError, match="the Ray cluster has no GPU"):
        join(1, True)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ConfigError, match=rf"^no Ray cluster answers at {address}: .*refused; start it"):
            join(None, None)


def test_an_actor_of_a_run_that_is_over_does_nothing(tmp_path: Path) -> None:
    folder, job = make_inputs(tmp_path / "in", {"a.pt": "a"}), fake_job(tmp_path / "out")
    with held(job), quiet(job):
        announce(job, "now")
    row = {"path": [str(tmp_path / "rows")], "start": [0], "stop": [1]}
    (outcome,) = _RayWorker(job, "before")(row)["outcome"]
    assert Outcome(*json.loads(outcome)).reason.endswith("another run has begun; this one ends")
    store = Store(job.out)
    line = json.dumps(["block", [list(item) for item in list_items(str(folder), LATENT_SUFFIXES)]]).encode()
    store.write("rows", line)
    row = {"path": [store.path("rows")], "start": [0], "stop": [len(line)]}
    unloadable = replace(job, make=partial(DecodeClips, None, "gone.pth", family="taehv"))
    (outcome,) = _RayWorker(unloadable, "now")(row)["outcome"]
    assert Outcome(*json.loads(outcome)).state == "ends"
    assert "gone.pth" in Outcome(*json.loads(outcome)).reason
    assert outputs_of(job).keys() == {"rows"}
    (Path(job.out) / "rows").unlink()
    assert outputs_of(job) == {}
    with at_work(Store(job.out)), pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock, "_ACTORS_SECONDS", 0.1)
        with pytest.raises(BatchError, match="actors of an earlier run are at work"):
            list(run(job, str(folder), LATENT_SUFFIXES, engine="local"))


def test_map_batches_as_the_page_has_it(tmp_path: Path, files: tuple[str, str]) -> None:
    page = (ROOT / "docs/dataset.md").read_text(encoding="utf-8")
    (block,) = (text for text in re.findall(r"```python\n(.*?)```", page, re.S) if "map_batches" in text)
    decode = DecodeClips(*files, device="cpu", tensorrt=False)
    clips = [latents(3, seed).numpy() for seed in range(4)]
    for number, clip in enumerate(clips):
        np.save(tmp_path / f"{number}.npy", clip)
    here = {"latents/": f"{tmp_path}/", "dec.yml": files[0], "dec.pt": files[1], "num_gpus=1": "num_gpus=0"}
    for written, there in here.items():
        assert written in block
        block = block.replace(written, there)
    names: dict[str, Any] = {}
    exec(compile(block, "docs/dataset.md", "exec"), names)
    found = {Path(row["name"]).stem: row["frames"] for row in names["frames"].iter_rows()}
    assert sorted(found) == ["0", "1", "2", "3"]
    for number, clip in enumerate(clips):
        assert np.array_equal(found[str(number)], decode({"latents": clip[None]})["frames"][0])


def test_the_example_decodes_what_it_can(
    tmp_path: Path, files: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of one and of two clips are decoded whole, and a bad one costs no other."""
    decoder = get_decoder_only(None, *files, device="cpu", dtype=torch.float32)
    channels = decoder.latent_channels
    clips = {"one": torch.randn(2, channels, 4, 4), "two": torch.randn(2, 1, channels, 4, 4)}
    for name, clip in {**clips, "bad": torch.randn(2, channels + 1, 4, 4)}.items():
        save_array(tmp_path / f"in/{name}.pt", clip)
    context = ray.data.DataContext.get_current()
    monkeypatch.setattr(context, "max_errored_blocks", context.max_errored_blocks)  # the script's choice ends with it
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["decode_dataset.py", "in", "out", *files])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "examples/decode_dataset.py"), run_name="__main__")
    assert ended.value.code == "error: decoded 2 of the 3 .pt files in in"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"one.npy", "two.npy"}
    for name, clip in clips.items():
        with torch.no_grad():
            wanted = to_bytes(decoder(clip.reshape(2, channels, 4, 4)))
        got = torch.from_numpy(np.load(tmp_path / f"out/{name}.npy"))
        assert (got.int() - wanted.int()).abs().max() <= 1
