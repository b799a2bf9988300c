"""Decodes for minutes while weights, shapes and the cache change under it, and compares every frame with PyTorch's.

Two workers share one cache. Each decodes clips of changing sizes and lengths. After every few clips its weights
change: by a fused optimiser step, by a plain one, or back to the first ones by `load_state_dict`. Frames are also
compared by a canary, often. Meanwhile a third process that builds a program is killed every minute, at a random moment.
Another one with the same weights must then get its program and right frames.

The weights go round in a circle, so that programs are found again in the cache and updates are many. At every update
the new weights' frames must differ from the old ones' by far more than is allowed, or a stale frame could pass.

On a CPU the decoder is a tiny one and programs are made by torch.export, as in the tests; everything else is the same.

With `--out FOLDER` every process writes a line of its counts there every 30 seconds, so that a run that is ended early
leaves figures. With `--share 0.3` a worker rests between clips, for the sake of other work on the same GPU.

The cache has room for `KEEP` programs; a builder a minute fills it, so old programs are evicted while others are read.

Usage: python -m benchmarks.soak --minutes 9        exit status 1 for a wrong frame, a bad entry or memory that grows
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import subprocess
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import console
from benchmarks.soak_builders import KEEP, Killer, start
from benchmarks.soak_watch import growth, left_over, used_mib, write_rows
from owl_wms.cache import CacheStore
from owl_wms.runtime import VideoDecode, canary
from owl_wms.settings import TensorRTConfig
from owl_wms.trt.check.parity import errors

BATCH = 4
# bf16 decoders have 0.006 to 0.016 (docs/measure.md). Weights whose own bf16 error is larger allow three times that:
# one for PyTorch's frame, two for the program's. Other weights differ by more than LEAST_NEW, so no old frame passes.
MOST_RELATIVE = 0.03
LEAST_NEW = 0.2
MOST_GROWTH_MIB = 64
LONGEST_REST = 1.0  # seconds; what takes long is a program's loading, which needs the GPU for little of it
GRACE_SECONDS = 25.0  # a worker that waits for a build at the end
WORKERS = 2
RATE = 0.3
CANARY_EVERY = 100


def decoder_of(name: str, seed: int, device: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """Returns a decoder whose weights take gradients, in eval mode, and its latent shape."""
    if name == "tiny":
        from tests.runtime.toolchains import TinyDecoder

        torch.manual_seed(seed)
        return TinyDecoder().eval(), (4, 6, 6)
    from benchmarks.decoders import subject
    from owl_wms.vae import fold_weight_norm

    made = subject(name)
    decoder = fold_weight_norm(made.make()).eval().requires_grad_(True).to(device=device, dtype=torch.bfloat16)
    if seed:
        gradients(decoder, seed)
        torch.optim.SGD(decoder.parameters(), lr=RATE).step()
    return decoder, made.latent_shape


def toolchain_of(name: str) -> Any:
    """Returns the stand-in of the tiny decoder; None for TensorRT."""
    if name != "tiny":
        return None
    from tests.runtime.toolchains import ExportToolchain

    return ExportToolchain()


def decode_of(decoder: nn.Module, options: argparse.Namespace, output: str) -> VideoDecode:
    """Returns the decode function under test."""
    room = {"cache_max_bytes": options.room} if options.room else {}
    settings = TensorRTConfig.resolve({"cache_dir": str(options.cache)}, **room)
    return VideoDecode(
        decoder,
        batch_size=BATCH,
        settings=settings,
        toolchain=toolchain_of(options.decoder),
        output=output,
        check="auto+canary",
    )


def gradients(decoder: nn.Module, seed: int) -> None:
    """Sets seeded gradients of the weights' size."""
    generator = torch.Generator().manual_seed(seed)
    for weight in decoder.parameters():
        drawn = torch.randn(weight.shape, generator=generator).to(weight)
        weight.grad = drawn * weight.detach().abs().mean()


