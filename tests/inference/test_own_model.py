"""A model, autoencoder and key map that are not the game's: sizes and controls are data."""

from __future__ import annotations

import json
import re
import tokenize
from pathlib import Path
from typing import Any

import av
import pytest
import torch
import yaml
from safetensors.torch import save_file

import owl_wms
from owl_wms.configs import load_vae_model, load_world_config
from owl_wms.data.npy_table import NpyTableWriter
from owl_wms.errors import ConfigError, DataError
from owl_wms.inference.build import build_pipeline, frame_size, make_contexts
from owl_wms.inference.context import fit_buttons
from owl_wms.inference.controls import GAME_CONTROLS, controls_for
from owl_wms.vae.dcae import DCAEDecoder, DCAEEncoder
from tests.cli.runner import run
from tests.world import inputs, tiny_config, tiny_core

KEYS = ("KeyI", "KeyJ", "KeyK", "KeyL", "Space", "ShiftLeft", "Mouse0")
CONTROLS = [{"name": f"B{n}", "key": key, "label": f"does {n}"} for n, key in enumerate(KEYS)]
VAE = {
    "model_id": "dcae",
    "sample_size": [90, 160],
    "channels": 3,
    "latent_size": 4,
    "latent_channels": 8,
    "ch_0": 8,
    "ch_max": 16,
    "encoder_blocks_per_stage": [1, 1, 1, 1, 1],
    "decoder_blocks_per_stage": [1, 1, 1, 1, 1],
}


def write_model(folder: Path, buttons: int = 7, controls: Any = CONTROLS, **train: Any) -> tuple[Path, Path]:
    """A model of 4x4 latents of 8 channels over an autoencoder of 90x160."""
    changes = {"sample_size": 4, "tokens_per_frame": 16, "channels": 8, "n_layers": 1, "n_frames": 16}
    changes |= {"n_buttons": buttons}
    (folder / "vae.yml").write_text(yaml.safe_dump({"model": VAE, "train": {}, "wandb": {}}))
    cfg = load_vae_model(folder / "vae.yml")
    torch.manual_seed(0)
    parts = {"encoder": DCAEEncoder(cfg), "decoder": DCAEDecoder(cfg)}
    torch.save(
        {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()},
        folder / "vae.pt",
    )
    settings = {"vae_cfg_path": str(folder / "vae.yml"), "vae_ckpt_path": str(folder / "vae.pt"), "vae_scale": 1.0}
    settings |= {"fps": 12, "sampler_kwargs": {"n_steps": 1, "max_window": 6, "noise_prev": 0.1}, **train}
    whole: dict[str, Any] = {"model": dict(vars(tiny_config(**changes))), "train": settings, "wandb": {}}
    if controls is not None:
        whole["controls"] = controls
    (folder / "world.yml").write_text(yaml.safe_dump(whole))
    torch.save({f"core.{k}": v for k, v in tiny_core(**changes).state_dict().items()}, folder / "world.pt")
    return folder / "world.yml", folder / "world.pt"


def test_own_sizes_and_buttons_are_played(tmp_path: Path) -> None:
    config, weights = write_model(tmp_path)
    pipeline = build_pipeline(config, weights)
    frame = pipeline(torch.zeros(2), torch.eye(7)[3])
    assert frame.image.shape == (90, 160, 3)
    assert [button.name for button in pipeline.controls] == [f"B{n}" for n in range(7)]
    x, _, mouse, btn = inputs(1, 3, channels=8, side=4)
    save_file({"latents": x, "mouse": mouse, "buttons": btn[..., :7].contiguous()}, tmp_path / "c.safetensors")
    begun = build_pipeline(config, weights, context=tmp_path / "c.safetensors")
    assert begun(torch.zeros(2), torch.zeros(7)).image.shape == (90, 160, 3)


def test_a_table_with_the_buttons_in_another_order_is_refused(tmp_path: Path) -> None:
    config, _ = write_model(tmp_path)
    world, table, names = load_world_config(config), tmp_path / "t", [f"B{n}" for n in range(7)]
    x, _, mouse, btn = inputs(1, 15, channels=8, side=4)
    arrays = {"depth_latent": x[0].numpy(), "mouse": mouse[0].numpy(), "buttons": btn[0, :, :7].numpy()}
    NpyTableWriter(table, tuple(arrays)).append(arrays)
    for stored in (None, names, ["UP", *names[1:]]):  # names that say nothing of the order
        if stored is not None:
            (table / "source.json").write_text(json.dumps({"buttons": stored}))
        (begun,) = make_contexts(world, config, "cpu", torch.float32, path=f"{table}#0")
        assert torch.equal(begun.buttons, btn[:, :12, :7])
    (table / "source.json").write_text(json.dumps({"buttons": [*names[1:], names[0]]}))
    with pytest.raises(DataError, match="t#0: its buttons are B1, B2, "):
        make_contexts(world, config, "cpu", torch.float32, path=f"{table}#0")


