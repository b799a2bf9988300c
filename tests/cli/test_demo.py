"""`owl-wms demo`: the shipped autoencoder on held-out play, its pictures on disk and its table truthful."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from owl_wms.cli.demo import render_clip
from owl_wms.configs.paths import DEMO_VAE
from owl_wms.media.metrics import psnr
from owl_wms.media.video import read_video
from owl_wms.vae import fold_weight_norm, load_decoder, load_encoder
from tests.cli.runner import run


def test_demo_leaves_clip_and_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("demo", "--out", str(tmp_path / "d"), "--frames", "3", "--device", "cpu") == 0
    frames = list(read_video(tmp_path / "d" / "clip.mp4"))
    assert [tuple(f.shape) for f in frames] == [(360, 1280, 3)] * 3
    assert (frames[1][:, :640].int() - frames[1][:, 640:].int()).abs().float().mean() < 6  # decoded beside source
    for corner in (frames[1][:8, :8], frames[1][:8, 640:648]):
        assert corner.float().mean() < 60  # the ground of a label; the game's sky is lighter
    with Image.open(tmp_path / "d" / "sheet.png") as sheet:
        assert sheet.size[0] > 1000
    table = capsys.readouterr().out
    for word in ("decoded by", "because", "frames/s decoded", "ms per batch", "peak memory", "PSNR", "SSIM"):
        assert word in table


def test_shipped_weights_are_as_good_as_said() -> None:
    config, weights = DEMO_VAE
    assert weights.stat().st_size < 6 * 2**20
    source, _ = render_clip(5, 2, 60, "cpu", lambda: None)
    encoder, decoder = (fold_weight_norm(load(None, config, weights)) for load in (load_encoder, load_decoder))
    with torch.inference_mode():
        latents = encoder(source)
        decoded = decoder(latents).clamp(-1, 1)
    assert latents.shape == (2, 128, 8, 8)
    assert psnr(decoded[:, :3], source[:, :3]).min() > 30  # the worst of 256 held-out frames was 32.7
    stats = json.loads(config.with_name("latent_stats.json").read_text())
    assert 0.5 * stats["vae_scale"] < latents.std() < 2 * stats["vae_scale"]


def test_training_twin_equals_the_stock_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DEMO_VAE[0].parent))
    import fast_net

    from owl_wms.configs import load_vae_config
    from owl_wms.vae import build_autoencoder

    config = load_vae_config(DEMO_VAE[0]).model.model_copy(update={"sample_size": (90, 160)})
    folded = fold_weight_norm(build_autoencoder(config, "tiled"))
    fast = fast_net.FastAutoencoder(folded)
    frames = torch.rand(1, 4, 90, 160) * 2 - 1
    with torch.inference_mode():
        z = folded.encoder(frames)
        x = folded.decoder(z)
        assert (fast.encode(frames) - z).norm() < 1e-4 * z.norm()
        assert (fast.decode(z) - x).norm() < 1e-4 * x.norm()
