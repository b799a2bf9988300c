"""The package has one direction: a place imports only itself and places to its left, by absolute imports, and no file
imports itself by way of others.

Run: python -m pytest tests/test_import_direction.py
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "owl_wms"
PLACES = [
    *(
        "errors",
        "interrupts",
        "env",
        "process",
        "temporary",
        "ending",
        "files",
        "whole",
        "memory",
        "cudnn",
        "dynamo",
        "timing",
        "power",
        "device_order",
        "configs",
        "settings",
        "state",
        "request",
        "game",
        "vae",
        "ops",
        "fused",
        "trt",
    ),
    *("cache", "runtime", "utils"),
    *("nn", "models", "sampling", "media", "data", "batch", "trainers", "inference", "cli"),
]
# `__init__` and `__main__` stand for the whole package, not for a place in it.
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.name not in ("__init__.py", "__main__.py"))
# What makes latents must not know how they are decoded; it reaches decoding through the bridge alone.
FORBIDDEN = {
    "ops": {"vae", "game"},
    "fused": {"game"},
    "cache": {"vae", "ops", "trt", "configs", "settings"},
    **{place: {"trt", "cache", "runtime"} for place in ("nn", "models", "sampling", "data")},
    **{place: {"trt", "cache"} for place in ("trainers", "inference")},
}
# Folders of `trt/`, in the order in which they may be imported; its single files stand between them.
TRT = ["library", "spec", "graph", "rewrites", "check", "plans", "key", "run", "build", "jit", "__init__"]


def place_of(path: Path) -> str:
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


def test_every_place_is_known() -> None:
    assert {place_of(path) for path in FILES} <= set(PLACES)
    assert len(FILES) > 40, "the walk found too few files to mean anything"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_left(path: Path) -> None:
    own = place_of(path)
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] != "owl_wms" or len(parts) < 2 or parts[1] not in PLACES:
            continue
        assert PLACES.index(parts[1]) <= PLACES.index(own), f"{own} must not import {name}"
        assert parts[1] not in FORBIDDEN.get(own, set()), f"{own} must not know {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_tensorrt_and_environment_have_one_reader(path: Path) -> None:
    names = imported_modules(path)
    if path.relative_to(PACKAGE).parts[:2] != ("trt", "library"):
        assert not any(name.split(".")[0] in ("torch_tensorrt", "tensorrt", "tensorrt_rtx") for name in names)
    if place_of(path) != "env":
        text = path.read_text(encoding="utf-8")
        assert "os.environ" not in text, "read the environment in owl_wms/env.py"
        assert "getenv" not in text, "read the environment in owl_wms/env.py"


@pytest.mark.parametrize("path", [path for path in FILES if place_of(path) == "trt"], ids=lambda path: path.stem)
def test_the_rooms_of_trt_have_an_order(path: Path) -> None:
    own = path.relative_to(PACKAGE / "trt").parts[0].removesuffix(".py")
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[:2] == ["owl_wms", "trt"] and len(parts) > 2 and parts[2] in TRT:
            assert TRT.index(parts[2]) <= TRT.index(own), f"trt/{own} must not import {name}"


def module_name(path: Path) -> str:
    parts = ("owl_wms", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Module -> modules of ours that it imports anywhere in it, type checking included. A package counts as imported
    only where a name is taken from it that is not a module of its own: `from owl_wms.ops import resize` is an import of
    `owl_wms.ops.resize`.
    """
    files = {module_name(path): path for path in package.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        found = set()
        for name in imported_modules(path):
            while name and name not in files:
                name = name.rpartition(".")[0]
            found.add(name)
        graph[module] = found - {"", module}
    return graph


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, in order, or an empty list."""
    done: set[str] = set()

    def walk(module: str, way: list[str]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return []
        for target in sorted(graph.get(module, ())):
            if circle := walk(target, [*way, module]):
                return circle
        done.add(module)
        return []

    return next((circle for module in sorted(graph) if (circle := walk(module, []))), [])


def test_no_file_imports_itself_by_way_of_others() -> None:
    assert circle_in(import_graph()) == []


def test_a_circle_would_be_found() -> None:
    graph = import_graph()
    graph["owl_wms.errors"] = {"owl_wms.cli"}
    assert len(circle_in(graph)) > 2
