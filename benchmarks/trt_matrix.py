"""Takes every decoder through the real path: key, cache, child-process build, parity, save, reload in a new
process, second start.

One row a decoder: plan chosen, engines, operators left in PyTorch and why, build, save and load seconds, file size,
latency, error. Results are written after every row, so that a time limit costs the rows not reached and nothing else.

Usage (on a GPU):
    python -m benchmarks.trt_matrix --out build/trt_matrix.json [--only dist sana] [--precision auto]
    [--seconds 90]
    python -m benchmarks.trt_matrix --render result.json                                  # the Markdown, anywhere
    python -m benchmarks.trt_matrix --render all.json --merge first.json second.json      # rows of several runs
Rows are `name`, `name:precision` or `name:precision:plan` (`sana:bf16:tensorrt` is the live case of isolation).
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import decoders, harness
from benchmarks.report import require_alike, write_markdown, write_merged
from owl_wms import trt
from owl_wms.cache import CacheStore, Key, Miss
from owl_wms.request import Request
from owl_wms.trt.check.output import output_digest
from owl_wms.trt.check.parity import latents

ROWS = (
    *("dist", "distill_vae", "demo", "dist_learned", "base", "sana", "sana:bf16", "base_learned"),
    "sana:bf16:tensorrt",
)
LONG_RUN_ROW = "dist"
LONG_RUN_CALLS = 1000
PROGRAM = "program.pt2"


def spec_of(row: str, args: argparse.Namespace) -> tuple[decoders.Subject, Request]:
    """Returns the subject of `name[:precision[:plan]]` and what is asked for it."""
    name, own, plan, *_ = [*row.split(":"), "", ""]
    subject = decoders.subject(name)
    shape = (args.batch, *subject.latent_shape)
    return subject, Request(
        input_shape=shape,
        precision=own or args.precision,
        plans=(plan,) if plan else tuple(args.plans),
        timeout_seconds=args.seconds,
    )


def first_answer(program: trt.LoadedProgram, spec: Request) -> torch.Tensor:
    """Returns the program's output for the latents that the build recorded its digest for."""
    x = program(latents(spec.input_shape, 1.0, program.input_dtype, program.device))
    torch.cuda.synchronize()
    return x


def measure(row: str, store: CacheStore, args: argparse.Namespace) -> dict[str, Any]:
    """First start in this process, second start in a new one; the row's numbers, or its `error`."""
    begin = time.monotonic()
    try:
        subject, spec = spec_of(row, args)
        decoder = subject.make()
    except Exception as error:
        return {"row": row, "error": f"not available: {type(error).__name__}: {error}"}
    made = time.monotonic()
    events: list[dict[str, Any]] = []
    try:
        material = trt.key_material(decoder, spec)
        keyed = time.monotonic()
        entry = store.get_or_build(
            row.replace(":", "_"),
            Key.of(material),
            lambda out: trt.build_program(decoder, spec, out, progress=events.append),
        )
        program = trt.load_program(entry.read(PROGRAM), "cuda:0")
        x = first_answer(program, spec)
        done = time.monotonic()
    except Exception as error:
        failed = [event for event in events if event["stage"] == "attempt failed"]
        return {"row": row, "error": f"{type(error).__name__}: {error}", "events": failed[-8:] + events[-3:]}
    report = entry.manifest.report
    result = {
        "row": row,
        "make_seconds": made - begin,
        "key_seconds": keyed - made,
        "first_start_seconds": done - made,
        "same_as_built": output_digest(x) == report["output_sha256"],
        "report": report,
        "second_start": second_start(row, store, args),
        "attempts_failed": [event for event in events if event["stage"] == "attempt failed"],
    }
    if row == LONG_RUN_ROW:
        result["long_run"] = long_run(program, spec)
    del program, x
    gc.collect()
    torch.cuda.empty_cache()
    return result


