"""Weights stored with 8 bits: read as any others, near the ones that were stored, refused when they do not fit.

Run: python -m pytest tests/vae/test_eight_bits.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from owl_wms.errors import CheckpointError
from owl_wms.vae.checkpoint import load_weights, read_state_dict
from owl_wms.vae.eight_bits import SCALE, packed
from tests.world import tiny_core


def test_a_model_comes_back_within_half_a_step_of_each_row(tmp_path: Path) -> None:
    core = tiny_core()
    weights = core.state_dict()
    path = tmp_path / "core.safetensors"
    save_file(packed(weights), path)
    found = read_state_dict(path)
    assert set(found) == set(weights)
    for name, value in weights.items():
        if value.ndim != 2:
            assert torch.equal(found[name], value.bfloat16())
            continue
        step = value.abs().amax(dim=1, keepdim=True) / 127
        assert ((found[name] - value).abs() <= 0.51 * step).all(), name
    load_weights(tiny_core(seed=1), found, path)
    assert path.stat().st_size < 0.6 * sum(2 * value.numel() for value in weights.values())


def test_rows_of_zeros_stay_zero() -> None:
    stored = packed({"a": torch.tensor([[0.0, 0.0], [0.5, -1.0]])})
    assert stored["a"].tolist()[0] == [0, 0]
    assert torch.isfinite(stored[f"a{SCALE}"]).all()


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({f"a{SCALE}": torch.ones(2), "b": torch.ones(2, 2)}, "but nothing"),
        ({f"a{SCALE}": torch.ones(3), "a": torch.ones(2, 2, dtype=torch.int8)}, "torch.int8 [2, 2]"),
        ({f"a{SCALE}": torch.ones(2), "a": torch.ones(2, 2)}, "torch.float32 [2, 2]"),
    ],
)
def test_factors_without_their_matrix_are_one_line(tmp_path: Path, stored: dict[str, torch.Tensor], words: str) -> None:
    path = tmp_path / "w.safetensors"
    save_file(stored, path)
    with pytest.raises(CheckpointError, match="has no int8 matrix of so many rows") as caught:
        read_state_dict(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
