"""TAEHV: the author's own frames, streams equal to clips, checkpoints in the author's layout."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from owl_wms.configs import TAEHVConfig, load_vae_config
from owl_wms.errors import CheckpointError, ConfigError, LatentShapeError
from owl_wms.state import State, zeros
from owl_wms.utils.owl_vae_bridge import get_decoder_only
from owl_wms.vae import build_decoder, build_encoder, load_decoder, taehv
from owl_wms.vae.taehv import TAEHVDecoder
from owl_wms.vae.taehv_weights import config_of, require_fits
from tests.vae.helpers import DATA, VAE_CONFIGS, relative_error

GOLDEN = ("taehv_hy15", "taehv_wan21")
# Two of each form at sizes where a test takes a fraction of a second.
SMALL: dict[str, dict[str, Any]] = {
    "normal": {"latent_channels": 4, "patch_size": 2},
    "super": {"latent_channels": 4, "form": "super", "time_upscale": (True, False, True)},
}


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoders of a few thousand weights."""
    monkeypatch.setattr(taehv, "WIDTHS", dict.fromkeys(taehv.WIDTHS, (16, 8, 8, 8)))


def fill(decoder: torch.nn.Module, last: str) -> None:
    """The rule by which the golden vectors' weights were drawn; it stands in the files too."""
    state = decoder.state_dict()
    for k, name in enumerate(sorted(state)):
        drawn = torch.randn(state[name].shape, generator=torch.Generator().manual_seed(1000 + k))
        if drawn.dim() == 1:
            state[name] = drawn * 0.1 + (0.5 if name == f"{last}.bias" else 0.0)
        else:
            gain = 0.8 * math.sqrt(2 / drawn[0].numel()) * (0.02 if name == f"{last}.weight" else 1.0)
            state[name] = drawn * gain
    decoder.load_state_dict(state)


def small(form: str) -> TAEHVDecoder:
    decoder = build_decoder(TAEHVConfig(model_id="taehv", **SMALL[form])).eval()
    fill(decoder, "22")
    assert isinstance(decoder, TAEHVDecoder)
    return decoder


@pytest.mark.parametrize("name", GOLDEN)
@torch.no_grad()
def test_frames_are_the_authors(name: str) -> None:
    golden = torch.load(DATA / f"{name}.pt", weights_only=True)
    decoder = build_decoder(TAEHVConfig(model_id="taehv", **golden["arguments"])).eval()
    assert {key: tuple(value.shape) for key, value in decoder.state_dict().items()} == {
        key: tuple(shape) for key, shape in golden["keys"].items()
    }
    fill(decoder, golden["last_bias"].removesuffix(".bias"))
    for key, value in decoder.state_dict().items():
        assert value.double().sum().item() == pytest.approx(golden["sums"][key], abs=1e-3), key
    assert isinstance(decoder, TAEHVDecoder)
    latents, wanted = golden["latents"], golden["frames"]
    assert decoder.frames_per_latent == golden["t_upscale"]
    reach = float(wanted.max() - wanted.min())
    assert float((decoder(latents) - wanted).abs().max()) <= 1e-5 * reach
    # And latent by latent: the frames that a stream drops are the ones that the author trims.
    state, streamed = (), []
    for i in range(latents.shape[1]):
        frames, state = decoder.step(latents[:, i], state)
        streamed.append(frames)
    assert float((torch.cat(streamed, 1)[:, golden["frames_to_trim"] :] - wanted).abs().max()) <= 1e-5 * reach
    unclamped = torch.nn.functional.pixel_shuffle(golden["unclamped"].float(), decoder.config.patch_size)
    assert float((torch.cat(streamed, 1) - unclamped.clamp(0, 1)).abs().max()) < 1e-3  # kept in fp16


@pytest.mark.parametrize("form", SMALL)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_a_stream_is_the_clip(form: str, data: st.DataObject) -> None:
    """Whatever the lengths: latents in pieces of any size, several streams in one batch, a fork in the middle."""
    decoder = small(form)
    streams = data.draw(st.integers(1, 2))
    pieces = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    latents = torch.randn(streams, sum(pieces), 4, 3, 2, generator=torch.Generator().manual_seed(7))
    whole = decoder(latents)
    done, state, parts = 0, (), []
    branch = data.draw(st.integers(0, len(pieces) - 1))
    forks = []
    for i, count in enumerate(pieces):
        kept = [tensor.clone() for tensor in state]
        frames, following = decoder.advance(latents[:, done : done + count], state)
        assert all(torch.equal(a, b) for a, b in zip(kept, state, strict=True)), "a step must not write its state"
        if i == branch:
            forks = [decoder.advance(latents[:, done : done + count] * scale, state)[0] for scale in (1.0, -1.0)]
            assert torch.equal(forks[0], frames)
            assert not torch.equal(forks[1], frames)
        parts.append(frames)
        done, state = done + count, following
    assert relative_error(torch.cat(parts, 1)[:, decoder.frames_per_latent - 1 :], whole) < 1e-5
    alone = torch.cat([decoder(latents[i : i + 1]) for i in range(streams)])
    assert relative_error(alone, whole) < 1e-5


