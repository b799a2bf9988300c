"""Times the decoder's ops one by one: GPU time against the bytes they must move and against plain PyTorch.

Run: python -m benchmarks.ops [--out results.json] [--batch 8]
     python -m benchmarks.ops --render results.json      # the Markdown beside it, anywhere

Each op is captured into a CUDA graph of several calls on rotated inputs, so that launch gaps and caches stay out of the
number. The floor is bytes (every input once, every output once) over this card's measured copy rate. A row is reported
only after its parity check: relative L2 error against the same function in fp32, on a smaller batch.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy import relative_l2
from benchmarks.case import Case
from benchmarks.harness import (
    console,
    document,
    finish,
    machine_line,
    measure_ceilings,
    measure_interleaved,
    require_gpu,
    show,
)
from benchmarks.ops8 import code_cases
from benchmarks.ops_sana import sana_cases
from benchmarks.report import table_lines, write_markdown
from owl_wms.env import describe_machine
from owl_wms.ops import conv_out, grouped_conv, resize, stage_tail, up_residual

ERROR_LIMIT = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
# (decoder, output side of the stage, its width C, width of its input)
STAGES = (
    ("distilled", 512, 96, 192),
    ("distilled", 256, 192, 384),
    ("distilled", 64, 768, 1536),
    ("base", 512, 256, 512),
    ("base", 128, 1024, 2048),
)


def cases(batch: int, dtype: torch.dtype) -> Iterator[Case]:
    """Lists every op at the shapes that dominate the two decoders."""

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device="cuda") * scale).to(dtype)

    for decoder, side, width, wide in STAGES:
        pixels, hidden = batch * side * side, 2 * width
        weight, bias = grouped_conv.pack(random(hidden, 16, 3, 3, scale=0.1)), torch.randn(hidden, device="cuda")
        for up2 in (False, True):
            low = side // 2 if up2 else side
            yield Case(
                name=f"grouped_conv{' up2' if up2 else ''} {decoder} {side}x{side}x{hidden}",
                make=lambda b, n=low, c=hidden, w=weight, v=bias, up2=up2: (random(b, n, n, c), w, v, up2),
                run=torch.ops.owl_wms.grouped_conv,
                reference=grouped_conv.reference,
                bytes_moved=pixels * hidden * 2 + batch * low * low * hidden * 2,
                flops=pixels * hidden * 2 * 9 * 16,
            )
        half = side // 2
        yield Case(
            name=f"up_residual {decoder} {side}x{side}x{width}",
            make=lambda b, n=half, c=width, s=wide: (random(b, n, n, c), random(b, n, n, s)),
            run=torch.ops.owl_wms.up_residual,
            reference=up_residual.reference,
            bytes_moved=pixels * width * 2 + pixels // 4 * (width + wide) * 2,
        )
    yield from tail_cases(batch, random)
    for decoder, width, outputs in (("distilled", 96, 3), ("base", 256, 4)):
        last, zero = conv_out.pack(random(outputs, width, 3, 3, scale=0.1)), torch.zeros(4, device="cuda")
        yield Case(
            name=f"conv_out {decoder} 512x512x{width}",
            make=lambda b, width=width, w=last, v=zero: (random(b, 512, 512, width), w, v, True),
            run=torch.ops.owl_wms.conv_out,
            reference=conv_out.reference,
            bytes_moved=batch * 512 * 512 * (width * 2 + 16),
        )
    yield Case(
        name="resize 512x512 to 360x640",
        make=lambda b: (torch.randn(b, 512, 512, 4, device="cuda"), 3, 360, 640, dtype),
        run=torch.ops.owl_wms.resize,
        reference=lambda x, c, h, w, _: resize.reference(x, c, h, w, x.dtype),
        bytes_moved=batch * (512 * 512 * 16 + 360 * 640 * 3 * 2),
    )


def tail_cases(batch: int, random: Callable[..., Tensor]) -> Iterator[Case]:
    """`stage_tail` at the widest stages of the distilled decoder, beside the three calls that it replaces."""
    for decoder, side, width, wide in STAGES[:2]:
        pixels, hidden, half = batch * side * side, 2 * width, side // 2
        weights = (
            grouped_conv.pack(random(hidden, 16, 3, 3, scale=0.1)),
            torch.randn(hidden, device="cuda"),
            random(width, hidden, scale=0.1),
        )
        for name, run in (("stage_tail", torch.ops.owl_wms.stage_tail), ("its parts", stage_tail.composition)):
            yield Case(
                name=f"{name} {decoder} {side}x{side}x{width}",
                make=lambda b, n=half, c=width, s=wide, w=weights: (
                    random(b, n, n, c), random(b, n, n, 2 * c), random(b, n, n, s), *w,
                ),
                run=run,
                reference=stage_tail.reference,
                bytes_moved=pixels * width * 2 + pixels // 4 * (width + hidden + wide) * 2,
                flops=pixels * hidden * 2 * (9 * 16 + width),
            )  # fmt: skip


def graph_ms(run: Callable[..., Tensor], arguments: Sequence[tuple], calls: int = 6, replays: int = 9) -> float:
    """Median milliseconds of one call inside a captured graph of `calls` calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for values in arguments:
            run(*values)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            run(*arguments[index % len(arguments)])
    graph.replay()
    samples = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(begin.elapsed_time(end) / calls)
    return statistics.median(samples)


