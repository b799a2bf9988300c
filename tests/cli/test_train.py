"""`owl-wms train` and `owl-wms data`: a run from a file with changes, resumed; a table of the game; refusals.

Run: python -m pytest tests/cli/test_train.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from owl_wms.cli.train import load_changed
from owl_wms.configs import load_vae_config
from owl_wms.data.latent_dataset import make_game_latents
from owl_wms.data.npy_table import NpyTable
from owl_wms.errors import ConfigError, DataError
from owl_wms.vae import build_autoencoder
from tests.cli.conftest import CONFIG
from tests.cli.runner import run
from tests.trainers.helpers import config, write_table


def test_train_runs_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_table(tmp_path)
    config(tmp_path, "rft")
    file = str(tmp_path / "rft.yml")
    assert run("--quiet", "train", file, "--set", "train.max_steps=2", "--set", "train.opt_kwargs.lr=0.001") == 0
    assert "start, " not in capsys.readouterr().err
    assert run("train", file, "--set", "train.max_steps=3", "--resume") == 0
    said = capsys.readouterr()
    assert "step 3, diffusion_loss" in said.out
    begun = re.findall(r"start, [0-9.]+ s: (.*?) *\n", said.err)
    assert begun[:2] == ["building model and optimisers", "opening the training data"]
    assert begun[2].startswith("restoring")
    assert begun[3] == "loading evaluation data and decoder"
    assert begun[-2:] == ["making the first step", "the run is under way"]
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {"step_2.pt", "step_3.pt", "log.jsonl"}


def test_resume_begins_where_the_configuration_says_while_there_is_no_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job that is started again by itself always has --resume, also one that goes on from another run's step."""
    write_table(tmp_path)
    config(tmp_path, "rft")
    file, branch = str(tmp_path / "rft.yml"), f"train.checkpoint_dir={tmp_path / 'branch'}"
    assert run("--quiet", "train", file, "--set", "train.max_steps=2") == 0
    onwards = ("--set", f"train.resume_ckpt={tmp_path / 'run' / 'step_2.pt'}", "--set", branch, "--resume")
    for steps, restored in ((3, "run/step_2.pt"), (4, "branch/step_3.pt")):
        assert run("train", file, "--set", f"train.max_steps={steps}", *onwards) == 0
        said = capsys.readouterr()
        assert f"step {steps}, diffusion_loss" in said.out
        assert f"restoring{tmp_path / restored}" in "".join(said.err.split())


def test_changes_are_validated(tmp_path: Path) -> None:
    config(tmp_path, "rft")
    file = tmp_path / "rft.yml"
    assert load_changed(file, ["train.opt_kwargs.lr=1e-4", "wandb.project=x"]).train.batch_size == 2
    with pytest.raises(ConfigError, match="batch_size"):
        load_changed(file, ["train.batch_sise=4"])
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        load_changed(file, ["train.batch_size"])
    assert run("train", str(file), "--set", "train.opt=AdamX", "--set", "train.max_steps=1") == 2


def test_files_named_beside_the_configuration_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config(tmp_path, "rft")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "w.pt").write_bytes(b"")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    changes = ["train.vae_ckpt_path=vae/w.pt", "train.teacher_ckpt=absent.pt"]
    train = load_changed(tmp_path / "rft.yml", changes).train
    assert train.vae_ckpt_path == str(tmp_path / "vae" / "w.pt")
    assert (train.teacher_ckpt, train.vae_cfg_path) == ("absent.pt", None)


def test_the_autoencoder_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config(tmp_path, "rft")
    weights = tmp_path / "vae.safetensors"
    weights.write_bytes(b"weights")
    changes = [f"train.{key}={weights}" for key in ("vae_ckpt_path", "output_path")]
    assert run("train", str(tmp_path / "rft.yml"), "--set", changes[0], "--set", changes[1]) == 2
    assert "vae.safetensors: is a file that this command reads" in " ".join(capsys.readouterr().err.split())


def test_the_demo_autoencoder_is_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr("owl_wms.data.latent_dataset.make_game_latents", lambda path, *a, **k: made.append(path) or 16)
    monkeypatch.chdir(tmp_path)
    assert run("data", "make", "table", "--device", "cpu") == 0
    assert made == [Path("table")]