def test_a_clip_is_sampled_at_the_size_of_its_autoencoder(tmp_path: Path) -> None:
    config, weights = write_model(tmp_path)
    clip_file = tmp_path / "a.mp4"
    assert run("sample", str(config), str(weights), "--frames", "3", "--out", str(clip_file), "--device", "cpu") == 0
    with av.open(str(clip_file)) as clip:
        assert (clip.streams.video[0].width, clip.streams.video[0].height) == (160, 90)


def test_the_game_is_rendered_at_the_size_of_the_autoencoder(tmp_path: Path) -> None:
    config, _ = write_model(tmp_path, buttons=13, controls=None)
    world = load_world_config(config)
    assert frame_size(world, config) == (90, 160)
    (made,) = make_contexts(world, config, "cpu", torch.float32)
    assert (made.latents.shape[2:], made.buttons.shape[2]) == ((8, 4, 4), 13)
    assert not made.buttons[..., 11:].any()


def test_buttons_that_the_game_lacks_are_zero() -> None:
    held = torch.ones(1, 2, 11)
    assert fit_buttons(held, 3).tolist() == [[[1.0] * 3] * 2]
    assert fit_buttons(held, 12)[0, 0].tolist() == [1.0] * 11 + [0.0]


@pytest.mark.parametrize(
    ("buttons", "controls", "message"),
    [
        (7, None, "has 7 buttons and the game 11: list the model's under `controls:`"),
        (7, CONTROLS[:3], "has 7 buttons, 3 are listed"),
        (2, [CONTROLS[0], CONTROLS[0]], "each needs its own name"),
    ],
)
def test_buttons_that_cannot_be_played_are_one_line(tmp_path: Path, buttons: int, controls: Any, message: str) -> None:
    config, weights = write_model(tmp_path, buttons=buttons, controls=controls)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        build_pipeline(config, weights)
    assert "\n" not in str(caught.value)
    assert caught.value.key == "controls"


@pytest.mark.parametrize(
    ("change", "key"),
    [({"name": "a b"}, "name"), ({"key": "w"}, "key"), ({"label": "x" * 41}, "label"), ({"more": 1}, "more")],
)
def test_a_key_map_is_checked(tmp_path: Path, change: dict[str, Any], key: str) -> None:
    config, _ = write_model(tmp_path, controls=[{**CONTROLS[0], **change}, *CONTROLS[1:]])
    with pytest.raises(ConfigError, match=key):
        load_world_config(config)


def test_the_game_has_its_own_key_map(tmp_path: Path) -> None:
    config, _ = write_model(tmp_path, buttons=11, controls=None)
    assert controls_for(load_world_config(config), config) == GAME_CONTROLS


def test_an_autoencoder_of_other_latents_is_one_line(tmp_path: Path) -> None:
    config, weights = write_model(tmp_path)
    text = (
        config.read_text()
        .replace("sample_size: 4", "sample_size: 2")
        .replace("tokens_per_frame: 16", "tokens_per_frame: 4")
    )
    config.write_text(text)
    core = tiny_core(sample_size=2, tokens_per_frame=4, channels=8, n_layers=1, n_frames=16, n_buttons=7)
    torch.save({f"core.{k}": v for k, v in core.state_dict().items()}, weights)
    with pytest.raises(ConfigError, match=r"takes latents \[8, 2, 2\], its VAE encodes to \[8, 4, 4\]"):
        build_pipeline(config, weights)


# Rooms in which a number of buttons or a frame size is data. `data/s3_windows.py` reads a published format of 11.
ROOMS = ("inference", "cli", "sampling", "models", "nn", "trainers", "configs")


def test_no_room_counts_on_the_games_buttons_or_its_frame_size() -> None:
    package = Path(owl_wms.__file__).parent
    found = []
    for path in sorted(path for room in ROOMS for path in (package / room).rglob("*.py")):
        with tokenize.open(path) as file:
            numbers = [t for t in tokenize.generate_tokens(file.readline) if t.type == tokenize.NUMBER]
        heights = {t.start[0] for t in numbers if t.string == "360"}
        widths = {t.start[0] for t in numbers if t.string == "640"}
        lines = {t.start[0] for t in numbers if t.string == "11"} | (heights & widths)
        found += [f"{path.name}:{line}" for line in sorted(lines)]
    assert found == []
