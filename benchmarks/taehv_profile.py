"""Says where the time of one step goes: its kernels by time and in order, and how its convolutions were chosen.

Usage:
    with noted_times() as times:
        fused = fuse(decoder, torch.float16, shape)
    text = profile_text(run, latents) + choices_text(fused, times)
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from owl_wms.fused import convolution

STEPS, TOP = 10, 12
Times = list[tuple[tuple[int, ...], dict[str, float]]]


@contextlib.contextmanager
def noted_times() -> Iterator[Times]:
    """Collects what every way of every convolution took while `fuse` chose among them: input shape, way -> ms."""
    times: Times = []
    original = convolution.interleaved

    def note(ways: Any, x: Tensor, **options: Any) -> dict[str, float]:
        found = original(ways, x, **options)
        times.append((tuple(x.shape), found))
        return found

    convolution.interleaved = note  # type: ignore[assignment]
    try:
        yield times
    finally:
        convolution.interleaved = original


def choices_text(fused: nn.Module, times: Times) -> str:
    """Returns the ways chosen and the times that they were chosen by, as text."""
    chosen = sorted(
        {
            f"{type(m).__name__} {list(m.weight.shape)}: {m.how}"
            for m in fused.modules()
            if isinstance(m, convolution.Chosen)
        }
    )
    lines = ["ways chosen (weights: how)", *chosen, "", "microseconds of every way, in the order of the first use"]
    lines += [
        f"{list(shape)}: {', '.join(f'{how}: {ms * 1e3:.1f}' for how, ms in ways.items())}" for shape, ways in times
    ]
    return "\n".join(lines) + "\n"


def profile_text(run: Callable[[Tensor], Any], latents: Tensor) -> str:
    """Returns the kernels of `run` by time and in the order of one call, as text; on a CPU that there are none."""
    if not latents.is_cuda:
        return "no kernels: not on a GPU\n"
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    for latent in latents[:3]:
        run(latent)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for latent in latents[:STEPS]:
            run(latent)
        torch.cuda.synchronize()
    found = [event for event in seen.events() or [] if event.device_type == DeviceType.CUDA]
    kernels = sorted((e.time_range.start, e.time_range.end, e.name) for e in found)
    if not kernels:
        return "the profiler saw no kernels\n"
    total: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    for begin, end, name in kernels:
        total[name] += end - begin
        count[name] += 1
    busy, each = sum(total.values()) / STEPS, len(kernels) // STEPS
    span = (kernels[-1][1] - kernels[0][0]) / STEPS
    lines = [
        f"{STEPS} steps: {each} kernels and copies per step, {busy:.1f} us of work in {span:.1f} us per step",
        "",
        "us per step, times per step, name",
    ]
    for name in sorted(total, key=lambda name: -total[name])[:TOP]:
        lines.append(f"{total[name] / STEPS:9.1f} {count[name] / STEPS:6.1f}  {name[:120]}")
    lines += ["", "one step in order: us, us since the end of the one before, name"]
    middle = kernels[STEPS // 2 * each : (STEPS // 2 + 2) * each]  # two steps: graphs take turns
    for index, (begin, end, name) in enumerate(middle):
        gap = begin - middle[index - 1][1] if index else 0.0
        lines.append(f"{end - begin:9.1f} {gap:8.1f}  {name[:90]}")
    return "\n".join(lines) + "\n"