def error_of(case: Case) -> float:
    """Relative L2 error against the reference in fp32 (no TF32) or by the case's own rule; batch 1, fresh inputs."""
    if case.compare is not None:
        return case.compare(case.make(1))
    values = case.make(1)
    wide = tuple(value.float() if isinstance(value, Tensor) else value for value in values)
    return relative_l2(case.run(*values), case.reference(*wide))


TITLES = ("op", "ms", "floor ms", "% of floor", "TB/s", "TFLOP/s", "PyTorch ms", "error")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Returns a row as text, in the order of `TITLES`."""
    ms, floor = row["latency_ms"], row["floor_ms"]
    rates = f"{row['tbps']:.2f}", f"{row['tflops']:.0f}" if row["tflops"] else ""
    reference = f"{row['pytorch_ms']:.2f}", f"{row['error']:.1e}"
    return row["op"], f"{ms:.3f}", f"{floor:.3f}", f"{100 * floor / ms:.0f}", *rates, *reference


def render(result: dict[str, Any]) -> str:
    """Returns the document as Markdown."""
    machine, ceilings = result["machine"], result["ceilings"]
    lines = [
        "# Each kernel alone, bf16 and codes",
        "",
        f"{machine['gpu']}, driver {machine['driver']}, {machine['torch']}; commit {result['commit']}; batch "
        f"{result['batch']}. Read in the same run: copy {ceilings['copy_tbps']:.2f} TB/s.",
        "",
        "A floor is the bytes of arguments and result over that rate. `PyTorch` is the plain reference, which shows",
        "what an op replaces and is no rival; the error is against it in fp32.",
        "",
        *table_lines(TITLES, map(cells, result["rows"]), numbers=len(TITLES) - 1),
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--render", type=Path, help="write a result's Markdown beside it, and measure nothing")
    options = parser.parse_args(argv)
    if options.render is not None:
        write_markdown(options.render, render, parser)
        return
    require_gpu(parser)
    dtype = torch.bfloat16
    torch.backends.cudnn.allow_tf32 = False
    ceilings = measure_ceilings(dtype)
    console.print(machine_line(describe_machine(), ceilings))
    rows = []
    batch = options.batch
    for case in itertools.chain(cases(batch, dtype), code_cases(batch, "cuda"), sana_cases(batch, "cuda", dtype)):
        error, limit = error_of(case), case.limit or ERROR_LIMIT[dtype]
        if not error < limit:
            console.print(f"{case.name}: error {error:.1e} is over {limit:.0e}; not timed")
            continue
        arguments = [case.make(options.batch) for _ in range(2)]
        mine = graph_ms(case.run, arguments)
        # Long calls with host-made constants: timed one by one, not in a graph.
        plain_run = {"plain": lambda _, case=case, values=arguments[0]: case.reference(*values)}
        plain = measure_interleaved(plain_run, [arguments[0][0]], rounds=3, warmup=1)["plain"].median_ms
        floor = case.bytes_moved / ceilings.copy_tbps / 1e9
        row = {
            "op": case.name,
            "latency_ms": mine,
            "floor_ms": floor,
            "pytorch_ms": plain,
            "tbps": case.bytes_moved / mine / 1e9,
            "tflops": case.flops / mine / 1e9,
            "error": error,
        }
        rows.append(row)
    show(TITLES, [cells(row) for row in rows], "ops, bf16 and codes")
    finish(document("ops", ceilings, rows, batch=options.batch), options.out)


if __name__ == "__main__":
    main()
