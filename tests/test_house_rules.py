"""What a reader may rely on in every file: a docstring, a readable length, no output from library code.

Run: python -m pytest tests/test_house_rules.py
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "owl_wms"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
MAX_LINES = 400
MAX_TRACKED_BYTES = 34 * 1024 * 1024  # weights are 17 MB of it, reference vectors of others 12 MB


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_short_and_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_LINES
    assert ast.get_docstring(ast.parse(text)), "a module opens with what it is and why it exists"


@pytest.mark.parametrize(
    "path", [path for path in PACKAGE.rglob("*.py") if "cli" not in path.parts], ids=lambda path: path.name
)
def test_library_code_does_not_print_or_configure_logging(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called != "print", f"line {node.lineno}: log, or return the text"
            assert called != "logging.basicConfig", f"line {node.lineno}: only the command line configures logging"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_bare_except(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: name what is caught"


def test_tracked_tree_stays_small() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    sizes = {
        name: (ROOT / name).stat().st_size for name in listed.stdout.split("\0") if name and (ROOT / name).exists()
    }
    assert sum(sizes.values()) < MAX_TRACKED_BYTES, sorted(sizes.items(), key=lambda item: -item[1])[:5]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_what_the_thing_does(path: Path) -> None:
    """ "What", "whether" and "the same" begin a clause that never becomes a sentence."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        first = (ast.get_docstring(node) or "").split(" ", 1)[0] if isinstance(node, kinds) else ""
        assert first not in {"What", "Whether", "Which", "How", "Where", "Who"}, f"line {node.body[0].lineno}"  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_message_names_an_extra(path: Path) -> None:
    """The package is on no registry: `pip install 'name[extra]'` would fetch somebody else's."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not re.search(r"\bowl[-_]wms\[", node.value), f"line {node.lineno}: name the package that is missing"


def test_every_file_of_tests_is_collected(request: pytest.FixtureRequest) -> None:
    """pytest passes over folders of some names (`build` is one by default) without a word."""
    skipped = request.config.getini("norecursedirs")
    for path in (ROOT / "tests").rglob("test_*.py"):
        folders = path.relative_to(ROOT).parts[:-1]
        assert not [name for name in folders if any(fnmatch(name, pattern) for pattern in skipped)], path


def test_no_file_is_passed_over_by_git_or_ruff() -> None:
    """Ruff leaves folders out that are called `build`, unless told which to leave out; so do many lists for git."""
    ignored = subprocess.run(["git", "ls-files", "-ci", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if ignored.returncode:
        pytest.skip("not a git checkout")
    assert not ignored.stdout
    ruff = shutil.which("ruff", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")
    if ruff is None:
        pytest.skip("ruff is not installed")
    looked_at = subprocess.run([ruff, "check", "--show-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {str(path) for path in SOURCES} <= set(looked_at.stdout.splitlines())