@pytest.mark.parametrize("form", SMALL)
@torch.no_grad()
def test_the_state_is_what_its_description_says(form: str) -> None:
    decoder = small(form)
    specs = decoder.state_specs((2, 4, 3, 5))
    assert len({spec.name for spec in specs}) == len(specs) == 9
    frames, state = decoder.step(torch.randn(2, 4, 3, 5), zeros(specs))
    assert [(spec.shape, spec.dtype) for spec in specs] == [(tuple(t.shape), t.dtype) for t in state]
    assert frames.shape == (2, decoder.frames_per_latent, 3, 3 * decoder.scale, 5 * decoder.scale)


@pytest.mark.parametrize(
    ("variant", "channels", "scale", "per_latent"),
    [("wan21", 16, 8, 4), ("wan22", 48, 16, 4), ("hunyuan15", 32, 16, 4), ("ltx2", 128, 32, 8)],
)
@pytest.mark.parametrize("suffix", ["", "_super"])
def test_shipped_variants(variant: str, suffix: str, channels: int, scale: int, per_latent: int) -> None:
    with torch.device("meta"):
        decoder = build_decoder(load_vae_config(VAE_CONFIGS / f"taehv_{variant}{suffix}.yml").model)
        frames = decoder(torch.empty(1, 2, channels, 2, 3))
    assert frames.shape == (1, per_latent + 1, 3, 2 * scale, 3 * scale)


