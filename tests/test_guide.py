"""docs/guide_own_world.md: every command of it, from clips to a world that is played, with nothing of the game's sizes.

The world here has latents of 3x5 of 6 channels, 7 buttons, 12 frames per second and frames of 96x160.
"""

from __future__ import annotations

import asyncio
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from owl_wms.configs import load_vae_model, load_world_config
from owl_wms.data.npy_table import NpyTable
from owl_wms.inference.build import build_pipeline
from owl_wms.media.video import VideoWriter, read_video
from owl_wms.vae.dcae import DCAEDecoder, DCAEEncoder
from tests.cli.runner import run
from tests.inference.chromium import BINARY, click_to_play, open_page
from tests.inference.serving import TOKEN, serve
from tests.test_docs import ROOT, blocks, lines_of

pytest.importorskip("av")
GUIDE = ROOT / "docs" / "guide_own_world.md"
BUTTONS = ("UP", "DOWN", "LEFT", "RIGHT", "JUMP", "FIRE", "MAP")
KEYS = ("KeyW", "KeyS", "KeyA", "KeyD", "Space", "Mouse0", "ShiftLeft")
HEIGHT, WIDTH, CHANNELS, FPS = 96, 160, 6, 12
CLIPS, FRAMES = 4, 30
VAE = {
    "model_id": "dcae",
    "sample_size": [HEIGHT, WIDTH],
    "channels": 3,
    "latent_channels": CHANNELS,
    "ch_0": 24,
    "ch_max": 48,
    "encoder_blocks_per_stage": [1, 1, 1, 1, 1],
    "decoder_blocks_per_stage": [1, 1, 1, 1, 1],
    "skip_logvar": True,
}
# What keeps the test short: fewer steps, and fewer frames to sample.
SHORTER = {"train.max_steps=1000": "train.max_steps=2", "train.max_steps=2000": "train.max_steps=3", "48": "4"}
SMALLER = ("train.batch_size=2", "train.target_batch_size=2", "train.n_samples=1")


def write_vae(folder: Path) -> None:
    """An autoencoder with random weights, `vae.yml` and `vae.pt`."""
    (folder / "vae.yml").write_text(yaml.safe_dump({"model": VAE}))
    config = load_vae_model(folder / "vae.yml")
    torch.manual_seed(0)
    parts = {"encoder": DCAEEncoder(config), "decoder": DCAEDecoder(config)}
    weights = {f"{part}.{key}": value for part, module in parts.items() for key, value in module.state_dict().items()}
    torch.save(weights, folder / "vae.pt")


def write_clips(folder: Path) -> None:
    """Clips in which a square goes where the buttons push it, and their controls."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for clip in range(CLIPS):
        held = random.random((FRAMES, len(BUTTONS))) < 0.3
        mouse = random.normal(0, 0.2, (FRAMES, 2))
        y, x = 40, 70
        with VideoWriter(folder / f"{clip}.mp4", FPS) as video:
            for up, down, left, right, *_ in held.tolist():
                y, x = min(max(y + 4 * (down - up), 0), HEIGHT - 16), min(max(x + 4 * (right - left), 0), WIDTH - 16)
                frame = torch.full((1, HEIGHT, WIDTH, 3), 60, dtype=torch.uint8)
                frame[:, y : y + 16, x : x + 16] = torch.tensor([250, 120, 30], dtype=torch.uint8)
                video.write(frame)
        rows = [",".join(("mouse_x", "mouse_y", *BUTTONS))]
        rows += [
            f"{a:.4f},{b:.4f}," + ",".join(map(str, row)) for (a, b), row in zip(mouse, held.astype(int), strict=True)
        ]
        (folder / f"{clip}.csv").write_text("\n".join(rows) + "\n")


def commands() -> list[list[str]]:
    """The guide's commands in their order, without the program's name."""
    lines = [line for _, text in blocks(GUIDE, "console") for line in lines_of(text)]
    assert all(line.startswith("owl-wms ") for line in lines)
    return [shlex.split(line)[1:] for line in lines]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder after all commands of the guide but the last, and the last, which serves."""
    folder = tmp_path_factory.mktemp("guide")
    write_vae(folder)
    write_clips(folder / "clips")
    *rest, play = commands()
    assert play[0] == "play"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in rest:
            words = [SHORTER.get(word, word) for word in words]
            if words[0] == "train":
                words += [word for change in SMALLER for word in ("--set", change)]
            assert run(*words) == 0, words
            if words[0] == "init":
                file = folder / "my_world" / "world.yml"
                file.write_text(file.read_text().replace("n_layers: 5", "n_layers: 2"))
    return folder, play


