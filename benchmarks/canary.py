"""Measures what `check="canary"` costs at its default N, and shows that it finds a flipped bit: about a minute.

A comparison's cost is the difference between two decode functions of one program, in turns: one begins a comparison in
every call, the other none. That is divided by the time in which the program decodes N frames. Beside it stands the
ratio of PyTorch's time for one frame to the program's time per frame, from which N was chosen.

On a CPU a stand-in is measured: the program is the decoder itself, so the ratio is near 1.

Usage: python -m benchmarks.canary [--decoder dist] [--batch 8] [--seconds 20]       exit status 1 for a wrong result
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.decoders import subject
from benchmarks.harness import console
from owl_wms.runtime import VideoDecode, canary
from owl_wms.runtime.programs import Loaded
from owl_wms.settings import TensorRTConfig
from owl_wms.utils.owl_vae_bridge import make_batched_decode_fn
from owl_wms.vae import fold_weight_norm

MOST_SHARE = 0.002
DEFAULT_EVERY = canary.EVERY


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
    """Seconds of one call that begins a comparison after `every` frames, until the GPU is idle."""
    canary.EVERY = every
    chosen = decode._canary
    assert chosen is not None
    chosen._next = chosen._seen + every
    begin = time.perf_counter()
    decode(latents)
    if latents.is_cuda:
        torch.cuda.synchronize()
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
        decode.stats()
    without: list[float] = []
    compared: list[float] = []
    end = time.perf_counter() + options.seconds
    while time.perf_counter() < end or len(without) < 7:
        without.append(timed(decode, latents, 10**9))
        compared.append(timed(decode, latents, 1))
        decode.stats()  # a comparison that is under way would keep the next one from being begun
    eager: list[float] = []
    for _ in range(9):
        begin = time.perf_counter()
        with torch.no_grad():
            decoder(latents[0, :1])
        if cuda:
            torch.cuda.synchronize()
        eager.append(time.perf_counter() - begin)
    per_frame = statistics.median(without) / frames
    each = statistics.median(b - a for a, b in zip(without, compared, strict=True))
    share = each / (per_frame * DEFAULT_EVERY)
    canary.EVERY = 10**9
    state = decode.stats()
    one = statistics.median(eager)
    wrong = state.backend == "pytorch" or state.canary_misses or state.canaries < len(compared)
    console.print(
        f"program {per_frame * 1e3:.4f} ms per frame; PyTorch {one * 1e3:.3f} ms for one: {one / per_frame:.1f} times"
    )
    console.print(f"500 x that ratio: N = {500 * one / per_frame:.0f}; the default is {DEFAULT_EVERY}")
    console.print(f"a comparison adds {each * 1e3:.3f} ms to a call (median of {len(compared)} pairs)")
    console.print(
        f"cost at N = {DEFAULT_EVERY}: {share:.4%}, at most {MOST_SHARE:.1%}: {'yes' if share <= MOST_SHARE else 'NO'}"
    )
    console.print(f"{state.canaries} comparisons of a sound program, {state.canary_misses} misses (must be 0)")
    found = flipped(decoder, made.latent_shape, options.batch, latents)
    console.print(f"a bit flipped in the memory of a stand-in program: {'found' if found else 'NOT FOUND'}")
    return int(bool(wrong) or share > MOST_SHARE or not found)


def flipped(decoder: nn.Module, shape: tuple[int, int, int], batch: int, latents: Tensor) -> bool:
    """Returns whether a comparison finds one flipped bit of one weight, and PyTorch decodes after it."""
    toolchain = Copied()
    settings = TensorRTConfig(use_cache=False)
    decode = VideoDecode(decoder, batch_size=batch, settings=settings, toolchain=toolchain, check="canary")
    plain = VideoDecode(decoder, batch_size=batch, settings=TensorRTConfig(enabled=False))
    decode.prepare(shape)
    some = latents[:, :batch]
    timed(decode, some, 1)
    if decode.stats().canary_misses or decode.stats().canaries != 1:
        return False
    weight = next(part for part in toolchain.module.parameters() if part.dim() == 4)
    bits = weight.view(torch.int32 if weight.dtype == torch.float32 else torch.int16).reshape(-1)
    bits[3] ^= 1 << (30 if weight.dtype == torch.float32 else 14) - 1
    timed(decode, some, 1)
    state = decode.stats()
    return state.canary_misses == 1 and state.backend == "pytorch" and torch.equal(decode(some), plain(some))


if __name__ == "__main__":
    raise SystemExit(main())
