"""Measures what `check="canary"` costs at its default N, and shows that it finds a flipped bit: about a minute.

A comparison's cost is the difference between two decode functions of one program, in turns: one begins a comparison in
every call, the other none: the mean over whole turns of `FP32_EVERY`, since one comparison of a turn may go to fp32
and cost twenty times the others. That is divided by the time in which the program decodes N frames. Beside it stands
the ratio of PyTorch's time for one frame to that of the program per frame, from which N was chosen.

Then single bits are flipped in the weights that the program holds in memory, one after the other and back, and the next
frame is compared. Not every bit matters: whether a flip must be found is known from the frames before and after it.

On a CPU a stand-in is measured: the program is the decoder itself, so the ratio is near 1.

Usage: python -m benchmarks.canary [--decoder dist] [--batch 8] [--seconds 20]       exit status 1 for a wrong result
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.decoders import subject
from benchmarks.harness import console
from owl_wms.runtime import VideoDecode, canary
from owl_wms.runtime.programs import Loaded
from owl_wms.runtime.verdict import FP32_EVERY
from owl_wms.utils.owl_vae_bridge import make_batched_decode_fn
from owl_wms.vae import fold_weight_norm

MOST_SHARE = 0.002
DEFAULT_EVERY = canary.EVERY
FLIPS = 48
LEAST_VALUES = 512  # smaller tensors are not weights of convolutions
BITS = {torch.float32: (torch.int32, 30), torch.float16: (torch.int16, 14), torch.bfloat16: (torch.int16, 14)}
"""The integer of a weight's size, and the highest bit of its exponent."""


class Copied:
    """A stand-in for TensorRT: the program is a copy of the decoder."""

    name = "copied"
    background = False

    def obtain(self, decoder: nn.Module, *_: Any) -> Loaded:
        """Returns the copy, with the limits of an fp32 parity check."""
        self.module = copy.deepcopy(decoder)
        row = {"scale": 1, "relative_limit": 1e-4, "absolute_limit": 1e-2}
        report = {"precision": "fp32", "parity": {"scales": [row]}}
        numbers: dict[str, Any] = {"file_bytes": 0, "build_seconds": 0.0, "load_seconds": 0.0}
        return Loaded(program=self.module, built=True, name="copy", not_kept="in memory", report=report, **numbers)


def timed(decode: VideoDecode, latents: Tensor, every: int) -> float:
    """Seconds of one call that begins a comparison after `every` frames, until its result is known."""
    canary.EVERY = every
    chosen = decode._canary
    assert chosen is not None
    chosen._next = chosen._seen + every
    begin = time.perf_counter()
    decode(latents)
    if latents.is_cuda:
        torch.cuda.synchronize()
    decode.stats()  # reads the comparison, and decides about it
    return time.perf_counter() - begin