class Mean(nn.Module):
    """An encoder to 4 channels of 2x2, for speed."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 2) * self.scale


def test_the_game_becomes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done: list[tuple[int, int]] = []
    settings = {"episodes": 3, "frames": 4, "fps": 20, "batch": 2, "size": (36, 64)}
    rows = make_game_latents(tmp_path, Mean(), progress=lambda a, b: done.append((a, b)), **settings)
    table = NpyTable(tmp_path)
    assert rows == len(table.rows) == 3
    assert done[-1] == (12, 12)
    assert [row.fields["seed"] for row in table.rows] == [10_000_000, 10_000_001, 10_000_002]
    latents = table.slice(0, "depth_latent", 0, 4)
    assert latents.shape == (4, 4, 2, 2)
    assert latents.std() > 0
    assert (latents[0] != table.slice(1, "depth_latent", 0, 1)[0]).any()
    assert run("data", "show", str(tmp_path)) == 0
    assert "3 clips, 12 frames" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="divide 60"):
        make_game_latents(tmp_path / "no", Mean(), **{**settings, "fps": 25})


def test_an_autoencoder_of_another_size_without_depth_makes_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "vae.yml"
    file.write_text(CONFIG.replace("  channels: 4", "  channels: 3"))
    save_file(build_autoencoder(load_vae_config(file).model, "tiled").state_dict(), tmp_path / "vae.safetensors")
    vae = ("--vae-config", str(file), "--vae-checkpoint", str(tmp_path / "vae.safetensors"))
    command = ("data", "make", str(tmp_path / "table"), "--episodes", "1", "--frames", "2", "--device", "cpu", *vae)
    assert run(*command) == 0, capsys.readouterr().err
    assert NpyTable(tmp_path / "table").slice(0, "depth_latent", 0, 2).shape == (2, 16, 8, 8)
    file.write_text(CONFIG.replace("  channels: 4", "  channels: 5"))
    assert run(*command) == 2
    assert "encodes 5 channels, the game has 4" in capsys.readouterr().err


SMALL: dict[str, Any] = {"episodes": 2, "frames": 2, "fps": 20, "size": (36, 64)}


def other() -> Mean:
    encoder = Mean()
    encoder.scale.data.fill_(2.0)
    return encoder


@pytest.mark.parametrize(
    ("encoder", "changes", "message"),
    [
        (Mean, {}, r"holds 2 of the worlds 7 to 8 already, 7 to 8; first_seed \(--seed\) 9 is the next that is free"),
        (Mean, {"first_seed": 8}, "holds 1 of the worlds 8 to 9 already, 8 to 8;"),
        (Mean, {"first_seed": 6}, "holds 1 of the worlds 6 to 7 already, 7 to 7;"),
        (Mean, {"first_seed": 9, "fps": 30}, r"episodes at 20 frames per second, got fps \(--fps\) 30; ask for 20"),
        (other, {"first_seed": 9}, r"holds latents of first.pt with weights \w{12}, got second.pt .*--vae-checkpoint"),
    ],
)
def test_a_table_holds_every_world_once_in_one_way(
    tmp_path: Path, encoder: Callable[[], Mean], changes: dict[str, int], message: str
) -> None:
    make_game_latents(tmp_path, Mean(), first_seed=7, encoder_name="first.pt", **SMALL)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match=message):
        make_game_latents(tmp_path, encoder(), encoder_name="second.pt", **{"first_seed": 7, **SMALL, **changes})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_new_worlds_are_appended_in_either_precision(tmp_path: Path) -> None:
    make_game_latents(tmp_path, Mean(), first_seed=7, **SMALL)
    make_game_latents(tmp_path, Mean().bfloat16(), first_seed=9, **SMALL)
    assert [row.fields["seed"] for row in NpyTable(tmp_path).rows] == [7, 8, 9, 10]


def test_resume_makes_the_worlds_that_the_table_lacks_wherever_they_stand(tmp_path: Path) -> None:
    make_game_latents(tmp_path / "whole", Mean(), first_seed=7, **{**SMALL, "episodes": 6})
    make_game_latents(tmp_path / "table", Mean(), first_seed=7, **{**SMALL, "episodes": 5})
    manifest = json.loads((tmp_path / "table" / "manifest.json").read_text())
    manifest[1]["missing"] = True  # as a reader advises whose values are not finite
    (tmp_path / "table" / "manifest.json").write_text(json.dumps([*manifest[:3], manifest[4]]))
    for made in (3, 0):
        again = {**SMALL, "episodes": 6, "resume": True}
        assert make_game_latents(tmp_path / "table", Mean(), first_seed=7, **again) == made
    whole, table = NpyTable(tmp_path / "whole"), NpyTable(tmp_path / "table")
    assert [row.fields["seed"] for row in table.rows] == [7, 9, 11, 8, 10, 12]
    for place, row in enumerate(table.rows):
        wanted = whole.slice(row.fields["seed"] - 7, "depth_latent", 0, 2)
        assert (table.slice(place, "depth_latent", 0, 2) == wanted).all()


def test_a_row_marked_missing_may_be_made_anew_and_old_tables_appended_to(tmp_path: Path) -> None:
    make_game_latents(tmp_path, Mean(), first_seed=7, **SMALL)
    (tmp_path / "source.json").unlink()  # as before there was one
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest[1]["missing"] = True
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    make_game_latents(tmp_path, other(), first_seed=8, **SMALL)
    assert [row.fields["seed"] for row in NpyTable(tmp_path).rows] == [7, 8, 9]
    assert not (tmp_path / "source.json").exists(), "nobody knows what made the first rows"


def test_making_a_table_twice_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("owl_wms.vae.load_encoder", lambda *_: Mean())
    call = ("data", "make", str(tmp_path / "t"), "--episodes", "1", "--frames", "1", "--device", "cpu")
    assert run(*call) == 0
    assert run(*call) == 2
    assert "error: " in (error := capsys.readouterr().err)
    assert "(--seed) 10000001 is the next that is free" in error.replace("\n", " ")
