"""Two gloo processes train `rft` through the command line: they share data, agree on weights and metrics, and resume.

Run: python -m pytest tests/trainers/test_two_processes.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from owl_wms.trainers.checkpoints import load_checkpoint
from tests.trainers.helpers import TWO_RANKS, config, run_python, write_table

_SCRIPT = """
import sys, torch
import torch.distributed as dist
from owl_wms.configs.world import load_world_config
from owl_wms.trainers import get_trainer_cls, setup, cleanup
torch.set_num_threads(1)
rank, local_rank, world = setup()
cfg = load_world_config(sys.argv[1])
for steps in (2, 4):
    section = cfg.train.model_copy(update={"max_steps": steps, "resume_ckpt": "latest"})
    trainer = get_trainer_cls("rft")(section, cfg.wandb, cfg.model, rank, local_rank, world)
    trainer.train()
    mine = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    both = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(both, mine)
    assert torch.equal(both[0], both[1]), "ranks hold different weights"
    losses = [None] * world
    dist.all_gather_object(losses, trainer.losses)
    assert losses[0] == losses[1] and len(losses[0]) == 2, losses
    assert trainer.phases[0].accumulation == 2, trainer.phases[0].accumulation
    del trainer  # its reducers belong to the group that is about to go
dist.barrier()
cleanup()
"""


def test_two_ranks_share_one_run(tmp_path: Path) -> None:
    write_table(tmp_path, clips=8)
    muon = {"lr": 0.02, "adamw_lr": 0.01, "adamw_keys": ["core.proj_in", "gate"]}
    changes = {"target_batch_size": 8, "sample_interval": 2, "eval_sample_dir": str(tmp_path / "eval")}
    config(tmp_path, "rft", opt="Muon", opt_kwargs=muon, **changes)
    script = tmp_path / "run.py"
    script.write_text(_SCRIPT)
    run_python(tmp_path, *TWO_RANKS, str(script), str(tmp_path / "rft.yml"))
    state = load_checkpoint(tmp_path / "run" / "step_4.pt")
    assert state["steps"] == 4
    assert all(key.startswith("core.") for key in state["model"])
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]  # one writer, and the resumed run continues
    for name in ("vid.4.pt", "vid.4.rank1.pt"):
        assert torch.load(tmp_path / "eval" / name, weights_only=True).shape[0] == 1
