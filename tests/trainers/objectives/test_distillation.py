"""Distillation trains what is played: its noise levels, its history, its steps, and judges that see drift.

Run: python -m pytest tests/trainers/objectives/test_distillation.py
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from owl_wms.errors import ConfigError, TrainingError
from owl_wms.sampling import Guidance, get_sampler_cls
from owl_wms.trainers import BaseTrainer
from tests.trainers.helpers import FRAMES
from tests.trainers.test_trainers import build

PLAYED = {"n_steps": 2, "cfg_scale": 1.0, "num_frames": 2, "noise_prev": 0.3}


class Told(list[Tensor]):
    """Noise levels [b, n] that a network was told, pass by pass."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        network.register_forward_pre_hook(lambda _, given: self.append(given[1].detach().clone()))

    def values(self) -> set[float]:
        return {round(v, 4) for levels in self for v in levels.flatten().tolist()}


def step(trainer: BaseTrainer) -> dict[str, float]:
    values = trainer.train_step()
    assert all(torch.isfinite(torch.tensor(v)) for v in values.values())
    return values


def test_self_forcing_remembers_at_the_noise_of_play_and_steps_at_its_levels(tmp_path: Path) -> None:
    levels = (1.0, 0.75, 0.25)
    trainer = build(tmp_path, "sforce_vid", sampler_kwargs=PLAYED, student_levels=list(levels))
    told = Told(trainer.model)
    step(trainer)
    assert told.values() <= {0.3, *levels}
    assert {0.3, 1.0} <= told.values(), "and never at 0, which nothing was trained on"


def test_self_forcing_without_levels_steps_evenly(tmp_path: Path) -> None:
    trainer = build(tmp_path, "sforce_vid", rollout_steps=4, min_rollout_frames=6)
    told = Told(trainer.model)
    for _ in range(3):
        step(trainer)
    assert told.values() == {0.2, 1.0, 0.75, 0.5, 0.25}


def test_frames_that_leave_the_window_keep_no_graph(tmp_path: Path) -> None:
    trainer = build(tmp_path, "sforce_vid", min_rollout_frames=2 * FRAMES, max_rollout_frames=2 * FRAMES)
    with_gradient: list[bool] = []
    make = trainer._next_frame  # type: ignore[attr-defined]

    def watched(*arguments: Any) -> Tensor:
        frame: Tensor = make(*arguments)
        with_gradient.append(frame.requires_grad)
        return frame

    trainer._next_frame = watched  # type: ignore[attr-defined]
    made = trainer.rollout(tuple(part for part in trainer.loader.batch))  # type: ignore[attr-defined]
    assert with_gradient == [False] * FRAMES + [True] * FRAMES
    assert made.generated.all()
    assert made.x.shape[1] == FRAMES


def test_rollouts_may_be_longer_than_the_window_by_chance(tmp_path: Path) -> None:
    trainer = build(tmp_path, "sforce_vid", min_rollout_frames=2, max_rollout_frames=3 * FRAMES)
    lengths = set()
    for trainer.step in range(12):
        with torch.no_grad():
            told = Told(trainer.model)
            trainer.rollout(tuple(trainer.loader.batch))  # type: ignore[attr-defined]
            lengths.add(sum(bool((levels == 0.2).all()) and levels.shape[1] == 1 for levels in told))
    assert max(lengths) > FRAMES > min(lengths)


def test_causvid_takes_levels_share_and_context_noise_from_the_configuration(tmp_path: Path) -> None:
    changes = {"student_levels": [1.0, 0.6], "gen_p": 1.0, "context_noise": 0.1, "update_ratio": 1}
    trainer = build(tmp_path, "causvid_vid")
    trainer.train_cfg = trainer.train_cfg.model_copy(update={**changes, "student_levels": (1.0, 0.6)})
    told = Told(trainer.model)
    step(trainer)
    assert told.values() == {1.0, 0.6}, "all frames are generated"
    trainer.train_cfg = trainer.train_cfg.model_copy(update={"gen_p": 0.3})
    told.clear()
    step(trainer)
    assert told.values() == {1.0, 0.6, 0.1}


def test_the_critic_may_start_as_the_teacher(tmp_path: Path) -> None:
    trainer = build(tmp_path, "sforce_vid", critic_start="teacher")
    teacher = trainer.teacher.state_dict()  # type: ignore[attr-defined]
    critic = trainer.critic  # type: ignore[attr-defined]
    assert all(torch.equal(v, teacher[k]) for k, v in critic.state_dict().items())
    assert all(p.requires_grad for p in critic.parameters())
    step(trainer)
    assert any(not torch.equal(v, teacher[k]) for k, v in critic.state_dict().items())


