"""The real path on a GPU: build in a child process, reload bit-equal, isolation, the JIT form, CUDA graphs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from owl_wms import trt
from owl_wms.errors import FastPathError
from owl_wms.request import Request
from owl_wms.runtime import StreamDecode
from owl_wms.settings import TensorRTConfig
from owl_wms.trt.check.output import output_digest
from owl_wms.trt.check.parity import latents
from tests.trt import decoders

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_tensorrt() -> None:
    if not trt.status().available:
        pytest.skip(trt.status().reason)


@pytest.mark.parametrize(("family", "precision"), [("tiled", "auto"), ("sana", "bf16")])
def test_build_reload_and_run(family: str, precision: str, tmp_path: Path) -> None:
    decoder, shape = decoders.make(family)
    spec = Request(input_shape=shape, precision=precision, timeout_seconds=100)
    events: list[dict] = []
    report = trt.build_program(decoder, spec, tmp_path, progress=events.append)
    assert report["parity"]["passed"]
    assert report["reload_bit_equal"]
    assert report["latency_ms"] > 0
    program = trt.load_program((tmp_path / "program.pt2").read_bytes(), "cuda:0")
    z = latents(shape, 1.0, program.input_dtype, "cuda:0", spec.seed)
    assert output_digest(program(z)) == report["output_sha256"]
    with torch.no_grad():
        wanted = decoder(z.float().cpu())
    assert torch.allclose(program(z).float().cpu(), wanted, atol=0.15 if precision == "bf16" else 0.05)
    assert {event["stage"] for event in events} >= {"import", "lower", "compile", "parity", "timing", "save", "reload"}


@torch.no_grad()
def test_a_step_is_built_stored_and_streamed(tmp_path: Path) -> None:
    step, request = decoders.make_step()
    decoder = step.decoder.cuda()
    latents_ = torch.randn(1, 8, *request.input_shape[1:], generator=torch.Generator().manual_seed(5)).cuda()
    wanted = decoder(latents_)
    settings = TensorRTConfig(precision="fp16", cache_dir=tmp_path / "cache")
    for hits, builds in ((0, 1), (1, 0)):
        stream = StreamDecode(decoder, settings=settings)
        frames = [stream.step(latent) for latent in latents_[:, :4].unbind(1)]
        fork = stream.fork()
        frames += [stream.step(latent) for latent in latents_[:, 4:].unbind(1)]
        once_more = [fork.step(latent) for latent in latents_[:, 4:].unbind(1)]
        got, again = torch.cat(frames, 1), torch.cat(once_more, 1)
        assert bool((got - wanted).norm() < 0.02 * wanted.norm())
        assert torch.equal(got[:, -again.shape[1] :], again), "the fork goes on from where the stream was"
        stats = stream.stats()
        (program,) = stats.programs
        print(program, type(stream._state).__name__)
        assert (stats.backend, stats.hits, stats.builds, stats.fallbacks) == ("tensorrt", hits, builds, 0)
        assert stats.chunks_program == 12


def test_fp32_is_fp32_or_refused(tmp_path: Path) -> None:
    # TensorRT for RTX 1.4 computes in TF32 although it is told not to (docs/log.md). The gate must see that, also where
    # eager's convolutions use TF32 themselves.
    decoder, shape = decoders.make("square")
    spec = Request(input_shape=shape, precision="fp32", timeout_seconds=100)
    report, refusal = None, None
    try:
        report = trt.build_program(decoder, spec, tmp_path)
    except FastPathError as error:
        refusal = error
    if report is None:
        assert refusal is not None
        assert (refusal.stage, "relative error" in str(refusal)) == ("parity", True), refusal
    else:
        assert [row["relative_error"] <= 1e-4 for row in report["parity"]["scales"]] == [True] * 3


def test_cuda_graph_repeats_the_program() -> None:
    decoder, shape = decoders.make("square")
    decoder = decoder.cuda().half()
    graphed = trt.GraphedProgram(decoder, latents(shape, 1.0, torch.float16, "cuda"))
    assert graphed.graphed, graphed.reason
    z = latents(shape, 0.5, torch.float16, "cuda", seed=5)
    with torch.no_grad():
        first, wanted = graphed(z), decoder(z)
    assert torch.equal(first, wanted)
    graphed(z * 0)
    assert torch.equal(first, wanted), "an answer that was handed out must not change with the next call"


def test_a_graph_captured_in_inference_mode_serves_outside_of_it() -> None:
    decoder, shape = decoders.make("square")
    decoder = decoder.cuda().half()
    z = latents(shape, 1.0, torch.float16, "cuda")
    with torch.inference_mode():
        graphed = trt.GraphedProgram(decoder, z)
    assert graphed.graphed, graphed.reason
    with torch.no_grad():
        assert torch.equal(graphed(z), decoder(z))


def test_graphs_on_two_gpus_of_one_process() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    stream = torch.cuda.current_stream()
    for index in range(2):
        decoder, shape = decoders.make("square")
        decoder = decoder.to(f"cuda:{index}").half()
        graphed = trt.GraphedProgram(decoder, latents(shape, 1.0, torch.float16, f"cuda:{index}"))
        assert graphed.graphed, graphed.reason
        z = latents(shape, 0.5, torch.float16, f"cuda:{index}", seed=5)
        with torch.no_grad():
            assert torch.equal(graphed(z), decoder(z))
    assert torch.cuda.current_stream() == stream


def test_jit_form_compiles_and_agrees() -> None:
    decoder, shape = decoders.make("tiled")
    decoder = decoder.cuda()
    compiled = trt.compile_for_training(decoder, precision="fp16", strict=True)
    z = latents(shape, 1.0, torch.float32, "cuda")
    with torch.no_grad():
        wanted = decoder(z)
    got = compiled(z)
    assert compiled.reason == ""
    assert got.dtype == wanted.dtype
    assert torch.allclose(got, wanted, atol=0.05)


# A second start: a new process, the library alone, the machine code that came with the program.
SECOND = """
import sys, torch
import subprocess
import sys
from pathlib import Path
from owl_wms import trt
from owl_wms.ops.common import nvrtc
from owl_wms.trt.check.output import output_digest
from owl_wms.trt.check.parity import latents
def compiled(kernel, architecture): raise AssertionError(f"{kernel} was compiled again")
nvrtc._compile = compiled
assert trt.run_status().available
program = trt.load_program(Path(sys.argv[1]).read_bytes(), "cuda:0")
x = program(latents(tuple(map(int, sys.argv[2].split(","))), 1.0, program.input_dtype, "cuda:0", 0))
torch.cuda.synchronize()
print(output_digest(x), "torch_tensorrt" in sys.modules)
"""


@pytest.mark.parametrize(("family", "plan"), [("tiled", "tensorrt"), ("tiled", "tensorrt+ops"), ("sana", "tensorrt")])
def test_second_start_reads_with_the_library_alone_and_compiles_nothing(family: str, plan: str, tmp_path: Path) -> None:
    decoder, shape = decoders.make(family)
    spec = Request(input_shape=shape, precision="bf16", plans=(plan,), timeout_seconds=100)
    report = trt.build_program(decoder, spec, tmp_path)
    assert (report["kernel_bytes"] > 0) is (plan == "tensorrt+ops")
    command = [sys.executable, "-c", SECOND, str(tmp_path / "program.pt2"), ",".join(map(str, shape))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [report["output_sha256"], "False"]
