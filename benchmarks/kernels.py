"""Shows where a decoder's time goes: each kernel of the fused decoder, its milliseconds, its share of its own floor.

Each launch of ours and each library product is timed with CUDA events while the queue is kept full, so launch gaps stay
out; medians over several decodes. A launch's floor is the larger of the bytes of its arguments (each read or written
once) over this card's copy rate and its multiply-adds over the matrix rate, twice that rate for 8-bit products. Calls
of the same kernel on the same shape are one row. What PyTorch runs beside them is the row "other".

Usage (on a GPU):
    python -m benchmarks.kernels [--decoder dist base] [--precision bf16 int8] [--out result.json]
    python -m benchmarks.kernels --render result.json        # result.md beside it, anywhere
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import decoders, harness
from benchmarks.report import table_lines, write_markdown
from owl_wms.fused.dcae import fuse
from owl_wms.fused.dcae8 import fuse8
from owl_wms.ops.codes import FORMATS, LARGEST
from owl_wms.ops.common.nvrtc import Kernel
from owl_wms.trt.check.calibration import SEEDED
from owl_wms.trt.spec import dtype_of
from owl_wms.vae import fold_weight_norm

REPEATS = 7
# Keeps the GPU busy while the CPU enqueues a whole decode behind it.
HEAD_START_CYCLES = 60_000_000


@dataclass(slots=True)
class Call:
    """One launch: what, on what, the work it must do, and its events."""

    name: str
    shape: str
    bytes_moved: int
    flops: float
    events: tuple[torch.cuda.Event, torch.cuda.Event]


class Recorder:
    """Times every launch inside its block."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    @contextlib.contextmanager
    def timed(self, name: str, tensors: list[Tensor], flops: float) -> Iterator[None]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        largest = max(tensors, key=lambda tensor: tensor.numel() * tensor.element_size())
        self.calls.append(Call(name, "x".join(map(str, largest.shape)), moved, flops, (begin, end)))

    def product(self, name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`function`, a library product whose last two tensors are rows and a transposed weight, timed."""

        def call(*args: Any, **kwargs: Any) -> Tensor:
            tensors = [value for value in args if isinstance(value, Tensor)]
            rows, weight = tensors[-2:]
            with self.timed(name, tensors, 2.0 * rows.numel() * weight.shape[1]):
                out = function(*args, **kwargs)
            self.calls[-1].bytes_moved += out.numel() * out.element_size()
            return out

        return call


def flops_of(kernel: Kernel, tensors: list[Tensor]) -> float:
    """Multiply-adds times two of one launch of ours; 0 for kernels that only move memory."""
    out = tensors[0]
    if kernel.op in ("grouped_conv", "grouped_conv8") or "MODE=1" in kernel.defines:
        return 2.0 * out.numel() * 9 * 16
    if kernel.op == "stage_tail":
        hidden = tensors[-1].shape[-1]  # w3 is [C, 2C]
        branch = 2.0 * (out.numel() // out.shape[-1]) * hidden * 9 * 16 if "MODE=0" in kernel.defines else 0.0
        return branch + 2.0 * out.numel() * hidden
    if kernel.op == "linear8":
        # Codes, residual or both come first, then x and the weight; all the results have the same number of elements.
        weight = next(t for t in tensors if t.dim() == 2 and t.dtype in LARGEST)
        return 2.0 * out.numel() * weight.shape[-1]
    return 0.0


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """Times launches of our CUDA kernels, of our Triton products and of library products."""
    from owl_wms.ops.linear8 import kernel as products

    recorder = Recorder()
    originals = Kernel.launch, products.launch, products.launch_add_
    libraries = torch.mm, torch.addmm, Tensor.addmm_

    def launch(self: Kernel, device: torch.device, *, arguments: Any, **sizes: Any) -> None:
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        # Its second argument is added to in place: read and written.
        tensors += [arguments[1]] if self.op == "linear8" and arguments[1] is not None else []
        with recorder.timed(f"{self.op} {' '.join(self.defines[:1])}", tensors, flops_of(self, tensors)):
            originals[0](self, device, arguments=arguments, **sizes)
        if self.op == "stage_tail" and "MODE=2" in self.defines:  # reads its branch, twice its result, by a tensor map
            recorder.calls[-1].bytes_moved += 2 * tensors[0].numel() * tensors[0].element_size()

    def linear(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        with recorder.timed("linear8 (Triton)", [x, weight], 2.0 * x.shape[0] * weight.numel()):
            out = originals[1](x, weight, *rest)
        recorder.calls[-1].bytes_moved += out.numel()
        return out

    def add(u: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Tensor | None:
        with recorder.timed("add_linear8 (Triton)", [u, u, x, weight], 2.0 * x.shape[0] * weight.numel()):
            codes = originals[2](u, x, weight, *rest)
        recorder.calls[-1].bytes_moved += 0 if codes is None else codes.numel()
        return codes

    Kernel.launch, products.launch, products.launch_add_ = launch, linear, add  # type: ignore[method-assign]
    timed = [recorder.product("library product", function) for function in libraries]
    torch.mm, torch.addmm, Tensor.addmm_ = timed  # type: ignore[assignment, method-assign]
    try:
        yield recorder
    finally:
        Kernel.launch, products.launch, products.launch_add_ = originals  # type: ignore[method-assign]
        torch.mm, torch.addmm, Tensor.addmm_ = libraries  # type: ignore[assignment, method-assign]


@torch.no_grad()
def profile(decode: Callable[[Tensor], Tensor], z: Tensor, ceilings: harness.Ceilings) -> dict[str, Any]:
    """Rows of one decoder, longest first, and the whole decode's milliseconds."""
    decode(z)
    samples: list[list[float]] = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        torch.cuda._sleep(HEAD_START_CYCLES)
        with recording() as recorder:
            decode(z)
        torch.cuda.synchronize()
        samples.append([begin.elapsed_time(end) for begin, end in (call.events for call in recorder.calls)])
    times = [statistics.median(each) for each in zip(*samples, strict=True)]
    whole = harness.measure_interleaved({"whole": decode}, [z, z.flip(0)], rounds=REPEATS)["whole"].median_ms
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for call, ms in zip(recorder.calls, times, strict=True):
        rate = ceilings.matmul_tflops * (2 if "linear8" in call.name else 1)
        floor = max(call.bytes_moved / ceilings.copy_tbps, call.flops / rate) / 1e9
        row = rows.setdefault((call.name, call.shape), {"kernel": call.name, "shape": call.shape, "calls": 0})
        row["calls"] += 1
        for key, value in (("ms", ms), ("floor_ms", floor), ("gigabyte", call.bytes_moved / 1e9)):
            row[key] = row.get(key, 0.0) + value
    ordered = sorted(rows.values(), key=lambda row: -row["ms"])
    ordered.append(
        {"kernel": "other", "shape": "", "calls": 0, "ms": whole - sum(times), "floor_ms": 0.0, "gigabyte": 0.0}
    )
    return {"whole_ms": whole, "kernels": ordered}


LEGEND = (
    "A floor is the larger of bytes over the copy rate and multiply-adds over the matrix rate (twice it for 8-bit",
    "products). `library product` is cuBLAS; `stage_tail` MODE 0 is a whole tail, 1 a grouped convolution behind an",
    "enlargement, 2 a projection; `up_residual` MODE 0 is an enlargement, 1 with the shortcut, 2 the shortcut alone;",
    "`other` is PyTorch and gaps.",
)
TITLES = ("kernel", "largest tensor", "calls", "ms", "% of time", "floor ms", "% of floor")


def cells(row: dict[str, Any], whole_ms: float) -> tuple[str, ...]:
    """Returns a kernel's row as text, in the order of `TITLES`; what PyTorch runs beside them has no floor."""
    share = f"{100 * row['ms'] / whole_ms:.0f}"
    if not row["floor_ms"]:
        return row["kernel"], row["shape"], "", f"{row['ms']:.3f}", share, "", ""
    floor = (f"{row['floor_ms']:.3f}", f"{100 * row['floor_ms'] / max(row['ms'], 1e-9):.0f}")
    return row["kernel"], row["shape"], str(row["calls"]), f"{row['ms']:.3f}", share, *floor


def title_of(found: dict[str, Any], batch: int) -> str:
    """Returns what a table is of. Gaps between kernels, which a CUDA graph closes, are in "other"."""
    return f"{found['decoder']} {found['precision']}, batch {batch}: {found['whole_ms']:.2f} ms launched one by one"


def render(result: dict[str, Any]) -> str:
    """Returns the document as Markdown."""
    ceilings, machine = result["ceilings"], result["machine"]
    lines = [
        "# Every kernel against its own floor",
        "",
        f"{machine['gpu']}, driver {machine['driver']}, {machine['torch']}; commit {result['commit']}. "
        f"Read in the same run: bf16 matrix product {ceilings['matmul_tflops']:.0f} TFLOP/s, "
        f"copy {ceilings['copy_tbps']:.2f} TB/s.",
        "",
        *LEGEND,
    ]
    for found in result["rows"]:
        lines += ["", f"## {title_of(found, result['batch'])}", ""]
        lines += table_lines(TITLES, [cells(row, found["whole_ms"]) for row in found["kernels"]], numbers=5)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print tables and the JSON document; or render one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", nargs="+", default=["dist", "base"], choices=["dist", "base", "demo"])
    parser.add_argument("--precision", nargs="+", default=["bf16"], choices=["bf16", "fp16", "int8", "fp8"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--render", type=Path)
    args = parser.parse_args()
    if args.render is not None:
        write_markdown(args.render, render, parser)
        return
    harness.require_gpu(parser)
    ceilings = harness.measure_ceilings()
    rows = []
    for name in args.decoder:
        subject = decoders.subject(name)
        folded = fold_weight_norm(subject.make()).eval().requires_grad_(False).cuda()
        for precision in args.precision:
            dtype = dtype_of(precision)
            fused: nn.Module
            if precision in FORMATS:
                calibration = torch.randn(SEEDED, *subject.latent_shape, device="cuda")
                fused = fuse8(folded, dtype, FORMATS[precision], calibration)
            else:
                fused = fuse(folded, dtype)
            z = torch.randn(args.batch, *subject.latent_shape, device="cuda").to(dtype)
            found = profile(fused, z, ceilings)
            rows.append({"decoder": name, "precision": precision, **found})
            shown = [cells(row, found["whole_ms"]) for row in found["kernels"]]
            harness.show(TITLES, shown, title_of(rows[-1], args.batch))
    harness.finish(harness.document("kernels", ceilings, rows, batch=args.batch), args.out)


if __name__ == "__main__":
    main()
