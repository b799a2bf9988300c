"""The audio decoder: counts, sample rate arithmetic, its activation, and its rules."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path

import pytest
import torch

from owl_wms.configs import load_vae_config, parse_vae_model
from owl_wms.errors import ConfigError
from owl_wms.utils.owl_vae_bridge import get_decoder_only, make_batched_audio_decode_fn
from owl_wms.vae import build_decoder, build_encoder, fold_weight_norm, load_weights
from owl_wms.vae.audio import SnakeBeta
from tests.vae.helpers import DATA, VAE_CONFIGS, randomize, relative_error, small_audio


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


@torch.no_grad()
def test_upstreams_decoder(tmp_path: Path) -> None:
    """Weights and samples that upstream's own decoder gave."""
    golden = torch.load(DATA / "audio_decoder.pt", weights_only=True)["three"]
    decoder = build_decoder(parse_vae_model(golden["cfg"])).eval()
    assert decoder.state_dict().keys() == golden["decoder"].keys()
    load_weights(decoder, golden["decoder"], "golden")
    assert relative_error(decoder(golden["z"]), golden["y"]) < 2e-6
    config = tmp_path / "a.yml"
    config.write_text(json.dumps({"model": golden["cfg"]}))
    torch.save({f"decoder.{key}": value for key, value in golden["decoder"].items()}, tmp_path / "a.pt")
    decode = make_batched_audio_decode_fn(get_decoder_only(None, config, tmp_path / "a.pt", device="cpu"), 1)
    samples = decode(golden["z"].transpose(1, 2))
    assert relative_error(samples.float(), golden["y"].transpose(1, 2)) < 0.05


@pytest.mark.parametrize("folded", [False, True])
def test_names_of_our_older_files(folded: bool) -> None:
    decoder = randomize(build_decoder(small_audio()))
    decoder = fold_weight_norm(decoder) if folded else decoder
    old = {
        re.sub(r"block([123])\.", lambda m: f"blocks.{int(m[1]) - 1}.", key): value
        for key, value in decoder.state_dict().items()
    }
    old = {key.replace("final.", "act_out."): value for key, value in old.items()}
    assert "blocks.0.blocks.0.conv1.bias" in old
    fresh = build_decoder(small_audio())
    load_weights(fresh, old, "old.pt")
    fresh = fold_weight_norm(fresh) if folded else fresh
    assert all(torch.equal(value, decoder.state_dict()[key]) for key, value in fresh.state_dict().items())


def test_rules() -> None:
    with pytest.raises(ConfigError, match="never reached"):
        build_decoder(small_audio(ch_max=64))
    with pytest.raises(ConfigError, match="at least one stride"):
        build_decoder(small_audio(strides=[]))
    with pytest.raises(ConfigError, match="only the decoder of audio_ae"):
        build_encoder(small_audio())
