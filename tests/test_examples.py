"""The examples' scripts: what they name is found from any directory, what is missing is one line.

Run: python -m pytest tests/test_examples.py
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from owl_wms.configs.world import load_world_config

WORLD = Path(__file__).parents[1] / "examples" / "world"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """examples/world/train.py as a module; its neighbours are imported by their bare names."""
    monkeypatch.syspath_prepend(str(WORLD))
    spec = importlib.util.spec_from_file_location("world_train", WORLD / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in ("control", "episodes"):
        sys.modules.pop(name, None)


def test_the_autoencoder_is_found_from_any_directory(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = WORLD / "game_rft.yml"
    cfg = script.with_files_found(load_world_config(path), path)
    encode, decode = script.make_codec(cfg, torch.device("cpu"))
    with torch.no_grad():
        assert decode(encode(torch.zeros(1, 4, 360, 640))).shape == (1, 4, 360, 640)


def test_missing_weights_are_one_line(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py", "--measure", "none.safetensors", "--out", "out"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    assert "error: --measure none.safetensors: no such file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
