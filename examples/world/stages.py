"""The stages of the training run, and what travels from one call to the next.

Usage:
    state = Progress.read(out)
    trainer = make_trainer(out, STAGES[0], state, cfg, loader, seconds=300)
    trainer.train()
    carry(out, STAGES[0], state, trainer)
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from own_history import Horizon, OwnHistoryLoader, OwnHistoryTrainer, playing
from safetensors.torch import save_file

from owl_wms.configs.levels import LevelsConfig
from owl_wms.configs.world import WorldConfig
from owl_wms.trainers.base import BaseTrainer
from owl_wms.trainers.checkpoints import latest_checkpoint, load_core_weights
from owl_wms.trainers.ema import EMA
from owl_wms.trainers.evaluation import core_of
from owl_wms.trainers.objectives.rft import RFTTrainer

RENEW_EVERY = 300  # steps between renewals of own frames
ROUND, ROUNDS = 256, 4  # clips continued at once, and rounds in the buffer
OWN_FRAMES = 72


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A part of the run with settings of its own.

    Attributes:
        name: of its folder and of its line in the log.
        steps: optimiser steps.
        prefix: share of clips with a history, see `LevelsConfig`.
        decay: share of the steps at whose end the learning rate falls to zero.
        own: whether half of the windows begin with the model's own frames.
        rate, adamw_rate: of Muon and of AdamW; None takes the configuration's.
    """

    name: str
    steps: int
    prefix: float = 0.5
    decay: float = 0.0
    own: bool = False
    rate: float | None = None
    adamw_rate: float | None = None

    def smaller(self) -> Stage:
        """A few steps of it."""
        return replace(self, steps=12)

    def config(self, cfg: WorldConfig, out: Path) -> WorldConfig:
        """The configuration of this stage."""
        train = cfg.train
        rates = {"lr": self.rate, "adamw_lr": self.adamw_rate}
        kwargs = {**(train.opt_kwargs or {}), **{k: v for k, v in rates.items() if v is not None}}
        warmup = min(300, self.steps // 4)
        schedule: dict[str, Any] = {"warmup_steps": warmup}
        if self.decay:
            schedule |= {"decay_steps": int(self.decay * self.steps), "last_step": self.steps}
        changes = {
            "checkpoint_dir": str(out / self.name),
            "max_steps": self.steps,
            "levels": LevelsConfig(**{**train.levels.model_dump(), "prefix": self.prefix}),
            "opt_kwargs": kwargs,
            "scheduler": "LinearDecay" if self.decay else "LinearWarmup",
            "scheduler_kwargs": schedule,
            "resume_ckpt": "latest",
        }
        return cfg.model_copy(update={"train": train.model_copy(update=changes)})


STAGES = (
    Stage(name="base", steps=13_000),
    Stage(name="settle", steps=13_000, prefix=0.8, decay=0.45),
    Stage(name="own", steps=8_000, prefix=0.8, decay=1 / 3, own=True, rate=0.003, adamw_rate=3e-4),
)


@dataclass(kw_only=True, slots=True)
class Progress:
    """What is done, in `state.json`.

    Attributes:
        calls: of the script so far; decides which worlds are rendered next.
        done: names of finished stages.
        stage, step: where `carry.safetensors` stands, for a machine without the checkpoint.
    """

    calls: int = 0
    done: list[str] = field(default_factory=list)
    stage: str = ""
    step: int = 0

    @staticmethod
    def read(out: Path) -> Progress:
        """The state in a folder; a new one where there is none."""
        path = out / "state.json"
        return Progress(**json.loads(path.read_text())) if path.exists() else Progress()


class _Staged(RFTTrainer):
    """A trainer that evaluates nothing, as the script measures at its end, and may begin from carried weights."""

    carried: Path | None = None
    carried_step = 0

    def resume(self) -> None:
        super().resume()
        if self.step == 0 and self.carried is not None:
            load_core_weights(core_of(self.model), self.carried)
            self.ema = EMA(self.model, self.ema_beta)
            self.step = self.carried_step

    def _evaluation_due(self) -> bool:
        return False


class _OwnStaged(OwnHistoryTrainer, _Staged):
    """The same on own frames, which are made before the first step and then renewed."""

    def train_step(self) -> dict[str, float]:
        loader = self.loader
        assert isinstance(loader, OwnHistoryLoader)
        missing = ROUNDS if not self.losses else int(self.step % RENEW_EVERY == 0)
        clips = min(ROUND, 4 * self.train_cfg.batch_size)
        third = min(2, 3 * self.step // max(1, self.train_cfg.max_steps or 1))
        loader.horizon = Horizon(moving=8 * (third + 1))
        for round_ in range(missing):
            loader.renew(
                playing(self.ema.model.core, self.device),
                clips=clips,
                keep=ROUNDS,
                frames=OWN_FRAMES,
                step=self.step * ROUNDS + round_,
                steps=(self.train_cfg.sampler_kwargs or {})["n_steps"],
                noise=(0.0, 0.3),
            )
        return super().train_step()


def make_trainer(
    out: Path, stage: Stage, state: Progress, cfg: WorldConfig, loader: Any, seconds: float
) -> BaseTrainer:
    """A trainer of the stage: from its checkpoint, from carried weights, or from the stage before."""
    section = stage.config(cfg, out)
    kind = _OwnStaged if stage.own else _Staged
    trainer = kind(
        section.train, None, section.model, loader=loader, sample_loader=loader, max_seconds=max(0.0, seconds)
    )
    carried = out / "carry.safetensors"
    if carried.exists() and latest_checkpoint(out / stage.name) is None:
        trainer.carried = carried
        trainer.carried_step = state.step if state.stage == stage.name else 0
    return trainer


def carry(out: Path, stage: Stage, state: Progress, trainer: BaseTrainer) -> None:
    """Write what the next call needs, and the weights themselves after the last stage."""
    weights = {k: v.bfloat16().contiguous().cpu() for k, v in trainer.ema.model.state_dict().items()}
    save_file(weights, out / "carry.safetensors")
    state.calls, state.stage, state.step = state.calls + 1, stage.name, trainer.step
    if trainer.step >= stage.steps:
        state.done.append(stage.name)
        save_file(weights, out / "world.safetensors")
        sections = {"model": trainer.model_cfg, "train": trainer.train_cfg}
        plain = {name: section.model_dump(mode="json", exclude_unset=True) for name, section in sections.items()}
        plain["train"] |= {"latent_transform": "whitener.safetensors", "resume_ckpt": None}
        for key in ("vae_cfg_path", "vae_ckpt_path"):
            found = getattr(trainer.train_cfg, key)
            plain["train"][key] = None if found is None else str(Path(found).resolve())
        (out / "world.yml").write_text(yaml.safe_dump(plain, sort_keys=False))
    with (out / "log.jsonl").open("a", encoding="utf-8") as log:
        for index, values in enumerate(trainer.losses):
            step = trainer.step - len(trainer.losses) + 1 + index
            if step % 20 == 0 or step == trainer.step:
                log.write(json.dumps({"stage": stage.name, "step": step, **values}) + "\n")
    (out / "state.json").write_text(json.dumps(asdict(state)) + "\n")


def sampler_of(cfg: WorldConfig) -> dict[str, Any]:
    """Returns the configured arguments of `av_caching` without `num_frames`, which each measure sets by itself."""
    return {name: value for name, value in (cfg.train.sampler_kwargs or {}).items() if name != "num_frames"}


def smaller(cfg: WorldConfig) -> WorldConfig:
    """A toy of the same shape for a CPU."""
    model = cfg.model.model_copy(
        update={"n_layers": 2, "d_model": 64, "n_heads": 2, "n_frames": 24, "control_hidden": 32}
    )
    train = cfg.train.model_copy(update={"batch_size": 4, "target_batch_size": 4})
    return cfg.model_copy(update={"model": model, "train": train})
