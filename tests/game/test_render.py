"""Frames: depth is the analytic distance, colours stay in range, and what is done can be seen."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from owl_wms.game.render import channel_to_depth, depth_to_channel, render
from owl_wms.game.world import GameWorld
from tests.game.test_world import arena, press


def test_depth_is_the_distance_of_wall_and_floor() -> None:
    world = arena()
    world.state = dataclasses.replace(world.state, position=torch.tensor([[10.0, 8.5]]))
    frame = render(world, height=90, width=160)[0]
    depth = channel_to_depth(frame[3])
    # The wall that faces x stands at x = 16; perpendicular depth is 6 cells in every column it fills.
    assert torch.allclose(depth[44, 60:100], torch.full((40,), 6.0), rtol=1e-4)
    focal, eye = 160 / 2 / 0.84, world.state.eye().item()
    row = 85
    assert depth[row, 80].item() == pytest.approx(focal * eye / (row + 0.5 - 45), rel=1e-4)
    assert frame[3, 2].max() == 1  # sky


def test_depth_mapping_is_its_own_inverse() -> None:
    depth = torch.tensor([0.0, 0.5, 4.0, 30.0])
    assert torch.allclose(channel_to_depth(depth_to_channel(depth)), depth, atol=1e-5)
    assert depth_to_channel(torch.tensor([0.0, 4.0, torch.inf])).tolist() == [-1.0, 0.0, 1.0]


def test_frames_are_finite_in_range_and_repeatable() -> None:
    frames = render(GameWorld(5, batch=3), height=72, width=128)
    assert (tuple(frames.shape), frames.dtype) == ((3, 4, 72, 128), torch.float32)
    assert frames.isfinite().all()
    assert frames.min() >= -1
    assert frames.max() <= 1
    assert torch.equal(frames, render(GameWorld(5, batch=3), height=72, width=128))
    assert frames.flatten(1).std(dim=1).min() > 0.05
    assert render(GameWorld(5)).shape == (1, 4, 360, 640)


@pytest.mark.parametrize("button", ["LMB", "F", "E", "R", "RMB", "SPACE"])
def test_every_action_shows(button: str) -> None:
    idle, acting = arena(), arena()
    for _ in range(20 if button == "E" else 4):  # the scan ring starts at the feet, out of view
        idle.step(torch.zeros(1, 2), press())
        acting.step(torch.zeros(1, 2), press(button))
    difference = (render(idle, height=72, width=128) - render(acting, height=72, width=128)).abs()
    assert difference[:, :3].max() > 0.1


def test_turning_right_moves_the_picture_left() -> None:
    world = arena()
    creatures = world.state.creatures.clone()
    creatures[0, 0] = torch.tensor([11.0, 8.5])
    gone = world.state.gone.clone()
    gone[0, 0] = 0
    world.state = dataclasses.replace(world.state, creatures=creatures, gone=gone)

    def place() -> float:
        ball = channel_to_depth(render(world, height=72, width=128)[0, 3]).sub(2.5).abs() < 0.2
        ball &= torch.arange(72)[:, None] < 60  # above the floor at that distance
        return ball.float().sum(dim=0).argmax().item()

    before = place()
    world.state = dataclasses.replace(world.state, yaw=world.state.yaw + 0.2)
    assert place() < before - 5


@pytest.mark.gpu
def test_gpu_renders_what_the_cpu_renders() -> None:
    cpu, gpu = GameWorld(9, batch=2), GameWorld(9, batch=2, device="cuda")
    difference = (render(cpu) - render(gpu).cpu()).abs()
    assert difference.mean() < 1e-3
