"""The parity check: a program is used only if it is about as near to the fp32 decoder as eager PyTorch is at the same
precision.

Why it exists: a compiler that picks another algorithm may be right to, but a tolerance such as 1e-1 hides broken
programs. Eager PyTorch at the same precision is the measure: whoever chose fp16 or bf16 has accepted its error.

The rule, for seeded latents of several scales (the same rounded latents for all three):
    r = fp32 decoder without TF32 and cuDNN, e = eager at the precision, y = the program
    finite      every element of y is finite wherever r is
    relative    |y - r| / |r| (L2) <= 2 * min(|e - r| / |r|, 8 eps of the dtype)
    absolute    max |y - r| over elements with |r| <= 1 is <= max(1e-2, 2 * the same of e)
The absolute bound is 1e-2 if the dtype can express that. If eager itself is further off, the bound is twice eager's
error. If eager overflows, there is no absolute bound.

The error of e is bounded too, because eager runs on cuDNN, which was seen to be wrong (docs/log.md). Eager is measured
a second time with the reference's arithmetic. If its first error is more than twice the second, the second counts. No
relative error of e counts for more than 8 eps.

fp32 has the same rule with constants in e's place: relative 2 * 5e-5, absolute 1e-2. That lets another order of
summation pass (about 1e-6 per layer) and stops TF32 (2e-4 to 1e-3), which eager's own convolutions use by default:
whoever asks for fp32 by name does not ask for that, so eager's error is reported and widens nothing.

fp8 and int8 are used only by a user who asks for them by name, and have a rule of their own:
    finite      as above
    psnr        20 log10(2 / rms(y - r)), both clamped to [-1, 1], >= PSNR_GATE_DB[precision] at scale 1, the one that
                they are calibrated for (40 dB: an rms error of a hundredth of the range)
The other numbers are reported all the same.

Usage:
    reference = Reference.measure(folded_fp32, eager, request.input_shape, dtype, "cuda:0")
    result = reference.check(program)        # result["passed"], result["reason"], numbers per scale
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from owl_wms import cudnn

SCALES = (0.1, 1.0, 3.0)
RELATIVE_FACTOR = 2.0
ABSOLUTE_LIMIT = 1e-2
FP32_ERROR = 5e-5
# Independent roundings in a row add up to about 0.29 eps times the root of their number: 8 eps are 760 layers. Every
# decoder measured has 0.3 to 2.1 eps, at all scales and in both half precisions (benchmarks/results), and the fault of
# cuDNN gave 15. So this refuses no honest program, and it is what remains where eager overflows and has no error.
MOST_EPS = 8.0
PSNR_GATE_DB = {"fp8": 40.0, "int8": 40.0}

Decode = Callable[[Tensor], Tensor | tuple[Tensor, ...]]
"""Latents to frames, or to several tensors that are each compared (`check.chain`)."""
_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def reference_arithmetic() -> Iterator[None]:
    """Products in full float32 (TF32 off) and convolutions as PyTorch's own products, without cuDNN, inside the block.

    Why without: cuDNN 9.19 gave 63 of 2048 channels of one fp32 convolution of AutoencoderDC wrong on an H100, in a
    process's first decodes at batch 8 and not always later (docs/log.md). What programs are compared with must not
    depend on that.
    """
    matmul = torch.backends.cuda.matmul
    # Setting the old flag sets the new one too, which `torch.compile` has in the keys of its cache: if it stayed at
    # "ieee", a model that has not changed would be compiled anew.
    precision, medium = matmul.fp32_precision, _is_medium()
    try:
        allowed = matmul.allow_tf32
    except RuntimeError:  # the process has set the new one alone, and torch then refuses to read the old one
        allowed = None
    if allowed is None:
        matmul.fp32_precision = "ieee"
    else:
        matmul.allow_tf32 = False
    try:
        with cudnn.flags(enabled=False, allow_tf32=False):
            yield
    finally:
        if allowed is not None:
            matmul.allow_tf32 = allowed
        if medium:  # which is more than the old flag can say: torch would refuse to read its precision from here on
            torch.set_float32_matmul_precision("medium")
        matmul.fp32_precision = precision


def _is_medium() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "medium"
    except RuntimeError:  # as above
        return False


def latents(
    shape: tuple[int, ...], scale: float, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> Tensor:
    """Seeded normal latents `shape` times `scale`, drawn on the CPU in float32 so that every machine gets the same
    ones.
    """
    # The process's own defaults (torch.set_default_dtype, set_default_device) would draw other ones.
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return (drawn * scale).to(dtype).to(device)


def example(
    shape: tuple[int, ...],
    state: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """Seeded normal latents and, for a step, a state of such values; each tensor has a seed of its own."""
    return tuple(latents(size, 1.0, dtype, device, seed + i) for i, size in enumerate((shape, *state)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """Distance from the fp32 output: relative L2, largest absolute difference where |fp32| <= 1, all finite, and PSNR
    of what a viewer sees, clamped to [-1, 1] (infinite for equal frames).
    """

    relative: float
    absolute: float
    finite: bool
    psnr_db: float


def errors(output: Tensor, reference: Tensor) -> Errors:
    """`output` against `reference` of the same shape; both any float dtype, compared in float32."""
    y, r = output.float(), reference.float()
    known = torch.isfinite(r)
    finite = bool(torch.isfinite(y[known]).all())
    difference = torch.where(known, y - r, torch.zeros_like(r))
    norm = torch.linalg.vector_norm(torch.where(known, r, torch.zeros_like(r))).item()
    relative = torch.linalg.vector_norm(difference).item() / max(norm, torch.finfo(torch.float32).tiny)
    inside = difference[known & (r.abs() <= 1)]
    absolute = inside.abs().max().item() if inside.numel() else 0.0
    seen = torch.where(known, y.clamp(-1, 1) - r.clamp(-1, 1), torch.zeros_like(r)).square().mean().item()
    psnr = 10 * math.log10(4 / seen) if 0 < seen < math.inf else math.inf if seen == 0 else -math.inf
    return Errors(relative=relative, absolute=absolute, finite=finite, psnr_db=psnr)


def _outputs(decode: Decode, inputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """Every tensor that `decode` returns for every input, in order; one input's at a time are in memory."""
    for z in inputs:
        output = decode(z)
        yield from (output,) if isinstance(output, Tensor) else output


