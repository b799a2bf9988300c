"""`ode_distill_vid`: a student learns from the teacher's own way from noise to clip.

Without `student_levels` a shallower student learns the teacher's velocities at all levels of that way, and needs as
many steps. With them it learns to jump from each of these few levels to the end of the way.

Usage:
    DistillODETrainer(cfg.train, cfg.wandb, cfg.model).train()
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from owl_wms.data.loading import Batch
from owl_wms.errors import ConfigError
from owl_wms.models import make_model
from owl_wms.sampling import Guidance
from owl_wms.trainers.base import BaseTrainer
from owl_wms.trainers.objectives.dmd import context_noise, expand, load_teacher, masked_mse

_BLOCKS = "transformer.blocks."


def kept_layers(teacher: int, student: int) -> list[int]:
    """Return the teacher's layers that a student with fewer starts from: evenly spread, first and last included.

    Raises:
        ConfigError: a student deeper than its teacher.
    """
    if student > teacher:
        raise ConfigError(
            f"a student of {student} layers cannot be cut from a teacher of {teacher}", key="model.n_layers"
        )
    if student == 1:
        return [0]
    return [round(i * (teacher - 1) / (student - 1)) for i in range(student)]


def cut_student(teacher: nn.Module, student: nn.Module, layers: list[int]) -> None:
    """Copy the teacher's weights into the student, block i from the teacher's block `layers[i]`."""
    weights = {key: value for key, value in teacher.state_dict().items() if not key.startswith(_BLOCKS)}
    for key, value in teacher.state_dict().items():
        if key.startswith(_BLOCKS):
            index, rest = key.removeprefix(_BLOCKS).split(".", 1)
            weights.update({f"{_BLOCKS}{i}.{rest}": value for i, kept in enumerate(layers) if kept == int(index)})
    student.load_state_dict(weights)


class DistillODETrainer(BaseTrainer):
    """Batches (latents, mouse, buttons); reports `loss`, of velocities over the generated frames."""

    trainer_id = "ode_distill_vid"
    stops_by_epochs = False

    def build_model(self) -> nn.Module:
        teacher = load_teacher(self.train_cfg)
        student = make_model(self.model_cfg).core
        cut_student(teacher, student, kept_layers(teacher.config.n_layers, self.model_cfg.n_layers))
        self.teacher = teacher.to(self.device)
        return student

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        video, mouse, btn = batch[:3]
        assert self.train_cfg.gen_p is not None
        clean = self.to_latents(video)
        generated = torch.rand(clean.shape[:2], dtype=torch.float32, device=clean.device) < self.train_cfg.gen_p
        generated[:, -1] |= ~generated.any(dim=1)
        states = self._teacher_path(clean, generated, mouse, btn)
        losses = [
            masked_mse(self.model(x, t, mouse, btn).float(), v.float(), generated) for x, t, v in self._some(states)
        ]
        loss = torch.stack(losses).mean()
        return loss, {"loss": loss}

    def _path_levels(self) -> list[float]:
        """Return the noise levels of the teacher's steps: `rollout_steps` even ones, or as fine between the student."""
        cfg = self.train_cfg
        assert cfg.rollout_steps is not None
        levels: list[float] = []
        for high, low in pairwise((*(cfg.student_levels or (1.0,)), 0.0)):
            steps = max(1, round((high - low) * cfg.rollout_steps))
            levels += [high - (high - low) * step / steps for step in range(steps)]
        return levels

    @torch.no_grad()
    def _teacher_path(
        self, clean: Tensor, generated: Tensor, mouse: Tensor, btn: Tensor
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return (x_t, t, target) at the student's levels; context frames stay at their noise level, also in t."""
        cfg = self.train_cfg
        assert cfg.cfg_scale is not None
        guidance = Guidance(model=self.teacher, scale=cfg.cfg_scale, max_level=cfg.teacher_max_level)
        levels = self._path_levels()
        context = torch.full(generated.shape, context_noise(cfg), dtype=torch.float32, device=clean.device)
        x = clean.lerp(torch.randn_like(clean), expand(context.masked_fill(generated, levels[0])))
        path = []
        for level, following in pairwise((*levels, 0.0)):
            t = context.masked_fill(generated, level)
            (v,) = guidance.velocity((x,), t, mouse, btn)
            path.append((x, t, v))
            x = torch.where(expand(generated), x - (level - following) * v.float(), x)
        if cfg.student_levels is None:
            return path
        # The straight way from a state to the end of the curved one: a single step of this velocity arrives there.
        starts = [state for state, level in zip(path, levels, strict=True) if level in cfg.student_levels]
        return [(state, t, (state - x) / expand(t)) for state, t, _ in starts]

    def _some(self, states: list[tuple[Tensor, Tensor, Tensor]]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Pick a random share `subsample` of the states, at least one."""
        assert self.train_cfg.subsample is not None
        count = max(1, round(self.train_cfg.subsample * len(states)))
        return [states[i] for i in torch.randperm(len(states), device="cpu")[:count].tolist()]
