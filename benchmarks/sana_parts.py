"""Shows where the sana decoder's time goes: each convolution shape by each way to compute it, each stage, the whole.

Eager PyTorch and `torch.compile` (channels_last) stand beside the fused decoder, with the error of each against the
fp32 decoder and achieved TFLOP/s. Parts run alone, so their sum is a little more than the whole.

Usage (on a GPU): python -m benchmarks.sana_parts [--dtypes bf16 fp16] [--batch 8] [--compile none|whole] [--profile]
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import decoders
from benchmarks.accuracy import relative_l2
from benchmarks.harness import console, finish, measure_interleaved, require_gpu
from owl_wms.fused.convolution import Conv3x3
from owl_wms.fused.sana import fuse
from owl_wms.ops import conv3x3 as conv3x3_op
from owl_wms.trt.check.parity import reference_arithmetic
from owl_wms.trt.spec import dtype_of

ROUNDS = 7
NAMES = {-1: "library", -2: "library fused", -3: "resident", 0: "narrow"}


def milliseconds(call: Callable[[Tensor], object], x: Tensor, rounds: int = ROUNDS) -> float:
    """Median of one call."""
    return measure_interleaved({"call": call}, [x], rounds=rounds, warmup=2)["call"].median_ms


def convolutions(fused: nn.Module, z: Tensor) -> list[dict]:
    """Times each distinct convolution in every way: a row of milliseconds, TFLOP/s and error against the library."""
    seen: dict[tuple, dict] = {}

    def watch(conv: Conv3x3, arguments: tuple) -> None:
        x, residual = arguments[0], arguments[1] if len(arguments) > 1 else None
        key = (tuple(x.shape), conv.weight.shape[0], conv.relu, residual is not None)
        if key in seen:
            seen[key]["times"] += 1
            return
        row = seen[key] = {"shape": list(x.shape), "out": key[1], "relu": key[2], "residual": key[3], "times": 1}
        tflop = 2 * x.numel() * 9 * key[1] / 1e12
        ways = {}
        wanted = None
        for how in conv3x3_op.ways(x, conv.weight, residual is not None, conv.relu):
            name = NAMES[how]

            def run(rows: Tensor, how: int = how) -> Tensor:
                return torch.ops.owl_wms.conv3x3(rows, conv.weight, conv.bias, residual, conv.relu, how)

            try:
                got = run(x).float()
                wanted = got if wanted is None else wanted
                ms = milliseconds(run, x, 5)
                ways[name] = {"ms": ms, "tflops": tflop / ms * 1e3, "stray": relative_l2(got, wanted)}
            except Exception as error:
                ways[name] = {"reason": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
        row["ways"] = ways

    handles = [m.register_forward_pre_hook(watch) for m in fused.modules() if isinstance(m, Conv3x3)]
    fused(z)
    for handle in handles:
        handle.remove()
    return list(seen.values())


def stages(eager: nn.Module, fused: nn.Module, z: Tensor) -> list[dict]:
    """Milliseconds of every block in both forms, each on its own true input, and the error of one against the other."""
    rows = []
    blocks = [block for stage in reversed(eager.up_blocks) for block in stage]
    inputs: list[Tensor] = []
    handles = [block.register_forward_pre_hook(lambda module, args: inputs.append(args[0])) for block in blocks]
    eager(z)
    for handle in handles:
        handle.remove()
    for block, ours, x in zip(blocks, fused.body, inputs, strict=True):
        name = f"{type(block).__name__} {list(x.shape)}"
        if rows and rows[-1]["name"] == name:
            rows[-1]["times"] += 1
            continue
        nhwc = x.permute(0, 2, 3, 1).contiguous()
        error = relative_l2(ours(nhwc).permute(0, 3, 1, 2), block(x).float())
        rows.append({"name": name, "times": 1, "eager_ms": milliseconds(block, x), "ours_ms": milliseconds(ours, nhwc)})
        rows[-1]["difference"] = error
    rows.append({"name": "input", "times": 1, "ours_ms": milliseconds(lambda q: latent(fused, q), z)})
    last = blocks[-1](inputs[-1]).permute(0, 2, 3, 1).contiguous()
    rows.append({"name": f"output {list(last.shape)}", "times": 1, "ours_ms": milliseconds(fused.output, last)})
    return rows


def latent(fused: nn.Module, z: Tensor) -> Tensor:
    """Returns the first convolution of the fused decoder."""
    return torch.ops.owl_wms.latent_conv(z, fused.in_weight, fused.in_bias, fused.repeats)


def kernels(run: Callable[[Tensor], Tensor], z: Tensor) -> list[dict]:
    """Returns the 22 longest kernels of one call, longest first."""
    run(z)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(3):
            run(z)
        torch.cuda.synchronize()
    events = [e for e in seen.key_averages() if e.self_device_time_total > 0]
    events.sort(key=lambda e: -e.self_device_time_total)
    return [{"kernel": e.key[:90], "ms": e.self_device_time_total / 3e3, "calls": e.count // 3} for e in events[:22]]


@torch.no_grad()
def measure(precision: str, live: nn.Module, z: Tensor, compiled: bool, profiled: bool) -> dict:
    """Everything at one precision, printed as it comes; the row of the document."""
    dtype = dtype_of(precision)
    narrow = z.to(dtype)
    with reference_arithmetic():
        wanted = live(narrow.float())
    eager = copy.deepcopy(live).to(dtype).to(memory_format=torch.channels_last)
    begin = time.monotonic()
    fused = fuse(live, dtype, tuple(z.shape))
    choosing = time.monotonic() - begin
    hows = sorted(
        {(m.weight.shape[-1], m.weight.shape[0], m.relu, m.how) for m in fused.modules() if isinstance(m, Conv3x3)}
    )
    console.print(f"{precision}: fused and measured in {choosing:.1f} s; (in, out, relu, how): {hows}")

    runs: dict[str, Callable[[Tensor], Tensor]] = {"eager channels_last": eager, "ours": fused}
    if compiled:
        runs["torch.compile channels_last"] = torch.compile(copy.deepcopy(eager), dynamic=False)
    tflop = decoders.gigaflop(eager, narrow) / 1e3
    whole = {}
    errors = {name: relative_l2(run(narrow), wanted) for name, run in runs.items()}
    for name, timing in measure_interleaved(runs, [narrow, narrow.flip(0)], rounds=10, warmup=2).items():
        whole[name] = {"ms": timing.median_ms, "tflops": tflop / timing.median_ms * 1e3, "error": errors[name]}
        row = whole[name]
        console.print(f"  {name:30s} {row['ms']:8.3f} ms {row['tflops']:6.0f} TFLOP/s  error {row['error']:.2e}")
    result = {"precision": precision, "choosing_seconds": choosing, "whole": whole}
    result["stages"] = stages(eager, fused, narrow)
    for row in result["stages"]:
        eager_ms = f"{row['eager_ms']:8.3f}" if "eager_ms" in row else " " * 8
        difference = f"{row['difference']:.1e}" if "difference" in row else ""
        console.print(
            f"  {row['times']:2d} x {row['name']:44s} eager {eager_ms} ours {row['ours_ms']:8.3f} {difference}"
        )
    result["convolutions"] = convolutions(fused, narrow)
    for row in result["convolutions"]:
        what = (
            f"{row['times']:2d} x {row['shape']} -> {row['out']}"
            + " relu" * row["relu"]
            + " residual" * row["residual"]
        )
        console.print(f"  {what}")
        for name, way in row["ways"].items():
            text = way.get("reason") or f"{way['ms']:8.3f} ms {way['tflops']:5.0f} TFLOP/s stray {way['stray']:.1e}"
            console.print(f"      {name:14s} {text}", markup=False)
    if profiled:
        result["kernels"] = kernels(fused, narrow)
        for row in result["kernels"]:
            console.print(f"  {row['ms']:8.3f} ms x{row['calls']:3d} {row['kernel']}", markup=False)
    return result


def main() -> None:
    """Measure and print; the last line is the JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp16"], choices=["bf16", "fp16"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--compile", default="whole", choices=["none", "whole"], help="in the first precision only")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    require_gpu(parser)
    subject = decoders.subject("sana")
    with torch.device("cuda"):
        live = subject.make().eval().requires_grad_(False)
    z = torch.randn(options.batch, *subject.latent_shape, device="cuda")
    rows = []
    for index, precision in enumerate(options.dtypes):
        rows.append(measure(precision, live, z, options.compile == "whole" and not index, options.profile))
        torch.cuda.empty_cache()
    finish({"theme": "sana_parts", "batch": options.batch, "rows": rows}, None)


if __name__ == "__main__":
    main()
