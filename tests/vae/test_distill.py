"""The distilled autoencoder: counts, keys, and a second derivation of both halves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from owl_wms.configs import load_vae_config
from owl_wms.errors import ConfigError
from owl_wms.vae import build_autoencoder, build_decoder, build_encoder
from tests.vae.helpers import VAE_CONFIGS, effective, randomize, relative_error, small_distill
from tests.vae.test_dcae import _res


@pytest.mark.parametrize(
    ("latent", "decoder_count", "encoder_count"), [(64, 15_911_523, 18_272_416), (128, 16_796_259, 19_157_216)]
)
def test_counts_are_upstreams(latent: int, decoder_count: int, encoder_count: int) -> None:
    cfg = load_vae_config(VAE_CONFIGS / "cod_64x_c64_depth_distill_dec.yml").model
    cfg = cfg.model_copy(update={"latent_channels": latent})
    with torch.device("meta"):
        decoder, encoder = build_decoder(cfg), build_encoder(cfg)
        assert decoder(torch.empty(2, latent, 8, 8)).shape == (2, 3, 360, 640)
        assert encoder(torch.empty(2, 4, 360, 640)).shape == (2, latent, 8, 8)
    assert sum(p.numel() for p in decoder.parameters()) == decoder_count
    assert sum(p.numel() for p in encoder.parameters()) == encoder_count
    assert (len(decoder.state_dict()), len(encoder.state_dict())) == (52, 54)


def test_keys() -> None:
    with torch.device("meta"):
        keys = set(build_decoder(small_distill(sample_size=[36, 64])).state_dict())
    pair = [f"parametrizations.weight.original{i}" for i in (0, 1)]
    wanted = {f"{conv}.{p}" for conv in ("conv_in", "conv_out.proj") for p in pair}
    wanted |= {f"blocks.{i}.proj.{p}" for i in (2, 4, 6, 8) for p in pair}
    for i in (1, 3, 5, 7, 9):
        wanted |= {f"blocks.{i}.{conv}.{p}" for conv in ("conv1", "conv2", "conv3") for p in pair}
        wanted |= {f"blocks.{i}.conv1.bias", f"blocks.{i}.conv2.bias"}
    assert keys == wanted


@torch.no_grad()
def test_decoder_matches_second_derivation() -> None:
    decoder = randomize(build_decoder(small_distill()))
    w, z = effective(decoder), torch.randn(1, 8, 2, 2)
    x = F.conv2d(z, w["conv_in.weight"], padding=1)
    for i, stride in enumerate((2, 4, 2, 2, 2)):
        if i > 0:
            x = F.conv2d(x, w[f"blocks.{2 * i}.proj.weight"])
        x = _res(F.interpolate(x, scale_factor=stride, mode="bicubic"), w, f"blocks.{2 * i + 1}")
    assert relative_error(decoder(z), F.conv2d(x, w["conv_out.weight"], padding=1)) < 1e-5
    assert relative_error(torch.export.export(decoder, (z,)).module()(z), decoder(z)) < 1e-6


@torch.no_grad()
def test_encoder_matches_second_derivation_and_clamps() -> None:
    encoder = randomize(build_encoder(small_distill()))
    w, x = effective(encoder), torch.randn(1, 5, 128, 128)
    h = F.conv2d(x[:, :3], w["conv_in.weight"], padding=1)
    for i, stride in enumerate((2, 2, 2, 4, 2)):
        h = F.interpolate(_res(h, w, f"blocks.{2 * i}"), scale_factor=1 / stride, mode="bicubic")
        h = F.conv2d(h, w[f"blocks.{2 * i + 1}.proj.weight"])
    want = F.conv2d(h, w["conv_out.weight"], padding=1).clamp(-10, 10)
    assert relative_error(encoder(x), want) < 1e-5
    assert encoder(1e4 * x).abs().max() == 10


def test_autoencoder_and_rules() -> None:
    rec, z = build_autoencoder(small_distill())(torch.randn(1, 3, 64, 64))
    assert rec.shape == (1, 3, 64, 64)
    assert z.shape == (1, 8, 1, 1)
    with pytest.raises(ConfigError, match="16 \\* ch_0 = 128"):
        build_decoder(small_distill(ch_max=64))
    with pytest.raises(ConfigError, match="no 'learned' variant"):
        build_decoder(small_distill(), "learned")
