"""Measures what `check="canary"` costs at its default N, and shows that it finds a flipped bit: about two minutes.

The cost is found in two ways, and both must keep the bound:

- Directly: calls that begin a comparison and calls that do not, in turns and in drawn order. One comparison of
  `FP32_EVERY` is decided by fp32 and costs twenty times the others, so both kinds are timed apart and weighed. That is
  divided by the time in which the program decodes N frames.
- By the clock: runs of N frames without a comparison, with one (what a user has), and with `FP32_EVERY` of them, of
  which exactly one goes to fp32; in turns, in drawn order. The last kind takes longer by `FP32_EVERY` times the cost at
  N, and so it stands out from the noise, which the spread over the turns shows.

Then single bits are flipped in the weights that the program holds in memory, one after the other and back, and the next
frame is compared. Not every bit matters: whether a flip must be found is known from the frames before and after it.

On a CPU a stand-in is measured: the program is the decoder itself, so a comparison costs as much as a frame.

Usage: python -m benchmarks.canary [--decoder dist] [--seconds 90] [--out DIR]       exit status 1 for a wrong result
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from collections import Counter
from pathlib import Path
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
NEVER = 10**9
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


def timed(decode: VideoDecode, latents: Tensor, compares: bool) -> float:
    """Seconds of one call, until the result of its comparison is known, if it is to begin one."""
    chosen = decode._canary
    assert chosen is not None
    canary.EVERY = 1 if compares else NEVER
    chosen._next = chosen._seen + canary.EVERY
    begin = time.perf_counter()
    decode(latents)
    finish(latents)
    decode.stats()  # reads the comparison, and decides about it
    return time.perf_counter() - begin


def finish(tensor: Tensor) -> None:
    """Waits for the GPU."""
    if tensor.is_cuda:
        torch.cuda.synchronize()


class Cost:
    """Times comparisons of one decode function.

    Args:
        decode: compares by canary.
        latents: of one call, `[1, n, c, h, w]`.
    """

    def __init__(self, decode: VideoDecode, latents: Tensor) -> None:
        self.decode, self.latents, self.random = decode, latents, random.Random(0)
        self.frames = latents.shape[1]
        self.calls = max(FP32_EVERY, DEFAULT_EVERY // self.frames) if latents.is_cuda else FP32_EVERY
        self.by_fp32 = 0
        self.found: dict[str, Any] = {"default N": DEFAULT_EVERY, "bound": MOST_SHARE, "turns": []}
        decides = vars(canary)["judge"]

        def counted(*arguments: Any) -> Any:
            self.by_fp32 += 1
            return decides(*arguments)

        vars(canary)["judge"] = counted

    def directly(self, turns: int) -> float:
        """Returns the share of the time that comparisons take at the default N, from single calls."""
        for compares in (False, True, False, True):
            timed(self.decode, self.latents, compares)
        without: list[float] = []
        extra: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(turns * FP32_EVERY):
            seconds, before = {}, self.by_fp32
            for compares in self.random.sample((False, True), 2):
                seconds[compares] = timed(self.decode, self.latents, compares)
            without.append(seconds[False])
            extra[self.by_fp32 > before].append(seconds[True] - seconds[False])
        per_frame = statistics.median(without) / self.frames
        mean = statistics.mean([*extra[True], *extra[False]])
        share = mean / (per_frame * DEFAULT_EVERY)
        console.print(f"program {per_frame * 1e3:.4f} ms per frame, {self.frames} frames per call")
        for by_fp32, name in ((False, "decided by PyTorch's frame"), (True, "decided by fp32")):
            if extra[by_fp32]:
                low, *_, high = statistics.quantiles(extra[by_fp32] * 2, n=10)
                told = f"a comparison {name} adds {statistics.median(extra[by_fp32]) * 1e3:.3f} ms to a call"
                console.print(f"{told} (10 to 90 %: {low * 1e3:.3f} to {high * 1e3:.3f}; {len(extra[by_fp32])} pairs)")
        console.print(f"a comparison costs {mean * 1e3:.3f} ms in the mean of {turns} times {FP32_EVERY} pairs")
        console.print(f"cost at N = {DEFAULT_EVERY}, directly: {share:.4%}, at most {MOST_SHARE:.1%}: {said(share)}")
        milliseconds = {name: [round(1e3 * one, 4) for one in extra[name == "fp32"]] for name in ("pytorch", "fp32")}
        self.found |= {"ms per frame": per_frame * 1e3, "ms of a comparison": milliseconds, "share directly": share}
        return share

    def by_clock(self, seconds: float) -> float:
        """Returns the same from runs of N frames; at least two turns are taken."""
        kinds = {"none": NEVER, "one": self.calls * self.frames, "many": self.calls * self.frames // FP32_EVERY}
        ratios: dict[str, list[float]] = {"one": [], "many": []}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(ratios["many"]) < 2:
            turn: dict[str, Any] = {}
            for kind in self.random.sample(sorted(kinds), len(kinds)):
                turn[kind], turn[f"{kind}, compared"], turn[f"{kind}, by fp32"] = self.run(kinds[kind])
            self.found["turns"].append(turn)
            for kind, all_ratios in ratios.items():
                all_ratios.append(turn[kind] / turn["none"] - 1)
            console.print("turn: " + ", ".join(f"{name} {value:.4g}" for name, value in sorted(turn.items())))
        spread = {kind: statistics.stdev(values) / len(values) ** 0.5 for kind, values in ratios.items()}
        one, many = statistics.mean(ratios["one"]), statistics.mean(ratios["many"])
        at_default = self.calls * self.frames / DEFAULT_EVERY / FP32_EVERY  # a CPU's runs are shorter than N frames
        share, error = many * at_default, spread["many"] * at_default
        runs = f"{len(ratios['many'])} turns of {self.calls * self.frames} frames"
        console.print(f"by the clock, {runs}: one comparison {one:+.4%} (standard error {spread['one']:.4%})")
        console.print(f"  {FP32_EVERY} comparisons {many:+.4%} (standard error {spread['many']:.4%})")
        told = f"cost at N = {DEFAULT_EVERY}, by the clock: {share:.4%} (standard error {error:.4%})"
        console.print(f"{told}, at most {MOST_SHARE:.1%}: {said(share)}")
        self.found |= {"share by the clock": share, "standard error": error, "one": one, "of one": spread["one"]}
        return share

    def run(self, every: int) -> tuple[float, int, int]:
        """Seconds of a run of calls that compares one frame of so many; how many it compared, and how many by fp32."""
        chosen = self.decode._canary
        assert chosen is not None
        timed(self.decode, self.latents, compares=False)  # the run before leaves nothing to read
        canary.EVERY = every
        chosen._next = chosen._seen + every
        before, by_fp32 = self.decode.stats().canaries, self.by_fp32
        begin = time.perf_counter()
        for _ in range(self.calls):
            self.decode(self.latents)
            finish(self.latents)
        compared = self.decode.stats().canaries - before
        return time.perf_counter() - begin, compared, self.by_fp32 - by_fp32


def said(share: float) -> str:
    """Returns whether a share keeps the bound."""
    return "yes" if share <= MOST_SHARE else "NO"


def main() -> int:
    """Measures, prints what it found and returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--decoder", default="dist" if cuda else "small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=2, help=f"of {FP32_EVERY} pairs of calls")
    parser.add_argument("--seconds", type=float, default=90.0, help="of runs of N frames")
    parser.add_argument("--out", default="", help="folder for canary.json")
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
    cost = Cost(decode, latents)
    good = cost.directly(options.turns) <= MOST_SHARE
    write(options.out, cost.found)
    good &= cost.by_clock(options.seconds) <= MOST_SHARE
    state = decode.stats()
    cost.found |= {"canaries": state.canaries, "misses": state.canary_misses, "by fp32": cost.by_fp32}
    write(options.out, cost.found)
    told = f"{state.canaries} comparisons of a sound program, {cost.by_fp32} by fp32"
    console.print(f"{told}, {state.canary_misses} misses (must be 0)")
    good &= state.backend != "pytorch" and not state.canary_misses and state.canaries > FP32_EVERY
    canary.EVERY = NEVER
    good &= flips(decode, latents[:, : options.batch])
    console.print("right" if good else "NOT RIGHT")
    return int(not good)


