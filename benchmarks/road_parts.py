"""Runs the parts of `benchmarks.road`, each in a process of its own: what one process leaves behind (a CUDA context, a
compiler, cached memory) must not help or hinder the next.

Usage: python -m benchmarks.road_parts PART JSON      prints one JSON object as its last line
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.road_tools import decoder_of, dtype_of, entries, latent_shape, resident_mib, wait

Settings = dict[str, Any]
COMPILER = ("torch._dynamo", "torch._inductor", "sympy", "torch_tensorrt")
"""What a cached start does without. Listed by `first` where it was imported all the same."""
BACKGROUND_SECONDS = 60.0
STEPS = {
    "weights: read": "owl_wms.vae.weight_files:_read_file",
    "weights: module and load": "owl_wms.utils.owl_vae_bridge:load_decoder",
    "weights: fold": "owl_wms.utils.owl_vae_bridge:fold_weight_norm",
    "weights: finite": "owl_wms.utils.owl_vae_bridge:check_values",
    "key": "owl_wms.trt:key_material",
    "key: weights": "owl_wms.trt.key:weights_digest",
    "key: sources": "owl_wms.trt.key:sources_digest",
    "key: machine": "owl_wms.env:describe_machine",
    "TensorRT's library": "owl_wms.trt.library.engines:_load_library",
    "program: read and hash": "owl_wms.cache.entry:_read_program",
    "program: load": "owl_wms.trt:load_program",
    "program: call list": "owl_wms.trt.run.calls:read",
    "program: engines": "torch._C:_pickle_load_obj",
    "program: kernels": "owl_wms.trt.run.kernels:adopt",
    "program: repeats its output": "owl_wms.trt.run.load:confirm",
    "program: exported form": "owl_wms.trt.run.load:_exported",
    "CUDA graph": "owl_wms.trt:GraphedProgram",
    "first run": "owl_wms.runtime.programs:first_run",
}
"""Step of a start -> the function that takes it. A step may be a part of another one."""
PIECE = 32  # frames per call of the decode function: as many as a piece of `decode_stream` has


def files(s: Settings) -> Settings:
    """Writes the decoder's checkpoint and configuration, and `frames` random latents, where they are not there yet."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from benchmarks.decoders import subject

    made = subject(s["decoder"])
    if not Path(s["checkpoint"]).exists():
        weights = {name: value.contiguous() for name, value in made.make().state_dict().items()}
        save_file(weights, s["checkpoint"])
    if not Path(s["latents"]).exists():
        latents = torch.randn(s["frames"], *made.latent_shape, generator=torch.Generator().manual_seed(0))
        np.save(s["latents"], latents.numpy())
    return {"latents_bytes": Path(s["latents"]).stat().st_size}


def first(s: Settings) -> Settings:
    """Times the way from the start of this process (`s["begun"]`, wall clock) to the first decoded batch."""
    return _started(s)[0]


def _started(s: Settings) -> tuple[Settings, Any, Any]:
    """What `first` returns, the decode function and the latents that it decoded."""
    marks = [("interpreter", time.time())]
    import torch

    marks.append(("import torch", time.time()))
    from owl_wms.utils.owl_vae_bridge import get_decoder_only, make_batched_decode_fn

    marks.append(("import owl_wms", time.time()))
    if s["device"] == "cuda":
        torch.zeros(1, device="cuda")
    marks.append(("CUDA", time.time()))
    decoder = get_decoder_only(None, s["config"], s["checkpoint"], device=s["device"], dtype=dtype_of(s))
    marks.append(("weights", time.time()))
    decode = make_batched_decode_fn(decoder, s["batch"], output="uint8")
    latents = torch.zeros((1, s["batch"], *latent_shape(s)), device=s["device"])
    frames = decode(latents).cpu()
    marks.append(("program and first batch", time.time()))
    stats, before, spent = decode.stats(), s["begun"], {}
    for name, at in marks:
        spent[name], before = at - before, at
    compiler = [name for name in COMPILER if name in sys.modules]
    entry = stats.programs[0]["entry"]
    reports = [info.manifest.report for info in entries() if info.manifest and info.name == entry]
    found = {
        "seconds": spent,
        "after_torch": sum(seconds for name, seconds in spent.items() if name not in ("interpreter", "import torch")),
        "frame": list(frames.shape[2:]),
        "build_seconds": stats.build_seconds,
        "load_seconds": stats.load_seconds,
        "build_stages": stats.programs[0]["stages"],
        "no_call_list": reports[0].get("no_call_list", "not said") if reports else "no program",
        "compiler_imported": compiler,
        "backend": stats.backend,
        "reason": stats.reason,
    }
    return found, decode, latents


