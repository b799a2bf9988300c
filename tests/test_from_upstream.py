"""The page for people who come from upstream: every name on its right-hand side can be imported as it stands there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "from_upstream.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| upstream")
]
NAMES = sorted({name for row in ROWS for name in re.findall(r"`(owl_wms(?:\.\w+)+)`", row[1])})


def test_every_row_says_where_or_why_not() -> None:
    assert len(ROWS) >= 70
    for row in ROWS:
        assert len(row) == 2, row
        assert "`" in row[1] or row[1].startswith("nothing: "), row


@pytest.mark.parametrize("name", NAMES)
def test_the_name_can_be_imported(name: str) -> None:
    owner, attribute = name.rsplit(".", 1)
    if not hasattr(importlib.import_module(owner), attribute):
        importlib.import_module(name)  # a module
