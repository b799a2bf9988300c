"""`causvid_vid`: a causal few-step student matched to a teacher, frames of real clips replaced by the student's own.

Usage:
    CausVidTrainer(cfg.train, cfg.wandb, cfg.model).train()
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from owl_wms.data.loading import Batch
from owl_wms.errors import ConfigError
from owl_wms.trainers.objectives.dmd import DMDTrainer, Rollout, context_noise, expand, masked_mse

GENERATED_SHARE = 0.25  # upstream's fixed values, used when the configuration says nothing
LEVELS = (1.0, 0.5)


class CausVidTrainer(DMDTrainer):
    """Batches (latents, mouse, buttons); reports `critic_loss`, `dmd_loss`, `regression_loss`, `g_norm`."""

    trainer_id = "causvid_vid"

    def build_model(self) -> nn.Module:
        if not self.model_cfg.causal:
            raise ConfigError("causvid_vid trains a causal student; set model.causal to true", key="model.causal")
        return super().build_model()

    def rollout(self, batch: Batch) -> Rollout:
        video, mouse, btn = batch[:3]
        x = self.to_latents(video)
        cfg = self.train_cfg
        b, n = x.shape[:2]
        share = GENERATED_SHARE if cfg.gen_p is None else cfg.gen_p
        generated = torch.rand(b, n, dtype=torch.float32, device=x.device) < share
        generated[:, -1] |= ~generated.any(dim=1)  # a clip without a generated frame would teach nothing
        levels = torch.tensor(cfg.student_levels or LEVELS, dtype=torch.float32, device=x.device)
        drawn = levels[torch.randint(len(levels), (b, n), device=x.device)]
        t = torch.where(generated, drawn, context_noise(cfg))
        noisy = x.lerp(torch.randn_like(x), expand(t))
        v = self.model(noisy, t, mouse, btn)
        made = torch.where(expand(generated), noisy - expand(t) * v.float(), x)
        return Rollout(x=made, generated=generated, mouse=mouse, btn=btn, original=x)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        made = self.rollout(batch)
        matching = self.matching(made).float()
        assert made.original is not None
        assert self.train_cfg.regression_weight is not None
        regression = masked_mse(made.x, made.original, made.generated)
        total = matching + self.train_cfg.regression_weight * regression
        return total, {"dmd_loss": matching, "regression_loss": regression}
