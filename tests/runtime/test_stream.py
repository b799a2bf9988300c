"""`decode_stream`: the same frames as the plain decode, in order, in bounded memory, and an end to every stage."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor, nn

from owl_wms.errors import ConfigError, DataError, DecodeMemoryError, LatentShapeError
from owl_wms.runtime import VideoDecode, decode_stream
from owl_wms.runtime.ahead import Channel, ChannelClosedError, ahead
from owl_wms.settings import TensorRTConfig
from owl_wms.timing import Spent
from tests.runtime.toolchains import ExportToolchain, TinyDecoder, settings

OFF = TensorRTConfig(enabled=False)


_others: set[threading.Thread] = set()
"""Threads of earlier tests' workers, which live as long as their process does."""


def threads() -> set[str]:
    """Names of our threads that this test began."""
    return {at.name for at in threading.enumerate() if at.name.startswith("owl-wms-") and at not in _others}


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    _others.clear()
    _others.update(threading.enumerate())
    yield
    assert threads() == set()


class Counting(nn.Module):
    """Frames that say which latent they come from; notes what it decoded."""

    latent_channels = 4

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen: list[float] = []
        self.at: Callable[[float], None] = lambda place: None

    def forward(self, z: Tensor) -> Tensor:
        for place in z[:, 0, 0, 0].tolist():
            self.at(place)
            self.seen.append(place)
        return (z[:, :3] * self.weight).repeat_interleave(2, -1)


def numbered(clips: int, length: int) -> Tensor:
    return torch.arange(clips * length).float().reshape(clips, length, 1, 1, 1).expand(-1, -1, 4, 2, 2)


@examples(max_examples=60, deadline=None)
@given(
    clips=st.integers(1, 3),
    length=st.integers(0, 23),
    batch_size=st.integers(1, 5),
    batches=st.integers(1, 4),
    ring=st.integers(2, 5),
    output=st.sampled_from(["bf16", "uint8"]),
)
def test_order_and_bits_are_the_plain_decodes(
    clips: int, length: int, batch_size: int, batches: int, ring: int, output: str
) -> None:
    torch.manual_seed(clips * 100 + length)
    latents = torch.randn(clips, length, 4, 3, 3)
    decode = VideoDecode(TinyDecoder().eval(), batch_size=batch_size, settings=OFF, output=output)
    whole = decode(latents).flatten(0, 1)
    pieces = [piece.clone() for piece in decode_stream(decode, latents, batches=batches, ring=ring)]
    assert all(len(piece) == batches * batch_size for piece in pieces[:-1])
    assert torch.equal(torch.cat([*pieces, whole[:0]]), whole)


def test_a_compiled_program_gives_the_same_bits_in_the_other_thread(tmp_path: Path) -> None:
    decode = VideoDecode(
        TinyDecoder().eval(), batch_size=4, settings=settings(tmp_path), toolchain=ExportToolchain(), output="uint8"
    )
    latents = torch.randn(2, 11, 4, 3, 3)
    pieces = [piece.clone() for piece in decode_stream(decode, latents, batches=2)]
    assert decode.stats().backend == "export"
    assert torch.equal(torch.cat(pieces), decode(latents).flatten(0, 1))


def test_scale_is_the_latents_times_it() -> None:
    latents = torch.randn(1, 7, 4, 3, 3)
    decode = VideoDecode(TinyDecoder().eval(), batch_size=4, settings=OFF)
    (piece,) = decode_stream(decode, latents, scale=0.5)
    assert torch.equal(piece, decode(latents * 0.5)[0])


def test_a_slow_reader_makes_the_decoder_wait() -> None:
    decoder = Counting()
    decode = VideoDecode(decoder, batch_size=2, settings=OFF)
    stream = decode_stream(decode, numbered(1, 100), batches=1, ring=3)
    for step, _ in enumerate(stream):
        time.sleep(0.02)
        if step == 10:
            break
        # A ring of three: one in use here, two ahead of it.
        assert len(decoder.seen) <= 2 * (step + 3)
    stream.close()
    assert len(decoder.seen) <= 2 * (10 + 4)


