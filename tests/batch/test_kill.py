"""`kill -9` of workers, drivers and Ray's nodes: after a rerun the outputs are those of a quiet run, each made once.

The quick form kills at named points of the code, in forked processes. The slow form kills real processes at random
moments, under local workers and under Ray.

Run: python -m pytest tests/batch/test_kill.py [--full-counts]
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from owl_wms.batch import BlockWorker, Job, local
from owl_wms.batch.items import LATENT_SUFFIXES, cut, list_items
from owl_wms.batch.ledger import Part, run_name
from owl_wms.batch.run import run
from owl_wms.batch.store import Store
from tests.batch.fake import FakeClips, fake_job, make_inputs, outputs_of, parts

ROOT = Path(__file__).parents[2]
FORK: Any = multiprocessing.get_context("fork")
# The class, its method, the first argument, the call that is meant, and whether the call is made before the kill.
MOMENTS: dict[str, tuple[Any, str, str | None, int, bool]] = {
    "an item is begun": (Part, "add", "begin", 3, True),
    "half an output is written": (FakeClips, "piece", None, 6, True),
    "an output is staged": (Part, "add", "placing", 3, False),
    "half a line is written": (Part, "add", "placing", 3, False),
    "an output is recorded": (Part, "add", "placing", 3, True),
    "an output has its name": (Store, "place", None, 3, True),
    "an item is done": (Part, "add", "done", 3, True),
    "a block is closed": (Part, "close", None, 1, True),
}


def go(job: Job, folder: Path, workers: int = 2) -> None:
    for _ in run(job, str(folder), LATENT_SUFFIXES, engine="local", workers=workers):
        pass


def quiet_outputs(folder: Path, out: Path) -> dict[str, bytes]:
    """Of a run that nothing disturbs."""
    worker, name = BlockWorker(fake_job(out)), run_name()
    blocks = ((f"{name}-{n}", block) for n, block in enumerate(cut(list_items(str(folder), LATENT_SUFFIXES))))
    assert all(outcome.state != "failed" for outcome in worker.run(blocks))
    return outputs_of(fake_job(out))


def check(job: Job, wanted: dict[str, bytes]) -> None:
    assert outputs_of(job) == wanted, "complete, equal to a quiet run, and no temporary file"
    done = Counter(line["key"] for line in parts(job) if line["event"] == "done")
    assert set(done.values()) == {1}, "none was put in place twice"


def die_at(moment: str, victim: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Kills the victim, once in all processes that are forked from this one, and lists what is put in place."""
    owner, name, first, call, made = MOMENTS[moment]
    original, calls = getattr(owner, name), []

    def deadly(self: Any, *arguments: Any, **facts: Any) -> Any:
        meant = FORK.current_process().name != "MainProcess" and first in (None, *arguments[:1])
        calls.append(1) if meant else None
        now = meant and len(calls) == call
        result = original(self, *arguments, **facts) if made or not now else None
        if now:
            try:
                os.close(os.open(folder / "killed", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return result if made else original(self, *arguments, **facts)
            if moment == "half a line is written":
                os.write(self._file, b'{"event": "placing", "ke')
            os.kill(os.getpid() if victim == "worker" else os.getppid(), signal.SIGKILL)
            time.sleep(60)  # a worker ends with its driver
        return result

    place = Store.place

    def placed(self: Store, staged: Path, name: str) -> None:
        place(self, staged, name)
        with (folder / "placed").open("a") as file:
            file.write(f"{name}\n")

    patch.setattr(Store, "place", placed)
    original = placed if owner is Store else original
    patch.setattr(owner, name, deadly)
    patch.setattr(local, "_CONTEXT", FORK)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("victim", ["worker", "driver"])
def test_killed_at(tmp_path: Path, victim: str, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_inputs(tmp_path / "in", {f"{n:02}.pt": f"item {n}" for n in range(12)})
    wanted, job = quiet_outputs(folder, tmp_path / "quiet"), fake_job(tmp_path / "out")
    with monkeypatch.context() as patch:
        die_at(moment, victim, tmp_path, patch)
        exits = []
        for _ in range(1 if victim == "worker" else 2):
            driver = FORK.Process(target=go, args=(job, folder))
            driver.start()
            driver.join(60)
            exits.append(driver.exitcode)
    assert exits == ([0] if victim == "worker" else [-signal.SIGKILL, 0])
    assert (tmp_path / "killed").exists()
    check(job, wanted)
    placed = Counter((tmp_path / "placed").read_text().splitlines())
    assert max(placed[name] for name in wanted) == 1


DRIVER = """
import sys
from owl_wms.batch.items import LATENT_SUFFIXES
from owl_wms.batch.run import run
from tests.batch.fake import fake_job
if __name__ == "__main__":
    engine, address = sys.argv[1:3]
    if engine == "ray":
        import ray
        ray.init(address=address, log_to_driver=False)
    for outcome in run(fake_job(sys.argv[3]), sys.argv[4], LATENT_SUFFIXES, engine=engine, workers=2):
        if outcome.worker:
            print(outcome.worker.rpartition(":")[2], flush=True)
"""


class Rig:
    """Real drivers over items of known outputs, and what can be killed: workers, the driver, a Ray node."""

    def __init__(self, folder: Path, engine: str) -> None:
        self.engine, self.folder, self.cluster = engine, folder, None
        self.texts = {f"{n:03}.pt": f"slow:0.0{n % 10}" for n in range(80)}
        make_inputs(folder / "in", self.texts)
        self.job, self.script = fake_job(folder / "out"), folder / "driver.py"
        self.script.write_text(DRIVER)
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if engine == "ray":
            from ray.cluster_utils import Cluster

            os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")  # for the nodes, whose workers inherit them
            self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
            self.nodes = [self.cluster.add_node(num_cpus=1, object_store_memory=80 << 20) for _ in range(2)]

    def more(self, turn: int) -> None:
        """Changes half of the items, so that there is something to do."""
        for name in list(self.texts)[turn % 2 :: 2]:
            self.texts[name] += "0"
            (self.folder / "in" / name).write_text(self.texts[name])

    def start(self) -> subprocess.Popen[str]:
        address = self.cluster.address if self.cluster else ""
        arguments = [self.engine, address, str(self.folder / "out"), str(self.folder / "in")]
        command = [sys.executable, str(self.script), *arguments]
        return subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE, text=True)

    def kill(self, victim: str, driver: subprocess.Popen[str], worker: int) -> None:
        if victim == "worker":
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        elif victim == "driver":
            driver.kill()
        else:
            node = self.nodes.pop(0)
            os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
            self.cluster.remove_node(node, allow_graceful=False)
            self.nodes.append(self.cluster.add_node(num_cpus=1, object_store_memory=80 << 20))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("engine", "victim"),
    [("local", "worker"), ("local", "driver"), ("ray", "worker"), ("ray", "driver"), ("ray", "node")],
)
def test_ten_random_moments(tmp_path: Path, engine: str, victim: str) -> None:
    if engine == "ray":
        pytest.importorskip("ray", reason="Ray comes with the extra ray")
    rig, chance, exits = Rig(tmp_path, engine), random.Random(f"{engine} {victim}"), []
    try:
        for turn in range(10):
            driver = rig.start()
            assert driver.stdout is not None
            worker = driver.stdout.readline()  # the first outcome: workers are at work
            assert worker, f"the driver ended with status {driver.wait()} before its first outcome"
            time.sleep(chance.uniform(0, 1.5))
            rig.kill(victim, driver, int(worker))
            driver.communicate(timeout=280)
            exits.append(driver.returncode)
            if victim != "driver":
                assert driver.returncode == 0, "a run that loses a worker or a node is a whole run"
            rig.more(turn)
        last = rig.start()
        last.communicate(timeout=280)
        assert last.returncode == 0
    finally:
        if rig.cluster is not None:
            rig.cluster.shutdown()
    print(engine, victim, "exit statuses", Counter(exits))
    check(rig.job, quiet_outputs(tmp_path / "in", tmp_path / "quiet"))
