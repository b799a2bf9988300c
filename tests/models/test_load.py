"""Checkpoints of every shape load into the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from owl_wms.errors import CheckpointError, ConfigError
from owl_wms.models.load import load_model
from tests.process_state import set_in_process
from tests.world import golden


@pytest.fixture
def cfg_path(tmp_path: Path) -> Path:
    path = tmp_path / "world.yml"
    path.write_text(yaml.safe_dump({"model": golden()["cfg"], "train": {"trainer_id": "rft"}, "wandb": {}}))
    return path


@pytest.mark.parametrize("prefix", ["core.", "", "_orig_mod.module.core.", "core.transformer._orig_mod."])
def test_prefixes_of_training_are_understood(tmp_path: Path, cfg_path: Path, prefix: str) -> None:
    data = golden()
    weights = {key.removeprefix("core."): value for key, value in data["state_dict"].items()}
    if prefix.startswith("core.transformer"):
        saved = {"core." + k.replace("transformer.", "transformer._orig_mod."): v for k, v in weights.items()}
    else:
        saved = {prefix + key: value for key, value in weights.items()}
    torch.save({"model": saved, "steps": 3}, tmp_path / "model.pt")
    model = load_model(cfg_path, tmp_path / "model.pt")
    assert model.training
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    with torch.no_grad():
        y = model.core.eval()(data["x"], data["t"], data["mouse"], data["btn"])
    assert (y - data["y"]).abs().max() / data["y"].abs().max() < 1e-4


def test_weights_of_another_model_are_named(tmp_path: Path, cfg_path: Path) -> None:
    weights = dict(golden()["state_dict"])
    weights["core.proj_in.weight"] = torch.zeros(64, 5)
    torch.save(weights, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"proj_in.weight is \[64, 5\]"):
        load_model(cfg_path, tmp_path / "model.pt")


def test_the_model_section_is_all_that_is_read(tmp_path: Path, cfg_path: Path) -> None:
    """A file may lie beside its weights for years; keys of its trainer, and variables of its cluster, come and go."""
    torch.save(golden()["state_dict"], tmp_path / "model.pt")
    model = golden()["cfg"]
    for more in ({}, {"train": {"no_such_key": 1, "checkpoint_dir": "${oc.env:NOT_SET_HERE}/a"}, "more": 1}):
        cfg_path.write_text(yaml.safe_dump({"model": model, **more}))
        assert load_model(cfg_path, tmp_path / "model.pt").training
    cfg_path.write_text(yaml.safe_dump({"model": {**model, "n_layer": 1}}))
    with pytest.raises(ConfigError, match=r"did you mean 'n_layers'"):
        load_model(cfg_path, tmp_path / "model.pt")


@pytest.mark.parametrize("state", ["bfloat16", "float64", "meta"])
def test_a_loaded_model_is_fp32_on_the_cpu_whatever_the_process_defaults_to(
    tmp_path: Path, cfg_path: Path, state: str
) -> None:
    torch.save(golden()["state_dict"], tmp_path / "model.pt")
    wanted = load_model(cfg_path, tmp_path / "model.pt")
    with set_in_process(state):
        model = load_model(cfg_path, tmp_path / "model.pt")
    own = [*model.core.named_parameters(), *model.core.named_buffers()]
    others = dict([*wanted.core.named_parameters(), *wanted.core.named_buffers()])
    for name, value in own:
        assert (value.dtype, value.device.type) == (others[name].dtype, "cpu")
        assert torch.equal(value, others[name])
