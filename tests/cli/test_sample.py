"""`owl-wms sample`: a tiny model over the shipped autoencoder, from files to a clip and back into a context."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from owl_wms.configs import TAEHVConfig
from owl_wms.configs.paths import DEMO_VAE
from owl_wms.inference.context import load_contexts
from owl_wms.media.video import read_video
from owl_wms.media.watch import rate_of
from owl_wms.vae import build_decoder
from tests.cli.runner import run
from tests.world import inputs, tiny_config, tiny_core


@pytest.mark.parametrize("sampler", [None, "av_causal_no_cfg"])
def test_a_clip_is_written(world: Path, tmp_path: Path, sampler: str | None) -> None:
    pytest.importorskip("av")
    call = ["sample", str(world / "world.yml"), str(world / "world.pt"), "--out", str(tmp_path / "clip.mp4")]
    call += ["--context", str(world / "context.safetensors"), "--frames", "3", "--device", "cpu"]
    call += ["--latents", str(tmp_path / "clip.safetensors")]
    call += [] if sampler is None else ["--sampler", sampler, "--steps", "1"]
    assert run(*call) == 0
    frames = list(read_video(tmp_path / "clip.mp4"))
    assert len(frames) == 5
    assert frames[0].shape == (360, 640, 3)
    written, given = load_file(tmp_path / "clip.safetensors"), load_file(world / "context.safetensors")
    assert torch.allclose(written["latents"][:, :2], given["latents"], atol=1e-5), "the context comes back unscaled"
    again = load_contexts(tmp_path / "clip.safetensors", channels=128, grid=(8, 8), n_buttons=11, scale=0.8)
    assert again[0].latents.shape == (1, 5, 128, 8, 8)


def test_a_clip_of_a_streaming_decoder_has_its_rate(tmp_path: Path) -> None:
    """Two latents of context and two more, at 10 per second: 4 * 4 - 3 frames at 40 per second; and decoded again."""
    pytest.importorskip("av")
    decoder = build_decoder(TAEHVConfig(model_id="taehv", latent_channels=4)).eval()
    torch.save({f"decoder.{key}": value for key, value in decoder.state_dict().items()}, tmp_path / "tae.pth")
    train = {"vae_id": "taehv", "vae_ckpt_path": str(tmp_path / "tae.pth"), "vae_scale": 0.8, "fps": 10}
    train |= {"sampler_id": "av_caching", "sampler_kwargs": {"n_steps": 1, "cfg_scale": 1.0, "max_window": 6}}
    (tmp_path / "world.yml").write_text(yaml.safe_dump({"model": vars(tiny_config()), "train": train, "wandb": {}}))
    torch.save(tiny_core().state_dict(), tmp_path / "world.pt")
    x, _, mouse, btn = inputs(1, 2)
    save_file({"latents": x, "mouse": mouse, "buttons": btn}, tmp_path / "context.safetensors")
    call = ["sample", str(tmp_path / "world.yml"), str(tmp_path / "world.pt"), "--out", str(tmp_path / "clip.mp4")]
    call += ["--context", str(tmp_path / "context.safetensors"), "--frames", "2", "--device", "cpu"]
    again = ["decode", str(tmp_path / "made.safetensors"), "--family", "taehv", "--checkpoint", train["vae_ckpt_path"]]
    for arguments in ([*call, "--latents", again[1]], [*again, "--out", str(tmp_path / "again.mp4")]):
        assert run(*arguments) == 0
    clips = [list(read_video(tmp_path / f"{name}.mp4")) for name in ("clip", "again")]
    assert [len(frames) for frames in clips] == [13, 13]
    for name in ("clip", "again"):
        assert rate_of(tmp_path / f"{name}.mp4") == 40
    assert np.abs(np.stack(clips[0]).astype(float) - np.stack(clips[1])).max() <= 2


def test_bad_calls_end_in_one_line(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["sample", str(world / "world.yml"), str(world / "world.pt")]
    for extra, message in ((["--out", "clip.gif"], "must end in .mp4"), (["--sampler", "av_cache"], "av_caching")):
        assert run(*call, *extra) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")


def test_an_autoencoder_that_a_copied_configuration_lacks_is_named_with_its_key(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    document = yaml.safe_load((world / "world.yml").read_text())
    document["train"]["vae_cfg_path"] = "gone/vae.yml"
    (tmp_path / "copy.yml").write_text(yaml.safe_dump(document))
    assert run("sample", "copy.yml", str(world / "world.pt"), "--device", "cpu") == 2
    assert "copy.yml: train.vae_cfg_path: gone/vae.yml: no such file" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("left", "words"),
    [
        ({}, "train.vae_cfg_path and train.vae_ckpt_path are missing"),
        ({"vae_cfg_path": str(DEMO_VAE[0])}, "world.yml: train.vae_ckpt_path is missing"),
        ({"vae_id": "taehv"}, "world.yml: train.vae_ckpt_path is missing"),
    ],
)
@pytest.mark.parametrize("command", ["sample", "play"])
def test_without_an_autoencoder_the_missing_keys_are_named_at_once(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, left: dict[str, str], words: str
) -> None:
    document = yaml.safe_load((world / "world.yml").read_text())
    document["train"] = {"vae_scale": 0.8, "fps": 20, **left}
    (tmp_path / "world.yml").write_text(yaml.safe_dump(document))
    options = ["--device", "cpu"] + (["--port", "0"] if command == "play" else [])
    assert run(command, str(tmp_path / "world.yml"), str(tmp_path / "no_weights.pt"), *options) == 2
    error = capsys.readouterr().err.replace("\n", " ")
    assert words in error
    assert "write the paths of its YAML file and its weights there" in error