@pytest.mark.parametrize("shared", [False, True])
def test_critic_updates_share_rollouts_when_told(tmp_path: Path, shared: bool) -> None:
    trainer = build(tmp_path, "sforce_vid", shared_rollouts=shared, target_batch_size=4)  # two updates of two batches
    made: list[int] = []
    rollout = trainer.rollout

    def counted(batch: Any) -> Any:
        made.append(trainer.step)
        return rollout(batch)

    trainer.rollout = counted  # type: ignore[method-assign]
    step(trainer)
    step(trainer)
    # Per step: the critic's 2 x 2 micro-batches, or 2 when shared, and the student's 2.
    assert made == [0] * (4 if shared else 6) + [1] * (4 if shared else 6)


def test_a_step_that_is_tried_again_makes_its_clips_anew(tmp_path: Path) -> None:
    """Those of the attempt that failed may be why it did."""
    trainer = build(tmp_path, "sforce_vid", shared_rollouts=True)
    rollout = trainer.rollout

    def broken(batch: Any) -> Any:
        made = rollout(batch)
        return dataclasses.replace(made, x=made.x * math.nan)

    trainer.rollout = broken  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="the gradient of the critic"):
        step(trainer)
    trainer.rollout = rollout  # type: ignore[method-assign]
    step(trainer)
    assert trainer.step == 1


def test_a_clip_may_be_judged_at_one_level(tmp_path: Path) -> None:
    trainer = build(tmp_path, "sforce_vid", judged_levels="clip")
    told = Told(trainer.critic)  # type: ignore[attr-defined]
    step(trainer)
    assert told
    assert all((levels == levels[:, :1]).all() for levels in told)


def test_ode_distillation_learns_to_jump_at_the_levels_of_play(tmp_path: Path) -> None:
    """One step of the target from a state of the teacher's way ends where the way ends."""
    changes = {"student_levels": [1.0, 0.5], "rollout_steps": 8, "sampler_kwargs": PLAYED}
    trainer = build(tmp_path, "ode_distill_vid", **changes)
    assert trainer._path_levels() == [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]  # type: ignore[attr-defined]
    video, mouse, btn = trainer.loader.batch  # type: ignore[attr-defined]
    generated = torch.zeros(video.shape[:2], dtype=torch.bool)
    generated[:, -2:] = True
    torch.manual_seed(3)
    jumps = trainer._teacher_path(trainer.to_latents(video), generated, mouse, btn)  # type: ignore[attr-defined]
    trainer.train_cfg = trainer.train_cfg.model_copy(update={"student_levels": None})
    torch.manual_seed(3)
    path = trainer._teacher_path(trainer.to_latents(video), generated, mouse, btn)  # type: ignore[attr-defined]
    last, level, velocity = path[-1]
    end = (last - level[..., None, None, None] * velocity)[:, -2:]
    assert [float(t[0, -1]) for _, t, _ in jumps] == [1.0, 0.5]
    for x, t, target in jumps:
        assert (t[:, :-2] == 0.3).all(), "the history of play"
        torch.testing.assert_close((x - t[..., None, None, None] * target)[:, -2:], end, atol=1e-4, rtol=1e-4)


def test_ode_distillation_without_levels_learns_velocities(tmp_path: Path) -> None:
    trainer = build(tmp_path, "ode_distill_vid", rollout_steps=4)
    told = Told(trainer.model)
    step(trainer)
    assert told.values() == {0.2, 1.0, 0.75, 0.5, 0.25}


@pytest.mark.parametrize("levels", [[0.9, 0.5], [1.0, 0.5, 0.5], [1.0, 0.0], []])
def test_levels_must_fall_from_one(tmp_path: Path, levels: list[float]) -> None:
    with pytest.raises(ConfigError, match="must fall from 1"):
        build(tmp_path, "ode_distill_vid", student_levels=levels)


@pytest.mark.parametrize("sampler_id", ["av_caching", "av_window", "av_causal"])
def test_a_label_may_be_bounded_for_weights_that_never_saw_one(tmp_path: Path, sampler_id: str) -> None:
    trainer = build(tmp_path, "rft")
    core = trainer.ema.model.core
    told = Told(core)
    video, mouse, btn = trainer.loader.batch  # type: ignore[attr-defined]
    run = get_sampler_cls(sampler_id)(n_steps=2, num_frames=1, noise_prev=0.3, max_level=0.985)
    args = (video, mouse, btn) if sampler_id == "av_caching" else (video, None, mouse, btn)
    mouse, btn = mouse.repeat(1, 2, 1), btn.repeat(1, 2, 1)
    args = (*args[:-2], mouse, btn)
    run(core, *args)
    assert max(told.values()) == pytest.approx(0.985)
    assert 0.3 in told.values()
    with pytest.raises(ConfigError, match="max_level"):
        Guidance(model=core, max_level=0.0)


def test_the_teacher_of_old_weights_may_be_told_less_than_one(tmp_path: Path) -> None:
    trainer = build(tmp_path, "ode_distill_vid", teacher_max_level=0.985)
    told = Told(trainer.teacher)  # type: ignore[attr-defined]
    step(trainer)
    assert max(told.values()) == pytest.approx(0.985)
