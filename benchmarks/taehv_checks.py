"""Checks of streaming TAEHV that `benchmarks.taehv` makes on a GPU: every op, whole steps, and a long stream."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import console
from benchmarks.ops_taehv import cases
from benchmarks.taehv_forms import MOST_ERROR, Bench, Example, errors, make
from benchmarks.taehv_steps import graphed
from owl_wms import cudnn
from owl_wms.fused.taehv import fuse
from owl_wms.state import State, zeros

MOST_GROWTH = 16 << 20  # bytes of a process whose allocator keeps what is free


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
        exact = graphed(decoder.step, z[0], start)
    ours = graphed(fused.step, z[0].to(bench.half), half_start)
    state: State = start
    own: State = half_start
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
    for name, (_, height, width, _) in bench.forms.items():
        example = Example(name, bench, (2, min(height, 11), min(width, 19)), steps=4)
        fused = fuse(example.decoder, bench.half, example.shape)
        ours = example.errors(fused.step)
        graph = example.errors(graphed(fused.step, example.latents[0], example.start))
        eager = example.errors(example.decoder.to(bench.half).step)
        right = max(ours) <= MOST_ERROR * max(eager) and max(graph) <= MOST_ERROR * max(eager)
        fine &= right
        word = "right" if right else "WRONG"
        console.print(
            f"{name}: {word}, error {max(ours):.2e}, as a graph {max(graph):.2e}, eager fp16 {max(eager):.2e}"
        )
    return fine
