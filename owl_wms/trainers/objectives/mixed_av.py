"""`mixed_av`: picture and sound, where some clips have no controls.

Usage:
    MixedAVRFTTrainer(cfg.train, cfg.wandb, cfg.model).train()
"""

from __future__ import annotations

from torch import Tensor

from owl_wms.data.loading import Batch
from owl_wms.trainers.objectives.av import AVRFTTrainer


class MixedAVRFTTrainer(AVRFTTrainer):
    """Batches (latents, audio, mouse, buttons, has_controls bool [b]); also reports `unlabelled_proportion`."""

    trainer_id = "mixed_av"
    batch_parts = ("latents", "audio", "mouse", "buttons", "has_controls")
    clip = 1.0

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        video, audio, mouse, btn, has_controls = batch
        total, video_loss, audio_loss = self.model(
            self.to_latents(video),
            self.to_audio(audio),
            mouse,
            btn,
            has_controls=has_controls,
            levels=self.train_cfg.levels,
        )
        unlabelled = 1 - has_controls.float().mean()
        reports = {"diffusion_loss": total, "video_loss": video_loss, "audio_loss": audio_loss}
        return total, {**reports, "unlabelled_proportion": unlabelled}
