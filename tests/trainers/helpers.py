"""Tiny world models, batches and configurations for trainer tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

from owl_wms.configs.world import TrainingConfig, WorldConfig, WorldModelConfig, load_world_config
from owl_wms.data.npy_table import NpyTableWriter
from owl_wms.models import get_model_cls

CHANNELS, SIDE, FRAMES, AUDIO = 4, 2, 6, 3
ADAMW = {"lr": 1.0e-2, "betas": [0.9, 0.95]}


def model_section(audio: bool = False, layers: int = 2) -> dict[str, object]:
    """The `model` section of a world model small enough for a step in milliseconds."""
    return {
        "model_id": "game_rft_audio" if audio else "game_rft",
        "sample_size": SIDE,
        "channels": CHANNELS,
        "audio_channels": AUDIO,
        "n_layers": layers,
        "n_heads": 2,
        "d_model": 32,
        "tokens_per_frame": SIDE * SIDE + int(audio),
        "n_buttons": 11,
        "control_hidden": 16,
        "n_frames": 32,
        "cfg_prob": 0.1,
        "causal": True,
        "uncond": False,
        "backbone": "dit",
        "has_audio": audio,
        "rope_impl": "motion",
        "local_window": 4,
        "global_window": None,
    }


def train_section(folder: Path, trainer_id: str, **changes: object) -> dict[str, object]:
    """A `train` section that reads the table in `folder/table` and never evaluates unless told to."""
    data = {
        "dataset_path": str(folder / "table"),
        "window_length": FRAMES,
        "batch_columns": ["depth_latent", "mouse", "buttons"],
        "num_workers": 0,
    }
    return {
        "trainer_id": trainer_id,
        "data_id": "cod",
        "data_kwargs": data,
        "sample_data_id": "cod",
        "sample_data_kwargs": data,
        "target_batch_size": 2,
        "batch_size": 2,
        "epochs": 1000,
        "opt": "AdamW",
        "opt_kwargs": ADAMW,
        "checkpoint_dir": str(folder / "run"),
        "sample_interval": 1_000_000,
        "save_interval": 1_000_000,
        "n_samples": 2,
        "sampler_id": "av_caching",
        "sampler_kwargs": {"n_steps": 2, "cfg_scale": 1.0, "num_frames": 2},
        "vae_scale": 0.5,
        **changes,
    }


def config(folder: Path, trainer_id: str, *, audio: bool = False, layers: int = 2, **changes: object) -> WorldConfig:
    """Written to disk and read back, as a user's would be."""
    path = folder / f"{trainer_id}.yml"
    sections = {"model": model_section(audio, layers), "train": train_section(folder, trainer_id, **changes)}
    path.write_text(yaml.safe_dump(sections))
    return load_world_config(path)


def write_table(folder: Path, clips: int = 4, frames: int = 2 * FRAMES) -> Path:
    """A table of random clips in `folder/table`."""
    rng = np.random.default_rng(0)
    writer = NpyTableWriter(folder / "table", ("depth_latent", "mouse", "buttons"))
    for _ in range(clips):
        writer.append(
            {
                "depth_latent": rng.normal(size=(frames, CHANNELS, SIDE, SIDE)).astype(np.float32),
                "mouse": rng.normal(size=(frames, 2)).astype(np.float32),
                "buttons": rng.integers(0, 2, size=(frames, 11)).astype(np.uint8),
            }
        )
    return folder / "table"


def teacher_files(folder: Path, model: WorldModelConfig, layers: int = 2) -> dict[str, object]:
    """A teacher's configuration and checkpoint, and the same weights as the student's start."""
    torch.manual_seed(5)
    section = model_section(layers=layers)
    cfg = folder / "teacher.yml"
    cfg.write_text(yaml.safe_dump({"model": section, "train": {}}))
    net = get_model_cls("game_rft")(load_world_config(cfg).model)
    for parameter in net.parameters():  # freshly built gates may be zero; a teacher's are not
        torch.nn.init.normal_(parameter, std=0.1)
    torch.save({"model": net.state_dict(), "steps": 3}, folder / "teacher.pt")
    return {"teacher_cfg": str(cfg), "teacher_ckpt": str(folder / "teacher.pt")}


class FixedLoader:
    """One batch for ever."""

    epoch = 0

    def __init__(self, batch: tuple[Tensor, ...]) -> None:
        self.batch = batch

    def __iter__(self):  # type: ignore[no-untyped-def]
        while True:
            yield self.batch

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert state == {}


def batch_for(trainer_id: str) -> tuple[Tensor, ...]:
    """A batch in the order that the trainer reads."""
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(2, FRAMES, CHANNELS, SIDE, SIDE, generator=generator)
    audio = torch.randn(2, FRAMES, AUDIO, generator=generator)
    mouse = torch.randn(2, FRAMES, 2, generator=generator)
    buttons = torch.randint(0, 2, (2, FRAMES, 11), generator=generator).float()
    if trainer_id == "av":
        return video, audio, mouse, buttons
    if trainer_id == "mixed_av":
        return video, audio, mouse, buttons, torch.tensor([True, False])
    return video, mouse, buttons


def training(cfg: WorldConfig, **changes: object) -> TrainingConfig:
    """The `train` section with values replaced."""
    return cfg.train.model_copy(update=changes)


TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
"""Arguments of Python before a script that two ranks are to run."""


def run_python(home: Path, *arguments: str) -> str:
    """Run Python in an environment that has nothing of the caller's; returns its standard error. It must succeed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "OMP_NUM_THREADS": "1",
            "PATH": "/usr/bin:/bin",
            "HOME": str(home),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr
