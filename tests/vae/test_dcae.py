"""The dcae reference: upstream's golden numbers, its counts and keys, and both variants against a second derivation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from owl_wms.configs import load_vae_config, parse_vae_model
from owl_wms.errors import ConfigError
from owl_wms.vae import build_autoencoder, build_decoder, build_encoder, set_gradient_checkpointing
from owl_wms.vae.dcae import mask_channels
from tests.vae.helpers import DATA, SMALL, VAE_CONFIGS, effective, randomize, relative_error, small_dcae


@pytest.fixture(scope="module")
def golden() -> dict:
    return torch.load(DATA / "dcae_pin_square.pt", weights_only=True)


@torch.no_grad()
def test_decoder_reproduces_upstream(golden: dict) -> None:
    decoder = build_decoder(parse_vae_model(golden["cfg"])).eval()
    decoder.load_state_dict(golden["decoder"], strict=True)
    assert relative_error(decoder(golden["z"]), golden["y"]) < 1e-5


@torch.no_grad()
def test_encoder_reproduces_upstream(golden: dict) -> None:
    encoder = build_encoder(parse_vae_model(golden["cfg"])).eval()
    encoder.load_state_dict(golden["encoder"], strict=True)
    assert relative_error(encoder(golden["x"]), golden["mu"]) < 1e-5


# From running the originals: decoder parameters, tensors, modules; encoder parameters, tensors; operations at batch 8.
COUNTS = {
    ("base", "tiled"): (235_804_420, 203, 412, 248_654_080, 212, 21_785_416_302_592),
    ("dec_dist", "tiled"): (25_118_307, 61, 145, 30_035_552, 68, 1_126_623_608_832),
    ("base", "learned"): (790_040_328, 222, None, None, None, None),
    ("dec_dist", "learned"): (252_998_502, 80, None, None, None, None),
}


@pytest.mark.parametrize(("name", "variant"), COUNTS)
def test_counts_are_upstreams(name: str, variant: str) -> None:
    cfg = load_vae_config(VAE_CONFIGS / f"{name}.yml").model
    with torch.device("meta"):
        decoder, encoder = build_decoder(cfg, variant).eval(), build_encoder(cfg, variant)
        z = torch.empty(8, 128, 8, 8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        frames = decoder(z)
    parameters, tensors, modules, enc_parameters, enc_tensors, operations = COUNTS[name, variant]
    assert tuple(frames.shape) == (8, cfg.channels, 360, 640)
    assert sum(p.numel() for p in decoder.parameters()) == parameters
    assert len(decoder.state_dict()) == tensors
    if modules is not None:
        assert len(list(decoder.modules())) == modules
        assert sum(p.numel() for p in encoder.parameters()) == enc_parameters
        assert len(encoder.state_dict()) == enc_tensors
        assert counter.get_total_flops() == operations
    if (name, variant) == ("dec_dist", "learned"):
        assert round(counter.get_total_flops() / 8 / 1e9, 2) == 543.28


def test_dec_dist_has_upstreams_keys_in_order() -> None:
    lines = (DATA / "dec_dist_keys.txt").read_text().split("\n")
    wanted = [(key, tuple(map(int, shape.split(",")))) for key, shape in (line.split(" ") for line in lines if line)]
    with torch.device("meta"):
        decoder = build_decoder(load_vae_config(VAE_CONFIGS / "dec_dist.yml").model)
    assert [(key, tuple(value.shape)) for key, value in decoder.state_dict().items()] == wanted
    assert len(wanted) == 61


def test_learned_dec_dist_keys() -> None:
    with torch.device("meta"):
        cfg = load_vae_config(VAE_CONFIGS / "dec_dist.yml").model
        later = {k: tuple(v.shape) for k, v in build_decoder(cfg, "learned").state_dict().items()}
        tiled = build_decoder(cfg, "tiled").state_dict().keys()
    shapes = [(6144, 1536), (6144, 1536), (3072, 1536), (1536, 768), (768, 384), (384, 192)]
    wanted = {"conv_in.proj.bias": (1536,), "conv_out.proj.bias": (3,)}
    wanted["conv_in.proj.parametrizations.weight.original0"] = (1536, 1, 1, 1)
    wanted["conv_in.proj.parametrizations.weight.original1"] = (1536, 128, 3, 3)
    for i, (c_out, c_in) in enumerate(shapes):
        wanted[f"residuals.{i}.proj.bias"] = (c_out,)
        wanted[f"residuals.{i}.proj.parametrizations.weight.original0"] = (c_out, 1, 1, 1)
        wanted[f"residuals.{i}.proj.parametrizations.weight.original1"] = (c_out, c_in, 3, 3)
    assert {k: v for k, v in later.items() if k not in tiled} == wanted
    assert {k for k in tiled if k not in later} == {k for k in tiled if k.startswith("conv_in.")}


def _res(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    h = F.leaky_relu(F.conv2d(x, w[f"{name}.conv1.weight"], w[f"{name}.conv1.bias"]), 0.01)
    groups = h.shape[1] // 16
    h = F.conv2d(h, w[f"{name}.conv2.weight"], w[f"{name}.conv2.bias"], padding=1, groups=groups)
    return x + F.conv2d(F.leaky_relu(h, 0.01), w[f"{name}.conv3.weight"])


def _up(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    if f"{name}.weight" in w:
        x = F.conv2d(x, w[f"{name}.weight"])
    return F.interpolate(x, size=(2 * x.shape[2], 2 * x.shape[3]), mode="bicubic", align_corners=False)


def _second_derivation(z: Tensor, w: dict[str, Tensor], depths: tuple[int, ...], learned: bool) -> Tensor:
    """The decoder's square part and last convolution, written from the published description."""
    if learned:
        x = F.conv2d(z, w["conv_in.proj.weight"], w["conv_in.proj.bias"], padding=1)
        reps = x.shape[1] // z.shape[1]
        x = x + torch.stack([z[:, j // reps] for j in range(x.shape[1])], 1) / reps**0.5
    else:
        x = F.conv2d(z, w["conv_in.weight"], w["conv_in.bias"])
        x = x + torch.stack([z[:, j % z.shape[1]] for j in range(x.shape[1])], 1)
    for i, depth in enumerate(depths):
        h = _up(x, w, f"blocks.{i}.up.proj")
        for j in range(depth):
            h = _res(h, w, f"blocks.{i}.blocks.{j}")
        if learned:
            s = F.conv2d(x, w[f"residuals.{i}.proj.weight"], w[f"residuals.{i}.proj.bias"], padding=1)
            x = h + F.pixel_shuffle(s, 2)
        else:
            s = F.pixel_shuffle(x, 2)
            x = h + torch.cat([s] * (h.shape[1] // s.shape[1]), 1)
    name = "conv_out.proj" if "conv_out.proj.weight" in w else "conv_out"
    return F.conv2d(F.silu(x), w[f"{name}.weight"], w.get(f"{name}.bias"), padding=1)


@pytest.mark.parametrize("variant", ["tiled", "learned"])
@pytest.mark.parametrize("size", [64, [64, 64], [36, 64]])
@torch.no_grad()
def test_decoder_matches_second_derivation(variant: str, size: int | list[int]) -> None:
    cfg = small_dcae(sample_size=size)
    decoder = randomize(build_decoder(cfg, variant))
    z = torch.randn(2, 8, 4, 4)
    want = _second_derivation(z, effective(decoder), cfg.decoder_blocks_per_stage, variant == "learned")
    if size == [36, 64]:
        # The learned variant ignores the configured size and picks the standard one nearest in area to 32x32.
        want = F.interpolate(want, size=(36, 64) if variant == "tiled" else (45, 80), mode="bicubic")
    assert relative_error(decoder(z), want) < 1e-5


@pytest.mark.parametrize("variant", ["tiled", "learned"])
@torch.no_grad()
def test_encoder_shapes_and_middle_block(variant: str) -> None:
    cfg = small_dcae(sample_size=[36, 64], use_middle_block=True)
    plain = small_dcae(sample_size=[36, 64])
    decoder, encoder = randomize(build_decoder(cfg, variant)), randomize(build_encoder(cfg, variant))
    assert any(key.startswith("middle_block.blocks.0.conv1") for key in encoder.state_dict())
    x = torch.randn(1, 3, 36, 64)
    mu = encoder(x)
    # 36 x 64 squashes to 64 x 64 (the power of two nearest to 48), three stages down.
    assert mu.shape == (1, 8, 8, 8)
    assert not torch.equal(decoder(mu), build_decoder(plain, variant).eval()(mu))


@torch.no_grad()
def test_tiled_middle_block_replaces_and_learned_adds() -> None:
    for variant, gain in (("tiled", 1.0), ("learned", 2.0)):
        decoder = build_decoder(small_dcae(use_middle_block=True), variant).eval()
        for block in decoder.middle_block.blocks:
            block.conv3.parametrizations.weight.original0.zero_()
        # With its branch off, the middle block is the identity: replaced once, or added to itself.
        plain = build_decoder(small_dcae(), variant).eval()
        state = {k: v for k, v in decoder.state_dict().items() if not k.startswith("middle_block")}
        plain.load_state_dict(state)
        z = torch.randn(1, 8, 2, 2)
        plain.conv_in.register_forward_hook(lambda _module, _args, out, gain=gain: gain * out)
        assert relative_error(decoder(z), plain(z)) < 1e-5


def test_encoder_modes() -> None:
    encoder = build_encoder(small_dcae())
    x = torch.randn(1, 3, 64, 64)
    mu, logvar = encoder.train()(x)
    assert mu.shape == logvar.shape == (1, 8, 8, 8)
    assert torch.equal(encoder.eval()(x), mu)
    assert not encoder.sample(x).requires_grad
    assert not torch.equal(encoder.sample(x), encoder.sample(x))
    skipping = build_encoder(small_dcae(skip_logvar=True))
    assert not any("logvar" in key for key in skipping.state_dict())
    assert isinstance(skipping.train()(x), Tensor)


def test_later_flags() -> None:
    plain = build_autoencoder(small_dcae(skip_residuals=True))
    assert not any(key.startswith(("decoder.residuals", "encoder.residuals")) for key in plain.state_dict())
    assert plain.state_dict()["decoder.conv_in.parametrizations.weight.original1"].shape == (64, 8, 3, 3)
    encoder = randomize(build_encoder(small_dcae(normalize_mu=True)))
    with torch.no_grad():
        mu = encoder(torch.randn(2, 3, 64, 64))
    assert torch.allclose(mu.mean((1, 2, 3)), torch.zeros(2), atol=1e-5)
    assert torch.allclose(mu.std((1, 2, 3)), torch.ones(2), atol=1e-4)
    assert build_encoder(small_dcae(), "learned").state_dict()["conv_out_logvar.bias"].shape == (1,)
    masked = mask_channels(torch.ones(64, 48, 2, 2))
    kept = masked[:, :, 0, 0].sum(1)
    assert set(kept.tolist()) == {32.0, 40.0, 48.0}
    assert all(row[: int(n)].all() and not row[int(n) :].any() for row, n in zip(masked[:, :, 0, 0], kept, strict=True))


def test_autoencoder_trains_and_checkpointing_changes_nothing() -> None:
    torch.manual_seed(1)
    model = build_autoencoder(small_dcae(skip_logvar=True)).train()
    x = torch.randn(1, 3, 64, 64)
    grads = []
    for enabled in (False, True):
        set_gradient_checkpointing(model, enabled)
        model.zero_grad()
        rec, mu, _ = model(x)
        (F.mse_loss(rec, x) + mu.square().mean()).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(g.abs().sum() > 0 for g in grads[0])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("variant", ["tiled", "learned"])
def test_decoder_exports_without_breaks(variant: str) -> None:
    decoder = randomize(build_decoder(small_dcae(sample_size=[36, 64], decoder_blocks_per_stage=[1, 1, 1]), variant))
    z = torch.randn(2, 8, 4, 4)
    program = torch.export.export(decoder, (z,))
    with torch.no_grad():
        assert relative_error(program.module()(z), decoder(z)) < 1e-6


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"ch_max": 96}, "model.ch_max", "power of two"),
        ({"ch_max": 256}, "model.ch_max", "never reached"),
        ({"ch_0": 128}, "model.ch_0", "at most ch_max"),
        ({"latent_channels": 7}, "model.ch_max", "multiple of latent_channels"),
        ({"ch_0": 4, "ch_max": 16}, "model.ch_0", "multiple of 16"),
        ({"decoder_blocks_per_stage": []}, "model.decoder_blocks_per_stage", "at least one stage"),
    ],
)
def test_impossible_widths_name_the_key(changes: dict, key: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        build_decoder(parse_vae_model({**SMALL, **changes}), "tiled")
    assert caught.value.key == key


def test_variants_are_checked() -> None:
    with pytest.raises(ConfigError, match="later revision"):
        build_decoder(small_dcae(skip_residuals=True), "tiled")
    with pytest.raises(ConfigError, match='must be "tiled" or "learned"'):
        build_decoder(small_dcae(), "latest")
    with pytest.raises(ConfigError, match="at least 32"):
        build_decoder(small_dcae(do_channel_mask=True))


@torch.no_grad()
def test_without_shortcuts_any_width_goes_with_any_latent() -> None:
    config = small_dcae(latent_channels=7, skip_residuals=True)
    decoder, encoder = build_decoder(config, "learned").eval(), build_encoder(config, "learned").eval()
    z = encoder(torch.randn(1, 3, 64, 64))
    assert z.shape[1] == 7
    assert decoder(z).shape == (1, 3, 64, 64)
