"""`dmd_loss` pulls a student's clip from where the critic places it to where the teacher does.

Run: python -m pytest tests/trainers/objectives/test_dmd.py
"""

from __future__ import annotations

import torch

from owl_wms.trainers.objectives.dmd import dmd_loss

SHAPE = (2, 3, 4, 2, 2)


def _case() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(SHAPE, generator=generator).requires_grad_(), torch.randn(SHAPE, generator=generator)


def test_the_gradient_points_from_the_teacher_to_x_when_the_critic_sits_at_x() -> None:
    x, teacher = _case()
    frames = torch.ones(SHAPE[:2], dtype=torch.bool)
    dmd_loss(x, teacher, x.detach(), frames).backward()
    assert x.grad is not None
    # Of the mean over frames and elements: (x - teacher) / mean distance of the item, per element.
    away = x.detach() - teacher
    wanted = away / away.abs().mean(dim=(1, 2, 3, 4), keepdim=True) / x.numel()
    torch.testing.assert_close(x.grad, wanted)
    # So a step down the gradient comes nearer to the teacher, in every item.
    moved = x.detach() - 0.1 * x.numel() * x.grad
    assert ((moved - teacher).square().mean(dim=(1, 2, 3, 4)) < away.square().mean(dim=(1, 2, 3, 4))).all()


def test_no_gradient_where_critic_and_teacher_agree_or_the_frame_is_given() -> None:
    x, teacher = _case()
    frames = torch.tensor([[True, False, True], [False, True, True]])
    dmd_loss(x, teacher, teacher, frames).backward()
    assert x.grad is not None
    assert x.grad.abs().max() == 0
    x.grad = None
    dmd_loss(x, teacher, x.detach(), frames).backward()
    assert x.grad[~frames].abs().max() == 0
    assert (x.grad[frames] != 0).all()


def test_a_critic_on_the_far_side_pushes_away_from_it() -> None:
    x, _ = _case()
    teacher, critic = x.detach() + 1, x.detach() - 1
    dmd_loss(x, teacher, critic, torch.ones(SHAPE[:2], dtype=torch.bool)).backward()
    assert x.grad is not None
    assert (x.grad < 0).all()  # down the gradient is up, to the teacher
