"""One HTML page about a training run, from the files in its folder: losses, rates, gradient norms, evaluation clips,
environment and configuration. The page needs no network and no other file.

Usage:
    Path("report.html").write_text(report(Path("checkpoints/game_rft")))
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from owl_wms.errors import DataError
from owl_wms.files import open_regular
from owl_wms.media.stored import is_native
from owl_wms.trainers.checkpoints import LOG, latest_checkpoint
from owl_wms.vae.torch_files import load_torch

GENERATOR = '<meta name="generator" content="owl-wms report">'
CLIP_BYTES = 24 << 20
"""Most bytes of clips inside a page; what is beyond is named only."""
_POINTS = 600
_MOST_STEPS = 1 << 53
"""Beyond it a float has no room for the next step."""
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 240, 64, 24
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1400px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.5em}h2{font-size:1.2em;margin-top:2em;border-bottom:1px solid #ccc}
.row{display:flex;flex-wrap:wrap;gap:1em}figure{margin:0}figcaption{font-size:.85em;color:#444}
table{border-collapse:collapse;font-size:.85em}td{padding:.1em .8em .1em 0;vertical-align:top;border-top:1px solid #eee}
svg text{font-size:11px;fill:#444}video{width:420px;background:#000}.none{color:#777}"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run's folder as data.

    Attributes:
        series: numbers by name, each a list of (step, value) with rising steps.
        clips: (step, file names, what decoded them), oldest first.
        errors: (step, text) of evaluations that failed.
        seconds: of each start of the run, summed.
        broken: lines of the log that could not be read.
    """

    series: dict[str, list[tuple[int, float]]]
    clips: list[tuple[int, list[str], str]]
    errors: list[tuple[int, str]]
    seconds: float
    broken: int


def read_run(folder: Path) -> Run:
    """Read `log.jsonl`. A later line about a step supersedes an earlier one, as after a resume.

    Raises:
        DataError: there is no log, or it cannot be read.
    """
    path = folder / LOG
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except (OSError, ValueError) as error:  # a NUL in the name
        reason, hint = getattr(error, "strerror", error), "give a run's checkpoint_dir"
        raise DataError(f"{path}: no log of a training run: {reason}; {hint}", path=path) from error
    numbers: dict[str, dict[int, float]] = {}
    clips: dict[int, tuple[list[str], str]] = {}
    errors: dict[int, str] = {}
    seconds, last, broken = 0.0, 0.0, 0
    for line in lines:
        try:
            entry = json.loads(line)
            step, now = int(entry["step"]), float(entry.get("seconds", last))
            values = {name: float(value) for name, value in entry.items() if isinstance(value, (int, float))}
            if not (math.isfinite(now) and abs(step) < _MOST_STEPS):
                raise ValueError("no number of a run")
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):  # a killed run leaves half a line
            broken += 1
            continue
        if now < last:  # another start of the run
            seconds += last
        last = now
        if "samples" in entry:
            clips[step] = (str(entry["samples"]).split(", "), str(entry.get("decoded_by", "")))
        if "evaluation_error" in entry:
            errors[step] = str(entry["evaluation_error"])
        for name, value in values.items():
            if name not in ("step", "seconds"):
                numbers.setdefault(name, {})[step] = value
    return Run(
        series={name: sorted(values.items()) for name, values in sorted(numbers.items())},
        clips=[(step, *found) for step, found in sorted(clips.items())],
        errors=sorted(errors.items()),
        seconds=seconds + last,
        broken=broken,
    )


