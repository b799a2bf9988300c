"""Bars of milliseconds a batch against the floor, from the rows of a decoder benchmark.

Usage: python -m benchmarks.plot result.json result.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.report import read_result

OURS, THEIRS, FLOOR = "#1b9e77", "#8da0cb", "#d95f02"


def plot_rows(rows: list[dict[str, Any]], out: Path, caption: str) -> None:
    """One panel a decoder and batch size; a bar a candidate with ms and ratio over eager; the floor as a line.

    Args:
        rows: `rows` of the benchmark's JSON document; refused rows are left out.
        out: PNG to write.
        caption: the machine line, printed under the panels.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [row for row in rows if "median_ms" in row["figures"]]
    panels = list(dict.fromkeys((row["decoder"], row["batch"]) for row in measured))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(lines, columns, figsize=(6.2 * columns, 3.1 * lines + 0.5), squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (decoder, batch) in zip(grid.flat, panels, strict=False):
        own = [row for row in measured if (row["decoder"], row["batch"]) == (decoder, batch)][::-1]
        times = [row["figures"]["median_ms"] for row in own]
        colours = [OURS if row["candidate"].startswith("ours") else THEIRS for row in own]
        axes.barh([row["candidate"] for row in own], times, color=colours)
        for index, row in enumerate(own):
            text = f" {times[index]:.2f} ms · {row['figures']['over_eager']:.1f}×"
            axes.text(times[index], index, text, va="center", fontsize=8)
        floor = own[0]["figures"]["floor_ms"]
        axes.axvline(floor, color=FLOOR, linewidth=1.5, label=f"bf16 floor {floor:.2f} ms")
        axes.set_xlim(0, max(times) * 1.35)
        axes.set_title(f"{decoder}, batch {batch}", fontsize=10)
        axes.set_xlabel("ms a batch (lower is better)", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=8, loc="lower right")
        axes.spines[["top", "right"]].set_visible(False)
    figure.text(0.01, 0.005, caption, fontsize=5.5, color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    pyplot.close(figure)


def main() -> None:
    """Parse arguments, read the result, draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    source = read_result(args.result, parser)
    machine = source["machine"]
    plot_rows(source["rows"], args.picture, f"{machine['gpu']} · {machine['torch']} · commit {source['commit']}")


if __name__ == "__main__":
    main()
