"""The 21 calls of upstream's programs, as a table: which function, how its arguments are given, and what comes back.

Every row is called here as its file calls it, on a stand-in for that file's configuration.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from owl_wms.utils import owl_vae_bridge as bridge

DATA = Path(__file__).parents[1] / "data"
VIDEO = ("train_cfg.vae_id", "train_cfg.vae_cfg_path", "train_cfg.vae_ckpt_path")
AUDIO = ("train_cfg.audio_vae_id", "train_cfg.audio_vae_cfg_path", "train_cfg.audio_vae_ckpt_path")
NONE = (None, *VIDEO[1:])
POSITIONAL = ("decoder", "train_cfg.vae_batch_size")
LOADS, DECODES, HEARS = "get_decoder_only", "make_batched_decode_fn", "make_batched_audio_decode_fn"

# file, function, positional arguments, keyword arguments
SITES: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = [
    ("__init__", LOADS, VIDEO, {}),
    ("trainers/rft_trainer", LOADS, VIDEO, {}),
    ("trainers/av_trainer", LOADS, VIDEO, {}),
    ("trainers/av_trainer, audio", LOADS, AUDIO, {}),
    ("trainers/mixed_av_trainer", LOADS, VIDEO, {}),
    ("trainers/mixed_av_trainer, audio", LOADS, AUDIO, {}),
    ("trainers/causvid_vid_only", LOADS, NONE, {}),
    ("trainers/sf_vid_only", LOADS, NONE, {}),
    ("trainers/prune_vid_only", LOADS, VIDEO, {}),
    ("inference/causvid_pipeline", LOADS, NONE, {}),
    ("sanity/sampling", LOADS, VIDEO, {}),
    ("trainers/rft_trainer", DECODES, POSITIONAL, {}),
    ("trainers/av_trainer", DECODES, POSITIONAL, {}),
    ("trainers/mixed_av_trainer", DECODES, POSITIONAL, {}),
    ("trainers/causvid_vid_only", DECODES, ("decoder",), {"batch_size": "train_cfg.vae_batch_size"}),
    ("trainers/sf_vid_only", DECODES, ("decoder",), {"batch_size": "train_cfg.vae_batch_size"}),
    ("trainers/prune_vid_only", DECODES, POSITIONAL, {}),
    ("inference/test_sampling", DECODES, ("decoder", 8), {}),
    ("sanity/sampling", DECODES, ("decoder",), {"batch_size": 4}),
    ("trainers/av_trainer", HEARS, ("audio_decoder", "train_cfg.vae_batch_size"), {}),
    ("trainers/mixed_av_trainer", HEARS, ("audio_decoder", "train_cfg.vae_batch_size"), {}),
]


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What upstream's files have in hand: their configuration and the decoders that they loaded."""
    folder = tmp_path_factory.mktemp("vae")
    golden = torch.load(DATA / "dcae_pin_square.pt", weights_only=True)
    sound = torch.load(DATA / "audio_decoder.pt", weights_only=True)["three"]
    for name, part in (("video", golden), ("audio", sound)):
        (folder / f"{name}.yml").write_text(json.dumps({"model": part["cfg"]}), encoding="utf-8")
        torch.save(part["decoder"], folder / f"{name}.pt")
    train_cfg = SimpleNamespace(
        vae_id=None,
        vae_cfg_path=str(folder / "video.yml"),
        vae_ckpt_path=str(folder / "video.pt"),
        audio_vae_id=None,
        audio_vae_cfg_path=str(folder / "audio.yml"),
        audio_vae_ckpt_path=str(folder / "audio.pt"),
        vae_batch_size=4,
    )
    decoders = [
        bridge.get_decoder_only(None, folder / f"{n}.yml", folder / f"{n}.pt", device="cpu") for n in ("video", "audio")
    ]
    return {
        "train_cfg": train_cfg,
        "decoder": decoders[0],
        "audio_decoder": decoders[1],
        "golden": golden,
        "sound": sound,
    }


def _value(word: Any, caller: dict[str, Any]) -> Any:
    if not isinstance(word, str):
        return word
    head, _, attribute = word.partition(".")
    return getattr(caller[head], attribute) if attribute else caller[head]


def test_there_are_twenty_one() -> None:
    assert len(SITES) == 21
    assert [sum(site[1] == name for site in SITES) for name in (LOADS, DECODES, HEARS)] == [11, 8, 2]


@pytest.mark.parametrize("site", SITES, ids=[f"{site[1]} in {site[0]}" for site in SITES])
def test_the_call_gives_what_upstream_gives(
    site: tuple[str, str, tuple[Any, ...], dict[str, Any]], caller: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "_own_device", lambda: torch.device("cpu"))  # upstream's calls name no device
    _, name, positional, keywords = site
    result = getattr(bridge, name)(
        *(_value(word, caller) for word in positional), **{key: _value(word, caller) for key, word in keywords.items()}
    )
    if name == LOADS:
        _is_upstreams_decoder(result)
    elif name == DECODES:
        _decodes(result, caller["golden"], _value(([*positional[1:], *keywords.values()])[0], caller))
    else:
        _hears(result, caller["sound"])


def _is_upstreams_decoder(decoder: Any) -> None:
    """bf16, in eval mode; trainers set device, mode and dtype again."""
    assert isinstance(decoder, nn.Module)
    assert not decoder.training
    assert {weight.dtype for weight in decoder.parameters()} == {torch.bfloat16}
    assert decoder.eval().to("cpu").bfloat16() is decoder
    assert decoder.requires_grad_(False) is decoder


def _decodes(decode: Any, golden: dict[str, Tensor], batch_size: int) -> None:
    """`[b, n, c, h, w]` to `[b, n, C, H, W]` in bf16; the argument is called `x`."""
    assert decode.batch_size == batch_size
    z = golden["z"][None].expand(2, *golden["z"].shape) * 1.0
    frames = decode(z.bfloat16())
    assert frames.dtype == torch.bfloat16
    assert frames.shape == (2, len(golden["z"]), *golden["y"].shape[1:])
    assert torch.equal(decode(x=z.bfloat16()), frames)
    assert float((frames[1].float() - golden["y"]).norm() / golden["y"].norm()) < 0.05
    assert not frames.requires_grad


def _hears(decode: Any, sound: dict[str, Tensor]) -> None:
    """`[b, n, c]` to `[b, samples, C]` in bf16."""
    samples = decode(sound["z"].transpose(1, 2).bfloat16())
    assert samples.dtype == torch.bfloat16
    assert samples.shape == (len(sound["y"]), sound["y"].shape[2], sound["y"].shape[1])
    assert torch.equal(decode(x=sound["z"].transpose(1, 2).bfloat16()), samples)


def test_a_trainer_written_to_upstreams_interface_runs(caller: dict[str, Any]) -> None:
    """A stand-in for its evaluation: scale, decode, clamp, and a backward pass through the closure."""
    decode = bridge.make_batched_decode_fn(caller["decoder"], caller["train_cfg"].vae_batch_size)
    latents = caller["golden"]["z"][None].clone().requires_grad_()
    with torch.no_grad():
        shown = decode(latents.bfloat16() * 0.63).clamp(-1, 1)
    assert not shown.requires_grad
    loss = decode(latents * 0.63).float().square().mean()
    loss.backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0
