"""From config and file to a decoder: only that half, the right variant, and diffusers' decoder by its folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from owl_wms.errors import CheckpointError, ConfigError
from owl_wms.vae import build_autoencoder, build_decoder, load_decoder, load_encoder
from tests.vae.helpers import SMALL, randomize, relative_error, small_dcae, small_distill


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "cfg.yml"
    path.write_text(yaml.safe_dump({"model": SMALL}))
    return path


@pytest.mark.parametrize("variant", ["tiled", "learned"])
@torch.no_grad()
def test_variant_follows_the_file(tmp_path: Path, config: Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomize(build_autoencoder(small_dcae(), variant))
    torch.save(model.bfloat16().state_dict(), tmp_path / "full.pt")
    # Asked for the decoder, nothing may build the encoder.
    monkeypatch.setattr("owl_wms.vae.load.build_encoder", None)
    decoder = load_decoder(None, config, tmp_path / "full.pt")
    assert decoder.variant == variant
    assert not decoder.training
    assert {(p.dtype, p.device.type) for p in decoder.parameters()} == {(torch.float32, "cpu")}
    z = torch.randn(1, 8, 2, 2)
    assert relative_error(decoder(z), model.float().decoder(z)) < 1e-6
    monkeypatch.undo()
    x = torch.randn(1, 3, 64, 64)
    assert relative_error(load_encoder(None, config, tmp_path / "full.pt")(x), model.encoder(x)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_rounds_no_weights(tmp_path: Path, config: Path, dtype: torch.dtype) -> None:
    torch.save(randomize(build_autoencoder(small_dcae())).state_dict(), tmp_path / "full.pt")
    wanted = [load(None, config, tmp_path / "full.pt").state_dict() for load in (load_decoder, load_encoder)]
    torch.set_default_dtype(dtype)
    try:
        found = [load(None, config, tmp_path / "full.pt").state_dict() for load in (load_decoder, load_encoder)]
    finally:
        torch.set_default_dtype(torch.float32)
    for had, has in zip(wanted, found, strict=True):
        assert all(has[key].dtype == value.dtype and torch.equal(has[key], value) for key, value in had.items())


def test_refusals(tmp_path: Path, config: Path) -> None:
    decoder = build_decoder(small_dcae())
    torch.save(decoder.state_dict(), tmp_path / "bare.pt")
    torch.save({f"encoder.{k}": v for k, v in decoder.state_dict().items()}, tmp_path / "encoder.pt")
    torch.save(build_decoder(small_distill()).state_dict(), tmp_path / "distill.pt")
    assert load_decoder("720pr3dc", config, tmp_path / "bare.pt").config == small_dcae()
    with pytest.raises(CheckpointError, match="of the encoder only"):
        load_decoder(None, config, tmp_path / "encoder.pt")
    with pytest.raises(
        CheckpointError, match=r"distill\.pt: does not belong to this DCAEDecoder.* need the configuration"
    ):
        load_decoder(None, config, tmp_path / "distill.pt")
    with pytest.raises(CheckpointError, match="conv_in"):
        load_encoder(None, config, tmp_path / "bare.pt")
    with pytest.raises(ConfigError, match="vae_ckpt_path is needed"):
        load_decoder(None, config, None)
    with pytest.raises(ConfigError, match="vae_cfg_path is needed"):
        load_decoder(None, None, "x.pt")
    with pytest.raises(ConfigError, match="cannot read"):
        load_decoder(None, tmp_path / "absent.yml", tmp_path / "bare.pt")


@torch.no_grad()
def test_diffusers_decoder_from_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 16), "layers_per_block": (1, 1)}
    model = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=blocks["block_out_channels"],
        decoder_block_out_channels=blocks["block_out_channels"],
        encoder_layers_per_block=blocks["layers_per_block"],
        decoder_layers_per_block=blocks["layers_per_block"],
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    ).eval()
    model.save_pretrained(tmp_path / "hub")
    torch.set_default_dtype(torch.bfloat16)  # which must not round its weights
    try:
        decoder = load_decoder("dcae", None, tmp_path / "hub")
    finally:
        torch.set_default_dtype(torch.float32)
    z = torch.randn(1, 4, 4, 4)
    assert torch.equal(decoder(z), model.decode(z).sample)
    assert (decoder.latent_channels, decoder.out_channels) == (4, 3)
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(load_encoder("dcae", None, tmp_path / "hub")(x), model.encode(x).latent)
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    (tmp_path / "hub").rename(tmp_path / "pipe" / "vae")
    assert torch.equal(load_decoder("dcae", None, tmp_path / "pipe")(z), decoder(z))
    monkeypatch.setenv("OWL_MODELS", str(tmp_path))
    assert torch.equal(load_decoder("dcae", None, "$OWL_MODELS/pipe")(z), decoder(z))
    with pytest.raises(CheckpointError, match="is a name whose variable OWL_NOWHERE is not set"):
        load_decoder("dcae", None, "$OWL_NOWHERE/pipe")
    with pytest.raises(CheckpointError, match="no such folder"):
        load_decoder("dcae", None, tmp_path / "absent")
