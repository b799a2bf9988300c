"""Rules: controls move the camera as commanded, walls stop it, and nothing depends on chance."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from owl_wms.game.buttons import BUTTONS
from owl_wms.game.controls import RestlessPlayer, ScriptedPlayer, scripted_controls
from owl_wms.game.render import render
from owl_wms.game.world import YAW_PER_MOUSE, GameWorld


def arena(yaw: float = 0.0, size: int = 17) -> GameWorld:
    """A world that is one empty room, the player in its middle."""
    world = GameWorld(0)
    world.grid[:, 1:-1, 1:-1] = 0
    world.grid[0, 0] = world.grid[0, -1] = world.grid[0, :, 0] = world.grid[0, :, -1] = 1
    world.state = dataclasses.replace(
        world.state, position=torch.tensor([[size / 2, size / 2]]), yaw=torch.tensor([yaw]), gone=world.state.gone + 1e6
    )
    return world


def press(*names: str) -> torch.Tensor:
    return torch.tensor([[name in names for name in BUTTONS]])


def run(world: GameWorld, frames: int, *names: str, mouse: tuple[float, float] = (0.0, 0.0)) -> torch.Tensor:
    start = world.state.position.clone()
    for _ in range(frames):
        world.step(torch.tensor([mouse]), press(*names))
    return (world.state.position - start)[0]


def test_mouse_right_turns_right_and_mouse_down_looks_down() -> None:
    world = arena()
    run(world, 5, mouse=(1.0, 0.5))
    assert world.state.yaw.item() == pytest.approx(5 * YAW_PER_MOUSE)
    assert world.state.pitch.item() < 0
    run(world, 100, mouse=(0.0, 1.0))
    assert world.state.pitch.item() >= -0.4 - 1e-6


@pytest.mark.parametrize(("key", "angle"), [("W", 0.0), ("D", 0.5), ("S", 1.0), ("A", -0.5)])
@pytest.mark.parametrize("yaw", [0.0, 1.1])
def test_keys_move_relative_to_the_view(key: str, angle: float, yaw: float) -> None:
    moved = run(arena(yaw), 30, key)
    direction = yaw + angle * math.pi  # right of (1, 0) is (0, 1): y points down the map
    assert moved.norm() > 0.5
    assert torch.allclose(
        moved / moved.norm(), torch.tensor([math.cos(direction), math.sin(direction)], dtype=torch.float32), atol=1e-4
    )


def test_sprint_is_faster_and_diagonals_are_not() -> None:
    walk, sprint = run(arena(), 30, "W").norm(), run(arena(), 30, "W", "LSHIFT").norm()
    assert sprint > 1.4 * walk
    assert run(arena(), 30, "W", "D").norm() == pytest.approx(walk.item(), rel=1e-3)


def test_walls_stop_and_let_slide() -> None:
    world = arena(yaw=math.pi / 4)
    run(world, 400, "W", "LSHIFT")
    assert not world.solid(world.state.position[:, None]).any()
    assert (world.state.position > 15.5).all()  # slid along one wall into the corner
    assert (world.state.position < 16).all()


def test_jump_rises_and_lands() -> None:
    world = arena()
    heights = []
    for frame in range(60):
        world.step(torch.zeros(1, 2), press(*(["SPACE"] if frame == 0 else [])))
        heights.append(world.state.height.item())
    assert 0.3 < max(heights) < 0.6
    assert heights[-1] == 0


def test_fire_reload_lamp_scan_and_aim() -> None:
    world = arena()
    run(world, 1, "LMB", "F", "E")
    assert (world.state.flash.item(), world.state.lamp.item()) == (1.0, 1.0)
    assert world.state.pulse.item() == 0
    run(world, 3, "LMB", "F", "RMB")
    assert world.state.flash.item() < 0.3  # still cooling down
    assert world.state.lamp.item() == 1  # held, not pressed again
    assert world.state.zoom.item() > 0.3
    run(world, 1, "R")
    run(world, 20, "LMB")
    assert world.state.flash.item() < 0.05  # no shot while reloading


def test_a_shot_hits_what_stands_before_it_only() -> None:
    world = arena()
    creatures = world.state.creatures.clone()
    creatures[0] = torch.tensor([2.5, 2.5])
    creatures[0, 0] = torch.tensor([11.0, 8.5])
    creatures[0, 1] = torch.tensor([5.0, 8.5])  # behind the player
    world.state = dataclasses.replace(world.state, creatures=creatures, gone=torch.zeros_like(world.state.gone))
    run(world, 1, "LMB")
    assert world.state.gone[0, 0] > 0
    assert (world.state.gone[0, 1:] == 0).all()


def test_play_is_the_same_alone_and_in_a_batch() -> None:
    alone, both = GameWorld(41), GameWorld(40, batch=2)
    players = ScriptedPlayer(alone), ScriptedPlayer(both)
    for _ in range(40):
        alone.step(*players[0].controls())
        both.step(*players[1].controls())
    assert torch.allclose(alone.state.position[0], both.state.position[1], atol=1e-5)
    assert torch.allclose(render(alone, height=36, width=64)[0], render(both, height=36, width=64)[1], atol=1e-3)
    part = both.part(1, 2)
    assert torch.equal(render(part, height=36, width=64)[0], render(both, height=36, width=64)[1])


def test_scripted_controls_are_smooth_plausible_and_repeatable() -> None:
    mouse, buttons = scripted_controls(7, 150)
    again = scripted_controls(7, 150)
    assert torch.equal(mouse, again[0])
    assert torch.equal(buttons, again[1])
    assert (mouse.shape, buttons.shape, buttons.dtype) == ((150, 2), (150, 11), torch.bool)
    assert mouse.abs().max() <= 1
    assert mouse.diff(dim=0).abs().max() < 0.3
    assert 0.4 < buttons[:, 0].float().mean() <= 1  # walks most of the time
    changes = (buttons[1:] != buttons[:-1]).sum(dim=0)
    assert changes.max() < 30  # keys are held, not rattled


def test_training_data_have_players_at_rest_and_single_controls() -> None:
    world = GameWorld(5_000, batch=64)
    player = RestlessPlayer(world)
    mice, held = [], []
    for _ in range(96):
        mouse, buttons = player.controls()
        mice.append(mouse)
        held.append(buttons)
        world.step(mouse, buttons)
    mouse, buttons = torch.stack(mice, dim=1), torch.stack(held, dim=1)
    assert mouse.abs().max() <= 1
    quiet = (mouse == 0).all(dim=-1) & ~buttons.any(dim=-1)
    assert 0.25 < quiet.float().mean() < 0.6, "a quarter of the pieces, and the longer ones"
    runs = quiet.unfold(1, 20, 1).all(dim=-1)
    assert runs.any(dim=1).float().mean() > 0.4, "in most episodes somebody stands still for 20 frames"
    only_x = (mouse[..., 0] != 0) & (mouse[..., 1] == 0) & ~buttons.any(dim=-1)
    one_key = (mouse == 0).all(dim=-1) & (buttons.sum(dim=-1) == 1)
    assert only_x.float().mean() > 0.05
    assert one_key.float().mean() > 0.05
    assert buttons[one_key].any(dim=0).all(), "every key is held alone by somebody"
    both = (mouse != 0).all(dim=-1)
    assert both.float().mean() > 0.25


def test_restless_play_is_the_same_alone_and_in_a_batch() -> None:
    alone, both = GameWorld(41), GameWorld(40, batch=2)
    players = RestlessPlayer(alone), RestlessPlayer(both)
    for _ in range(60):
        first, second = players[0].controls(), players[1].controls()
        torch.testing.assert_close(first[0][0], second[0][1], atol=1e-5, rtol=0)
        assert torch.equal(first[1][0], second[1][1])
        alone.step(*first)
        both.step(*second)


def test_wrong_shapes_are_refused() -> None:
    world = GameWorld(0, batch=2)
    with pytest.raises(ValueError, match=r"\[2, 2\] and \[2, 11\], got \[2, 2\] and \[2, 8\]"):
        world.step(torch.zeros(2, 2), torch.zeros(2, 8))
    with pytest.raises(ValueError, match="at least 1"):
        GameWorld(0, batch=0)
