"""Training runs of the world model, by the `trainer_id` of their configuration.

| id | trains | batches |
|---|---|---|
| `rft` | GameRFT | latents, mouse, buttons[, doc_id] |
| `av` | GameRFTAudio | latents, audio, mouse, buttons |
| `mixed_av` | GameRFTAudio | the same and has_controls |
| `causvid_vid` | a causal few-step student of a teacher | latents, mouse, buttons |
| `sforce_vid` | the same on its own rollouts | latents, mouse, buttons |
| `ode_distill_vid` | a shallower student of a teacher | latents, mouse, buttons |

Usage:
    trainer = get_trainer_cls("rft")(cfg.train, cfg.wandb, cfg.model)
    trainer.train()
"""

from __future__ import annotations

from owl_wms.configs.strict import choose
from owl_wms.trainers.base import BaseTrainer
from owl_wms.trainers.distributed import cleanup, setup
from owl_wms.trainers.objectives.av import AVRFTTrainer
from owl_wms.trainers.objectives.causvid_vid import CausVidTrainer
from owl_wms.trainers.objectives.mixed_av import MixedAVRFTTrainer
from owl_wms.trainers.objectives.ode_distill_vid import DistillODETrainer
from owl_wms.trainers.objectives.rft import RFTTrainer
from owl_wms.trainers.objectives.sforce_vid import SelfForceTrainer

TRAINERS: dict[str, type[BaseTrainer]] = {
    trainer.trainer_id: trainer
    for trainer in (
        RFTTrainer,
        AVRFTTrainer,
        MixedAVRFTTrainer,
        CausVidTrainer,
        SelfForceTrainer,
        DistillODETrainer,
    )
}

__all__ = ["TRAINERS", "BaseTrainer", "cleanup", "get_trainer_cls", "setup"]


def get_trainer_cls(trainer_id: str) -> type[BaseTrainer]:
    """Return the class that a `trainer_id` names.

    Raises:
        ConfigError: no such id; the message lists the ids.
    """
    return choose(TRAINERS, trainer_id, "train.trainer_id")
