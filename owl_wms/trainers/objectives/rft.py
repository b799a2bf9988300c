"""`rft`: the video world model on latents and controls, with a noise level of its own for every frame.

Usage:
    RFTTrainer(cfg.train, cfg.wandb, cfg.model).train()
"""

from __future__ import annotations

from torch import Tensor, nn

from owl_wms.data.loading import Batch
from owl_wms.models import make_model
from owl_wms.trainers.base import BaseTrainer


class RFTTrainer(BaseTrainer):
    """Batches (latents, mouse, buttons[, doc_id]); reports `diffusion_loss` and `latent_error`.

    `latent_error` is the mean squared error of the clean frame that a prediction implies, in the scale of the stored
    latents: runs with other scales or transforms of the latents can be compared by it.
    """

    trainer_id = "rft"

    def build_model(self) -> nn.Module:
        return make_model(self.model_cfg)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        video, mouse, btn, *doc_id = batch
        x = self.to_latents(video)
        found = self.model(
            x, mouse, btn, doc_id=doc_id[0] if doc_id else None, return_dict=True, levels=self.train_cfg.levels
        )
        loss = found["diffusion_loss"]
        return loss, {"diffusion_loss": loss, "latent_error": self.space.error(x, found)}
