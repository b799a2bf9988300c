"""Muon: singular values, the split of parameters, batches of one shape.

Run: python -m pytest tests/trainers/optim/test_muon.py
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from owl_wms.errors import ConfigError
from owl_wms.trainers.optim.muon import Muon, build_muon, orthogonalise


@pytest.mark.parametrize("shape", [(3, 16, 48), (2, 48, 16), (1, 24, 24)])
def test_singular_values_come_near_one(shape: tuple[int, int, int]) -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)).float())
    assert values.shape == (shape[0], min(shape[1:]))
    assert values.max() < 1.3
    assert values.median() > 0.6


def test_matrices_of_one_shape_step_as_they_would_alone() -> None:
    first, second = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(8, 4))
    alone = nn.Parameter(first.detach().clone())
    start = first.detach().clone()
    both, single = Muon([first, second], lr=0.1), Muon([alone], lr=0.1)
    for _ in range(3):
        gradient = torch.randn(8, 4)
        first.grad, second.grad, alone.grad = gradient, torch.randn(8, 4), gradient.clone()
        both.step()
        single.step()
    torch.testing.assert_close(first, alone, atol=2e-3, rtol=0)
    assert (first - start).abs().max() > 0.02, "they did step"


def test_named_parameters_and_vectors_go_to_adamw() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimiser = build_muon(model.named_parameters(), adamw_keys=["1.weight"])
    assert [p is model[0].weight for p in optimiser.muon.param_groups[0]["params"]] == [True]
    assert len(optimiser.adamw.param_groups[0]["params"]) == 3
    assert set(optimiser.state_dict()) == {"adamw", "muon"}


def test_a_key_without_a_parameter_is_an_error() -> None:
    with pytest.raises(ConfigError, match="proj_inn"):
        build_muon(nn.Linear(4, 4).named_parameters(), adamw_keys=["proj_inn"])


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (24, 24)])
def test_the_update_is_torchs(shape: tuple[int, int]) -> None:
    """torch.optim.Muon is the same algorithm; bfloat16 products in another order are all that differs."""
    mine, theirs = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.empty(shape))
    theirs.data.copy_(mine.data)
    settings = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    pair = Muon([mine], **settings), torch.optim.Muon([theirs], **settings)
    start = mine.detach().clone()
    for _ in range(4):
        gradient = torch.randn(shape)
        for parameter, optimiser in zip((mine, theirs), pair, strict=True):
            parameter.grad = gradient.clone()
            optimiser.step()
    difference, way = (mine - theirs).detach().norm(), (theirs.detach() - start).norm()
    assert float(difference / way) < 0.04
