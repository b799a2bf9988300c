"""Writes the report of `benchmarks.road`: the table, the split of a start, and a picture of where the time goes.

Usage: python -m benchmarks.road_report road.json      writes road.md and road.png beside it
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.report import read_result, table_lines
from benchmarks.road import BEFORE, STAGES, START_STAGES, STARTS_BEFORE, table

COLOURS = ("#8da0cb", "#1b9e77", "#66c2a5", "#d95f02", "#e6ab02")


def page(result: dict[str, Any], names: list[str]) -> str:
    """Markdown."""
    parts = result["parts"]
    lines = ["# From latents to files, in trainers, from a cold start", ""]
    lines += [f"{harness.origin(result)} · {result['cores']} cores", ""]
    lines += table_lines(("what", "found", "wanted", "met"), table(parts, names))
    starts = {
        name: part["seconds"] for name, part in parts.items() if name.startswith("first") and "after_torch" in part
    }
    if starts:
        columns = list(next(iter(starts.values())))
        lines += ["", "Seconds from the start of a process to its first decoded batch:", ""]
        rows = [[name, *(f"{spent[column]:.2f}" for column in columns)] for name, spent in starts.items()]
        lines += table_lines(["", *columns], rows)
    steps = {name.split()[1]: part["steps"] for name, part in parts.items() if part.get("steps")}
    if steps:
        lines += ["", "Seconds of the steps of a cached start; a step may be a part of another one:", ""]
        lines += _side_by_side(steps, "0.00")
    builds = {
        name: part["build_stages"]
        for name, part in parts.items()
        if name.endswith("built") and part.get("build_stages")
    }
    if builds:
        lines += ["", "Seconds of the first builds, by stage and plan:", "", *_side_by_side(builds, "")]
    lines += ["", "`owl-wms decode`, seconds that each stage was busy; stages work at the same time:", ""]
    rows = []
    for name, part in _runs(parts).items():
        cells = [f"{part['spent'][stage]:.2f}" if stage in part["spent"] else "" for stage in STAGES]
        rows.append([f"{name}, {part['frames']} frames", f"{part['seconds']:.2f}", *cells])
    return "\n".join([*lines, *table_lines(["", "whole", *STAGES], rows)]) + "\n"


def _side_by_side(spent: dict[str, dict[str, float]], absent: str) -> list[str]:
    """A table with a column for each of `spent` and a row for each step in it; `absent` stands where one has none."""
    steps = dict.fromkeys(step for seconds in spent.values() for step in seconds)
    cells = [[f"{seconds[step]:.2f}" if step in seconds else absent for seconds in spent.values()] for step in steps]
    return table_lines(["", *spent], [[step, *row] for step, row in zip(steps, cells, strict=True)])


def _runs(parts: dict[str, Any]) -> dict[str, Any]:
    """The parts that ran `owl-wms decode` and said where the time went."""
    return {name: part for name, part in parts.items() if name.split()[0] in ("npy", "mp4") and part.get("spent")}


def picture(result: dict[str, Any], out: Path) -> None:
    """Starts before and now, stacked by stage, then bars of seconds for each stage of each run of the command."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = result["parts"]
    starts = {}
    for name in STARTS_BEFORE:
        tries = [parts[key] for key in (f"first {name}", f"first {name} 2", f"first {name} 3") if key in parts]
        tries = sorted((part for part in tries if "after_torch" in part), key=lambda part: float(part["after_torch"]))
        if tries:  # the one in the middle
            spent = tries[(len(tries) - 1) // 2]["seconds"]
            starts[name] = tuple(spent[stage] for stage in START_STAGES)
    runs = _runs(parts)
    kinds = [[name for name in starts if name.endswith(kind)] for kind in ("cached", "built")]
    heights = [0.5 + 0.5 * len(names) for names in kinds if names] + [1.5] * len(runs)
    if not heights:
        return
    figure, grid = pyplot.subplots(
        len(heights), 1, figsize=(8, sum(heights) + 1.0), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    panels = iter(grid.flat)
    for names in [names for names in kinds if names]:
        axes = next(panels)
        bars = [(f"{name}, {when}", spent[name]) for name in names for when, spent in _both(starts)]
        for place, (_, spent) in enumerate(bars):
            left = 0.0
            for number, seconds in enumerate(spent):
                label = START_STAGES[number] if not place else None
                axes.barh(place, seconds, left=left, height=0.7, color=COLOURS[number], label=label)
                left += seconds
            axes.annotate(f"{left:.2f} s", (left, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_yticks(range(len(bars)), [label for label, _ in bars])
        axes.invert_yaxis()
        axes.set_title(f"first decode after import torch, {names[0].split()[1]}, in seconds", fontsize=9)
        axes.margins(x=0.12)
    # Above the whole figure, where it covers nothing.
    figure.legend(*grid.flat[0].get_legend_handles_labels(), fontsize=8, loc="upper center", ncols=4, frameon=False)
    for axes, (name, part) in zip(panels, runs.items(), strict=True):
        stages = [stage for stage in STAGES if stage in part["spent"]][::-1]
        values = [part["spent"][stage] for stage in stages]
        axes.barh(stages, values, color=[COLOURS[STAGES.index(stage)] for stage in stages])
        axes.axvline(part["seconds"], color="#444444", linewidth=1.5)
        same = name.split()[1] == BEFORE["decoder"] and part["frames"] == BEFORE["frames"] and name.startswith("mp4")
        before = f"; before {BEFORE['seconds']:.1f} s, the first build included" if same else ""
        told = f"{name}: {part['frames']} frames, {part['frames_per_second']:.0f} frames/s"
        axes.set_title(f"{told}; seconds busy, line: {part['seconds']:.2f} s in all{before}", fontsize=9)
    for axes in grid.flat:
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / (sum(heights) + 1.0)))
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def _both(starts: dict[str, tuple[float, ...]]) -> tuple[tuple[str, dict[str, tuple[float, ...]]], ...]:
    return ("before", STARTS_BEFORE), ("now", starts)


def write(result: dict[str, Any], names: list[str], out: Path) -> None:
    """Writes the page and, where matplotlib is installed, the picture."""
    out.with_suffix(".md").write_text(page(result, names), encoding="utf-8")
    try:
        picture(result, out.with_suffix(".png"))
    except ImportError:
        harness.console.print("no picture: matplotlib is not installed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    given = parser.parse_args().result
    found = read_result(given, parser)
    write(found, found["decoders"], given)
