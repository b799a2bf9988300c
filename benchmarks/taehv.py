"""Times streaming TAEHV: milliseconds per latent beside what people run today, and a check of every kernel in it.

    python -m benchmarks.taehv --check                  # one minute: every op against its reference, then whole steps
    python -m benchmarks.taehv --out benchmarks/results/taehv_h200.json       # five minutes; writes .md beside it
    python -m benchmarks.taehv --toy                    # every line of it on a CPU, in bf16; its times mean nothing

Rivals, all fp16, one stream: eager PyTorch; the author's arrangement, which takes one frame at a time through all
layers; torch.compile; the same replayed as a CUDA graph; TensorRT alone as a CUDA graph. A graph's row includes the
copy of the state into its buffers. `to bytes` is ours until the frames stand on the host as bytes.
Exit status 1: a wrong result, or an error above 1.2 times that of eager fp16.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import (
    Timing,
    console,
    document,
    finish,
    measure_ceilings,
    measure_interleaved,
    require_gpu,
    show,
    timing_of,
    watts,
)
from benchmarks.ops_taehv import cases
from benchmarks.taehv_steps import Step, as_program, candidates
from owl_wms import cudnn
from owl_wms.configs import TAEHVConfig
from owl_wms.fused.convolution import Chosen
from owl_wms.fused.taehv import fuse
from owl_wms.state import State, zeros
from owl_wms.vae import build_decoder
from owl_wms.vae.taehv import TAEHVDecoder

# name -> configuration, latent height and width, milliseconds wanted (issue: streaming TAEHV)
FORMS: dict[str, tuple[dict[str, Any], int, int, float]] = {
    "hunyuan1.5 720p": ({"latent_channels": 32, "patch_size": 2}, 45, 80, 0.90),
    "wan2.1 480x832": ({"latent_channels": 16}, 60, 104, 1.35),
    "hunyuan1.5 super 720p": ({"latent_channels": 32, "patch_size": 2, "form": "super"}, 45, 80, 2.0),
}
TOY_FORMS: dict[str, tuple[dict[str, Any], int, int, float]] = {
    "normal": ({"latent_channels": 16, "patch_size": 2}, 2, 3, 0.90),
    "super": ({"latent_channels": 16, "form": "super"}, 2, 3, 2.0),
}
CHAIN = 32  # consecutive steps over which errors are compared
MOST_ERROR = 1.2  # times that of eager fp16
MOST_GROWTH = 16 << 20  # bytes of a process whose allocator keeps what is free


@dataclasses.dataclass(frozen=True)
class Bench:
    """Holds where it runs and what is measured."""

    device: str = "cuda"
    half: torch.dtype = torch.float16
    forms: dict[str, tuple[dict[str, Any], int, int, float]] = dataclasses.field(default_factory=lambda: FORMS)
    rounds: int = 60


TOY = Bench("cpu", torch.bfloat16, TOY_FORMS, 2)


def make(config: dict[str, Any], bench: Bench) -> TAEHVDecoder:
    """Returns a decoder with random weights, fp32, whose frames spread over [0, 1]."""
    torch.manual_seed(0)
    decoder = build_decoder(TAEHVConfig(model_id="taehv", **config)).to(bench.device).eval().requires_grad_(False)
    assert isinstance(decoder, TAEHVDecoder)
    for name, parameter in decoder.named_parameters():
        parameter.normal_(std=0.1 if name.endswith("bias") else (2 / parameter[0].numel()) ** 0.5)
    last: Any = decoder[22]
    last.weight.mul_(1e-4)
    last.bias.fill_(0.5)
    spread = decoder(torch.randn(1, 2, decoder.latent_channels, 8, 8, device=bench.device)).std()
    last.weight.mul_(0.15 / spread)
    return decoder


def chained(step: Step, latents: Tensor, state: State) -> list[Tensor]:
    """Frames of every step, in fp32."""
    frames = []
    for latent in latents:
        decoded, state = step(latent, state)
        frames.append(decoded.float().clone())
    return frames


def errors(got: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Relative error of every step."""
    return [
        float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)) for a, b in zip(got, wanted, strict=True)
    ]


class Candidate:
    """A step and the state of its own stream; called with a latent it goes on by one step."""

    def __init__(self, step: Step, state: State) -> None:
        self.step, self.state = step, state

    def __call__(self, latent: Tensor) -> Tensor:
        frames, self.state = self.step(latent, self.state)
        return frames


def timed(running: dict[str, Candidate], latents: list[Tensor], bench: Bench) -> dict[str, Timing]:
    """Measures milliseconds of every candidate, one after the other in each round."""
    if bench.device == "cuda":
        return measure_interleaved(dict(running), latents, rounds=bench.rounds)
    samples: dict[str, list[float]] = {label: [] for label in running}
    for latent in latents[: bench.rounds]:
        for label, run in running.items():
            begin = time.perf_counter()
            run(latent)
            samples[label].append((time.perf_counter() - begin) * 1e3)
    return {label: timing_of(values) for label, values in samples.items()}