def test_the_table_holds_the_clips(played: tuple[Path, list[str]]) -> None:
    table = NpyTable(played[0] / "data")
    assert [row.length for row in table.rows] == [FRAMES] * CLIPS
    assert table.slice(0, "depth_latent", 0, 1).shape == (1, CHANNELS, 3, 5)
    assert table.slice(0, "buttons", 0, 1).shape == (1, 7)
    assert (played[0] / "frames.png").stat().st_size > 1000


def test_the_configuration_fits_the_data(played: tuple[Path, list[str]]) -> None:
    world = load_world_config(played[0] / "my_world" / "world.yml")
    assert (world.model.sample_size, world.model.channels, world.model.n_buttons) == ((3, 5), CHANNELS, 7)
    assert world.train.fps == FPS
    stored = np.concatenate([np.load(path) for path in sorted((played[0] / "data").glob("depth_latent_*.npy"))])
    assert world.train.vae_scale == pytest.approx(stored.std(), rel=0.01)
    assert world.controls is not None
    assert [(button.name, button.key) for button in world.controls] == list(zip(BUTTONS, KEYS, strict=True))


def test_the_run_was_resumed_and_reported(played: tuple[Path, list[str]]) -> None:
    folder = played[0] / "my_world"
    assert (folder / "checkpoints" / "step_3.pt").is_file()
    assert "<html" in (folder / "checkpoints" / "report.html").read_text()
    assert load_file(folder / "world.safetensors")


def test_the_clip_has_the_frames_of_the_autoencoder(played: tuple[Path, list[str]]) -> None:
    frames = list(read_video(played[0] / "clip.mp4"))
    assert len(frames) == 12 + 4
    assert frames[0].shape == (HEIGHT, WIDTH, 3)


class Heard:
    """A source that notes the buttons that it was given."""

    def __init__(self, source: Any) -> None:
        self._source, self.held = source, set[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __call__(self, mouse: Any, buttons: Any) -> Any:
        self.held |= {number for number, down in enumerate(buttons.tolist()) if down}
        return self._source(mouse, buttons)


@pytest.mark.skipif(BINARY is None, reason="no Chromium here; install Debian's package chromium")
def test_the_model_is_played_with_its_own_keys(played: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, (_, config, weights, option, context) = played
    assert option == "--context"
    monkeypatch.chdir(folder)
    source = Heard(build_pipeline(config, weights, context=context, steps=1, cfg_scale=1.0))

    async def test() -> None:
        async with serve(source) as (_, address, _made), open_page(f"{address}/{TOKEN}/") as page:
            await click_to_play(page)
            await page.until("Number(document.body.dataset.frames) > 2")
            assert await page.value("document.getElementById('view').width") == WIDTH
            assert await page.value("document.querySelector('[data-button=JUMP]') !== null")
            assert await page.value("document.querySelector('[data-button=W]') === null")
            for number, code in ((0, "KeyW"), (4, "Space"), (6, "ShiftLeft")):
                await page.key(code, "", True)
                for _ in range(200):
                    if number in source.held:
                        break
                    await asyncio.sleep(0.05)
                await page.key(code, "", False)
            assert source.held == {0, 4, 6}

    asyncio.run(asyncio.wait_for(test(), 90))
