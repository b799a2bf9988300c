"""Adds what `owl-wms bench` printed on another machine to the table of `benchmarks/results/community.md`.

Usage:
    python -m benchmarks.community result.json --source "#31"      # the issue it came in, or who ran it
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.decoder import MAX_ERROR_OVER_EAGER
from owl_wms.cli.bench import SCHEMA

PAGE = Path(__file__).parent / "results" / "community.md"


def row(result: dict[str, Any], source: str) -> str:
    """One line of the table.

    Args:
        result: the object that `owl-wms bench` prints.
        source: where it comes from, for the last column.

    Raises:
        ValueError: no such object, one of another schema, or frames of owl_wms that are too far from fp32.
    """
    if not isinstance(result, dict) or result.get("schema") != SCHEMA or not isinstance(result.get("rows"), list):
        raise ValueError(f"is not what `owl-wms bench` prints today (schema {SCHEMA}): ask for a new run")
    ways = {each["way"].split(" (")[0]: each for each in result["rows"]}
    missing = [way for way in ("eager", "owl_wms") if "ms" not in ways.get(way, {})]
    if missing:
        raise ValueError(f"has no time for {' and '.join(missing)}")
    eager, ours, compiled = ways["eager"], ways["owl_wms"], ways.get("torch.compile", {})
    if ours["relative_error"] > MAX_ERROR_OVER_EAGER * eager["relative_error"]:
        raise ValueError(
            f"owl_wms has an error of {ours['relative_error']:.1e} where eager has {eager['relative_error']:.1e}: "
            "that is a bug report, no row"
        )
    machine = result["machine"]
    program: dict[str, Any] = next(iter(result["programs"]), {})
    on_gpu = result["device"] == "cuda"
    cells = (
        machine["gpu"] if on_gpu else f"CPU, {machine['os']}",
        machine["driver"] if on_gpu else "-",
        machine["torch"].removeprefix("torch "),
        ", ".join(program[key] for key in ("plan", "precision") if key in program) or "PyTorch",
        f"{eager['ms']:.2f}",
        f"{compiled['ms']:.2f}" if "ms" in compiled else "-",
        f"{ours['ms']:.2f}",
        f"{_joules(eager)}, {_joules(compiled)}, {_joules(ours)}",
        f"{eager['relative_error']:.1e}, {ours['relative_error']:.1e}",
        f"{result['date']}, owl_wms {result['owl_wms']}, batch {result['batch_size']}; {source}",
    )
    return f"| {' | '.join(cells)} |"


def _joules(way: dict[str, Any]) -> str:
    return "-" if way.get("joules") is None else f"{way['joules']:.2f}"


def main() -> None:
    """Append the row, or end in one line that says why it is none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--source", required=True)
    args = parser.parse_args()
    try:
        line = row(json.loads(args.result.read_text(encoding="utf-8")), args.source)
    except (OSError, ValueError) as error:
        parser.error(f"{args.result}: {error}")
    text = PAGE.read_text(encoding="utf-8")
    if line in text:
        parser.error(f"{args.result}: is in the table already")
    PAGE.write_text(f"{text.rstrip()}\n{line}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
