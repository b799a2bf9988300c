"""Shared test settings: seeds, the gpu marker, and the switch between tenth and full fault counts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# CI has two cores. Of two workers with two threads each, every parallel loop would wait for threads that do not run.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # a worker inherits what the next line set in its parent
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full-counts", action="store_true", help="run the fault suite at its full counts")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    only_full = pytest.mark.skip(reason="only with --full-counts")
    has_gpu = torch.cuda.is_available()
    full = config.getoption("--full-counts")
    for item in items:
        if "gpu" in item.keywords and not has_gpu:
            item.add_marker(no_gpu)
        if "slow" in item.keywords and not full:
            item.add_marker(only_full)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _every_kernel_runs(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a GPU, an operator that was computed without its kernel has not been tested."""
    yield
    register = sys.modules.get("owl_wms.ops.common.register")
    if "gpu" in request.keywords and register is not None:
        assert register.refused() == {}


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """A configuration and a checkpoint of the golden decoder."""
    golden = torch.load("tests/data/dcae_pin_square.pt", weights_only=True)
    config, checkpoint = tmp_path / "tiny.yml", tmp_path / "tiny.pt"
    config.write_text(json.dumps({"model": golden["cfg"]}), encoding="utf-8")
    torch.save(golden["decoder"], checkpoint)
    return str(config), str(checkpoint)
