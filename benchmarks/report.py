"""Writes results as Markdown: the report beside each JSON document, and README's tables; no figure is typed by hand.

Usage:
    python -m benchmarks.report results/decoder_h200_202611.json      # writes its .md; README's table too, for SHOWN
    python -m benchmarks.report --check results/decoder_h200_202611.json
    python -m benchmarks.report results/decoder_h200_202611.json --merge first.json second.json   # made side by side
"""

from __future__ import annotations

import argparse
import json
import operator
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ROOT / "benchmarks" / "results" / "decoder_h200_202611.json"  # what README's table is made of
BEGIN, END = "<!-- decoder table: begin (python -m benchmarks.report) -->", "<!-- decoder table: end -->"
USER_MARKERS = ("<!-- user table: begin (python -m benchmarks.report) -->", "<!-- user table: end -->")
COLUMNS = (
    ("ms", "median_ms", "{:.2f}"),
    ("p20–p80", None, ""),
    ("fps", "fps", "{:.0f}"),
    ("× eager", "over_eager", "{:.2f}"),
    ("× compiled", "over_compiled", "{:.2f}"),
    ("% of floor", "percent_of_floor", "{:.0f}"),
    ("% of executed", "percent_of_executed", "{:.0f}"),
    ("rel. error", "relative_l2", "{:.1e}"),
    ("max Δ 8-bit", "max_uint8", "{}"),
    ("PSNR dB", "psnr_db", "{:.1f}"),
    ("VRAM GiB", "peak_memory_gib", "{:.2f}"),
    ("ready s", "ready_seconds", "{:.1f}"),
    ("load s", "load_seconds", "{:.1f}"),
    ("unbroken ms", "sustained_ms", "{:.2f}"),
    ("W", "watts", "{:.0f}"),
    ("MHz", "clock_mhz", "{:.0f}"),
    ("J", "joules", "{:.2f}"),
    ("plan", "plan", "{}"),
)


