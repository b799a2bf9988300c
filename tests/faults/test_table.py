"""docs/faults.md belongs to this suite: the same rows, each with an outcome."""

from __future__ import annotations

from tests.faults.ledger import NOT_RUN, ROWS, read_table


def test_the_committed_table_has_these_rows() -> None:
    table = read_table()
    assert list(table) == list(ROWS), "rows were added, removed or moved: run `make faults`"
    for identifier, row in ROWS.items():
        attack, promise, outcome = table[identifier]
        assert (attack, promise) == (row.attack, row.promise), f"{identifier} was reworded: run `make faults`"
        assert outcome
        assert row.gpu or outcome != NOT_RUN