def test_memory_does_not_grow_with_the_length() -> None:
    """Of all the tensors that were decoded, no more than the ring's are alive at any time."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    class Watched(Counting):
        def forward(self, z: Tensor) -> Tensor:
            nonlocal most
            frames = super().forward(z)
            alive.add(frames)
            most = max(most, len(alive))
            return frames

    class Endless:
        shape = (1, 400, 4, 2, 2)

        def read(self, start: int, stop: int) -> Tensor:
            part = numbered(1, 400)[0, start:stop].clone()
            alive.add(part)
            return part

    decode = VideoDecode(Watched(), batch_size=4, settings=OFF)
    assert sum(len(piece) for piece in decode_stream(decode, Endless(), batches=1, ring=3)) == 400
    assert most <= 12


def drain(stream: Iterator[Tensor], into: list[float], limit: int = 10**9) -> None:
    """Notes the number of every frame; an OSError after `limit` of them, as of a disk that is full."""
    for piece in stream:
        into += piece[:, 0, 0, 0].tolist()
        if len(into) > limit:
            raise OSError("disk")


def raising(error: BaseException, place: int) -> Callable[[float], None]:
    def at(now: float) -> None:
        if now == place:
            raise error

    return at


@pytest.mark.parametrize("error", [DataError("bad"), KeyboardInterrupt(), MemoryError("none left"), SystemExit(3)])
def test_an_exception_of_the_reader_comes_after_the_pieces_before_it(error: BaseException) -> None:
    class Broken:
        shape = (1, 40, 4, 2, 2)

        def read(self, start: int, stop: int) -> Tensor:
            if start == 12:
                raise error
            return numbered(1, 40)[0, start:stop]

    decode, got = VideoDecode(Counting(), batch_size=4, settings=OFF), []
    with pytest.raises(type(error)) as caught:
        drain(decode_stream(decode, Broken(), batches=1), got)
    assert caught.value is error
    assert got == list(range(12))


def test_an_exception_of_the_decoder() -> None:
    decoder, got = Counting(), []
    decoder.at = raising(ValueError("no such frame"), 21)
    with pytest.raises(ValueError, match="no such frame"):
        drain(decode_stream(VideoDecode(decoder, batch_size=4, settings=OFF), numbered(1, 40), batches=1), got)
    assert got == list(range(20))


def test_memory_that_runs_out_is_told() -> None:
    decoder = Counting()
    decoder.at = raising(MemoryError("out of memory"), 9)
    with pytest.raises(DecodeMemoryError):
        list(decode_stream(VideoDecode(decoder, batch_size=4, settings=OFF), numbered(1, 40)))


def test_an_exception_of_the_caller_ends_the_threads() -> None:
    decoder = Counting()
    with pytest.raises(OSError, match="disk"):
        drain(decode_stream(VideoDecode(decoder, batch_size=1, settings=OFF), numbered(1, 1000), batches=1), [], 2)
    gc.collect()
    assert threads() == set()
    assert len(decoder.seen) < 10


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_early_ends_the_threads(taken: int) -> None:
    stream = decode_stream(VideoDecode(Counting(), batch_size=1, settings=OFF), numbered(1, 1000), batches=1)
    for _ in range(taken):
        next(stream)
    stream.close()
    assert threads() == set()


def test_bad_arguments_and_shapes() -> None:
    decode = VideoDecode(Counting(), batch_size=1, settings=OFF)
    for bad in ({"batches": 0}, {"ring": 1}):
        with pytest.raises(ConfigError, match="batches must be >= 1 and ring >= 2"):
            decode_stream(decode, numbered(1, 2), **bad)
    for shape in ((2, 4, 2, 2), (1, 2, 5, 2, 2)):
        with pytest.raises(LatentShapeError):
            next(decode_stream(decode, torch.zeros(shape)))


def test_spent_says_where_the_time_went() -> None:
    decoder, spent = Counting(), Spent()
    decoder.at = lambda place: time.sleep(0.002)
    list(decode_stream(VideoDecode(decoder, batch_size=4, settings=OFF), numbered(1, 40), spent=spent))
    assert spent.seconds["decode"] >= 0.08
    assert set(spent.seconds) == {"read", "decode"}


def test_channel_and_ahead() -> None:
    channel: Channel[int] = Channel(1)
    channel.put(1)
    channel.close()
    assert channel.get() == 1
    for call in (channel.get, lambda: channel.put(2)):
        with pytest.raises(ChannelClosedError):
            call()
    closed = []

    def source() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            closed.append(threading.current_thread().name)

    stream = ahead(source(), depth=2, name="owl-wms-test")
    assert [next(stream), next(stream)] == [0, 1]
    stream.close()
    assert closed == ["owl-wms-test"]


@pytest.mark.gpu
@pytest.mark.parametrize("output", ["bf16", "uint8"])
def test_on_a_gpu_the_bits_are_the_plain_decodes(output: str) -> None:
    decoder = TinyDecoder().cuda().bfloat16().eval()
    decode = VideoDecode(decoder, batch_size=4, settings=OFF, output=output)
    latents = torch.randn(3, 37, 4, 45, 80)
    whole = decode(latents.cuda()).flatten(0, 1).cpu()
    for source in (latents, latents.cuda()):
        for ring in (2, 5):
            pieces = []
            for frames in decode_stream(decode, source, batches=2, ring=ring):
                assert frames.device.type == "cpu"
                assert frames.is_pinned()
                pieces.append(frames.clone())
                time.sleep(0.005)  # a piece stays what it is while the next ones are decoded and copied
                assert torch.equal(pieces[-1], frames)
            assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.gpu
def test_on_a_gpu_the_callers_stream_comes_first() -> None:
    """Latents that the caller's own stream is still making are not decoded before they are made."""
    decode = VideoDecode(TinyDecoder().cuda().eval(), batch_size=4, settings=OFF, output="uint8")
    latents = torch.randn(1, 16, 4, 32, 32, device="cuda")
    want = decode(latents).flatten(0, 1).cpu()
    decode(torch.zeros_like(latents))
    late = torch.zeros_like(latents)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        late.copy_(latents)
        got = torch.cat([frames.clone() for frames in decode_stream(decode, late)])
    assert torch.equal(got, want)


