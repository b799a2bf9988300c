"""The audio decoder: counts, sample rate arithmetic, its activation, and its rules."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from owl_wms.configs import load_vae_config
from owl_wms.errors import ConfigError
from owl_wms.vae import build_decoder, build_encoder, fold_weight_norm
from owl_wms.vae.audio import SnakeBeta
from tests.vae.helpers import VAE_CONFIGS, randomize, relative_error, small_audio


def test_counts_are_upstreams() -> None:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoder = build_decoder(load_vae_config(VAE_CONFIGS / "audio_ae_2.yml").model)
        assert decoder(torch.empty(2, 64, 3)).shape == (2, 2, 3 * 735)
    assert sum(p.numel() for p in decoder.parameters()) == 109_017_602
    assert len(decoder.state_dict()) == 167


@torch.no_grad()
def test_decodes_in_range_and_folds() -> None:
    decoder = randomize(build_decoder(small_audio()))
    z = torch.randn(2, 4, 5)
    samples = decoder(z)
    assert samples.shape == (2, 2, 30)
    assert samples.abs().max() <= 1
    assert relative_error(fold_weight_norm(decoder)(z), samples) < 1e-6
    assert relative_error(torch.export.export(decoder, (z,)).module()(z), samples) < 1e-6


def test_snake_beta_formula() -> None:
    act = SnakeBeta(2)
    with torch.no_grad():
        act.alpha.copy_(torch.tensor([0.5, -0.25]))
        act.beta.copy_(torch.tensor([0.1, 2.0]))
    out = act(torch.tensor([[[0.3], [-1.2]]]))
    want = [
        0.3 + math.sin(0.3 * 1.5) ** 2 / (1e-6 + math.exp(0.1)),
        -1.2 + math.sin(-1.2 * 0.75) ** 2 / (1e-6 + math.exp(2.0)),
    ]
    assert torch.allclose(out.flatten(), torch.tensor(want))


def test_rules() -> None:
    with pytest.raises(ConfigError, match="never reached"):
        build_decoder(small_audio(ch_max=64))
    with pytest.raises(ConfigError, match="at least one stride"):
        build_decoder(small_audio(strides=[]))
    with pytest.raises(ConfigError, match="only the decoder of audio_ae"):
        build_encoder(small_audio())
