"""`av`: the world model of picture and sound.

Usage:
    AVRFTTrainer(cfg.train, cfg.wandb, cfg.model).train()
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from owl_wms.data.loading import Batch
from owl_wms.models import make_model
from owl_wms.sampling import SampleResult
from owl_wms.trainers.base import BaseTrainer


class AVRFTTrainer(BaseTrainer):
    """Batches (latents, audio, mouse, buttons); reports `diffusion_loss`, `video_loss`, `audio_loss`."""

    trainer_id = "av"
    batch_parts: tuple[str, ...] = ("latents", "audio", "mouse", "buttons")

    def build_model(self) -> nn.Module:
        return make_model(self.model_cfg)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        video, audio, mouse, btn = batch
        total, video_loss, audio_loss = self.model(
            self.to_latents(video), self.to_audio(audio), mouse, btn, levels=self.train_cfg.levels
        )
        return total, {"diffusion_loss": total, "video_loss": video_loss, "audio_loss": audio_loss}

    def to_audio(self, audio: Tensor) -> Tensor:
        """Divide stored audio latents by `audio_vae_scale`, as the model sees them."""
        assert self.train_cfg.audio_vae_scale is not None  # required by the configuration
        return audio / self.train_cfg.audio_vae_scale

    def sample(self, sampler: Any, core: nn.Module, batch: Batch) -> SampleResult:
        video, audio, mouse, btn = batch[:4]
        result: SampleResult = sampler(core, self.to_latents(video), self.to_audio(audio), mouse, btn)
        return result
