"""The package has one direction: a stage imports only itself and stages to its left, and only by absolute imports.

Run: python -m pytest tests/test_import_direction.py
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "owl_wms"
STAGES = [
    *("errors", "env", "cudnn", "dynamo", "timing", "configs", "settings", "game", "vae", "ops", "fused", "trt"),
    *("cache", "runtime", "utils"),
    *("nn", "models", "sampling", "data", "media", "trainers", "inference", "cli"),
]
# `__init__` and `__main__` stand for the whole package, not for a stage of it.
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.name not in ("__init__.py", "__main__.py"))
# What makes latents must not know how they are decoded; it reaches decoding through the bridge alone.
FORBIDDEN = {
    "ops": {"vae"},
    "cache": {"vae", "ops", "trt", "configs", "settings"},
    **{stage: {"trt", "cache", "runtime"} for stage in ("nn", "models", "sampling", "data")},
    **{stage: {"trt", "cache"} for stage in ("trainers", "inference")},
}


def stage_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> list[str]:
    """Dotted names of everything a file imports anywhere in it; a relative import counts as the error it is."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def test_every_stage_is_known() -> None:
    assert {stage_of(path) for path in FILES} <= set(STAGES)
    assert len(FILES) > 40, "the walk found too few files to mean anything"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_left(path: Path) -> None:
    own = stage_of(path)
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] != "owl_wms" or len(parts) < 2 or parts[1] not in STAGES:
            continue
        assert STAGES.index(parts[1]) <= STAGES.index(own), f"{own} must not import {name}"
        assert parts[1] not in FORBIDDEN.get(own, set()), f"{own} must not know {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_tensorrt_and_environment_have_one_reader(path: Path) -> None:
    names = imported_modules(path)
    if stage_of(path) != "trt":
        assert not any(name.split(".")[0] in ("torch_tensorrt", "tensorrt", "tensorrt_rtx") for name in names)
    if stage_of(path) != "env":
        text = path.read_text(encoding="utf-8")
        assert "os.environ" not in text, "read the environment in owl_wms/env.py"
        assert "getenv" not in text, "read the environment in owl_wms/env.py"
