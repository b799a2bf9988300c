"""`kill -9` of workers and of the driver at random moments: after a rerun the outputs are those of a quiet run.

Run: python -m pytest tests/batch/test_kill.py
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from owl_wms.batch import Job
from tests.batch.fake import fake_job, frames_of, make_inputs, outputs_of

ROOT = Path(__file__).parents[2]
DRIVER = """
import sys
from owl_wms.batch.items import LATENT_SUFFIXES
from owl_wms.batch.run import run
from tests.batch.fake import fake_job
if __name__ == "__main__":
    for outcome in run(fake_job(sys.argv[1]), sys.argv[2], LATENT_SUFFIXES, engine="local", workers=2):
        pass
"""
ITEMS = 120


def start(script: Path, out: Path, folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(script), str(out), str(folder)], env=environment)


def parts(job: Job) -> list[dict[str, str]]:
    folder = Path(job.out) / "_ledger/parts"
    lines = [line for part in sorted(folder.glob("*")) for line in part.read_text().splitlines()]
    return [json.loads(line) for line in lines if line.endswith("}")]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", ["worker", "driver"])
def test_a_killed_process_costs_nothing(tmp_path: Path, victim: str, request: pytest.FixtureRequest) -> None:
    kills = 10 if request.config.getoption("--full-counts", default=False) else 2
    texts = {f"{n:03}.pt": f"slow:0.0{n % 10}" for n in range(ITEMS)}
    folder, out = make_inputs(tmp_path / "in", texts), tmp_path / "out"
    script, job, chance = tmp_path / "driver.py", fake_job(out), random.Random(len(victim))
    script.write_text(DRIVER)
    for _ in range(kills):
        driver = start(script, out, folder)
        begun, had = time.monotonic(), len(parts(job))
        while len(parts(job)) == had and driver.poll() is None:  # models are being loaded
            assert time.monotonic() - begun < 120
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.6))
        if victim == "worker":
            children = [
                child for child in psutil.Process(driver.pid).children() if "spawn_main" in str(child.cmdline())
            ]
            if children:
                os.kill(chance.choice(children).pid, signal.SIGKILL)
            assert driver.wait(180) == 0
            break_after_this = len(outputs_of(job)) == ITEMS
            assert break_after_this, "a run that loses a worker is a whole run"
            for name in list(texts)[::2]:  # something to do for the next round
                (folder / name).write_text(texts[name] + "0")
                texts[name] += "0"
        else:
            workers = psutil.Process(driver.pid).children()
            driver.kill()
            driver.wait()
            _, alive = psutil.wait_procs(workers, timeout=10)
            assert not alive, "workers end with their driver"
    driver = start(script, out, folder)
    assert driver.wait(180) == 0
    found = outputs_of(job)
    assert set(found) == {f"{name}.npy" for name in texts}, "complete, and no temporary file"
    for name, data in found.items():
        assert data.endswith(frames_of(texts[name.removesuffix(".npy")]).numpy().tobytes())
    done = [line["key"] for line in parts(job) if line["event"] == "done"]
    assert len(done) == len(set(done)), "none was put in place twice"