class Worker:
    """One of the processes that decode.

    Args:
        options: of the command line; `number` is the worker's.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.random = options, random.Random(options.number)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.decoder, shape = decoder_of(options.decoder, 0, self.device)
        self.first = copy.deepcopy(self.decoder.state_dict())
        self.truth = copy.deepcopy(self.decoder).requires_grad_(False)
        c, h, w = shape
        self.shapes = [shape] if options.shapes == 1 else [shape, (c, h, max(1, w // 2)), (c, max(1, h // 2), w)]
        self.shapes = self.shapes[: options.shapes]
        canary.EVERY = CANARY_EVERY
        self.decode = decode_of(self.decoder, options, ("bf16", "uint8")[options.number % 2])
        self.turn = 0
        self.counts: Counter[str] = Counter()
        self.worst = 0.0
        self.limit = self.allowed()
        self.memory: dict[str, list[tuple[float, float]]] = {}
        self.state: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        """Decodes until the time is over and returns counts and memory."""
        end = self.options.until or time.monotonic() + self.options.minutes * 60
        while time.monotonic() < end:
            for _ in range(self.options.clips):
                begin = time.monotonic()
                if begin < end:
                    self.clip()
                    took = time.monotonic() - begin
                    time.sleep(min(LONGEST_REST, took * (1 / self.options.share - 1)))
            self.update()
            for name, mib in used_mib().items():
                self.memory.setdefault(name, []).append((round(time.monotonic(), 1), round(mib, 1)))
            self.look()
        return self.found()

    def look(self) -> None:
        """Reads the state of the decode function, which only the thread that decodes may wait for."""
        state = self.decode.stats()
        names = ("chunks_program", "chunks_pytorch", "builds", "hits", "canaries", "canary_misses")
        self.state = {name: getattr(state, name) for name in names}
        self.state |= {"failures": sum(state.failures.values()), "by_stage": dict(state.failures)}
        chosen = {f"{row['plan']} {row['precision']}" for row in state.programs if row["plan"]}
        self.state |= {"reason": state.reason, "programs": sorted(chosen)}

    def found(self) -> dict[str, Any]:
        """Returns all that is known so far; safe in another thread than the one that decodes."""
        numbers = {name: value for name, value in self.state.items() if isinstance(value, int)}
        texts = {name: value for name, value in self.state.items() if not isinstance(value, int)}
        counts = dict(self.counts) | numbers
        return {"counts": counts, "worst": self.worst, "limit": self.limit, "memory": dict(self.memory), **texts}

    @torch.no_grad()
    def allowed(self) -> float:
        """Returns the relative error that a right frame of these weights may have."""
        dtype = next(self.truth.parameters()).dtype
        if dtype == torch.float32:
            return MOST_RELATIVE
        probe = torch.randn(BATCH, *self.shapes[0], device=self.device, dtype=dtype)
        own = errors(self.truth(probe), copy.deepcopy(self.truth).float()(probe.float())).relative
        self.counts["limits too wide"] += int(not 3 * own <= LEAST_NEW / 2)
        return max(MOST_RELATIVE, 3 * own)

    @torch.no_grad()
    def clip(self) -> None:
        """Decodes one clip and compares every frame."""
        shape, length = self.random.choice(self.shapes), self.random.randint(1, 3 * BATCH)
        dtype = next(self.truth.parameters()).dtype
        latents = torch.randn(1, length, *shape, device=self.device, dtype=dtype)
        frames = self.decode(latents)[0]
        wanted = torch.cat([self.truth(part).float() for part in latents[0].split(BATCH)])
        self.counts["clips"] += 1
        for got, right in zip(frames, wanted, strict=True):
            error = self.distance(got, right)
            self.worst = max(self.worst, error) if error == error else float("inf")
            self.counts["frames"] += 1
            self.counts["wrong"] += int(not error <= self.limit)

    def distance(self, got: Tensor, right: Tensor) -> float:
        """Relative error of a frame; without the rounding of bytes."""
        if got.dtype == torch.bfloat16:
            return errors(got, right).relative
        values, seen = got.movedim(-1, 0).float() / 127.5 - 1, right.clamp(-1, 1)
        beyond = ((values - seen).abs() - 1 / 255).clamp(min=0)
        return float(torch.linalg.vector_norm(beyond) / torch.linalg.vector_norm(seen).clamp(min=1e-6))

    def update(self) -> None:
        """Changes the weights in the next of the ways, and looks that their frames are others."""
        parameters, turn = list(self.decoder.parameters()), self.turn % self.options.states
        probe = torch.randn(1, *self.shapes[0], device=self.device, dtype=parameters[0].dtype)
        with torch.no_grad():
            before = self.truth(probe)
        if turn == self.options.states - 1:
            self.decoder.load_state_dict(self.first)
            self.counts["restored"] += 1
        else:
            fused = turn % 2 == 0
            gradients(self.decoder, turn + 1)
            torch.optim.SGD(parameters, lr=RATE, fused=fused, foreach=not fused).step()
            self.counts["fused steps" if fused else "plain steps"] += 1
        self.turn += 1
        self.truth.load_state_dict(self.decoder.state_dict())
        with torch.no_grad():
            self.counts["updates that change little"] += int(errors(self.truth(probe), before).relative < LEAST_NEW)
        self.limit = self.allowed()


def build_one(options: argparse.Namespace) -> dict[str, Any]:
    """Builds, or finds, the program of weights that no worker has; returns whether its frames are right."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder, shape = decoder_of(options.decoder, 1000 + options.number, device)
    decode = decode_of(decoder, options, "bf16")
    latents = torch.randn(1, BATCH, *shape, device=device, dtype=next(decoder.parameters()).dtype)
    print("begins", flush=True)
    with torch.no_grad():
        error = errors(decode(latents)[0], decoder(latents[0]).float()).relative
    state = decode.stats()
    return {"right": error <= MOST_RELATIVE, "program": state.chunks_program > 0, "reason": state.reason}


