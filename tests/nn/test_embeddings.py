"""Embeddings: the sines against their definition, and fp32 inside a bf16 model."""

from __future__ import annotations

import math

import torch

from owl_wms.nn.embeddings import MouseEmbedding, TimestepEmbedding, sincos
from owl_wms.nn.mlp import MLP


def test_sincos_is_its_definition() -> None:
    out = sincos(torch.tensor([0.25]), 8)[0]
    wanted = [1000 * 0.25 * 300 ** (-i / 3) for i in range(4)]
    expected = [math.sin(a) for a in wanted] + [math.cos(a) for a in wanted]
    assert torch.allclose(out, torch.tensor(expected), atol=1e-4)


def test_a_bfloat16_model_tells_neighbouring_noise_levels_apart() -> None:
    embed = TimestepEmbedding(32).bfloat16()
    levels = torch.tensor([[0.9990, 0.9995]])
    assert torch.equal(levels.bfloat16()[0, 0], levels.bfloat16()[0, 1]), "bf16 itself cannot"
    out = embed(levels)
    assert out.dtype == torch.bfloat16
    assert sincos(levels, 512).diff(dim=1).abs().max() > 0.1
    assert not torch.equal(out[0, 0], out[0, 1])


def test_mlp_starts_near_silent() -> None:
    mlp = MLP(256, 512, 64)
    assert torch.equal(mlp.fc1.bias, torch.zeros(512))
    assert abs(float(mlp.fc1.weight.detach().std()) / (math.sqrt(2 / 256) / 16) - 1) < 0.02


def test_a_mouse_at_rest_has_upstreams_direction_or_none() -> None:
    torch.manual_seed(0)
    with_direction, without = MouseEmbedding(16, 8), MouseEmbedding(16, 8, rest_has_direction=False)
    without.load_state_dict(with_direction.state_dict())
    moving, still = torch.tensor([[[0.3, 0.0], [-0.2, 0.7]]]), torch.zeros(1, 1, 2)
    nearly = torch.tensor([[[1e-12, 0.0]]])
    assert torch.equal(with_direction(moving), without(moving))
    torch.testing.assert_close(with_direction(still), with_direction(nearly))
    assert not torch.equal(without(still), with_direction(still))
    assert torch.equal(without(still), without(-still)), "and -0.0 is rest as well"
