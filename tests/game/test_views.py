"""Views that are shown to people: faces and room score high, walls low, and the demo's own world is a good one."""

from __future__ import annotations

import dataclasses
import inspect
import math

import torch

from owl_wms.cli.demo import demo
from owl_wms.game.controls import ScriptedPlayer
from owl_wms.game.views import best_of_each, interest
from owl_wms.game.world import GameWorld
from tests.game.test_world import arena


def seen_from(x: float, yaw: float, creature: tuple[float, float] | None = None) -> float:
    """Returns the score of a player in the empty hall (walls at 1 and 16) at (x, 8.5), with a creature or without."""
    world = arena()
    creatures, gone = world.state.creatures.clone(), world.state.gone.clone()
    if creature is not None:
        creatures[0, 0], gone[0, 0] = torch.tensor(creature), 0
    place = {"position": torch.tensor([[x, 8.5]]), "yaw": torch.tensor([yaw]), "creatures": creatures, "gone": gone}
    world.state = dataclasses.replace(world.state, **place)
    return interest(world).item()


def test_a_hall_shows_more_than_a_wall_and_a_face_more_than_a_hall() -> None:
    wall, hall = seen_from(15.5, 0.0), seen_from(8.5, 0.0)
    assert wall < 0.15
    assert 0.9 < hall <= 1
    assert seen_from(8.5, 0.0, creature=(10.0, 8.5)) > hall + 0.5
    assert hall < seen_from(8.5, 0.0, creature=(13.0, 8.5)) < hall + 0.2, "a small face counts less"
    assert seen_from(8.5, math.pi, creature=(10.0, 8.5)) == seen_from(8.5, math.pi), "it is behind the player"
    assert seen_from(15.5, 0.0, creature=(16.5, 8.5)) == wall, "it is behind the wall"
    # Half of the picture is a near wall: the room counts for the half where the wall is nearer.
    assert seen_from(8.5, 0.0) > seen_from(15.5, math.pi / 2) + 0.3


def test_the_best_of_each_stretch_is_chosen_and_neighbours_are_not() -> None:
    scores = torch.tensor([1.0, 2, 1, 9, 8, 7, 1, 5, 0, 0, 3, 3])
    assert best_of_each(scores, 3) == [3, 5, 10]  # 4 is better than 5, but shows what 3 shows
    assert best_of_each(scores, 1) == [3]
    assert best_of_each(scores, 12) == list(range(12))
    for count in range(1, 13):
        places = best_of_each(torch.zeros(12), count)
        assert places == sorted(set(places))
        assert len(places) == count


def test_the_demo_s_world_shows_most_among_its_neighbours_and_the_score_is_repeatable() -> None:
    worlds = GameWorld(0, batch=8)
    player = ScriptedPlayer(worlds)
    scores = []
    for moment in range(1, 61):
        worlds.step(*player.controls())
        if moment % 20 == 0:
            scores.append(interest(worlds))
    total = torch.stack(scores).mean(dim=0)
    assert int(total.argmax()) == inspect.signature(demo).parameters["seed"].default
    assert torch.allclose(interest(worlds.part(7, 8)), scores[-1][7:8], atol=1e-3), "alone as in a batch"
