"""The runtime under hostile input, many threads, forks and failing programs.

A toolchain that stores ordinary exported programs takes TensorRT's place, so that cache, threads and fallbacks are the
real ones on a machine without a GPU.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from owl_wms.errors import FastPathError, OwlError
from owl_wms.request import Request
from owl_wms.runtime import Stored, VideoDecode
from owl_wms.runtime.turns import tracing
from owl_wms.settings import TensorRTConfig
from tests.faults.conftest import Fault, SmallDecoder
from tests.faults.tools import FORK, wait_ok

Wrap = Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]


class PlainToolchain(Stored):
    """Programs are exported programs; `wrap` lets a test break the loaded one."""

    name = "plain"

    def __init__(self, wrap: Wrap | None = None) -> None:
        self.wrap = wrap
        self.builds = 0

    def ready(self, request: Request) -> FastPathError | None:
        return None

    def key_material(self, decoder: torch.nn.Module, request: Request) -> Mapping[str, Any]:
        return {
            "weights": float(sum(p.double().sum() for p in decoder.parameters())),
            "shape": list(request.input_shape),
        }

    def build(
        self, decoder: torch.nn.Module, request: Request, key: Any, folder: Path, *_rest: Any
    ) -> Mapping[str, Any]:
        self.builds += 1
        with tracing():  # it exports in this process
            torch.export.save(torch.export.export(decoder, (torch.zeros(request.input_shape),)), folder / "program.pt2")
        return {"precision": "fp32", "plan": "plain"}

    def load(self, data: bytes, request: Request, report: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
        module = torch.export.load(io.BytesIO(data)).module()

        def program(z: Tensor) -> Tensor:
            assert tuple(z.shape) == request.input_shape, "the program got another shape than it was built for"
            return module(z.float())

        # The first run, on zeros, belongs to loading; what is broken here is broken later.
        return program if self.wrap is None else self.wrap(program)


def small_decoder() -> SmallDecoder:
    torch.manual_seed(3)
    decoder = SmallDecoder().eval()
    decoder.latent_channels = 4
    return decoder


def decode_with(folder: Path, wrap: Wrap | None = None, **options: Any) -> tuple[VideoDecode, SmallDecoder]:
    decoder = small_decoder()
    settings = TensorRTConfig(cache_dir=folder / "cache", precision="fp32")
    return VideoDecode(decoder, batch_size=4, settings=settings, toolchain=PlainToolchain(wrap), **options), decoder


def reference(decoder: SmallDecoder, latents: Tensor) -> Tensor:
    """Frame by frame in PyTorch: what any path must answer."""
    with torch.no_grad():
        frames = decoder(latents.float().reshape(-1, *latents.shape[2:]).contiguous())
    return frames.reshape(*latents.shape[:2], *frames.shape[1:])


def same(got: Tensor, latents: Tensor, decoder: SmallDecoder) -> bool:
    expected = reference(decoder, latents)
    assert got.dtype == torch.bfloat16
    assert got.shape == expected.shape
    return torch.allclose(got.float(), expected, atol=1e-2, rtol=1e-2, equal_nan=True)


def test_hostile_latents(fault: Fault, folder: Path) -> None:
    decode, decoder = decode_with(folder)
    good = torch.randn(2, 5, 4, 2, 2)
    assert same(decode(good), good, decoder)
    assert decode.stats().backend == "plain"
    answered = 0
    frames = fault.count(10_000)
    for latents in (
        good.double(),
        good.half(),
        good.to(torch.bfloat16),
        good.int(),
        good.transpose(3, 4),
        good.flip(0)[:, ::2],
        good[:, :1].expand(2, 7, 4, 2, 2),
        good.to(memory_format=torch.channels_last_3d),
        torch.randn(1, frames, 4, 2, 2),
        torch.zeros(2, 0, 4, 2, 2),
        torch.zeros(0, 3, 4, 2, 2),
        good * 1e30,
        torch.full_like(good, float("inf")),
        torch.full_like(good, float("nan")),
        torch.randn(1, 3, 4, 3, 5),
        good.requires_grad_(),
    ):
        assert same(decode(latents), latents, decoder)
        answered += 1
    # One bad frame must not spoil its neighbours.
    mixed = torch.randn(1, 8, 4, 2, 2)
    mixed[0, 2] = float("nan")
    got = decode(mixed)
    assert got[0, 2].isnan().any()
    assert got[0, [0, 1, 3, 4, 5, 6, 7]].isfinite().all()
    refused = 0
    for latents in (
        torch.zeros(2, 4, 2, 2),
        torch.zeros(1, 1, 5, 2, 2),
        torch.zeros(()),
        torch.zeros(1, 1, 4, 0, 2),
        torch.zeros(1, 1, 4, 2, 2, dtype=torch.complex64),
        torch.zeros(1, 1, 4, 2, 2).to_sparse(),
        "latents",
        None,
    ):
        with pytest.raises(OwlError):
            decode(latents)  # type: ignore[arg-type]
        refused += 1
    fault.record(
        "inputs", f"{answered + 1} kinds right (up to {frames} frames), {refused} kinds refused with one error"
    )


def test_threads_do_not_mix(fault: Fault, folder: Path) -> None:
    decode, decoder = decode_with(folder)
    rounds = fault.count(200)
    wrong: list[int] = []
    # Programs first: torch.export patches nn.Module for all threads while it runs, and this toolchain exports here.
    for width in (2, 3, 4):
        decode.prepare((4, 2, width))

    def one(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for turn in range(rounds):
            latents = torch.randn(1, 1 + (seed + turn) % 9, 4, 2, 2 + seed % 3, generator=generator)
            if not same(decode(latents), latents, decoder):
                wrong.append(seed)

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(280)
    assert wrong == []
    stats = decode.stats()
    assert stats.decodes == 16 * rounds
    assert stats.builds == 3
    assert stats.fallbacks == 0
    fault.record("runtime-threads", f"16 threads x {rounds} decodes over 3 shapes made before: 0 wrong, 3 builds")


class Engine:
    """A program that, as TensorRT's do, aborts the process that destroys it without the GPU it was made with."""

    def __init__(self, program: Callable[[Tensor], Tensor]) -> None:
        self._program, self._home = program, os.getpid()

    def __call__(self, z: Tensor) -> Tensor:
        return self._program(z)

    def __del__(self) -> None:
        if os.getpid() != self._home:
            os.abort()