def background(s: Settings) -> Settings:
    """As `first` with an empty cache and `TENSORRT_BUILD=background`, and the seconds until the program took over."""
    os.environ.update(TENSORRT_BUILD="background", TENSORRT_CACHE_DIR=str(Path(s["work"], "another cache")))
    found, decode, latents = _started(s)
    calls, slowest = 0, 0.0
    while decode.stats().backend == "pytorch" and time.time() - s["begun"] < BACKGROUND_SECONDS:
        begun = time.time()
        decode(latents).cpu()
        calls, slowest = calls + 1, max(slowest, time.time() - begun)
    interpreter = found["seconds"]["interpreter"] + found["seconds"]["import torch"]
    return {
        "after_torch": found["after_torch"],
        "swapped_after_torch": time.time() - s["begun"] - interpreter,
        "first_backend": found["backend"],
        "backend": decode.stats().backend,
        "reason": decode.stats().reason,
        "calls_meanwhile": calls,
        "slowest_call_seconds": slowest,
    }


def steps(s: Settings) -> Settings:
    """As `first`, with the seconds of every step of `STEPS`. The clock costs little, but it is no measurement of the
    whole."""
    import importlib

    from owl_wms.timing import Spent

    spent = Spent()

    def timed(step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with spent.on(step):
                return function(*args, **kwargs)

        return call

    for step, place in STEPS.items():
        module, name = place.split(":")
        owner = importlib.import_module(module)
        setattr(owner, name, timed(step, getattr(owner, name)))
    found = first(s)
    return {"steps": spent.seconds, "whole": found["seconds"], "backend": found["backend"], "reason": found["reason"]}


def rate(s: Settings) -> Settings:
    """Frames per second of the decode function (bf16 and bytes), of the stream, and of the stream into an array, in
    turns; and whether the stream's bytes are the function's."""
    import torch

    from owl_wms.media.latents import LatentFile
    from owl_wms.media.sinks import open_sink
    from owl_wms.ops.frame_bytes import frame_bytes, reference
    from owl_wms.runtime import decode_stream
    from owl_wms.utils.owl_vae_bridge import make_batched_decode_fn

    decoder, source = decoder_of(s), LatentFile(s["latents"])
    count = min(s["frames"], source.shape[1])
    floats = make_batched_decode_fn(decoder, s["batch"])
    pictures = make_batched_decode_fn(decoder, s["batch"], output="uint8")
    latents = source.read(0, count).to(s["device"])

    def function(decode: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            for part in latents.split(PIECE):
                decode(part[None])

        return run

    def stream() -> None:
        for _ in decode_stream(pictures, source):
            pass

    def array() -> None:
        with open_sink(Path(s["work"], "rate.npy"), shape=source.shape[:2], fps=60) as sink:
            for frames in decode_stream(pictures, source):
                sink.write(frames)

    # On a CPU the processor's time, for what else runs on the machine must not count.
    clock = time.perf_counter if s["device"] == "cuda" else time.process_time
    runs = {"function, bf16": function(floats), "function, bytes": function(pictures), "stream": stream}
    samples: dict[str, list[float]] = {name: [] for name in (*runs, "stream to .npy")}
    for run in runs.values():
        run()
    for _ in range(s["rounds"]):
        for name, run in (*runs.items(), ("stream to .npy", array)):
            wait(s)
            begun = clock()
            run()
            wait(s)
            samples[name].append(count / (clock() - begun))
    few = latents[: 5 * s["batch"] + 3]
    streamed = torch.cat([frames.clone() for frames in decode_stream(pictures, few[None])])
    x = 1.5 * torch.randn(3, 4, 90, 160, device=s["device"]).to(dtype_of(s))
    return {
        "frames_per_second": {name: median(values) for name, values in samples.items()},
        "same_bytes": bool(torch.equal(streamed, pictures(few[None])[0].cpu())),
        "kernel_is_the_reference": bool(torch.equal(frame_bytes(x), reference(x))),
        "backend": pictures.stats().backend,
        "reason": pictures.stats().reason,
    }


def command(s: Settings) -> Settings:
    """How many times as much a frame of the decode function costs as one of `owl-wms decode` to `.npy`, on a CPU.

    By the clock and by the processor's time, in turns, each the difference of a long and a short clip, so that starting
    and loading do not count. One thread: two of them wait for each other by spinning, which on a machine that others
    use as well is most of what would be measured.
    """
    import contextlib
    import io

    import numpy as np
    import torch

    from owl_wms.cli import main
    from owl_wms.utils.owl_vae_bridge import make_batched_decode_fn

    torch.set_num_threads(1)
    decode = make_batched_decode_fn(decoder_of(s), s["batch"], output="uint8")
    clips = {}
    for count in (s["frames"] // 5, s["frames"]):
        clips[count] = torch.randn(count, *latent_shape(s), generator=torch.Generator().manual_seed(0))
        np.save(Path(s["work"], f"{count}.npy"), clips[count].numpy())

    def function(count: int) -> None:
        for part in clips[count].split(PIECE):
            decode(part[None])

    def whole(count: int) -> None:
        given = [str(Path(s["work"], f"{count}.npy")), "--vae-config", s["config"], "--checkpoint", s["checkpoint"]]
        given += ["--out", str(Path(s["work"], "command.npy")), "--overwrite", "--batch-size", str(s["batch"])]
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
            main(["decode", *given, "--device", s["device"]])
        if f"{count} frames" not in said.getvalue():
            raise RuntimeError(said.getvalue())

    def cost(run: Callable[[int], None]) -> tuple[float, float]:
        marks = [(time.perf_counter(), time.process_time())]
        for count in clips:
            run(count)
            marks.append((time.perf_counter(), time.process_time()))
        first, second, third = (torch.tensor(mark, dtype=torch.float64) for mark in marks)
        clock, processor = (((third - second) - (second - first)) / (s["frames"] - s["frames"] // 5)).tolist()
        return clock, processor

    for run in (function, whole):
        run(s["frames"] // 5)
    found: dict[str, list[tuple[float, float]]] = {"function": [], "command": []}
    for number in range(s["rounds"]):
        turns = [("function", function), ("command", whole)]
        for name, run in turns[:: -1 if number % 2 else 1]:
            found[name].append(cost(run))
    pairs = list(zip(found["function"], found["command"], strict=True))
    return {
        "ratio": {
            what: median(alone[i] / with_files[i] for alone, with_files in pairs)
            for i, what in enumerate(("clock", "processor"))
        },
        "ms_per_frame": {
            name: {what: 1e3 * median(turn[i] for turn in costs) for i, what in enumerate(("clock", "processor"))}
            for name, costs in found.items()
        },
        "rounds": s["rounds"],
        "load": os.getloadavg()[0],
    }


def x264(s: Settings) -> Settings:
    """Frames per second of the encoder fed from memory, with the settings of `owl-wms decode`."""
    import numpy as np
    import torch

    from owl_wms.media.video import VideoWriter
    from owl_wms.timing import Spent

    frames, spent = torch.from_numpy(np.load(s["array"])), Spent()
    begun = time.perf_counter()
    with VideoWriter(Path(s["work"], "memory.mp4"), 60, spent=spent) as clip:
        for part in frames.split(PIECE):
            clip.write(part)
    seconds = time.perf_counter() - begun
    return {"frames_per_second": len(frames) / seconds, "seconds": seconds, "spent": spent.seconds}


def training(s: Settings) -> Settings:
    """Milliseconds per batch and errors of `compile_for_training`, eager and torch.compile, in turns."""
    import torch

    from benchmarks.harness import measure_interleaved
    from owl_wms.runtime import VideoDecode
    from owl_wms.trt import compile_for_training
    from owl_wms.trt.check.parity import errors, reference_arithmetic
    from owl_wms.utils.owl_vae_bridge import get_decoder_only, make_batched_decode_fn

    fp32 = get_decoder_only(None, s["config"], s["checkpoint"], device="cuda", dtype=torch.float32)
    decoder = get_decoder_only(None, s["config"], s["checkpoint"], device="cuda")
    compiled = torch.compile(
        get_decoder_only(None, s["config"], s["checkpoint"], device="cuda").to(memory_format=torch.channels_last),
        dynamic=False,
    )
    ours = compile_for_training(decoder)
    candidates: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "eager": decoder,
        "torch.compile": compiled,
        "compile_for_training": ours,
    }
    if s["whole"]:  # what evaluation calls; it compiles once more
        evaluation: VideoDecode = make_batched_decode_fn(decoder, s["batch"], jit=True)
        candidates["evaluation's decode function"] = lambda z: evaluation(z[None])[0]
    inputs = [torch.randn(s["batch"], *latent_shape(s), device="cuda").bfloat16() for _ in range(3)]
    seconds, found = {}, {}
    with torch.no_grad():
        with reference_arithmetic():
            want = fp32(inputs[0].float())
        for name, run in candidates.items():
            begun = time.perf_counter()
            found[name] = errors(run(inputs[0]), want)
            torch.cuda.synchronize()
            seconds[name] = time.perf_counter() - begun
        timings = measure_interleaved(candidates, inputs, rounds=20)
    return {
        "ms": {name: timing.median_ms for name, timing in timings.items()},
        "relative_error": {name: error.relative for name, error in found.items()},
        "absolute_error": {name: error.absolute for name, error in found.items()},
        "first_call_seconds": seconds,
        "plan": ours.plan,
        "reason": ours.reason,
    }


def memory(s: Settings) -> Settings:
    """Host memory in MiB while `frames` latents are streamed: after a tenth of them, and at the end."""
    import torch

    from owl_wms.runtime import decode_stream
    from owl_wms.utils.owl_vae_bridge import make_batched_decode_fn

    class Endless:
        shape = (1, s["frames"], *latent_shape(s))
        drawn = torch.randn(PIECE, *latent_shape(s))

        def read(self, start: int, stop: int) -> torch.Tensor:
            return self.drawn[: stop - start].clone()

    decode = make_batched_decode_fn(decoder_of(s), s["batch"], output="uint8")
    done, early, piece_bytes, begun = 0, 0.0, 0, time.perf_counter()
    for frames in decode_stream(decode, Endless()):
        done, piece_bytes = done + len(frames), max(piece_bytes, frames.nbytes)
        if not early and done >= s["frames"] / 10:
            early = resident_mib()
    seconds = time.perf_counter() - begun
    return {
        "frames": done,
        "seconds": seconds,
        "early_mib": early,
        "end_mib": resident_mib(),
        "piece_mib": piece_bytes / 2**20,
    }


PARTS = {part.__name__: part for part in (files, first, steps, background, rate, command, x264, training, memory)}

if __name__ == "__main__":
    print("\n" + json.dumps(PARTS[sys.argv[1]](json.loads(sys.argv[2]))), flush=True)
