"""Says whether a program's frame is wrong, held against PyTorch's frame of the same latents.

The rule has two steps. A frame whose distance from PyTorch's is within the limits of the program's parity check is
right. For any other frame the parity check itself decides, on these latents: fp32 decodes them too, and PyTorch's own
error sets the limits. So latents that are harder than the build's do not look like a fault.

Where PyTorch decodes in a coarser type than the program (bf16 beside fp16), no frame would pass the first step, since
PyTorch's own distance from fp32 is beyond the program's limits, and fp32 costs twenty times what the rest does. So what
fp32 found of PyTorch's own error is kept, and the first step allows that much more: by the triangle inequality a sound
program is within the sum. A wrong program passes only if it is wrong by less than its limit and twice that error. At
every `FP32_EVERY`-th comparison fp32 decides again, by the limits of the parity check alone.

Usage:
    rms, largest, size = distance(values(frame, "bf16"), values(truth, "bf16")).tolist()
    right = within([rms, largest, size], report, "bf16")
    problem, own = judge(eager, report, latents, frame, "bf16", truth)      # where it is not
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from owl_wms.interrupts import raise_interrupt
from owl_wms.runtime.eager import EagerDecoder, release_memory
from owl_wms.trt.check.parity import PSNR_GATE_DB, Reference, errors
from owl_wms.trt.spec import DTYPES

FP32_EVERY = 32
"""Comparisons for one that fp32 decides, where the limits of the parity check are too narrow for PyTorch itself."""
EIGHT_BIT_MARGIN_DB = 6.0
"""fp8 and int8 are calibrated for latents of scale 1. A caller's may be others: twice the rms error is allowed."""


@dataclass(kw_only=True, slots=True)
class OwnError:
    """PyTorch's own distance from fp32, on the latents that fp32 last decoded; `left` comparisons may rest on it."""

    relative: float = 0.0
    absolute: float = 0.0
    left: int = 0


def within(measured: list[float], report: Mapping[str, Any], kind: str, own: OwnError | None = None) -> bool:
    """Returns whether a frame is so near to PyTorch's that it is right.

    Args:
        measured: as `distance` gives it.
        report: of the program's build. Without a parity check of latents of scale 1 in it, no frame is near enough.
        kind: `bf16` or `uint8`.
        own: PyTorch's error, if it is known; allowed beside the limits. Not in 8 bits, whose limit is far wider.
    """
    rms, largest, size = measured
    own = own or OwnError()
    row: Mapping[str, Any] = next((row for row in report.get("parity", {}).get("scales", ()) if row["scale"] == 1), {})
    precision = report.get("precision")
    if precision in PSNR_GATE_DB:
        return rms <= 2 * 10 ** (-PSNR_GATE_DB[precision] / 20)  # PSNR is against a range of 2
    relative, absolute = row.get("relative_limit"), row.get("absolute_limit")
    if relative is None or absolute is None:  # a limit that was not finite, too
        return False
    # Both frames were rounded when they were stored.
    of_size, fixed = _half_step(kind, None)
    most_rms = (relative + own.relative + 2 * of_size) * size + 2 * fixed
    return bool(rms <= most_rms and largest <= absolute + own.absolute + 2 * (of_size + fixed))


@torch.no_grad()
def judge(
    eager: EagerDecoder, report: Mapping[str, Any], latents: Tensor, frame: Tensor, kind: str, truth: Tensor
) -> tuple[str, OwnError]:
    """Holds a program's frame to the parity check's rule, on the latents that it was decoded from.

    Args:
        eager: PyTorch's decoder.
        report: of the program's build.
        latents: `[1, c, h, w]` on the decoder's device.
        frame: as the decode function returns it: `[C, H, W]` bf16, or `[H, W, C]` uint8.
        truth: PyTorch's, in the same form.
        kind: `bf16` or `uint8`.

    Returns:
        How the frame is wrong, empty for a right one; and PyTorch's own error. If fp32 cannot decode the latents (for
        want of memory), the frame counts as wrong: it is not near PyTorch's, and nothing shows that it is right.
    """
    precision = str(report.get("precision"))
    dtype = DTYPES.get(precision, eager.dtype or torch.float32)
    try:
        exact, rounded = _in(eager, torch.float32, kind), _in(eager, dtype, kind)
        reference = Reference.of(exact, rounded, [latents.to(dtype)], dtype)
    except Exception as error:  # whatever a decoder raises in another dtype
        raise_interrupt(error)
        release_memory(latents.device)
        text = f"it is not near PyTorch's, and fp32 cannot decode it: {type(error).__name__}: {str(error)[:200]}"
        return text, OwnError()
    usual = errors(values(truth, kind)[None], reference.wanted[0])
    left = FP32_EVERY - 1 if usual.finite else 0  # of a limit that is infinite everything is within
    own = OwnError(relative=usual.relative, absolute=usual.absolute, left=left)
    return _problem(reference, frame, kind, precision, dtype), own


def _problem(reference: Reference, frame: Tensor, kind: str, precision: str, dtype: torch.dtype) -> str:
    """Returns how a frame breaks the parity check's rule; empty where it keeps it."""
    wanted = reference.wanted[0]
    got = errors(values(frame, kind)[None], wanted)
    if not got.finite:
        return "it has values that are not finite"
    if precision in PSNR_GATE_DB:
        least = PSNR_GATE_DB[precision] - EIGHT_BIT_MARGIN_DB
        return "" if got.psnr_db >= least else f"PSNR {got.psnr_db:.1f} dB against fp32, at least {least:g} dB"
    relative, absolute = reference.limits(reference.eager[0])
    of_size, fixed = _half_step(kind, dtype)
    size = torch.where(wanted.isfinite(), wanted, 0).square().mean().sqrt().item()
    relative += of_size + fixed / max(size, torch.finfo(torch.float32).tiny)
    absolute += of_size + fixed
    if not got.relative <= relative:
        return f"relative error {got.relative:.2e} against fp32, at most {relative:.2e}"
    if not got.absolute <= absolute:
        return f"absolute error {got.absolute:.2e} against fp32, at most {absolute:.2e}"
    return ""


def _in(eager: EagerDecoder, dtype: torch.dtype, kind: str) -> Callable[[Tensor], Tensor]:
    """Returns the decoder in `dtype`, whose weights are copied if they have another; its values as `kind` can hold."""
    module = eager.module if eager.dtype in (dtype, None) else copy.deepcopy(eager.module).to(dtype)

    def decode(z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            frames: Tensor = module(z.to(dtype))
        return frames.clamp(-1, 1) if kind == "uint8" else frames

    return decode


def distance(frame: Tensor, truth: Tensor) -> Tensor:
    """Returns, on the device, float32: rms difference, largest one where |truth| <= 1, and rms of the truth.

    Values that are not finite make the first two NaN or infinite, which no limit allows.
    """
    difference = frame - truth
    inside = torch.where(truth.abs() <= 1, difference.abs(), 0).max()
    return torch.stack((difference.square().mean().sqrt(), inside, truth.square().mean().sqrt()))


def values(frame: Tensor, kind: str) -> Tensor:
    """`[C, H, W]` in float32 from a frame as the decode function returns it."""
    return frame.float() if kind == "bf16" else frame.movedim(-1, 0).float() / 127.5 - 1


def _half_step(kind: str, dtype: torch.dtype | None) -> tuple[float, float]:
    """The rounding of stored values: the most as a share of a value, and the most of all. `dtype`: the program's."""
    if kind == "uint8":
        return 0.0, 1 / 255
    return (0.0 if dtype == torch.bfloat16 else torch.finfo(torch.bfloat16).eps / 2), 0.0
