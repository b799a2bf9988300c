"""Two gloo processes of which one fails: neither waits for the other until a timeout.

Run: python -m pytest tests/trainers/test_two_failures.py
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.trainers.helpers import TWO_RANKS, config, run_python, write_table
from tests.trainers.test_failures import decoder_files

_SCRIPT = """
import sys, torch
from owl_wms.configs.world import load_world_config
from owl_wms.errors import CheckpointError, TrainingError
from owl_wms.trainers import get_trainer_cls, setup, cleanup
from owl_wms.trainers.distributed import barrier
torch.set_num_threads(1)
rank, local_rank, world = setup(60)
cfg = load_world_config(sys.argv[1])

def trainer(**changes):
    section = cfg.train.model_copy(update=changes)
    return get_trainer_cls("rft")(section, cfg.wandb, cfg.model, rank, local_rank, world)

# A decoder that only rank 0 looks for, and does not find: both ranks stop before the first step.
lost = trainer(vae_ckpt_path="gone.pt")
try:
    lost.train()
except (CheckpointError, TrainingError) as error:
    assert isinstance(error, CheckpointError if rank == 0 else TrainingError), error
    assert lost.step == 0
else:
    raise AssertionError("a missing decoder was not noticed")
del lost

# A sample that fails on rank 1 alone, then a decode that fails on rank 0 alone: both train on.
failing = trainer()
sample, decode = failing.sample, failing.evaluator._write_all
def sampled(*arguments):
    if rank == 1 and failing.step == 1:
        raise RuntimeError("no sample")
    return sample(*arguments)
def written(*arguments):
    if failing.step == 2:
        raise RuntimeError("no clip")
    decode(*arguments)
failing.sample, failing.evaluator._write_all = sampled, written
failing.train()
assert failing.step == 3
assert (failing.evaluator._decode is not None) == (rank == 0), "only the first rank holds a decoder"
del failing, sample, decode  # each holds the trainer, which must go before the group does
barrier()
cleanup()
"""


def test_a_rank_that_fails_leaves_no_one_waiting(tmp_path: Path) -> None:
    write_table(tmp_path, clips=8)
    config(tmp_path, "rft", max_steps=3, sample_interval=1, target_batch_size=4, **decoder_files(tmp_path))
    script = tmp_path / "run.py"
    script.write_text(_SCRIPT)
    said = run_python(tmp_path, *TWO_RANKS, str(script), str(tmp_path / "rft.yml"))
    assert "step 1: evaluation failed on rank 1, training goes on: no sample" in said
    clips = {path.stem for path in (tmp_path / "run" / "samples").iterdir()}
    assert clips == {"step_0_rank0_0", "step_0_rank1_0", "step_1_rank0_0", "step_3_rank0_0", "step_3_rank1_0"}
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("evaluation_error") == "no clip"] == [2]