def described(form: str, channels: int, patch: int, time: tuple[bool, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a decoder's weights, counted from the description of the network and nothing else."""
    found: dict[str, tuple[int, ...]] = {}
    number = 0

    def put(name: str, *shape: int, bias: bool = False) -> None:
        found[f"{name}.weight"] = shape
        if bias:
            found[f"{name}.bias"] = shape[:1]

    if form == "normal":
        widths = (256, 128, 64, 64)
        put("1", widths[0], channels, 3, 3, bias=True)
        number = 3  # clamp, convolution, ReLU
        for i, (here, there) in enumerate(itertools.pairwise(widths)):
            for _ in range(3):
                put(f"{number}.conv.0", here, 2 * here, 3, 3, bias=True)
                put(f"{number}.conv.2", here, here, 3, 3, bias=True)
                put(f"{number}.conv.4", here, here, 3, 3, bias=True)
                number += 1
            put(f"{number + 1}.conv", here * (2 if time[i] else 1), here, 1, 1)  # behind the enlargement
            put(f"{number + 2}", there, here, 3, 3)
            number += 3
        number += 1  # ReLU
    else:
        widths = (512, 256, 128, 64)
        put("0", widths[0], channels, 1, 1)
        number = 1
        for i, (here, there) in enumerate(itertools.pairwise(widths)):
            for _ in range(3):
                put(f"{number}.conv.0", 2 * here, 1, 7, 7)
                put(f"{number}.conv.1", 4 * here, 2 * here, 1, 1, bias=True)
                put(f"{number}.conv.3", here, 4 * here, 1, 1)
                number += 1
            put(f"{number}", 4 * there, here, 3, 3, bias=True)
            put(f"{number + 3}.conv", there * (2 if time[i] else 1), there, 1, 1)  # behind ReLU and pixel shuffle
            number += 4
    put(f"{number}", 3 * patch**2, widths[-1], 3, 3, bias=True)
    return found


@pytest.mark.parametrize(
    ("variant", "channels", "patch", "time"),
    [
        ("wan21", 16, 1, (False, True, True)),
        ("wan22", 48, 2, (False, True, True)),
        ("hunyuan15", 32, 2, (False, True, True)),
        ("ltx2", 128, 4, (True, True, True)),
    ],
)
@pytest.mark.parametrize("form", ["normal", "super"])
def test_weights_of_every_variant(
    variant: str, channels: int, patch: int, time: tuple[bool, ...], form: str, tmp_path: Path
) -> None:
    """Their names, shapes and number; and weights under another variant's configuration are told which one fits."""
    names = {v: f"taehv_{v}{'_super' if form == 'super' else ''}.yml" for v in ("wan21", "wan22", "hunyuan15", "ltx2")}
    config = load_vae_config(VAE_CONFIGS / names[variant]).model
    wanted = described(form, channels, patch, time)
    with torch.device("meta"):
        decoder = build_decoder(config)
    own = {name: tuple(value.shape) for name, value in decoder.state_dict().items()}
    assert own == wanted
    assert len(own) == {"normal": 64, "super": 48}[form]
    state = {name: torch.zeros(1).expand(shape) for name, shape in wanted.items()}
    assert config_of(state, "x.pth") == config
    require_fits(config, state, "x.pth")
    for other in names:
        if other != variant:
            with pytest.raises(CheckpointError) as refused:
                require_fits(load_vae_config(VAE_CONFIGS / names[other]).model, state, "x.pth")
            assert f"use configs/vae/{names[variant]}, or vae_id taehv" in str(refused.value)
            assert "\n" not in str(refused.value)
    swapped = load_vae_config(VAE_CONFIGS / f"taehv_{variant}{'' if form == 'super' else '_super'}.yml").model
    with pytest.raises(CheckpointError, match=f"use configs/vae/{names[variant]}"):
        require_fits(swapped, state, "x.pth")


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(("height", "width"), [(5, 9), (1, 1), (3, 2)])
@pytest.mark.parametrize("form", ["normal", "super"])
@pytest.mark.parametrize(("channels", "patch", "time"), [(16, 1, (False, True, True)), (128, 4, (True, True, True))])
@torch.no_grad()
def test_one_latent_at_a_time_is_the_clip_at_odd_sizes(
    n: int, height: int, width: int, form: Any, channels: int, patch: int, time: Any
) -> None:
    decoder = build_decoder(
        TAEHVConfig(model_id="taehv", latent_channels=channels, patch_size=patch, form=form, time_upscale=time)
    ).eval()
    assert isinstance(decoder, TAEHVDecoder)
    fill(decoder, "22")
    latents = torch.randn(2, n, channels, height, width, generator=torch.Generator().manual_seed(7))
    whole = decoder(latents)
    each = decoder.frames_per_latent
    assert whole.shape == (2, n * each - each + 1, 3, 8 * patch * height, 8 * patch * width)
    state: State = ()
    parts = []
    for latent in latents.unbind(1):
        frames, state = decoder.step(latent, state)
        parts.append(frames)
    assert relative_error(torch.cat(parts, 1)[:, each - 1 :], whole) < 1e-5


def write(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("form", SMALL)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@torch.no_grad()
def test_checkpoints_in_the_authors_layout(form: str, suffix: str, tmp_path: Path) -> None:
    decoder = small(form)
    state = {f"decoder.{key}": value for key, value in decoder.state_dict().items()}
    state |= {"encoder.0.weight": torch.zeros(64, 12, 3, 3), "encoder.0.bias": torch.zeros(64)}
    path = write(state, tmp_path / f"tae{suffix}")
    latents = torch.randn(1, 2, 4, 3, 2)
    loaded = load_decoder("taehv", None, path)
    assert isinstance(loaded, TAEHVDecoder)
    assert loaded.config == decoder.config
    assert torch.equal(loaded(latents), decoder(latents))
    bridged = get_decoder_only("taehv", None, path, dtype=torch.float32, device="cpu")
    assert torch.equal(bridged(latents), decoder(latents))


@torch.no_grad()
def test_a_grow_layer_that_is_too_large_takes_its_last_outputs(tmp_path: Path) -> None:
    path = write({f"decoder.{k}": v for k, v in small("normal").state_dict().items()}, tmp_path / "tae.pth")
    config = tmp_path / "preview.yml"
    config.write_text("model: {model_id: taehv, latent_channels: 4, patch_size: 2, time_upscale: [false, false, true]}")
    preview, full = load_decoder(None, config, path), load_decoder("taehv", None, path)
    assert isinstance(preview, TAEHVDecoder)
    assert preview.frames_per_latent == 2
    assert torch.equal(preview[13].conv.weight, full[13].conv.weight[-128:])
    assert torch.equal(preview[19].conv.weight, full[19].conv.weight)


def test_refusals(tmp_path: Path) -> None:
    decoder = small("normal")
    with pytest.raises(LatentShapeError, match=r"latents must be \[b, 4, h, w\]; got \[1, 2, 4, 3, 3\]"):
        decoder.step(torch.zeros(1, 2, 4, 3, 3))
    with pytest.raises(LatentShapeError, match=r"\[b, n, 4, h, w\]; got \[1, 2, 5, 3, 3\]"):
        decoder(torch.zeros(1, 2, 5, 3, 3))
    with pytest.raises(ConfigError, match="only the decoder of taehv"):
        build_encoder(decoder.config)
    other = write({"decoder.conv.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"no TAEHV checkpoint: it has no decoder\.1\.weight"):
        load_decoder("taehv", None, other)
    layer = "decoder.7.conv.weight"
    for odd, words in (
        (torch.nested.nested_tensor([torch.ones(2)]), "nested"),
        (decoder.state_dict()[layer[8:]].to_sparse(), "sparse"),
    ):
        strange = {**{f"decoder.{k}": v for k, v in decoder.state_dict().items()}, layer: odd}
        torch.save(strange, tmp_path / "strange.pt")
        with pytest.raises(CheckpointError, match=f"7.conv.weight is .*{words}.*, and a dense tensor is needed"):
            load_decoder("taehv", None, tmp_path / "strange.pt")
    config = tmp_path / "wan.yml"
    config.write_text("model: {model_id: taehv, latent_channels: 16}")
    weights = write({f"decoder.{k}": v for k, v in decoder.state_dict().items()}, tmp_path / "four.pth")
    with pytest.raises(CheckpointError, match=r"latent_channels 4, patch_size 2.* describes Wan 2\.1: .* use a config"):
        load_decoder(None, config, weights)
    with pytest.raises(ConfigError, match="'taehv' with a checkpoint"):
        load_decoder("taehv", None, None)