def write(folder: str, found: dict[str, Any]) -> None:
    """Writes what is known so far."""
    if folder:
        Path(folder, "canary.json").write_text(json.dumps(found), encoding="utf-8")


def held(program: Any) -> list[Tensor]:
    """Returns the tensors of real numbers that a program holds in memory, at whose weights it computes."""
    while not isinstance(program, nn.Module):
        program = getattr(program, "program", None) or program._module
    tensors = [*program.parameters(), *program.buffers()]
    tensors += [value for value in vars(program).values() if isinstance(value, Tensor)]  # of a call list
    return [tensor for tensor in tensors if tensor.dtype in BITS and tensor.numel() >= LEAST_VALUES]


def flips(decode: VideoDecode, latents: Tensor) -> bool:
    """Flips bits of the program's weights, prints what was found, and returns whether all was that had to be.

    A flip must be found if it moves the compared frame by twice what the parity check allows, or makes it not finite:
    at once, or by the comparison that fp32 decides, which the benchmark asks for where the first one finds nothing.
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
        timed(decode, latents, compares=True)
        found, when = noticed() > before, "found"
        if not found:  # at the latest when fp32 decides again
            for own in vars(decode._canary)["_own"].values():
                own.left = 0
            timed(decode, latents, compares=True)
            found, when = noticed() > before, "found by fp32"
        bits ^= bit
        slot.accept(loaded)
        slot.failure, slot.failures = None, 0
        # Frames are bytes: one step of rounding for either frame.
        must = bool((~(moved <= 2 * (limit * size + 2 / 255))).all())
        kind = "moved much" if must else "moved nothing" if not moved.any() else "moved little"
        counts[f"{kind}, {when if found else 'not found'}"] += 1
        if not found:
            largest = max(largest, float((moved / size).nan_to_num(torch.inf).max()))
    told = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    console.print(f"{FLIPS} bits flipped in {len(weights)} tensors of the program, on {weights[0].device}: {told}")
    console.print(f"largest relative change that was not found {largest:.2e}; parity allows {limit:.2e}")
    same = torch.equal(frames(), sound)
    console.print(f"with every bit as it was, the frames are those of before: {'yes' if same else 'NO'}")
    bad = counts["moved much, not found"] + counts["moved nothing, found"] + counts["moved nothing, found by fp32"]
    return same and not bad and counts["moved much, found"] > 0


def rms(frames: Tensor) -> Tensor:
    """Root mean square of each frame."""
    return frames.square().mean((1, 2, 3)).sqrt()


if __name__ == "__main__":
    raise SystemExit(main())
