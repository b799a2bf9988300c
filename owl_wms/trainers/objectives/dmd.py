"""Distribution matching distillation: what the two trainers with a teacher and a critic share.

A student makes clips in few steps. A critic, trained on the student's clips, knows where they lie; the teacher knows
where real ones lie; the difference of their estimates of the clean clip is the student's gradient. Sources: Yin et
al., "One-step diffusion with distribution matching distillation" (2024), eq. 7-8; Yin et al., "From slow
bidirectional to fast autoregressive video diffusion models" (CausVid, 2024); Huang et al., "Self forcing" (2025).

Usage:
    class MyTrainer(DMDTrainer):
        def rollout(self, batch): return Rollout(...)
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from owl_wms.configs.world import TrainingConfig, load_world_model
from owl_wms.data.loading import Batch
from owl_wms.models import make_model
from owl_wms.models.flow import frame_times, noised
from owl_wms.models.gamerft import ConditionedCore
from owl_wms.sampling import Guidance
from owl_wms.trainers.base import BaseTrainer
from owl_wms.trainers.checkpoints import load_core_weights, strip_wrappers
from owl_wms.trainers.optim.optimisers import load_optimiser
from owl_wms.trainers.phases import Phase

CFG_SCALE = 1.5  # upstream's fixed value, used when the configuration says nothing
CONTEXT_NOISE = 0.2  # likewise
PREDICTION_FRAMES = 16  # of a clip that `log_predictions` shows, upstream's number


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """A clip that the student made.

    Attributes:
        x: [b, n, c, h, w]; carries the student's gradient where `generated`.
        generated: bool [b, n], which frames the student made.
        mouse: [b, n, 2].
        btn: [b, n, n_buttons].
        original: [b, n, c, h, w] real clip under the same controls, or None.
    """

    x: Tensor
    generated: Tensor
    mouse: Tensor
    btn: Tensor
    original: Tensor | None = None


def context_noise(cfg: TrainingConfig) -> float:
    """Return the noise level of the history: the student has to know the one at which it is played."""
    if cfg.context_noise is not None:
        return cfg.context_noise
    return float((cfg.sampler_kwargs or {}).get("noise_prev", CONTEXT_NOISE))


def expand(t: Tensor) -> Tensor:
    """[b, n] -> [b, n, 1, 1, 1]."""
    return t[..., None, None, None]


def masked_mse(a: Tensor, b: Tensor, frames: Tensor) -> Tensor:
    """Mean squared difference of [b, n, c, h, w] over the frames where `frames` [b, n] is true, at least one."""
    squared = (a - b).square().mean(dim=(2, 3, 4))
    return (squared * frames).sum() / frames.sum()


def dmd_loss(x: Tensor, clean_teacher: Tensor, clean_critic: Tensor, frames: Tensor) -> Tensor:
    """Half the squared distance to x minus the (normalised, detached) difference of the two estimates.

    Args:
        x: [b, n, c, h, w] with gradient.
        clean_teacher, clean_critic: estimates of the clean clip, the shape of x.
        frames: bool [b, n] that count.

    Returns:
        Scalar float64. Its gradient in x is proportional to the difference of the estimates, critic's less teacher's,
        divided per item by the mean distance between x and the teacher's.
    """
    exact = x.double()
    with torch.no_grad():
        distance = (exact - clean_teacher.double()).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        gradient = torch.nan_to_num((clean_critic.double() - clean_teacher.double()) / distance, posinf=0.0, neginf=0.0)
        target = exact - gradient
    return 0.5 * masked_mse(exact, target, frames)


def load_teacher(cfg: TrainingConfig) -> ConditionedCore:
    """Return the frozen core that `teacher_cfg` and `teacher_ckpt` name, on the CPU and in eval mode."""
    teacher: ConditionedCore = make_model(load_world_model(str(cfg.teacher_cfg))).core
    load_core_weights(teacher, str(cfg.teacher_ckpt))
    return teacher.eval().requires_grad_(False)


class DMDTrainer(BaseTrainer):
    """Student, frozen teacher and critic, all cores; a step is `update_ratio` critic updates and one of the student."""

    ema_beta = 0.99
    stops_by_epochs = False
    _predictions: dict[str, Tensor] | None = None
    _shared: tuple[int, list[Rollout]] = (0, [])  # clips of the critic in this step: asked for, and made

    def build_model(self) -> nn.Module:
        cfg = self.train_cfg
        self.teacher = load_teacher(cfg).to(self.device)
        student = make_model(self.model_cfg).core
        load_core_weights(student, str(cfg.student_ckpt))
        # By default the critic starts as the student, whose clips it has to know.
        start = student if cfg.critic_start == "student" else self.teacher
        self.critic = copy.deepcopy(start).to(self.device).train().requires_grad_(True)
        return student

    def build_phases(self) -> list[Phase]:
        cfg = self.train_cfg
        assert cfg.update_ratio is not None  # required by the configuration
        critic = self.phase(
            "critic", self.critic, self.critic_loss, "AdamW", cfg.d_opt_kwargs, repeats=cfg.update_ratio
        )
        return [critic, self.phase("model", self.model, self.loss, cfg.opt, cfg.opt_kwargs)]

    def train_step(self) -> dict[str, float]:
        self._shared = (0, [])  # also those of a step that failed, whose clips may be why
        return super().train_step()

    @abstractmethod
    def rollout(self, batch: Batch) -> Rollout:
        """Make a clip with the student from a batch (latents, mouse, buttons), with gradient if that is enabled."""

    def critic_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Rectified-flow loss of the critic on the student's clip, over the generated frames."""
        made = self._rollout_for_critic(batch)
        t = self._judged_levels(made.x)
        noisy, z = noised(made.x, t)
        v = self.critic(noisy, t, made.mouse, made.btn)
        loss = masked_mse(v.float(), z - made.x, made.generated)
        return loss, {"critic_loss": loss}

    @torch.no_grad()
    def _rollout_for_critic(self, batch: Batch) -> Rollout:
        """Return a clip of the student; with `shared_rollouts` the first update of a step makes it for all of them.

        The student stands still while the critic learns, and rollouts cost far more than the critic's own passes.
        """
        if not self.train_cfg.shared_rollouts:
            return self.rollout(batch)
        calls, clips = self._shared
        if calls < self.phases[0].accumulation:
            clips = [*clips, self.rollout(batch)]
        self._shared = (calls + 1, clips)
        return clips[calls % self.phases[0].accumulation]

    def _judged_levels(self, x: Tensor) -> Tensor:
        """Draw the noise levels [b, n] at which teacher and critic look at a clip."""
        t = frame_times(x)
        return t if self.train_cfg.judged_levels == "frame" else t[:, :1].expand_as(t).contiguous()

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        made = self.rollout(batch)
        loss = self.matching(made)
        return loss.float(), {"dmd_loss": loss}

    def matching(self, made: Rollout) -> Tensor:
        """Compute the loss whose gradient teacher and critic give the student."""
        scale = CFG_SCALE if self.train_cfg.cfg_scale is None else self.train_cfg.cfg_scale
        with torch.no_grad():
            t = self._judged_levels(made.x)
            noisy, _ = noised(made.x.detach(), t)
            teacher = Guidance(model=self.teacher, scale=scale, max_level=self.train_cfg.teacher_max_level)
            (v_teacher,) = teacher.velocity((noisy,), t, made.mouse, made.btn)
            v_critic = self.critic(noisy, t, made.mouse, made.btn)
            clean_teacher, clean_critic = noisy - expand(t) * v_teacher, noisy - expand(t) * v_critic
        # Kept only by the step that an evaluation follows: it is what the next clips show.
        if self.train_cfg.log_predictions and (self.step + 1) % self.train_cfg.sample_interval == 0:
            shown = {"student": made.x, "teacher": clean_teacher, "critic": clean_critic}
            self._predictions = {name: x[:1, -PREDICTION_FRAMES:].detach().float() for name, x in shown.items()}
        return dmd_loss(made.x, clean_teacher, clean_critic, made.generated)

    def predictions(self) -> dict[str, Tensor]:
        """Return the last frames of a clip of the student, and the clean clips that teacher and critic made of it."""
        found, self._predictions = self._predictions, None
        return found or {}

    def extra_state(self) -> dict[str, Any]:
        return {"critic": self.critic.state_dict(), "critic_opt": self.phases[0].optimiser.state_dict()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.critic.load_state_dict(strip_wrappers(state["critic"]))
        load_optimiser(self.phases[0].optimiser, state["critic_opt"])
