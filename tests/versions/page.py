"""Writes the tables of `benchmarks/results/versions.md` from what the runs found; people write the text around them.

Usage: page.write({"2.13": {"versions": {...}, "rows": [...], "tests": "95 passed", "sound": True}})
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "benchmarks" / "results" / "versions.md"
BEGIN, END = "<!-- written by tests/versions/run.py -->", "<!-- until here -->"
FIRST = "2.11"
"""The set that the others are held against: what ran on GPUs."""
Case = tuple[str, str, str]
"""Family, plan and precision."""


def write(results: dict[str, Any]) -> None:
    """Put the tables of these results, set -> result, into the page."""
    PAGE.write_text(page(results), encoding="utf-8")


def page(results: dict[str, Any]) -> str:
    """The page with these results."""
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n\n{tables(results)}\n{END}{after}"


def tables(results: dict[str, Any]) -> str:
    """The packages and tests of each set, and the matrix of families and sets."""
    lines = ["| set | packages | tests there |", "|---|---|---|"]
    for name, found in results.items():
        packages = "; ".join(str(text) for text in found["versions"].values() if "unknown" not in str(text))
        lines.append(f"| {name} | Python {packages} | {found['tests']} |")
    by_set = {name: {_case(row): row for row in found["rows"]} for name, found in results.items()}
    cases = dict.fromkeys(case for rows in by_set.values() for case in rows)
    lines += ["", f"| family | plan, precision | {' | '.join(by_set)} |", f"|---|---|{'---|' * len(by_set)}"]
    for case in cases:
        first = by_set.get(FIRST, {}).get(case)
        cells = [cell(rows.get(case), first) for rows in by_set.values()]
        lines.append(f"| {case[0]} | {case[1]}, {case[2]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(row: dict[str, Any] | None, first: dict[str, Any] | None) -> str:
    """What one build of one set did: its engines and the operators left in PyTorch, and every flaw in words.

    Args:
        row: as `tests.versions.matrix` prints it; None where the set has no such plan.
        first: the row of the set that it is held against.
    """
    if row is None:
        return "-"
    if "failed" in row:
        return f"**failed**: {row['failed']}"
    flaws = ["parity"] if not row["parity"] else []
    flaws += ["reload"] if not row["reload_bit_equal"] else []
    flaws += [f"leaves others than {FIRST}"] if first is not None and row["left"] != first.get("left") else []
    left = "built" if row["left"] is None else f"{row['engines']}, {len(row['left'])} left"
    return " ".join([left, *(f"**{flaw}**" for flaw in flaws)])


def _case(row: dict[str, Any]) -> Case:
    return row["family"], row["plan"], row["precision"]
