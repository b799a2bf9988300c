"""Latents in the model's scale and back: exact without a transform, invertible with one.

Run: python -m pytest tests/models/test_latents.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from owl_wms.errors import CheckpointError, ConfigError
from owl_wms.models.latents import LatentSpace, Whitener

CHANNELS = 16


def coloured(frames: int = 400) -> torch.Tensor:
    """Latents [frames, 16, 4, 4] whose principal variances span six orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS, generator=generator))
    spread = torch.logspace(1, -2, CHANNELS)
    white = torch.randn(frames, CHANNELS, 4, 4, generator=generator)
    return torch.einsum("ij,njhw->nihw", turn * spread, white) + 3.0


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_a_transform_is_undone_by_its_inverse(power: float) -> None:
    latents = coloured()
    space = LatentSpace(0.8, Whitener.fit(latents / 0.8, power=power))
    back = space.to_stored(space.to_model(latents))
    assert (back - latents).square().mean() / latents.var() < 1e-10
    moved = torch.randn_like(latents) * 0.1
    there = space.to_model(latents + moved) - space.to_model(latents)
    torch.testing.assert_close(space.difference_to_stored(there), moved, atol=1e-4, rtol=1e-4)


def test_a_transform_whose_parts_share_memory_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    same = torch.eye(4)
    Whitener(mean=same[0], forward=same, inverse=same).save("~/w.safetensors")
    found = Whitener.load(tmp_path / "w.safetensors")
    assert torch.equal(found.forward, same)
    assert torch.equal(found.mean, same[0])


def test_directions_left_out_cost_their_own_variance_alone() -> None:
    latents = coloured(4000)
    whitener = Whitener.fit(latents, power=0.5, channels=12)
    space = LatentSpace(1.0, whitener)
    x = space.to_model(latents)
    assert x.shape[1] == 12
    lost = (space.to_stored(x) - latents).square().sum(dim=1).mean()
    spread = torch.logspace(1, -2, CHANNELS)
    assert float(lost) == pytest.approx(float(spread[12:].square().sum()), rel=0.05)


@pytest.mark.parametrize(("power", "ratio"), [(0.0, 1e6), (0.5, 1e3), (1.0, 1.0)])
def test_power_flattens_the_variances(power: float, ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("owl_wms.models.latents.FLOOR", 0.0)
    latents = coloured(4000)
    x = LatentSpace(1.0, Whitener.fit(latents, power=power)).to_model(latents)
    rows = x.movedim(1, -1).reshape(-1, CHANNELS)
    covariance = torch.cov(rows.T.double())
    variances = covariance.diagonal()
    assert float(variances.max() / variances.min()) == pytest.approx(ratio, rel=0.05)
    assert float(variances.mean()) == pytest.approx(1.0, rel=0.01)
    assert float((covariance - variances.diag()).abs().max() / variances.max()) < 1e-3, "directions are independent"
    assert rows.mean(dim=0).abs().max() < 1e-3


def test_autocast_does_not_round_the_transform() -> None:
    latents = coloured()
    space = LatentSpace(1.0, Whitener.fit(latents, power=1.0))
    plain = space.to_model(latents)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(space.to_model(latents), plain)


def test_a_file_keeps_it(tmp_path: Path) -> None:
    whitener = Whitener.fit(coloured(), channels=8)
    whitener.save(tmp_path / "w.safetensors")
    again = Whitener.load(tmp_path / "w.safetensors")
    assert all(torch.equal(getattr(again, name), getattr(whitener, name)) for name in ("mean", "forward", "inverse"))
    assert LatentSpace(1.0, again).stored_channels(8) == CHANNELS
    with pytest.raises(ConfigError, match=r"model\.channels is 16, and train\.latent_transform gives 8 channels"):
        LatentSpace(1.0, again).stored_channels(16)


@pytest.mark.parametrize(
    "tensors",
    [
        {"mean": torch.zeros(4)},
        {"mean": torch.zeros(4), "forward": torch.zeros(2, 3), "inverse": torch.zeros(4, 2)},
        {"mean": torch.zeros(4), "forward": torch.full((2, 4), float("nan")), "inverse": torch.zeros(4, 2)},
        {"mean": torch.zeros(()), "forward": torch.zeros(2, 4), "inverse": torch.zeros(4, 2)},
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"w\.safetensors: no transform of latents"):
        Whitener.load(tmp_path / "w.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    with pytest.raises(CheckpointError, match="no transform of latents"):
        Whitener.load(tmp_path / "text.safetensors")


def test_a_scale_alone_multiplies(tmp_path: Path) -> None:
    latents = coloured(2)
    space = LatentSpace(0.25)
    assert torch.equal(space.to_model(latents), latents / 0.25)
    assert torch.equal(space.to_stored(latents), latents * 0.25)
    assert space.stored_channels(7) == 7
