"""Decoding in tiles gives the frames of the whole decoder, with halos no wider than they have to be."""

from __future__ import annotations

import pytest
import torch

from owl_wms.vae import tiles
from tests.fused.test_sana import VARIANTS, make

pytest.importorskip("diffusers")


@pytest.mark.parametrize("side", [1, 3, 5, 64])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_tiles_are_exact(name: str, side: int) -> None:
    decoder = make(**VARIANTS[name])
    z = torch.randn(2, decoder.conv_in.in_channels, 4, 5)
    got, wanted = tiles.decode_in_tiles(decoder, z, side), decoder(z)
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@torch.no_grad()
def test_a_narrower_halo_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make(**VARIANTS["f32c32 of Sana"])
    z = torch.randn(1, decoder.conv_in.in_channels, 8, 8)
    wide = tiles.halo(tiles.split(decoder)[1])
    monkeypatch.setattr(tiles, "halo", lambda tail: wide - 1)
    got, wanted = tiles.decode_in_tiles(decoder, z, 8), decoder(z)
    assert (got - wanted).abs().max() > 5e-5 * wanted.abs().max()  # five times what the test above allows


def test_the_halo_of_f32c32() -> None:
    """Three stages of three residual blocks, each behind nearest enlargement: pixels of an eighth of the picture."""
    values = {**VARIANTS["f32c32 of Sana"], "block_out_channels": [8] * 4, "layers_per_block": [3] * 4}
    values |= {"block_type": ["ResBlock"] * 3 + ["EfficientViTBlock"], "qkv_multiscales": [[], [], [], [5]]}
    assert tiles.halo(tiles.split(make(**values))[1]) == 7
