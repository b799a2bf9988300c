"""Draws a decoder benchmark for README, bf16: three bars per decoder, how many times as fast as eager PyTorch each is.

Usage: python -m benchmarks.plot result.json result.png
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.report import batch_8, read_result

COLOURS = {"eager": "#b3b3b3", "compiled": "#8da0cb", "ours": "#1b9e77"}
COLOUR_COUNT = 48  # enough for smooth letters, in half the bytes
NAMES = {"eager": "eager PyTorch", "compiled": "torch.compile", "ours": "owl_wms"}


def plot_rows(rows: list[dict[str, Any]], out: Path, caption: str) -> None:
    """Write the picture of the rows at batch 8, 900 pixels wide, 80 higher with each decoder.

    Args:
        rows: `rows` of the benchmark's JSON document.
        out: PNG to write.
        caption: the machine, printed below the bars.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [group for group in batch_8(rows) if "bf16" in group["name"] and all(group.get(kind) for kind in NAMES)]
    figure, axes = pyplot.subplots(figsize=(9, 1.4 + 0.8 * len(groups)), dpi=100)
    for index, group in enumerate(groups):
        eager = group["eager"]["median_ms"]
        for offset, kind in enumerate(NAMES):
            ms = group[kind]["median_ms"]
            place = index * 4 + offset
            label = NAMES[kind] if index == 0 else None
            axes.barh(place, eager / ms, color=COLOURS[kind], label=label, height=0.9)
            axes.text(eager / ms, place, f" {three_digits(ms)} ms, {eager / ms:.1f}x", va="center", fontsize=11)
    axes.set_yticks([index * 4 + 1 for index in range(len(groups))], [group["name"] for group in groups], fontsize=12)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(group["eager"]["median_ms"] / group["ours"]["median_ms"] for group in groups))
    axes.set_xlabel("times as fast as eager PyTorch; milliseconds per batch of 8 frames", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=len(NAMES), fontsize=11, frameon=False)
    figure.text(0.01, 0.01, caption, fontsize=9, color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn)
    pyplot.close(figure)
    Image.open(drawn).convert("RGB").quantize(COLOUR_COUNT).save(out, "PNG", optimize=True)


def three_digits(value: float) -> str:
    """Returns a figure as 2.63, 11.0 or 222."""
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


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
