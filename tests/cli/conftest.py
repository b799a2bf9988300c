"""A cache with one entry, and the files of a small decoder, for the tests of `owl-wms trt`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from owl_wms.runtime import VideoDecode
from tests.runtime.toolchains import ExportToolchain, TinyDecoder, settings


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
def files(tmp_path: Path) -> tuple[str, str]:
    """A configuration and a checkpoint of the golden decoder."""
    golden = torch.load("tests/data/dcae_pin_square.pt", weights_only=True)
    config, checkpoint = tmp_path / "tiny.yml", tmp_path / "tiny.pt"
    config.write_text(json.dumps({"model": golden["cfg"]}), encoding="utf-8")
    torch.save(golden["decoder"], checkpoint)
    return str(config), str(checkpoint)
