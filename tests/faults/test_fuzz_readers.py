"""Five seconds of `tests.faults.fuzz`, shared by all readers; an hour's form is `python -m tests.faults.fuzz`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.fuzz import FEWEST, READERS, fuzz


@pytest.mark.parametrize("reader", sorted(READERS))
def test_only_our_own_errors(reader: str, tmp_path: Path) -> None:
    found = fuzz(reader, 5 / len(READERS), 0, tmp_path)
    assert [why for _, why in found.failures] == []
    assert found.tried >= FEWEST
    assert len(found.ways) > 1, "the mutations reach nothing"