def report(folder: Path) -> str:
    """Return the page.

    Raises:
        DataError: the folder holds no log of a run.
    """
    run = read_run(folder)
    about = _about(folder)
    series = run.series
    steps = max((points[-1][0] for points in series.values()), default=0)
    losses = {name: points for name, points in series.items() if name.endswith(("loss", "error"))}
    charts = [chart(name, {name: points}) for name, points in losses.items()]
    charts.append(chart("learning rate", {name: p for name, p in series.items() if name in ("lr", "rate")}))
    charts.append(chart("gradient norm", {name: p for name, p in series.items() if name.endswith("g_norm")}))
    pace = [(step, 1 / value) for step, value in series.get("time", []) if value > 0]
    charts.append(chart("steps per second", {"steps per second": pace}))
    shown = {name for name in series if name in losses or name in ("lr", "rate", "time") or name.endswith("g_norm")}
    charts += [chart(name, {name: points}) for name, points in series.items() if name not in shown]
    facts = {"steps": steps, "seconds": round(run.seconds), "folder": folder}
    facts |= {f"last {name}": f"{points[-1][1]:.5g}" for name, points in losses.items()}
    if run.broken:
        facts["lines of the log that could not be read"] = run.broken
    parts = [
        f"<!doctype html><html lang=en><head><meta charset=utf-8>{GENERATOR}",
        f"<title>{html.escape(folder.name)}: training run</title><style>{_STYLE}</style></head><body>",
        f"<h1>Training run {html.escape(folder.name)}</h1>{table(facts)}",
        f'<h2>Course</h2><div class="row">{"".join(charts)}</div>',
        f"<h2>Evaluation clips</h2>{_clips(folder, run)}",
        f"<h2>Environment</h2>{table(flat(about.get('environment', {})))}",
        f"<h2>Configuration</h2>{table(flat(about.get('config', {})))}",
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _about(folder: Path) -> Mapping[str, Any]:
    """Read configuration and environment from the newest checkpoint; empty if there is none.

    Weights are read only from a file of another byte order: torch would swap the bytes of values that are not there,
    which ends the process.
    """
    path = latest_checkpoint(folder)
    if path is None:
        return {}
    try:
        with open_regular(path) as file:
            where = "meta" if is_native(file) else "cpu"
            file.seek(0)
            state = load_torch(file, device=where)
    except Exception:  # a damaged file raises anything, and the log alone makes a page
        return {}
    return state if isinstance(state, dict) else {}


def table(facts: Mapping[str, object]) -> str:
    """Return names and values as a table."""
    rows = "".join(f"<tr><td>{html.escape(str(k))}<td>{html.escape(str(v))}" for k, v in facts.items())
    return f"<table>{rows}</table>" if rows else '<p class="none">not recorded: the run saved no checkpoint</p>'


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Return nested mappings as dotted keys, without those that are None."""
    if not isinstance(value, Mapping):
        return {} if value is None else {key.rstrip("."): value}
    return {k: v for name, part in value.items() for k, v in flat(part, f"{key}{name}.").items()}


def thinned(points: Sequence[tuple[int, float]], most: int = _POINTS) -> list[tuple[float, float]]:
    """Return means of neighbouring points, at most `most` of them; values that are not finite are left out."""
    finite = [(float(step), value) for step, value in points if math.isfinite(value)]
    size = max(1, -(-len(finite) // most))
    parts = [finite[start : start + size] for start in range(0, len(finite), size)]
    return [(sum(p[0] for p in part) / len(part), sum(p[1] for p in part) / len(part)) for part in parts]


def chart(title: str, series: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Draw curves over the steps as SVG; logarithmic where positive values span more than a factor of 20."""
    curves = {name: found for name, points in series.items() if (found := thinned(points))}
    if not curves:
        return ""
    values = [value for points in curves.values() for _, value in points]
    steps = [step for points in curves.values() for step, _ in points]
    low, high = min(values), max(values)
    log = low > 0 and high > 20 * low
    if log:
        low, high = math.log10(low), math.log10(high)
    low, high = (low, high) if high > low else (low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1))
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def place(step: float, value: float) -> str:
        level = math.log10(value) if log else value
        x = _LEFT + (_WIDTH - _LEFT - 8) * (step - first) / (last - first)
        y = 8 + (_HEIGHT - _BOTTOM - 8) * (1 - (level - low) / (high - low))
        return f"{x:.1f},{y:.1f}"

    marks = []
    for part in range(5):
        level = low + (high - low) * part / 4
        y = 8 + (_HEIGHT - _BOTTOM - 8) * (1 - part / 4)
        text = f"{10**level if log else level:.3g}"
        marks.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - 8}" stroke="#eee"/>')
        marks.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for step, anchor, x in ((first, "start", _LEFT), (last, "end", _WIDTH - 8)):
        marks.append(f'<text x="{x}" y="{_HEIGHT - 6}" text-anchor="{anchor}">step {step:.0f}</text>')
    lines, names = [], []
    for index, (name, points) in enumerate(curves.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        path = " ".join(place(*point) for point in points)
        dot = f'<circle cx="{path.split(",")[0]}" cy="{path.split(",")[1]}" r="2" fill="{colour}"/>' * (
            len(points) == 1
        )
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.3"/>{dot}')
        names.append(f'<span style="color:{colour}">{html.escape(name)}</span>')
    caption = html.escape(title) if len(curves) == 1 else f"{html.escape(title)}: {', '.join(names)}"
    drawing = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}">{"".join(marks + lines)}</svg>'
    )
    return f"<figure>{drawing}<figcaption>{caption}{' (logarithmic)' if log else ''}</figcaption></figure>"


def _clips(folder: Path, run: Run) -> str:
    """Put clips into the page, newest first, until it is large enough."""
    left, parts = CLIP_BYTES, []
    for step, names, decoder in reversed(run.clips):
        figures = []
        for name in names:
            path = folder / "samples" / Path(name).name
            size = path.stat().st_size if path.is_file() else None
            if size is None or path.suffix != ".mp4" or size > left:
                why = "not found" if size is None else "not shown here"
                figures.append(f'<p class="none">{html.escape(name)}: {why}</p>')
                continue
            left -= size
            data = base64.b64encode(path.read_bytes()).decode()
            figures.append(
                f'<figure><video controls loop muted src="data:video/mp4;base64,{data}"></video>'
                f"<figcaption>{html.escape(name)}</figcaption></figure>"
            )
        note = f' <span class="none">decoded by {html.escape(decoder)}</span>' if decoder else ""
        parts.append(f'<h3>Step {step}{note}</h3><div class="row">{"".join(figures)}</div>')
    parts += [f"<p>Step {step}: the evaluation failed: {html.escape(text)}</p>" for step, text in run.errors]
    return "".join(parts) or '<p class="none">none</p>'