def measure(name: str, with_tensorrt: bool, bench: Bench) -> tuple[list[dict[str, Any]], bool]:
    """Rows of one form, and whether ours is near enough to fp32."""
    config, height, width, wanted_ms = bench.forms[name]
    decoder = make(config, bench)
    shape = (1, decoder.latent_channels, height, width)
    latents = torch.randn(CHAIN, *shape, device=bench.device)
    start = zeros(decoder.state_specs(shape), bench.device)
    with cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        truth = chained(decoder.step, latents, start)
    halves, half_start = latents.to(bench.half), tuple(tensor.to(bench.half) for tensor in start)
    fused = fuse(decoder, bench.half, shape)
    running: dict[str, Candidate] = {}
    found: dict[str, list[float]] = {}
    for label, maker in candidates(decoder, fused, with_tensorrt).items():
        began = time.monotonic()
        try:
            step = maker(halves[0], half_start)
            if "bytes" not in label:
                found[label] = errors(chained(step, halves, half_start), truth)
            running[label] = Candidate(step, half_start)
        except Exception as error:  # a rival that does not run here is a row that says so
            console.print(f"{name}: {label} does not run: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
            continue
        console.print(f"{name}: {label} is ready after {time.monotonic() - began:.0f} s", style="dim")
    rest = {label: run for label, run in running.items() if label != "ours, to bytes on the host"}
    times = timed(rest, list(halves), bench)
    for label in running.keys() - rest.keys():
        times |= timed({label: running[label]}, list(halves), bench)
    rows = []
    for label in running:
        strays = found.get(label, [float("nan")])
        rows.append(
            {
                "form": name,
                "candidate": label,
                "median_ms": times[label].median_ms,
                "p20_ms": times[label].p20_ms,
                "p80_ms": times[label].p80_ms,
                "error_first": strays[0],
                "error_last": strays[-1],
                "error_worst": max(strays),
                "watts": watts(functools.partial(running[label], halves[0])) if bench.device == "cuda" else None,
                "wanted_ms": wanted_ms if label == "ours" else None,
            }
        )
    ways = sorted(
        {f"{type(m).__name__} {list(m.weight.shape)}: {m.how}" for m in fused.modules() if isinstance(m, Chosen)}
    )
    console.print(f"{name}: ways chosen: " + "; ".join(ways), style="dim")
    fine = "ours" in found and max(found["ours"]) <= MOST_ERROR * max(found["eager"])
    return rows, fine


def allocated(bench: Bench) -> int:
    """Returns bytes in use: of tensors on the GPU, or of this process."""
    if bench.device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def long_run(steps: int, bench: Bench) -> dict[str, Any]:
    """Error beside fp32 and memory over many steps of one stream: both must stay where they were."""
    config, height, width, _ = next(iter(bench.forms.values()))
    decoder = make(config, bench)
    shape = (1, decoder.latent_channels, min(height, 12), min(width, 20))
    start = zeros(decoder.state_specs(shape), bench.device)
    half_start = tuple(tensor.to(bench.half) for tensor in start)
    z = torch.randn(64, *shape, device=bench.device)
    fused = fuse(decoder, bench.half, shape)
    with cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        exact = as_program(decoder.step, z[0], start)
    ours = as_program(fused.step, z[0].to(bench.half), half_start)
    state, own = start, half_start
    worst, memory = [], []
    for i in range(steps):
        wanted, state = exact(z[i % 64], state)
        got, own = ours(z[i % 64].to(bench.half), own)
        if i % (steps // 10) == steps // 10 - 1 or i == 99:
            worst.append(errors([got.float()], [wanted])[0])
            memory.append(allocated(bench))
    growth = max(memory) - min(memory)
    flat = max(worst) <= 1.5 * worst[0] and growth <= (0 if bench.device == "cuda" else MOST_GROWTH)
    return {"steps": steps, "errors": worst, "bytes_allocated": memory, "flat": flat}


def check(bench: Bench) -> bool:
    """Checks every op on the GPU at odd shapes, with poisoned outputs; then whole steps of every form."""
    fine = True
    torch.manual_seed(0)
    for dtype, most in ((torch.float16, 2e-3), (torch.bfloat16, 1.2e-2)) if bench.device == "cuda" else ():
        for index, (op, arguments) in enumerate(cases("cuda", dtype)):
            wanted = op(*(a.float() if isinstance(a, Tensor) else a for a in arguments))
            torch.full((1 << 26,), float("nan"), device="cuda", dtype=dtype)  # freed: what is not written shows
            shapes = [list(a.shape) if isinstance(a, Tensor) else a for a in arguments]
            try:
                got = op(*arguments)
                torch.cuda.synchronize()
            except Exception as error:
                console.print(f"FAILS {op} {dtype} {shapes}: {str(error).splitlines()[0][:200]}")
                fine = False
                if "CUDA" in str(error) or "launch" in str(error):
                    return False  # the context is gone
                continue
            if got.dtype == torch.uint8:
                error_now, limit = float((got.int() - wanted.int()).abs().max()), 1.0 if dtype == torch.float16 else 4.0
            else:
                difference = torch.linalg.vector_norm(got.float() - wanted)
                error_now, limit = float(difference / torch.linalg.vector_norm(wanted)), most
            if not error_now <= limit:
                console.print(f"WRONG {index} {op} {dtype} {shapes}: error {error_now:.2e}, limit {limit:.0e}")
                fine = False
    console.print(f"ops: {'right' if fine else 'WRONG'}")
    for name, (config, height, width, _) in bench.forms.items():
        decoder = make(config, bench)
        shape = (2, decoder.latent_channels, min(height, 11), min(width, 19))
        z = torch.randn(4, *shape, device=bench.device)
        start = zeros(decoder.state_specs(shape), bench.device)
        with cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            truth = chained(decoder.step, z, start)
        half, half_start = z.to(bench.half), tuple(tensor.to(bench.half) for tensor in start)
        fused = fuse(decoder, bench.half, shape)
        ours = errors(chained(fused.step, half, half_start), truth)
        graph = errors(chained(as_program(fused.step, half[0], half_start), half, half_start), truth)
        eager = errors(chained(decoder.to(bench.half).step, half, half_start), truth)
        right = max(ours) <= MOST_ERROR * max(eager) and max(graph) <= MOST_ERROR * max(eager)
        fine &= right
        word = "right" if right else "WRONG"
        console.print(
            f"{name}: {word}, error {max(ours):.2e}, as a graph {max(graph):.2e}, eager fp16 {max(eager):.2e}"
        )
    return fine


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table, also printed."""
    lines = []
    for row in rows:
        wanted = f" (wanted {row['wanted_ms']:.2f})" if row["wanted_ms"] else ""
        lines.append(
            (
                row["form"],
                row["candidate"],
                f"{row['median_ms']:.3f}{wanted}",
                f"{row['p20_ms']:.3f}-{row['p80_ms']:.3f}",
                f"{row['error_first']:.2e}",
                f"{row['error_last']:.2e}",
                "-" if row["watts"] is None else f"{row['watts']:.0f}",
            )
        )
    return show(("form", "candidate", "ms per latent", "p20-p80", "error, step 1", f"step {CHAIN}", "W"), lines)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare with references")
    parser.add_argument("--form", action="append", choices=[*FORMS, *TOY_FORMS], help="only these forms")
    parser.add_argument("--toy", action="store_true", help="tiny forms on the CPU: whether it runs, not how fast")
    parser.add_argument("--no-tensorrt", action="store_true", help="leave TensorRT alone out")
    parser.add_argument("--steps", type=int, default=10_000, help="of the long run; 0 leaves it out")
    parser.add_argument("--out", type=Path, help="JSON file; a table in Markdown is written beside it")
    given = parser.parse_args(arguments)
    bench = TOY if given.toy else Bench()
    if not given.toy:
        require_gpu(parser)
    unknown = [name for name in given.form or () if name not in bench.forms]
    if unknown:
        parser.error(f"--form {unknown[0]}: here there are {', '.join(bench.forms)}")
    torch.backends.cuda.matmul.allow_tf32 = False
    if given.check:
        return 0 if check(bench) else 1
    ceilings = None if given.toy else measure_ceilings(torch.float16)
    rows: list[dict[str, Any]] = []
    fine = True
    for name in given.form or bench.forms:
        measured, right = measure(name, not given.no_tensorrt and not given.toy, bench)
        rows += measured
        fine &= right
        write(document("taehv", ceilings, rows, long_run=None), given.out)  # a time limit costs the later forms alone
        with contextlib.suppress(Exception):
            torch._dynamo.reset()
        torch.cuda.empty_cache()
    run = long_run(given.steps, bench) if given.steps else None
    if run is not None:
        fine &= run["flat"]
        console.print(
            f"{run['steps']} steps: errors {run['errors'][0]:.2e} to {run['errors'][-1]:.2e}, flat: {run['flat']}"
        )
    result = document("taehv", ceilings, rows, long_run=run)
    if given.out is not None:
        write(result, given.out)
    finish(result, given.out)
    return 0 if fine else 1


def write(result: dict[str, Any], out: Path | None) -> None:
    """Writes the result so far and its table in Markdown, and prints the table."""
    text = markdown(result)
    if out is not None:
        harness.write(result, out)
        out.with_suffix(".md").write_text(text, encoding="utf-8")


def markdown(result: dict[str, Any]) -> str:
    """Returns the document as Markdown; its table is printed too."""
    return f"# Streaming TAEHV, fp16, one stream\n\n{harness.origin(result)}\n\n{table(result['rows'])}"


if __name__ == "__main__":
    sys.exit(main())