def soak(options: argparse.Namespace) -> int:
    """Runs everything, prints a table and returns the exit status."""
    begin = time.monotonic()
    end = options.until = begin + options.minutes * 60
    options.mark = uuid.uuid4().hex
    workers = [start(options, "worker", number) for number in range(WORKERS)]
    killer, rounds = Killer(options, end), 0
    if options.out:
        write_rows(Path(options.out) / "soak_builders.jsonl", killer.look)
    every = min(60.0, options.minutes * 15)
    while time.monotonic() < end - every:
        killer.round(rounds)
        rounds += 1
        time.sleep(max(0.0, begin + rounds * every - time.monotonic()))
    bad = killer.counts["next one failed"]
    console.print(f"{options.decoder}, {options.minutes:g} minutes, {WORKERS} workers, one cache")
    for number, worker in enumerate(workers):
        try:
            text, _ = worker.communicate(timeout=max(5.0, end + GRACE_SECONDS - time.monotonic()))
            result = json.loads(text.splitlines()[-1])
        except (subprocess.TimeoutExpired, ValueError, IndexError):
            worker.kill()
            console.print(f"worker {number}: DIED, status {worker.wait()}")
            bad += 1
            continue
        counts, memory = Counter(result["counts"]), result["memory"]
        console.print(f"worker {number}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
        console.print(
            f"  wrong {counts['wrong']} of {counts['frames']} frames, worst relative error {result['worst']:.2e} "
            f"(at most {result['limit']:.3g}); {result['reason']}; {', '.join(result['programs'])}"
        )
        for name, values in memory.items():
            minutes = (values[-1][0] - values[len(values) // 3][0]) / 60
            told = f"{name} memory {values[-1][1]:.0f} MiB, grew {growth(values):+.1f} MiB"
            console.print(f"  {told} in the last {minutes:.1f} minutes ({len(values)} samples)")
        if result["by_stage"]:
            console.print(f"  failures {result['by_stage']}")
        idle = counts["chunks_program"] == 0 or counts["fused steps"] == 0
        bad += counts["wrong"] + counts["canary_misses"] + counts["updates that change little"] + idle
        bad += counts["limits too wide"]
        bad += sum(growth(values) > MOST_GROWTH_MIB for values in memory.values())
    console.print("builders: " + ", ".join(f"{name} {count}" for name, count in killer.counts.items()))
    for reason in killer.reasons:
        console.print(f"  {reason}")
    orphans = left_over(options.mark)
    console.print(f"processes left over: {orphans}")
    console.print(f"in the end: {killer.look()}; at most {killer.most_entries} entries at once, room for {KEEP}")
    entries = CacheStore(Path(options.cache)).verify()
    broken = [info.name for info in entries if info.status != "ok"]
    console.print(f"cache: {len(entries)} entries, {len(broken)} bad {broken or ''}")
    bad += len(broken) + orphans + (killer.counts["killed"] == 0) + (killer.most_entries > KEEP + WORKERS + 1)
    console.print("right" if not bad else f"NOT RIGHT: {bad} findings")
    return int(bool(bad))


def main() -> int:
    """Runs the part that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--decoder", default="demo" if cuda else "tiny", help="of benchmarks.decoders, or tiny (CPU)")
    parser.add_argument("--cache", default="", help="folder; a new one if not given")
    parser.add_argument("--shapes", type=int, default=2 if cuda else 3, choices=(1, 2, 3))
    parser.add_argument("--states", type=int, default=3, help="of the weights, in a circle")
    parser.add_argument("--clips", type=int, default=6, help="between updates")
    parser.add_argument("--part", choices=("all", "worker", "builder"), default="all")
    parser.add_argument("--number", type=int, default=0)
    parser.add_argument("--until", type=float, default=0.0, help="second of the monotonic clock at which a worker ends")
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the time between updates in which a worker decodes"
    )
    parser.add_argument("--room", type=int, default=0, help="bytes of the cache; 0 for the usual limit")
    parser.add_argument("--out", default="", help="folder for a line of counts every 30 seconds")
    options = parser.parse_args()
    if options.part == "worker":
        worker = Worker(options)
        if options.out:
            write_rows(Path(options.out) / f"soak_worker{options.number}.jsonl", worker.found)
        print(json.dumps(worker.run()))
        return 0
    if options.part == "builder":
        print(json.dumps(build_one(options)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        options.cache = options.cache or f"{folder}/cache"
        options.temporary = f"{folder}/temporary"
        Path(options.temporary).mkdir()
        return soak(options)


if __name__ == "__main__":
    raise SystemExit(main())
