"""Writes the report of `benchmarks.road`: the table, the split of a start, and a picture of where the time goes.

Usage: python -m benchmarks.road_report road.json      writes road.md and road.png beside it
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.report import read_result
from benchmarks.road import BEFORE, STAGES, table

COLOURS = ("#8da0cb", "#1b9e77", "#66c2a5", "#d95f02", "#e6ab02")


def page(result: dict[str, Any], names: list[str]) -> str:
    """Markdown."""
    parts = result["parts"]
    lines = ["# From latents to files, in trainers, from a cold start", ""]
    lines += [f"{harness.origin(result)} · {result['cores']} cores", ""]
    lines += ["| what | found | wanted | met |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in table(parts, names)]
    starts = {
        name: part["seconds"] for name, part in parts.items() if name.startswith("first") and "after_torch" in part
    }
    if starts:
        columns = list(next(iter(starts.values())))
        lines += ["", "Seconds from the start of a process to its first decoded batch:", ""]
        lines += [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        lines += [f"| {name} | {' | '.join(f'{spent[c]:.2f}' for c in columns)} |" for name, spent in starts.items()]
    steps = {name.split()[1]: part["steps"] for name, part in parts.items() if part.get("steps")}
    if steps:
        lines += ["", "Seconds of the steps of a cached start; a step may be a part of another one:", ""]
        lines += [f"| | {' | '.join(steps)} |", "|---" * (len(steps) + 1) + "|"]
        for step in dict.fromkeys(step for spent in steps.values() for step in spent):
            lines.append(f"| {step} | {' | '.join(f'{spent.get(step, 0.0):.2f}' for spent in steps.values())} |")
    builds = {
        name: part["build_stages"]
        for name, part in parts.items()
        if name.endswith("built") and part.get("build_stages")
    }
    if builds:
        stages = list(dict.fromkeys(stage for spent in builds.values() for stage in spent))
        lines += ["", "Seconds of the first builds, by stage and plan:", ""]
        lines += [f"| | {' | '.join(builds)} |", "|---" * (len(builds) + 1) + "|"]
        for stage in stages:
            cells = [f"{spent[stage]:.2f}" if stage in spent else "" for spent in builds.values()]
            lines.append(f"| {stage} | {' | '.join(cells)} |")
    lines += ["", "`owl-wms decode`, seconds that each stage was busy; stages work at the same time:", ""]
    lines += [f"| | whole | {' | '.join(STAGES)} |", "|---" * (len(STAGES) + 2) + "|"]
    for name, part in parts.items():
        if name.split()[0] in ("npy", "mp4") and part.get("spent"):
            cells = [f"{part['spent'][stage]:.2f}" if stage in part["spent"] else "" for stage in STAGES]
            lines.append(f"| {name}, {part['frames']} frames | {part['seconds']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(result: dict[str, Any], out: Path) -> None:
    """Bars of seconds for each stage of each run of the command, whole times as lines, and the time before."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = {
        name: part for name, part in result["parts"].items() if name.split()[0] in ("npy", "mp4") and part.get("spent")
    }
    if not runs:
        return
    figure, grid = pyplot.subplots(len(runs), 1, figsize=(8, 1.7 * len(runs) + 0.6), squeeze=False)
    for axes, (name, part) in zip(grid.flat, runs.items(), strict=True):
        stages = [stage for stage in STAGES if stage in part["spent"]][::-1]
        values = [part["spent"][stage] for stage in stages]
        axes.barh(stages, values, color=[COLOURS[STAGES.index(stage)] for stage in stages])
        axes.axvline(part["seconds"], color="#444444", linewidth=1.5, label=f"whole {part['seconds']:.2f} s")
        same = name.split()[1] == BEFORE["decoder"] and part["frames"] == BEFORE["frames"] and name.startswith("mp4")
        before = f"; before {BEFORE['seconds']:.1f} s, the first build included" if same else ""
        axes.set_title(f"{name}: {part['frames']} frames, {part['frames_per_second']:.0f} frames/s{before}", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=8, loc="lower right")
        axes.spines[["top", "right"]].set_visible(False)
    grid.flat[-1].set_xlabel("seconds busy; stages work at the same time", fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=130)
    pyplot.close(figure)


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
