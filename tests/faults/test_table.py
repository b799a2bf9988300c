"""docs/faults.md belongs to this suite and to this code: the same rows, each with an outcome, and the same digests."""

from __future__ import annotations

import pytest

from tests.faults.conftest import Fault
from tests.faults.ledger import NOT_RUN, changed_parts, read_table
from tests.faults.rows import ROWS


@pytest.fixture(autouse=True)
def _not_while_it_is_made(fault: Fault) -> None:
    if fault.full:
        pytest.skip("this run writes the table when it ends, if everything passed")


def test_the_committed_table_has_these_rows() -> None:
    table = read_table()
    assert list(table) == list(ROWS), "rows were added, removed or moved: run `make faults`"
    for identifier, row in ROWS.items():
        said, outcome = table[identifier]
        assert said == row, f"{identifier} was reworded: run `make faults`"
        assert outcome
        assert row.gpu or outcome != NOT_RUN


def test_the_committed_table_is_of_this_code() -> None:
    """Tells and does not fail: why is in ledger.py."""
    changed = changed_parts()
    if changed:
        pytest.xfail(f"docs/faults.md is of older code ({', '.join(changed)} changed): run `make faults`")