def _compared(decode: Decode, inputs: list[Tensor], wanted: list[Tensor]) -> list[Errors]:
    return [errors(output, r) for output, r in zip(_outputs(decode, inputs), wanted, strict=True)]


def _second_run(eager: Decode, inputs: list[Tensor], wanted: list[Tensor]) -> list[Errors]:
    """Returns eager's errors in the reference's arithmetic, for use inside `reference_arithmetic`; empty if it cannot
    run so: PyTorch's operators without cuDNN need not take every dtype.
    """
    try:
        return _compared(eager, inputs, wanted)
    except Exception as error:
        _LOG.info("eager's error is measured once: %s: %s", type(error).__name__, error)
        return []


def _believed(usual: Errors, again: Errors) -> Errors:
    """Chooses between eager's error with cuDNN (`usual`) and without (`again`). Normally the first is used. If it is
    more than twice the second, cuDNN is at fault and the second is used. If either run overflowed, the first is used.
    """
    usual_counts = not usual.finite or not again.finite or usual.relative <= RELATIVE_FACTOR * again.relative
    return usual if usual_counts else again


@dataclass(kw_only=True, slots=True)
class Reference:
    """fp32 answers and eager's errors at one precision, measured once and compared with every program.

    Attributes:
        inputs: one latent batch per scale, in the precision's dtype.
        wanted: the fp32 decoder's outputs (float32, same device), as many for each input as a decode returns.
        eager: eager's errors against them, as far as they are believed.
        scales: of the latents, in the order of the lists.
        psnr_gate_db: for the 8-bit rule; None for the other one.
    """

    inputs: list[Tensor]
    wanted: list[Tensor]
    eager: list[Errors]
    scales: tuple[float, ...] = SCALES
    dtype: torch.dtype = field(default=torch.float32)
    psnr_gate_db: float | None = None

    @classmethod
    @torch.no_grad()
    def measure(
        cls,
        fp32: Decode,
        eager: Decode,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str,
        seed: int = 0,
        scales: tuple[float, ...] = SCALES,
        psnr_gate_db: float | None = None,
    ) -> Reference:
        """Run both decoders on seeded latents of every scale, eager twice unless `dtype` is float32."""
        inputs = [latents(shape, scale, dtype, device, seed + i) for i, scale in enumerate(scales)]
        return cls.of(fp32, eager, inputs, dtype, scales, psnr_gate_db)

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        fp32: Decode,
        eager: Decode,
        inputs: list[Tensor],
        dtype: torch.dtype,
        scales: tuple[float, ...] = (1.0,),
        psnr_gate_db: float | None = None,
    ) -> Reference:
        """Run both decoders on these latents, one of `scales` for each tensor."""
        with reference_arithmetic():
            wanted = list(_outputs(fp32, (z.float() for z in inputs)))
            # Not in fp32, where this is the reference itself and its zero would hide what eager's TF32 costs.
            again = [] if dtype == torch.float32 else _second_run(eager, inputs, wanted)
        usual = _compared(eager, inputs, wanted)
        return cls(
            inputs=inputs,
            wanted=wanted,
            eager=[_believed(*pair) for pair in zip(usual, again, strict=True)] if again else usual,
            scales=scales,
            dtype=dtype,
            psnr_gate_db=psnr_gate_db,
        )

    def eager_is_finite(self) -> bool:
        """Returns whether eager at this precision stays finite; where it does not, the precision cannot be used."""
        return all(e.finite for e in self.eager)

    @torch.no_grad()
    def check(self, program: Decode) -> dict[str, Any]:
        """Compares `program` with the fp32 decoder by the rule above.

        Returns:
            `passed`, `reason` (empty when passed), `relative_error` and `absolute_error` (worst scale), and `scales`,
            one dict each. JSON-ready: a number that is not finite is None, and so is the worst of several with one.
        """
        each = len(self.wanted) // len(self.inputs)
        scales = [scale for scale in self.scales for _ in range(each)]
        compared = _compared(program, self.inputs, self.wanted)
        rows = [self._row(*row) for row in zip(scales, compared, self.eager, strict=True)]
        bad = [row["reason"] for row in rows if row["reason"]]
        return {
            "passed": not bad,
            "reason": bad[0] if bad else "",
            "relative_error": _worst(row["relative_error"] for row in rows),
            "absolute_error": _worst(row["absolute_error"] for row in rows),
            "psnr_db": next((row["psnr_db"] for row in rows if row["scale"] == 1), None),
            "scales": rows,
        }

    def limits(self, eager: Errors) -> tuple[float, float]:
        """The largest relative and absolute error that passes."""
        if self.dtype == torch.float32:
            return RELATIVE_FACTOR * FP32_ERROR, ABSOLUTE_LIMIT
        most = MOST_EPS * torch.finfo(self.dtype).eps
        if not eager.finite:
            return RELATIVE_FACTOR * most, math.inf
        return RELATIVE_FACTOR * min(eager.relative, most), max(ABSOLUTE_LIMIT, RELATIVE_FACTOR * eager.absolute)

    def _row(self, scale: float, got: Errors, eager: Errors) -> dict[str, Any]:
        relative_limit, absolute_limit = self.limits(eager)
        reason = ""
        if not got.finite:
            reason = f"non-finite output for latents of scale {scale:g}"
        elif self.psnr_gate_db is not None:
            if scale == 1 and not got.psnr_db >= self.psnr_gate_db:
                reason = f"PSNR {got.psnr_db:.1f} dB against fp32 is under {self.psnr_gate_db:g} dB"
        elif not got.relative <= relative_limit:
            reason = f"relative error {got.relative:.2e} exceeds {relative_limit:.2e}"
            reason += f" at scale {scale:g} (eager {eager.relative:.2e})"
        elif not got.absolute <= absolute_limit:
            reason = f"absolute error {got.absolute:.2e} exceeds {absolute_limit:.2e}"
            reason += f" at scale {scale:g} (eager {eager.absolute:.2e})"
        numbers = {
            "relative_error": got.relative,
            "relative_limit": relative_limit,
            "absolute_error": got.absolute,
            "absolute_limit": absolute_limit,
            "psnr_db": got.psnr_db,
            "eager_relative_error": eager.relative,
            "eager_absolute_error": eager.absolute,
        }
        # The rows go into the manifest, whose JSON has no word for infinity and NaN.
        told = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
        return {"scale": scale, **told, "reason": reason}


def _worst(numbers: Iterable[float | None]) -> float | None:
    """The largest; None where one of them is None, which stands for a number that is not finite."""
    known = list(numbers)
    return None if None in known else max(number for number in known if number is not None)
