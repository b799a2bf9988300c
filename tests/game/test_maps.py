"""Maps: the same for a seed wherever it stands in a batch, walled in, and connected."""

from __future__ import annotations

import torch

from owl_wms.game.maps import GRID_SIZE, bake_floor_light, hash_unit, make_grid


def test_hash_is_a_function_of_its_arguments_and_uniform() -> None:
    seeds = torch.arange(4000)
    values = hash_unit(seeds, 3, 5)
    assert torch.equal(values[17:18], hash_unit(torch.tensor([17]), 3, 5))
    assert not torch.equal(values, hash_unit(seeds, 4, 5))
    assert not torch.equal(values, hash_unit(seeds, 3, 6))
    assert values.min() >= 0
    assert values.max() < 1
    counts = torch.histc(values, bins=10, min=0, max=1)
    assert (counts - 400).abs().max() < 100  # five standard deviations


def test_map_of_a_seed_does_not_depend_on_the_batch() -> None:
    together = make_grid(torch.tensor([3, 99, 12345678901]))
    assert torch.equal(together[2:], make_grid(torch.tensor([12345678901])))
    assert not torch.equal(together[0], together[1])


def test_free_space_is_connected_and_walled_in() -> None:
    grids = make_grid(torch.arange(40))
    for edge in (grids[:, 0], grids[:, -1], grids[:, :, 0], grids[:, :, -1]):
        assert (edge > 0).all()
    free = grids == 0
    assert free[:, 1::2, 1::2].all()
    reached = torch.zeros_like(free)
    reached[:, 1, 1] = True
    for _ in range(GRID_SIZE * GRID_SIZE):
        grown = reached.clone()
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown[:, :, 1:] |= reached[:, :, :-1]
        grown[:, :, :-1] |= reached[:, :, 1:]
        grown &= free
        if torch.equal(grown, reached):
            break
        reached = grown
    assert torch.equal(reached, free)


def test_floor_is_darker_in_the_shadow_of_a_wall() -> None:
    grid = torch.zeros(1, GRID_SIZE, GRID_SIZE, dtype=torch.long)
    grid[0, 8, 8] = 1
    light = bake_floor_light(grid, torch.tensor([[1.0, 0.0]]))[0]  # the sun stands towards +x
    shadow, lit = light[8 * 8 + 4, 8 * 8 - 4], light[8 * 8 + 4, 9 * 8 + 4]
    assert 0 < shadow < lit - 0.1
    assert lit <= 1
