"""A process's default dtype does not become the dtype of weights that are trained, averaged or taught by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from owl_wms.trainers import TRAINERS
from tests.process_state import set_in_process
from tests.trainers.test_trainers import build


@pytest.mark.parametrize("state", ["bfloat16", "float64"])
@pytest.mark.parametrize("trainer_id", sorted(TRAINERS))
def test_a_run_keeps_its_weights_in_fp32(tmp_path: Path, trainer_id: str, state: str) -> None:
    with set_in_process(state):
        trainer = build(tmp_path, trainer_id, max_steps=1, sample_interval=1, eval_sample_dir=str(tmp_path / "eval"))
        trainer.train()
    networks = [trainer.model, trainer.ema.model, *(getattr(trainer, name, None) for name in ("teacher", "critic"))]
    weights = [parameter for network in networks if network is not None for parameter in network.parameters()]
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert (tmp_path / "eval" / "vid.1.pt").exists(), "the evaluation failed"
