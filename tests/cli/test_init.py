"""`owl-wms init`: the configuration fits the table, and what does not fit is one line with nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from owl_wms.configs import load_world_config
from owl_wms.data.npy_table import NpyTableWriter
from owl_wms.data.starter import keys_of
from tests.cli.runner import run
from tests.test_guide import VAE


def write_table(folder: Path, *, lengths: tuple[int, ...] = (30, 40), fps: float | None = 12, **columns: int) -> Path:
    """A table of latents [n, 6, 3, 5], 7 buttons and a mouse; a column of width 0 is left out."""
    widths = {"mouse": 2, "buttons": 7, **columns}
    names = ("depth_latent", *(name for name, width in widths.items() if width))
    writer = NpyTableWriter(folder, names, columns=() if fps is None else ("fps",))
    random = np.random.default_rng(0)
    for length in lengths:
        arrays = {"depth_latent": random.normal(1, 3, (length, 6, 3, 5)).astype(np.float32)}
        arrays |= {name: np.zeros((length, width), np.float32) for name, width in widths.items() if width}
        writer.append(arrays, **({} if fps is None else {"fps": fps}))
    return folder


def test_the_configuration_is_that_of_the_table(tmp_path: Path) -> None:
    table = write_table(tmp_path / "my data: #1")
    assert run("init", tmp_path / "w", "--from", table) == 0
    world = load_world_config(tmp_path / "w" / "world.yml")
    assert (world.model.sample_size, world.model.tokens_per_frame, world.model.channels) == ((3, 5), 15, 6)
    assert (world.train.fps, world.train.vae_cfg_path) == (12, None)
    assert world.train.vae_scale == pytest.approx(3, rel=0.05)
    assert world.train.data_kwargs is not None
    assert world.train.data_kwargs["dataset_path"] == str(table)
    # Two windows of 24 frames: one in each clip.
    assert (world.train.data_kwargs["window_length"], world.train.batch_size, world.train.n_samples) == (24, 2, 2)
    assert world.controls is not None
    assert [button.name for button in world.controls] == [f"B{number}" for number in range(7)]
    assert "owl-wms train world.yml" in (tmp_path / "w" / "README.md").read_text()


def test_the_rendered_game_needs_no_table(tmp_path: Path) -> None:
    assert run("init", tmp_path / "w") == 0
    world = load_world_config(tmp_path / "w" / "world.yml")
    assert (world.model.sample_size, world.controls) == (8, None)
    assert f"owl-wms data make {tmp_path / 'w' / 'data'}" in (tmp_path / "w" / "README.md").read_text()


def test_short_clips_give_short_windows(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t", lengths=(9, 20, 20))
    assert run("init", tmp_path / "w", "--from", table) == 0
    kwargs = load_world_config(tmp_path / "w" / "world.yml").train.data_kwargs
    assert kwargs is not None
    assert kwargs["window_length"] == 9


def test_what_does_not_fit_is_one_line_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path / "t")
    (tmp_path / "vae.yml").write_text(yaml.safe_dump({"model": {**VAE, "sample_size": [96, 128]}}))
    (tmp_path / "vae.pt").write_bytes(b"not looked into")
    vae = ["--vae", tmp_path / "vae.yml", "--vae-checkpoint", tmp_path / "vae.pt"]
    bad = {
        ("--from", table, *vae): "are [6, 3, 5] (channels, height, width), this autoencoder's are [6, 3, 4]",
        ("--from", write_table(tmp_path / "u", mouse=0)): "has no column mouse",
        ("--from", write_table(tmp_path / "v", fps=None)): "say them with --fps",
        ("--from", tmp_path / "none"): "this is no table",
        ("--from", table, "--vae", tmp_path / "vae.yml"): "belong together",
        tuple(vae): "--vae goes with --from",
        ("--from", table, "--vae", tmp_path / "vae.yml", "--vae-checkpoint", tmp_path / "none.pt"): "no such file",
    }
    for words, message in bad.items():
        assert run("init", tmp_path / "w", *words) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert message in said
        assert "Traceback" not in said
    assert not (tmp_path / "w").exists()
    assert run("init", tmp_path / "w", "--from", table) == 0
    assert run("init", tmp_path / "w", "--from", table) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert run("init", tmp_path / "w", "--from", table, "--overwrite") == 0


def test_another_rate_than_the_tables_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path / "t")
    for rate, told in ((12, False), (30, True)):
        assert run("init", tmp_path / "w", "--from", table, "--fps", rate, "--overwrite") == 0
        assert load_world_config(tmp_path / "w" / "world.yml").train.fps == rate
        said = " ".join(capsys.readouterr().out.split())
        assert ("the data have 12 frames per second, the configuration says 30" in said) == told


def test_weights_in_a_folder_are_named_and_not_digested(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write_table(tmp_path / "t")
    (table / "source.json").write_text(json.dumps({"vae": "vae.pt", "vae_sha256": "0" * 64}))
    (tmp_path / "vae.yml").write_text(
        yaml.safe_dump({"model": {**VAE, "latent_channels": 6, "sample_size": [96, 160]}})
    )
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "weights").symlink_to("elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "elsewhere" / "inner").mkdir()
    (tmp_path / "link").symlink_to("elsewhere/inner")  # a step up from it is not the folder of the link
    (tmp_path / "elsewhere" / "vae.yml").symlink_to("../vae.yml")
    vae = ["--vae", tmp_path / "link" / ".." / "vae.yml", "--vae-checkpoint", "~/weights"]
    assert run("init", tmp_path / "w", "--from", table, *vae) == 0
    found = load_world_config(tmp_path / "w" / "world.yml").train.vae_cfg_path
    assert found == str(tmp_path / "elsewhere" / "vae.yml")
    assert "weights is not the file that encoded the data (vae.pt)" in " ".join(capsys.readouterr().out.split())
    assert load_world_config(tmp_path / "w" / "world.yml").train.vae_ckpt_path == str(tmp_path / "weights")


def test_names_of_an_import_become_keys(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t", buttons=3)
    (table / "source.json").write_text(json.dumps({"buttons": ["jump", "turn left", "q"]}))
    assert run("init", tmp_path / "w", "--from", table) == 0
    controls = load_world_config(tmp_path / "w" / "world.yml").controls
    assert controls is not None
    assert [(button.name, button.key) for button in controls] == [
        ("jump", "Space"),
        ("turn_left", "KeyW"),
        ("q", "KeyQ"),
    ]


def test_keys_are_each_given_once() -> None:
    names = ["UP", "forward", "a", "LEFT", "p", *map(str, range(30))]
    keys = keys_of(names)
    assert len(set(keys)) == len(names)
    assert keys[0] == "KeyW"
    assert not {"KeyP", "KeyN"} & set(keys), "the page needs them"