def test_fork_after_load(fault: Fault, folder: Path) -> None:
    decode, decoder = decode_with(folder, Engine)
    latents = torch.randn(1, 6, 4, 2, 2)
    assert same(decode(latents), latents, decoder)
    children = fault.count(30)

    def child() -> None:
        assert same(decode(latents), latents, decoder)
        assert "forked" in decode.stats().reason

    for _ in range(children):
        process = FORK.Process(target=child)
        process.start()
        wait_ok([process], 60)
    assert same(decode(latents), latents, decoder)
    assert decode.stats().backend == "plain"
    fault.record(
        "runtime-fork",
        f"{children} children decoded right by PyTorch, said so and ended well; the parent kept its program",
    )


def breaks_after_loading(effect: Callable[[Tensor], Tensor]) -> Wrap:
    """Let the first run (part of loading) pass, then break."""

    def wrap(program: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        runs = [0]

        def broken(z: Tensor) -> Tensor:
            runs[0] += 1
            return program(z) if runs[0] == 1 else effect(program(z))

        return broken

    return wrap


def _raises(error: Exception) -> Callable[[Tensor], Tensor]:
    def effect(frames: Tensor) -> Tensor:
        raise error

    return effect


EFFECTS = {
    "raises": _raises(RuntimeError("enqueueV3 failed")),
    "odd error": _raises(KeyError("x")),
    "NaN": lambda frames: frames * float("nan"),
    "Inf": lambda frames: frames / 0,
    "out of memory": _raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")),
    "too few frames": lambda frames: frames[:1],
}


@pytest.mark.parametrize("kind", EFFECTS)
def test_programs_that_fail_at_run(kind: str, fault: Fault, folder: Path) -> None:
    decode, decoder = decode_with(folder, breaks_after_loading(EFFECTS[kind]), check="always")
    for _ in range(6):
        latents = torch.randn(1, 4, 4, 2, 2)
        assert same(decode(latents), latents, decoder), "PyTorch's answer"
    stats = decode.stats()
    assert stats.fallbacks == 3, "three tries, then it is switched off"
    assert stats.backend == "pytorch"
    assert "switched off" in stats.reason
    strict, _ = decode_with(folder, breaks_after_loading(EFFECTS[kind]), check="always", strict=True)
    with pytest.raises(FastPathError):
        strict(torch.randn(1, 4, 4, 2, 2))
    if kind == "raises":
        fault.record(
            "run-failures",
            f"{len(EFFECTS)} kinds ({', '.join(EFFECTS)}): PyTorch's answer, put aside after three, "
            f"an error when strict",
        )


def test_decoding_out_of_memory_halves_the_chunk(fault: Fault, folder: Path) -> None:
    """PyTorch's own path runs out too, above one frame: smaller chunks, the same answer."""
    decode, decoder = decode_with(folder, breaks_after_loading(EFFECTS["out of memory"]))
    sizes: list[int] = []
    plain = type(decoder).forward

    class Tight(SmallDecoder):
        def forward(self, z: Tensor) -> Tensor:
            if not torch.compiler.is_exporting():
                sizes.append(len(z))
                if len(z) > 1:
                    raise torch.OutOfMemoryError("CUDA out of memory")
            return plain(self, z)

    latents = torch.randn(1, 4, 4, 2, 2)
    expected = reference(decoder, latents)
    decoder.__class__ = Tight
    got = decode(latents)
    assert torch.allclose(got.float(), expected, atol=1e-2)
    assert 1 in sizes
    assert max(sizes) <= 4
    fault.record("run-failures", "out of memory in PyTorch too: chunks halved down to one frame")


@pytest.mark.parametrize("damage", ["program", "manifest", "directory"])
def test_a_cache_that_goes_bad_between_starts(damage: str, folder: Path) -> None:
    first, decoder = decode_with(folder)
    latents = torch.randn(1, 4, 4, 2, 2)
    assert same(first(latents), latents, decoder)
    (entry,) = [path for path in (folder / "cache").iterdir() if not path.name.startswith(".")]
    if damage == "directory":
        (folder / "cache").chmod(0o777)
    else:
        path = entry / {"program": "program.pt2", "manifest": "manifest.json"}[damage]
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
    second, _ = decode_with(folder)
    assert same(second(latents), latents, decoder)
    assert second.stats().builds == 1
    assert second.stats().backend == "plain"
    assert os.path.exists(entry)