def long_run(program: trt.LoadedProgram, spec: Request) -> dict[str, Any]:
    """Memory around `LONG_RUN_CALLS` decodes: PyTorch's own counter and the whole device's."""
    z = latents(spec.input_shape, 1.0, program.input_dtype, program.device)
    marks = []
    for call in range(LONG_RUN_CALLS + 1):
        if call in (10, LONG_RUN_CALLS // 2, LONG_RUN_CALLS):
            torch.cuda.synchronize()
            free, total = torch.cuda.mem_get_info()
            marks.append(
                {"calls": call, "allocated_bytes": torch.cuda.memory_allocated(), "device_bytes": total - free}
            )
        program(z)
    return {"calls": LONG_RUN_CALLS, "marks": marks, "flat": len({mark["device_bytes"] for mark in marks}) == 1}


def second_start(row: str, store: CacheStore, args: argparse.Namespace) -> dict[str, Any]:
    """Measures what a new process needs until its first frame, and whether it computes the same bits."""
    command = [sys.executable, "-m", "benchmarks.trt_matrix", "--second", row, "--cache", args.cache]
    command += ["--batch", str(args.batch), "--precision", args.precision, "--seconds", str(args.seconds)]
    if args.plans:
        command += ["--plans", *args.plans]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=args.seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {args.seconds:g} s"}
    lines = [line for line in answer.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"error": (answer.stderr or answer.stdout)[-400:]}


def second(row: str, store: CacheStore, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the child's side of `second_start`: everything after the decoder exists is counted, also the
    import of TensorRT.
    """
    subject, spec = spec_of(row, args)
    decoder = subject.make()
    begin = time.monotonic()
    material = trt.key_material(decoder, spec)
    keyed = time.monotonic()
    entry = store.lookup(row.replace(":", "_"), Key.of(material))
    if isinstance(entry, Miss):
        return {"error": f"miss: {entry.reason}"}
    data = entry.read(PROGRAM)
    read = time.monotonic()
    state = trt.run_status()
    imported = time.monotonic()
    program = trt.load_program(data, "cuda:0")
    loaded = time.monotonic()
    x = first_answer(program, spec)
    done = time.monotonic()
    report = entry.manifest.report
    return {
        "seconds": done - begin,
        "key_seconds": keyed - begin,
        "read_seconds": read - keyed,
        "import_seconds": imported - read,
        "load_seconds": loaded - imported,
        "first_decode_seconds": done - loaded,
        "bit_equal": output_digest(x) == report["output_sha256"],
        "tensorrt": state.version,
    }


def merge(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns one document out of runs on one kind of machine; of a row that several have, the last one's.

    Raises:
        ValueError: the runs do not belong together.
    """
    rows: dict[str, dict[str, Any]] = {}
    require_alike(results, "theme", "machine", "batch")
    for result in results:
        rows |= {row["row"]: {"commit": result["commit"], **row} for row in result["rows"]}
    commits = dict.fromkeys(row["commit"] for row in rows.values())
    return {**results[0], "commit": ", ".join(commits), "rows": list(rows.values())}


def render(result: dict[str, Any]) -> str:
    """Returns the Markdown table of a result document."""
    machine = result["machine"]
    columns = "plan, prec, engines, in PyTorch, build s, save s, load s, MiB, ms, graph ms, eager ms, "
    columns += "rel. error (eager), bit-equal"
    lines = [
        "# Every decoder through the real path",
        "",
        f"{machine['gpu']}, driver {machine['driver']}, {machine['torch']}, {machine['torch_tensorrt']}, "
        f"{machine['tensorrt']}; "
        f"commit {result['commit']}; batch {result['batch']}. Random seeded weights unless the row is `demo`.",
        "",
        "| decoder | " + columns.replace(", ", " | ") + " | first start s | second start s |",
        "|" + "---|" * (len(columns.split(", ")) + 3),
    ]
    notes = []
    for row in result["rows"]:
        if "error" in row:
            lines.append(f"| {row['row']} | failed: {row['error'][:160].replace('|', '/')} |")
            continue
        report, again = row["report"], row["second_start"]
        worst = max(report["parity"]["scales"], key=lambda scale: scale["relative_error"])
        cells = [
            row["row"],
            report["plan"],
            report["precision"],
            report["engines"],
            len(report["pytorch_operators"]),
            f"{report['build_seconds']:.1f}",
            f"{report['save_seconds']:.1f}",
            f"{report['load_seconds']:.1f}",
            f"{report['program_bytes'] / 2**20:.0f}",
            f"{report['latency_ms']:.2f}",
            "-" if report["graph_latency_ms"] is None else f"{report['graph_latency_ms']:.2f}",
            "-" if report["eager_latency_ms"] is None else f"{report['eager_latency_ms']:.1f}",
            f"{worst['relative_error']:.1e} ({worst['eager_relative_error']:.1e})",
            "yes" if again.get("bit_equal") and row["same_as_built"] else "NO",
            f"{row['first_start_seconds']:.1f}",
            f"{again['seconds']:.1f}" if "seconds" in again else again.get("error", "?")[:60],
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
        others = [
            f"{c['plan']} at {c['precision']} {c['latency_ms']:.2f} ms"
            if c["usable"]
            else f"{c['plan']} at {c['precision']}: {c['reason'][:160]}"
            for c in report["candidates"]
        ]
        of = f" (commit {row['commit']})" if "commit" in row else ""
        notes.append(f"- `{row['row']}`{of}: {'; '.join(others)}.")
        left = Counter(operator.removeprefix("torch.ops.") for operator, _ in report["pytorch_operators"])
        told = ", ".join(f"{count} {name}" for name, count in left.most_common())
        if told:
            why = "ours" if all(name.startswith("owl_wms.") for name in left) else "ours, or no converter takes them"
            notes.append(f"  Left in PyTorch ({why}): {told}.")
        if report["kept_modules"]:
            tries = len(report["attempts"])
            notes.append(
                f"  Kept in PyTorch ({len(report['kept_modules'])} modules, {tries} tries, "
                f"minimal: {report['kept_minimal']}): "
                f"{', '.join(report['kept_modules'][:6])}... because: {report['kept_reason'][:200]}"
            )
        if "long_run" in row:
            flat = row["long_run"]
            notes.append(f"  {flat['calls']} decodes: memory flat: {flat['flat']} ({flat['marks']}).")
    return "\n".join([*lines, "", *notes, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", default=list(ROWS), help="rows, name or name:precision")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--plans", nargs="*", default=[], help="plans to compare; all that apply unless given")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=120.0, help="limit of one row's build")
    parser.add_argument("--cache", default="", help="cache directory; a temporary one unless given")
    parser.add_argument("--second", help=argparse.SUPPRESS)
    parser.add_argument("--render", type=Path)
    parser.add_argument("--merge", type=Path, nargs="+", help="write the document to render out of these first")
    args = parser.parse_args()
    if args.merge:
        if not args.render:
            parser.error("--merge writes the document that --render names: give both")
        write_merged(args.render, args.merge, merge, parser)
    if args.render:
        print(write_markdown(args.render, render, parser))
        return
    harness.require_gpu(parser)
    if args.second:
        print(json.dumps(second(args.second, CacheStore(args.cache), args)), flush=True)
        return
    with tempfile.TemporaryDirectory(prefix="trt_matrix_") as private:
        args.cache = args.cache or private
        store = CacheStore(args.cache)
        result = harness.document("trt_matrix", None, [], batch=args.batch, precision=args.precision)
        for row in args.only:
            begin = time.monotonic()
            result["rows"].append(measure(row, store, args))
            if args.out:
                harness.write(result, args.out)
                args.out.with_suffix(".md").write_text(render(result), encoding="utf-8")
            print(f"{row}: {time.monotonic() - begin:.1f} s", json.dumps(result["rows"][-1])[:1500], flush=True)
        print(render(result), flush=True)


if __name__ == "__main__":
    main()