def read_result(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Returns a benchmark's JSON document; the parser ends the program in one line when there is none in the file."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        parser.error(f"{path}: cannot be read: {error.strerror}")
    except ValueError as error:  # not JSON, or not text
        parser.error(f"{path}: is not JSON: {error}")
    if not isinstance(result, dict) or any(key not in result for key in ("theme", "machine", "commit", "rows")):
        parser.error(f"{path}: is not the result of a benchmark: it needs theme, machine, commit and rows")
    return result


def write_markdown(path: Path, render: Callable[[dict[str, Any]], str], parser: argparse.ArgumentParser) -> str:
    """Render the result in `path` beside it, as .md; the text."""
    text = render(read_result(path, parser))
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def write_merged(
    out: Path,
    parts: Sequence[Path],
    merge: Callable[[Sequence[dict[str, Any]]], dict[str, Any]],
    parser: argparse.ArgumentParser,
) -> None:
    """Write one document out of several; the parser ends the program in one line when they do not belong together."""
    try:
        merged = merge([read_result(path, parser) for path in parts])
    except ValueError as error:
        parser.error(str(error))
    out.write_text(json.dumps(merged, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def require_alike(results: Sequence[dict[str, Any]], *keys: str) -> None:
    """Raises ValueError where documents differ in one of the keys: they are not of one run's kind."""
    for result in results[1:]:
        for key in keys:
            if result[key] != results[0][key]:
                raise ValueError(f"runs differ in {key}: {results[0][key]} and {result[key]}")


def cell(figures: dict[str, Any], key: str | None, form: str) -> str:
    """Returns one figure as text, a dash where it was not measured; no key means the 20th to 80th percentile."""
    if key is None:
        return f"{figures['p20_ms']:.2f}–{figures['p80_ms']:.2f}"
    value = figures.get(key, figures.get("report", {}).get(key))  # what a build says of itself is in its report
    return "–" if value is None or value != value else form.format(value)  # power that cannot be read is NaN


def table_lines(titles: Sequence[str], rows: Iterable[Sequence[Any]], numbers: int = 0) -> list[str]:
    """Returns a table as lines of Markdown; its last `numbers` columns are aligned to the right."""
    head = "|".join(f" {title} " if title else " " for title in titles)
    rule = "|---" * (len(titles) - numbers) + "|---:" * numbers
    return [f"|{head}|", f"{rule}|", *(f"| {' | '.join(map(str, row))} |" for row in rows)]


def report(result: dict[str, Any]) -> str:
    """Returns the document as Markdown: machine, ceilings, a table per decoder and batch, refused rows with reasons."""
    machine = " · ".join(f"{key} {value}" for key, value in sorted(result["machine"].items()))
    read = result.get("parts") or [{"ceilings": result["ceilings"], "decoders": []}]
    ceilings = "; ".join(
        f"bf16 matrix product {rate['matmul_tflops']:.0f} TFLOP/s, copy {rate['copy_tbps']:.2f} TB/s"
        + (f" ({', '.join(panels)})" if panels else "")
        for rate, panels in ((part["ceilings"], part["decoders"]) for part in read)
    )
    lines = [
        f"# {result['theme']}",
        "",
        f"Machine: {machine}",
        "",
        f"Commit {result['commit']}. Ceilings read in the same run: {ceilings}. Method: benchmarks/README.md.",
    ]
    rows = result["rows"]
    of = {panel: part["commit"] for part in result.get("parts", []) for panel in part["decoders"]}
    several = len(set(of.values())) > 1
    for decoder, batch in dict.fromkeys((row["decoder"], row["batch"]) for row in rows):
        own = [row for row in rows if (row["decoder"], row["batch"]) == (decoder, batch)]
        floor = next((row["figures"]["floor_ms"] for row in own if "floor_ms" in row["figures"]), None)
        beside = "" if floor is None else f" (floor of bf16 products {floor:.2f} ms)"
        beside += f", commit {of[f'{decoder} at batch {batch}']}" if several else ""
        lines += ["", f"## {decoder}, batch {batch}{beside}", ""]
        lines += table_lines(["candidate", *(title for title, _, _ in COLUMNS)], [])
        for row in own:
            if row["refused"]:
                lines.append(f"| {row['candidate']} | refused: {row['refused']} |" + " |" * (len(COLUMNS) - 1))
                continue
            cells = [cell(row["figures"], key, form) for _, key, form in COLUMNS]
            lines.append(f"| {row['candidate']} | " + " | ".join(cells) + " |")
        for row in own:
            for other, same in row["figures"].get("same_bits_as", {}).items():
                gives = "the bits" if same else "other bits than those"
                lines += ["", f"*{row['candidate']}* gives {gives} of *{other}*."]
    return "\n".join(lines) + "\n"


def merge(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns one document out of runs of one theme and kind of machine, each of which had a card to itself.

    A document made here may take further runs.

    Raises:
        ValueError: the runs do not belong together, or measured the same.
    """
    require_alike(results, "theme", "machine")
    seen: set[tuple[Any, ...]] = set()
    for row in (row for result in results for row in result["rows"]):
        key = row["decoder"], row["batch"], row["candidate"]
        if key in seen:
            raise ValueError(f"two of the runs have {key[2]} of {key[0]} at batch {key[1]}: leave one out")
        seen.add(key)
    parts = []
    for result in results:
        panels = dict.fromkeys(f"{row['decoder']} at batch {row['batch']}" for row in result["rows"])
        own = {"ceilings": result["ceilings"], "commit": result["commit"], "decoders": list(panels)}
        parts += result.get("parts", [own])
    commits = dict.fromkeys(part["commit"] for part in parts)
    rows = [row for result in results for row in result["rows"]]
    return {**results[0], "commit": ", ".join(commits), "rows": rows, "parts": parts}


IN_EVERY_PRECISION = "base"
"""The decoder whose precisions README shows; of the others, bf16: at the same precision as its rivals."""


def batch_8(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows at batch 8 that README shows as groups: `name` (decoder and precision), and the figures of
    `eager`, of the faster `compiled` PyTorch, and of `ours`; an empty dict where one was not measured.
    """
    measured = [row for row in rows if row["batch"] == 8 and "median_ms" in row["figures"]]
    groups: list[dict[str, Any]] = []
    for decoder in dict.fromkeys(row["decoder"] for row in measured):
        own = [row for row in measured if row["decoder"] == decoder]
        eager: dict[str, Any] = next((row["figures"] for row in own if row["candidate"] == "eager bf16"), {})
        compiled = [row["figures"] for row in own if row["candidate"].startswith("torch.compile")]
        best = min(compiled, key=operator.itemgetter("median_ms"), default={})
        for row in (row for row in own if row["candidate"].startswith("ours")):
            if "bf16" not in row["candidate"] and decoder != IN_EVERY_PRECISION:
                continue
            name = f"{decoder}, {row['candidate'].removeprefix('ours ')}"
            groups.append({"name": name, "eager": eager, "compiled": best, "ours": row["figures"]})
    return groups


def readme_table(result: dict[str, Any]) -> str:
    """README's table of decoders: batch 8 beside eager and the faster compiled PyTorch."""
    titles = ("decoder", "eager PyTorch", "`torch.compile`", "owl_wms", "speedup over eager")
    rows = [
        (
            group["name"],
            cell(group["eager"], "median_ms", "{:.1f} ms"),
            cell(group["compiled"], "median_ms", "{:.1f} ms"),
            cell(group["ours"], "median_ms", "**{:.2f} ms**"),
            cell(group["ours"], "over_eager", "{:.2f}x"),
            cell(group["ours"], "over_compiled", "{:.2f}x"),
            ", ".join(cell(group[way], "relative_l2", "{:.1e}") for way in ("eager", "ours")),
        )
        for group in batch_8(result["rows"])
    ]
    return "\n".join(table_lines((*titles, "speedup over `torch.compile`", "relative error: eager, owl_wms"), rows))


AUTHORS = "author's arrangement"


def user_table() -> str:
    """README's table of what a user runs, out of the stored results of the road, play, diffusers' decoder and TAEHV."""

    def stored(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((SHOWN.parent / f"{name}_h200_202611.json").read_text(encoding="utf-8"))
        return found

    road = stored("road")["parts"]
    eager, captured = ({row["way"]: row for row in stored("play")["rows"]}[way] for way in ("eager", "captured"))
    sana = {(row["size"], row["candidate"]): row["median_ms"] for row in stored("sana_f32c32")["rows"]}
    taehv = {(row["form"], row["candidate"]): row["median_ms"] for row in stored("taehv")["rows"]}
    starts = {
        name: statistics.median(road[part]["after_torch"] for part in road if part.startswith(f"first {name} cached"))
        for name in ("dist", "base")
    }
    rows = [
        (
            "`owl-wms decode` to `.npy`, `dist`",
            f"{road['npy dist']['frames_per_second']:,.0f} frames/s",
            f"the decode function alone: {road['rate dist']['frames_per_second']['function, bf16']:,.0f}",
        ),
        (
            "`owl-wms decode` to `.mp4`",
            f"{road['mp4 dist']['frames_per_second']:.0f} frames/s",
            f"x264 fed from memory: {road['x264 dist']['frames_per_second']:.0f}",
        ),
    ]
    for name in ("dist", "base"):
        ms = road[f"training {name}"]["ms"]
        beside = f"`torch.compile`: {ms['torch.compile']:.1f} ms, eager: {ms['eager']:.1f} ms"
        what = f'in trainers, `torch.compile(backend="tensorrt")`, {name}'
        rows.append((what, f"{ms['compile_for_training']:.2f} ms", beside))
    for text, size in (("one picture of 1024x1024", "1 x 1024x1024"), ("8 pictures of 512x512", "8 x 512x512")):
        compiled, eager_ms = sana[size, "torch.compile channels_last"], sana[size, "eager"]
        beside = f"`torch.compile`: {compiled:.1f} ms, eager: {eager_ms:.1f} ms"
        rows.append((f"diffusers' Sana decoder (f32c32), {text}", f"{sana[size, 'ours']:.1f} ms", beside))
    form = "hunyuan1.5 720p"
    rows += [
        (
            "streaming TAEHV (Hunyuan 1.5), 4 frames of 720p",
            f"{taehv[form, 'ours']:.2f} ms",
            f"`torch.compile` as a CUDA graph: {taehv[form, 'torch.compile, CUDA graph']:.2f} ms, "
            f"eager, frame by frame as its author runs it: {taehv[form, AUTHORS]:.2f} ms",
        ),
        (
            "first decode of a new process, after `import torch`, program stored",
            f"{starts['dist']:.1f} s (dist), {starts['base']:.1f} s (base)",
            f"program to be built: {road['first dist built']['after_torch']:.0f} s, "
            f"{road['first base built']['after_torch']:.0f} s",
        ),
        (
            f"`owl-wms play` ({captured['source']}, {captured['steps']} steps), in the page",
            f"{captured['page_fps']:.0f} frames/s, {captured['key_ms_p50']:.0f} ms from key to picture",
            f"PyTorch without CUDA graphs: {eager['page_fps']:.0f} frames/s, {eager['key_ms_p50']:.0f} ms",
        ),
    ]
    shown = [(what, f"**{found}**", beside) for what, found, beside in rows]
    return "\n".join(table_lines(("what you run", "with owl_wms", "for comparison"), shown))


def with_table(readme: str, table: str, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """`readme` with the part between two markers replaced. Raises ValueError when a marker is missing."""
    begin, end = markers
    if begin not in readme or end not in readme:
        raise ValueError(f"README.md must hold the lines {begin!r} and {end!r}")
    head, tail = readme.split(begin)[0], readme.split(end)[1]
    return f"{head}{begin}\n{table}\n{end}{tail}"


def main() -> None:
    """Write (or with --check compare) the report and, of the result that README shows, its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--merge", type=Path, nargs="+", help="write the result out of these first")
    args = parser.parse_args()
    if args.merge:
        write_merged(args.result, args.merge, merge, parser)
    result = read_result(args.result, parser)
    wanted = {args.result.with_suffix(".md"): report(result)}
    if args.result.resolve() == SHOWN:
        readme = ROOT / "README.md"
        text = with_table(readme.read_text(encoding="utf-8"), readme_table(result))
        wanted[readme] = with_table(text, user_table(), USER_MARKERS)
    for path, text in wanted.items():
        if args.check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            parser.error(
                f"{path.name} does not match {args.result.name}: run python -m benchmarks.report {args.result}"
            )
        if not args.check:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
