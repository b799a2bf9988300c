"""What commands are called with: a cache with one entry, a small autoencoder and its files, a small world model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from owl_wms.configs import load_vae_config
from owl_wms.configs.paths import DEMO_VAE
from owl_wms.media.video import VideoWriter
from owl_wms.runtime import VideoDecode
from owl_wms.vae import build_autoencoder
from tests.runtime.toolchains import ExportToolchain, TinyDecoder, settings
from tests.world import inputs, tiny_config, tiny_core

CONFIG = """
model:
  model_id: dcae
  sample_size: [36, 64]
  channels: 4
  latent_channels: 16
  ch_0: 16
  ch_max: 32
  encoder_blocks_per_stage: [1, 1, 1]
  decoder_blocks_per_stage: [1, 1, 1]
  use_middle_block: false
  skip_logvar: true
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory with the entry of a tiny decoder, named by TENSORRT_CACHE_DIR."""
    VideoDecode(TinyDecoder(), batch_size=2, settings=settings(tmp_path), toolchain=ExportToolchain()).prepare(
        (4, 3, 3)
    )
    monkeypatch.setenv("TENSORRT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "250")
    return tmp_path / "cache"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a small autoencoder, latents, and a clip with its depth."""
    from tests.media.test_video import gradient

    (tmp_path / "vae.yml").write_text(CONFIG)
    autoencoder = build_autoencoder(load_vae_config(tmp_path / "vae.yml").model, "tiled")
    save_file(autoencoder.state_dict(), tmp_path / "vae.safetensors")
    torch.save(torch.randn(2, 5, 16, 8, 8), tmp_path / "latents.pt")
    for name in ("clip", "depth"):
        with VideoWriter(tmp_path / f"{name}.mp4") as clip:
            clip.write(gradient(3))
    return tmp_path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small world model, whose autoencoder is the demo's, and a context."""
    folder = tmp_path_factory.mktemp("world")
    changes = {"sample_size": 8, "tokens_per_frame": 64, "channels": 128, "n_layers": 1, "n_frames": 16}
    train = {
        "vae_cfg_path": str(DEMO_VAE[0]),
        "vae_ckpt_path": str(DEMO_VAE[1]),
        "vae_scale": 0.8,
        "fps": 20,
        "sampler_id": "av_caching",
        "sampler_kwargs": {"n_steps": 1, "cfg_scale": 1.0, "num_frames": 900, "max_window": 6},
    }
    document = {"model": vars(tiny_config(**changes)), "train": train, "wandb": {}}
    (folder / "world.yml").write_text(yaml.safe_dump(document))
    torch.save(tiny_core(**changes).state_dict(), folder / "world.pt")
    x, _, mouse, btn = inputs(1, 2, channels=128, side=8)
    save_file({"latents": x, "mouse": mouse, "buttons": btn}, folder / "context.safetensors")
    return folder
