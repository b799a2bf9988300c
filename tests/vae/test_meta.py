"""Weight norm on the meta device: right shapes, no compiler imported, and nothing changed elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from owl_wms.vae.meta import WeightNormShapes

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (5, 7), (3,)])
@pytest.mark.parametrize("dim", [0, -1])
def test_shapes_are_those_of_pytorch(shape: tuple[int, ...], dim: int) -> None:
    v = torch.randn(shape)
    wanted = torch.norm_except_dim(v, 2, dim)
    with WeightNormShapes():
        assert torch.norm_except_dim(v.to("meta"), 2, dim).shape == wanted.shape
        assert torch._weight_norm(v.to("meta"), wanted.to("meta"), dim).shape == v.shape
        assert torch.equal(torch.norm_except_dim(v, 2, dim), wanted), "real tensors are left to PyTorch"


def test_loading_a_decoder_or_a_world_model_imports_no_compiler() -> None:
    code = (
        "import sys; from owl_wms.utils.owl_vae_bridge import get_decoder_only as get;"
        "get(None, 'examples/demo/demo_vae.yml', 'examples/demo/demo_vae.safetensors', device='cpu');"
        "from owl_wms.models.load import load_model as load;"
        "load('examples/world/game_rft.yml', 'examples/world/game_rft.safetensors');"
        "print(sorted(set(sys.modules) & {'torch._dynamo', 'sympy'}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