def main() -> int:
    """Measures, prints a table and returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--decoder", default="dist" if cuda else "small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing")
    options = parser.parse_args()
    made = subject(options.decoder)
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    decoder = fold_weight_norm(made.make()).eval().requires_grad_(False).to(device=device, dtype=dtype)
    toolchain = None if cuda else Copied()
    decode = make_batched_decode_fn(decoder, options.batch, check="canary", output="uint8", toolchain=toolchain)
    decode.prepare(made.latent_shape)
    state = decode.stats()
    console.print(f"{options.decoder}, batch {options.batch}, {device}: {state.backend}, {state.reason}")
    latents = torch.randn(1, options.batch * (32 if cuda else 1), *made.latent_shape, device=device, dtype=dtype)
    frames = latents.shape[1]
    for every in (10**9, 1, 10**9, 1):
        timed(decode, latents, every)
    without: list[float] = []
    compared: list[float] = []
    end = time.perf_counter() + options.seconds
    while time.perf_counter() < end or len(without) % FP32_EVERY:
        without.append(timed(decode, latents, 10**9))
        compared.append(timed(decode, latents, 1))
    eager: list[float] = []
    for _ in range(9):
        begin = time.perf_counter()
        with torch.no_grad():
            decoder(latents[0, :1])
        if cuda:
            torch.cuda.synchronize()
        eager.append(time.perf_counter() - begin)
    per_frame = statistics.median(without) / frames
    each = statistics.mean(b - a for a, b in zip(without, compared, strict=True))
    share = each / (per_frame * DEFAULT_EVERY)
    canary.EVERY = 10**9
    state = decode.stats()
    one = statistics.median(eager)
    wrong = state.backend == "pytorch" or state.canary_misses or state.canaries < len(compared)
    console.print(
        f"program {per_frame * 1e3:.4f} ms per frame; PyTorch {one * 1e3:.3f} ms for one: {one / per_frame:.1f} times"
    )
    console.print(f"500 x that ratio: N = {500 * one / per_frame:.0f}; the default is {DEFAULT_EVERY}")
    console.print(f"a comparison adds {each * 1e3:.3f} ms to a call (mean of {len(compared)} pairs)")
    console.print(
        f"cost at N = {DEFAULT_EVERY}: {share:.4%}, at most {MOST_SHARE:.1%}: {'yes' if share <= MOST_SHARE else 'NO'}"
    )
    console.print(f"{state.canaries} comparisons of a sound program, {state.canary_misses} misses (must be 0)")
    good = not wrong and share <= MOST_SHARE
    good &= flips(decode, latents[:, : options.batch])
    console.print("right" if good else "NOT RIGHT")
    return int(not good)


def held(program: Any) -> list[Tensor]:
    """Returns the tensors of real numbers that a program holds in memory, at whose weights it computes."""
    while not isinstance(program, nn.Module):
        program = getattr(program, "program", None) or program._module
    tensors = [*program.parameters(), *program.buffers()]
    tensors += [value for value in vars(program).values() if isinstance(value, Tensor)]  # of a call list
    return [tensor for tensor in tensors if tensor.dtype in BITS and tensor.numel() >= LEAST_VALUES]


def flips(decode: VideoDecode, latents: Tensor) -> bool:
    """Flips bits of the program's weights, prints what was found, and returns whether all was that had to be.

    A flip must be found if it moves the compared frame by twice what the parity check allows, or makes it not finite.
    A flip that moves nothing must not be reported.
    """
    generation = decode._generation
    assert generation is not None
    slot = generation.slots()[0]
    loaded = slot.loaded
    if loaded is None:
        console.print(f"no program: {slot.reason}")
        return False
    limit = next(row["relative_limit"] for row in loaded.report["parity"]["scales"] if row["scale"] == 1)
    weights, chosen = held(loaded.program), random.Random(0)

    def frames() -> Tensor:
        with torch.no_grad():
            made: Tensor = loaded.program(latents[0])
        return made.float().clamp(-1, 1)

    def noticed() -> int:
        state = decode.stats()
        return state.canary_misses + sum(state.failures.values())

    sound = frames()
    size = rms(sound)
    counts: Counter[str] = Counter()
    largest = 0.0
    for trial in range(FLIPS):
        weight = weights[trial % len(weights)]
        whole, top = BITS[weight.dtype]
        place = weight.storage_offset() + chosen.randrange(weight.numel())
        bits = weight.detach().as_strided((1,), (1,), place).view(whole)
        bit = 1 << (top if trial < FLIPS // 2 else chosen.randrange(top + 1))
        bits ^= bit
        moved = rms(frames() - sound)
        before = noticed()
        timed(decode, latents, 1)
        found = noticed() > before
        bits ^= bit
        slot.accept(loaded)
        slot.failure, slot.failures = None, 0
        # Frames are bytes: one step of rounding for either frame.
        must = bool((~(moved <= 2 * (limit * size + 2 / 255))).all())
        kind = "moved much" if must else "moved nothing" if not moved.any() else "moved little"
        counts[f"{kind}, {'found' if found else 'not found'}"] += 1
        if not found:
            largest = max(largest, float((moved / size).nan_to_num(torch.inf).max()))
    told = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    console.print(f"{FLIPS} bits flipped in {len(weights)} tensors of the program, on {weights[0].device}: {told}")
    console.print(f"largest relative change that was not found {largest:.2e}; parity allows {limit:.2e}")
    same = torch.equal(frames(), sound)
    console.print(f"with every bit as it was, the frames are those of before: {'yes' if same else 'NO'}")
    bad = counts["moved much, not found"] + counts["moved nothing, found"]
    return same and not bad and counts["moved much, found"] > 0


def rms(frames: Tensor) -> Tensor:
    """Root mean square of each frame."""
    return frames.square().mean((1, 2, 3)).sqrt()


if __name__ == "__main__":
    raise SystemExit(main())
