"""A rank of four is killed inside a step: the others end with one line, and two ranks go on with the same data.

Run: python -m pytest tests/trainers/test_lost_rank.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from owl_wms.data.loaders import get_loader
from owl_wms.trainers.checkpoints import load_checkpoint
from tests.trainers.helpers import config, run_python, write_table
from tests.trainers.test_whole_steps import assert_same

STEPS, LOST = 5, 3
# One process imports torch and forks the ranks; it holds the store, so that the system chooses the port. The store
# comes last: it answers in a thread, and a rank forked while that thread looks up an address waits for its lock for
# ever.
_SCRIPT = """
import json, multiprocessing, os, signal, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from owl_wms.configs.world import load_world_config
from owl_wms.trainers import get_trainer_cls, setup
torch.set_num_threads(1)
folder = Path(sys.argv[1])
fork = multiprocessing.get_context("fork")

def rank(number, world, ports, run, steps, lost):
    port = ports.get()
    names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, TORCHELASTIC_USE_AGENT_STORE="True")
    setup(60)
    cfg = load_world_config(folder / "rft.yml")
    section = cfg.train.model_copy(
        update={"max_steps": steps, "checkpoint_dir": str(folder / run), "resume_ckpt": "latest"}
    )
    trainer = get_trainer_cls("rft")(section, cfg.wandb, cfg.model, number, number, world)
    step, update, batches, seen = trainer.train_step, trainer.phases[0].update, trainer._batches, []
    def reading():
        for batch in batches:
            seen.append(batch[0][:, 0, 0, 0, 0].tolist())
            yield batch
    trainer._batches = reading()
    def deadly(*arguments):
        if lost == (number, trainer.step):
            next(trainer._batches)
            os.kill(os.getpid(), signal.SIGKILL)
        return update(*arguments)
    def whole():
        seen.clear()
        values = step()
        with (folder / f"{run}-seen").open("a") as file:
            file.write(json.dumps([trainer.step, sum(seen, [])]) + chr(10))
        return values
    trainer.phases[0].update, trainer.train_step = deadly, whole
    said = "ended"
    try:
        trainer.train()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    (folder / f"{run}-{world}-{number}").write_text(said)
    os._exit(0)

def start(run, world, steps, lost=None):
    ports = fork.SimpleQueue()
    ranks = [fork.Process(target=rank, args=(n, world, ports, run, steps, lost)) for n in range(world)]
    for process in ranks:
        process.start()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for process in ranks:
        ports.put(store.port)
    for process in ranks:
        process.join()

start("whole", 4, int(sys.argv[2]))
start("cut", 4, 99, lost=(2, int(sys.argv[2])))
start("cut", 2, int(sys.argv[3]))
"""


def test_a_rank_is_killed_inside_a_step(tmp_path: Path) -> None:
    write_table(tmp_path, clips=16)
    cfg = config(tmp_path, "rft", batch_size=1, target_batch_size=4, sample_interval=10**9)
    run_python(tmp_path, "-c", _SCRIPT, str(tmp_path), str(LOST), str(STEPS))
    said = [(tmp_path / f"cut-4-{rank}").read_text() for rank in (0, 1, 3)]
    for text in said:
        assert text.startswith(f"TrainingError: another rank ended after step {LOST} ("), text
        assert "\n" not in text
    assert not (tmp_path / "cut-4-2").exists(), "this one was killed"
    assert_same(*(load_checkpoint(tmp_path / run / f"step_{LOST}.pt") for run in ("whole", "cut")))
    assert [(tmp_path / f"cut-2-{rank}").read_text() for rank in (0, 1)] == ["ended", "ended"]
    assert load_checkpoint(tmp_path / "cut" / f"step_{STEPS}.pt")["data"]["samples"] == 4 * STEPS
    # The order of one process is the order of any number of them.
    alone = iter(get_loader("cod", 4, seed=cfg.train.seed, **cfg.train.data_kwargs))
    wanted = [sorted(next(alone)[0][:, 0, 0, 0, 0].tolist()) for _ in range(STEPS)]
    found: dict[int, list[float]] = {}
    for line in (tmp_path / "cut-seen").read_text().splitlines():
        step, values = json.loads(line)
        found.setdefault(step, []).extend(values)
    assert [sorted(found[step]) for step in sorted(found)] == wanted, "no sample is lost or repeated"
    assert torch.tensor(wanted).unique().numel() == 4 * STEPS
