"""`rft` on the rendered game on a GPU, evaluated through TensorRT's form for trainers."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch

from owl_wms.cli import main
from owl_wms.trt import status

ROOT = Path(__file__).parents[2]
STEPS = 60


@pytest.mark.gpu
@pytest.mark.timeout(280)
def test_the_game_is_learnt_and_evaluated_through_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not status().available:
        pytest.skip(status().reason)
    monkeypatch.chdir(ROOT)
    table, run = tmp_path / "game", tmp_path / "run"

    def call(*arguments: str) -> None:
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        assert not end.value.code

    call("data", "make", str(table), "--episodes", "16", "--frames", "48", "--fps", "20", "--batch", "16")
    data = [f"train.{name}.dataset_path={table}" for name in ("data_kwargs", "sample_data_kwargs")]
    size = [
        "train.batch_size=16",
        "train.target_batch_size=16",
        "train.n_samples=2",
        "train.sampler_kwargs.num_frames=6",
    ]
    often = [f"train.max_steps={STEPS}", f"train.sample_interval={STEPS // 2}", f"train.checkpoint_dir={run}"]
    changes = [*data, *size, *often, "train.use_tensorrt=true", "train.tensorrt_fallback=false"]
    call("train", "examples/world/game_rft.yml", *(part for change in changes for part in ("--set", change)))
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [line["diffusion_loss"] for line in lines if "diffusion_loss" in line]
    assert len(losses) == STEPS
    assert statistics.mean(losses[-10:]) < 0.8 * statistics.mean(losses[:10])
    evaluations = [line for line in lines if "samples" in line]
    assert len(evaluations) >= 2
    assert all(line["decoded_by"].startswith("tensorrt-jit: built") for line in evaluations), evaluations
    clips = list((run / "samples").glob(f"step_{STEPS}_*"))
    assert len(clips) == 2
    assert all(clip.stat().st_size > 1000 for clip in clips)
    assert torch.cuda.max_memory_allocated() > 0
