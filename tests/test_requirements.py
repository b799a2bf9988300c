"""What the package imports is what requirements files and pyproject.toml declare, and nothing is declared for nobody.

Run: python -m pytest tests/test_requirements.py
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings it")

ROOT = Path(__file__).parents[1]
# Import name to distribution where they differ.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "botocore": "boto3",  # which is made of it
    "pydantic_core": "pydantic",  # which pins it to the version that it was built with
    "prometheus_client": "prometheus-client",
    "torch_tensorrt": "torch-tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
}
WITH_TORCH = {"triton"}  # torch's own wheels for Linux bring it; elsewhere there is no GPU to use it
TENSORRT = {"torch-tensorrt", "tensorrt", "tensorrt-rtx", "torch-tensorrt-rtx"}  # one of two sets, never both
# Modules that one command or one id imports when it is used, so an extra may bring what stands at their top.
BEHIND_A_COMMAND = {"inference/limits.py", "inference/server.py", "inference/session.py"}
# Sixteen distributions for a log that is off unless asked for: the extra `train` brings it, and the warning says so.
OPTIONAL = {"wandb"}
# Needed without an import of ours: a plugin of pytest, what diffusers downloads with, what builds wheels and lints, and
# what fsspec loads when a URL begins with s3://.
NOT_IMPORTED = {
    *("huggingface-hub", "mkdocs-material", "mkdocstrings", "mypy", "pytest-timeout", "pytest-xdist"),
    *("ruff", "s3fs", "setuptools", "types-pyyaml"),
}


def imports(path: Path, *, top: bool) -> Iterator[str]:
    """Distributions of third-party imports of a file; with `top`, only of those that importing it runs."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        for name in names:
            root = name.split(".")[0]
            if root not in sys.stdlib_module_names and root not in {"owl_wms", "tests", "benchmarks"} | WITH_TORCH:
                yield DISTRIBUTIONS.get(root, root)
        is_lazy = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Try)) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        if not (top and is_lazy):
            pending += ast.iter_child_nodes(node)


def names(lines: list[str]) -> set[str]:
    return {found[0].lower() for line in lines if (found := re.match(r"[A-Za-z0-9][\w.-]*", line.strip()))}


def declared() -> tuple[set[str], dict[str, set[str]]]:
    """The dependencies and the extras of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return names(project["dependencies"]), {extra: names(of) for extra, of in project["optional-dependencies"].items()}


PACKAGE = sorted((ROOT / "owl_wms").rglob("*.py"))
COMMON = names((ROOT / "requirements-common.txt").read_text(encoding="utf-8").splitlines())
REQUIRED, EXTRAS = declared()


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_is_installed_by_setup(path: Path) -> None:
    wanted = set(imports(path, top=False))
    assert wanted - COMMON - TENSORRT - OPTIONAL <= {"torch"}, (
        "`make setup` installs requirements-common.txt, torch and TensorRT"
    )
    assert wanted <= REQUIRED.union(*EXTRAS.values()), "pyproject.toml declares it, if only in an extra"
    if str(path.relative_to(ROOT / "owl_wms")) not in BEHIND_A_COMMAND:
        assert set(imports(path, top=True)) <= REQUIRED, "importing the module needs it, so an extra is not enough"


def test_nothing_is_required_that_nobody_imports() -> None:
    files = [*PACKAGE, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    imported = {name for path in files for name in imports(path, top=False)}
    assert imported >= COMMON - NOT_IMPORTED
    assert {name for path in PACKAGE for name in imports(path, top=False)} >= REQUIRED


def test_the_two_lists_ask_for_the_same_versions() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for line in (ROOT / "requirements-common.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            assert f'"{line}"' in text, f"{line} is asked for otherwise in pyproject.toml"