@pytest.mark.gpu
def test_on_a_gpu_memory_does_not_grow_with_the_length() -> None:
    decode = VideoDecode(TinyDecoder().cuda().bfloat16().eval(), batch_size=8, settings=OFF, output="uint8")
    latents = torch.randn(1, 64, 4, 45, 80)

    def most(clips: int) -> int:
        torch.cuda.reset_peak_memory_stats()
        for _ in decode_stream(decode, latents.expand(clips, -1, -1, -1, -1)):
            time.sleep(0.005)  # longer than a piece takes: every place that may wait for a slow caller is in use
        return torch.cuda.max_memory_allocated()

    most(1)
    assert most(40) < 1.2 * most(10) + 2**20


SLOW = """
import sys, time, torch
from tests.runtime.test_stream import Counting, OFF, numbered, threads
from owl_wms.runtime import VideoDecode, decode_stream
decoder = Counting()
decoder.at = lambda place: time.sleep(0.05)
try:
    for piece in decode_stream(VideoDecode(decoder, batch_size=1, settings=OFF), numbered(1, 10_000), batches=1):
        print("piece", flush=True)
except KeyboardInterrupt:
    print("interrupted", sorted(threads()), flush=True)
"""


def test_ctrl_c_ends_it_at_once() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW],
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "piece\n"
    child.send_signal(signal.SIGINT)
    rest: Any = child.communicate(timeout=120)[0]  # to its end it would take 500 s
    assert rest.endswith("interrupted []\n")
    assert rest.count("piece") < 1000
    assert child.returncode == 0
