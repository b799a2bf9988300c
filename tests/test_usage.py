"""The Usage block of a module's docstring calls what the module has, with arguments that it takes.

Why: nobody runs these lines, so an argument that was renamed or added stays wrong in them for good.

Run: python -m pytest tests/test_usage.py
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "owl_wms"
CODE = [path for path in sorted(PACKAGE.rglob("*.py")) if "cli" not in path.parts and path.name != "__main__.py"]


def usage(module: Any) -> str:
    """The indented lines below `Usage:`, or nothing."""
    found = re.search(r"^Usage[^\n]*:\n((?:(?: {4}.*)?\n?)*)", inspect.cleandoc(module.__doc__ or ""), re.MULTILINE)
    return textwrap.dedent(found[1]) if found else ""


def made_in(tree: ast.Module, module: Any) -> dict[str, type]:
    """Names that the block gives to objects of the module's own classes."""
    pairs = [(node.targets[0], node.value) for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    pairs += [(item.optional_vars, item.context_expr) for node in ast.walk(tree) for item in getattr(node, "items", ())]
    made = {}
    for name, value in pairs:
        if isinstance(name, ast.Name) and isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
            cls = getattr(module, value.func.id, None)
            if inspect.isclass(cls):
                made[name.id] = cls
    return made


def calls(tree: ast.Module, module: Any) -> Iterator[tuple[ast.Call, Any, list[None]]]:
    """Calls of the module's functions, classes and their methods: the call, what is called, its positional values."""
    made = made_in(tree, module)
    own = module.__name__.rsplit(".", 1)[-1]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or "..." in map(ast.unparse, node.args):  # whatever it takes
            continue
        given: list[None] = [None] * len(node.args)
        first, *rest = ast.unparse(node.func).split(".")
        if not rest and hasattr(module, first):
            yield node, getattr(module, first), given
        elif len(rest) == 1 and first in made:
            # What is no method may be an attribute that holds a callable, and says nothing here.
            yield node, inspect.getattr_static(made[first], rest[0], None), [None, *given]
        elif len(rest) == 1 and inspect.isclass(getattr(module, first, None)):
            yield node, getattr(getattr(module, first), rest[0]), given
        elif len(rest) == 1 and first == own and hasattr(module, rest[0]):
            yield node, getattr(module, rest[0]), given


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_usage_calls_what_there_is(path: Path) -> None:
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    for node, called, given in calls(ast.parse(usage(module)), module):
        if not callable(called) or not getattr(called, "__module__", "").startswith("owl_wms"):
            continue
        named = {keyword.arg: None for keyword in node.keywords if keyword.arg is not None}
        try:
            inspect.signature(called).bind(*given, **named)
        except TypeError as error:
            pytest.fail(f"{ast.unparse(node)}: {error}")
