"""Decode functions as upstream's closures are used: copied, pickled, called by keyword, differentiated through."""

from __future__ import annotations

import copy
import functools
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from owl_wms import errors
from owl_wms.errors import ConfigError, DataError, NonFiniteError
from owl_wms.runtime import AudioDecode, VideoDecode
from owl_wms.runtime import slot as slot_module
from owl_wms.utils.owl_vae_bridge import make_batched_audio_decode_fn, make_batched_decode_fn
from owl_wms.vae import fold_weight_norm
from tests.runtime.toolchains import ExportToolchain, TinyDecoder, settings

LATENTS = torch.randn(1, 3, 4, 3, 3)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = fold_weight_norm(TinyDecoder().eval())  # torch refuses to pickle a live weight norm
        self.audio = nn.Conv1d(4, 2, 1)
        self.decode = make_batched_decode_fn(self.decoder, 2, output="uint8", check="always", timing=True)
        self.decode_audio = make_batched_audio_decode_fn(self.audio, 3)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_follow_the_copied_decoder(clone: Callable[[Any], Any]) -> None:
    holder = Holder()
    holder.decode(LATENTS)
    other = clone(holder)
    assert other.decode.decoder is other.decoder is not holder.decoder
    assert other.decode_audio.decoder is other.audio
    assert (other.decode.output, other.decode.check, other.decode.batch_size) == ("uint8", "always", 2)
    assert torch.equal(other.decode(LATENTS), holder.decode(LATENTS))
    assert other.decode.stats().latency_ms is not None
    with torch.no_grad():
        other.decoder.conv_out.bias.add_(1)
    assert not torch.equal(other.decode(LATENTS), holder.decode(LATENTS))
    assert other.decode_audio(torch.randn(1, 2, 4)).shape == (1, 2, 2)


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_errors_cross_to_another_process_as_they_are(clone: Callable[[Any], Any]) -> None:
    """A pool of processes that cannot read a worker's error waits for its result for ever."""
    for error in (
        errors.ConfigError("m", path="p", key="k"),
        errors.CheckpointError("m", path="p", mismatch="q"),
        errors.LatentShapeError("m", got=(1,), expected="x"),
        errors.DataError("m", path="p", index=3),
        errors.BatchError("m", out="o"),
        errors.TrainingError("m", step=3),
        errors.FastPathError("run", "reason", "remedy"),
        errors.NoDeviceError("reason", "remedy"),
        errors.DecodeMemoryError("m", frames=1, latent_shape=(1, 2, 3)),
        NonFiniteError("m", frame=1),
        errors.CacheCorruptError("m", path="p"),
    ):
        again = clone(error)
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_a_copy_keeps_a_toolchain_that_cannot_be_copied(tmp_path: Path) -> None:
    decode = VideoDecode(TinyDecoder(), batch_size=2, settings=settings(tmp_path), toolchain=ExportToolchain())
    frames, other = decode(LATENTS), copy.deepcopy(decode)
    assert torch.equal(other(LATENTS), frames)
    assert other.toolchain is decode.toolchain
    assert other.stats().hits == 1


def test_latents_by_keyword() -> None:
    decoder = TinyDecoder().eval()
    assert make_batched_decode_fn(decoder, 2)(x=LATENTS).shape == (1, 3, 3, 6, 6)
    assert make_batched_audio_decode_fn(nn.Conv1d(4, 2, 1))(x=torch.randn(1, 5, 4)).shape == (1, 5, 2)


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("frames", [0, 3])
def test_gradients_reach_latents_and_weights(folded: bool, frames: int) -> None:
    decoder: nn.Module = TinyDecoder().eval()
    decoder = fold_weight_norm(decoder) if folded else decoder
    decode = make_batched_decode_fn(decoder, 2)
    latents = torch.randn(1, frames, 4, 3, 3, requires_grad=True)
    out = decode(latents)
    assert out.dtype == torch.bfloat16
    assert out.shape == (1, frames, 3, 6, 6)
    out.float().square().sum().backward()
    got, of_weights = latents.grad, [weight.grad for weight in decoder.parameters()]
    twin = latents.detach().clone().requires_grad_()
    decoder.zero_grad()
    decoder(twin.flatten(0, 1)).bfloat16().float().square().sum().backward()
    assert got is not None
    assert torch.allclose(got, twin.grad, atol=1e-4)
    assert all(torch.allclose(a, b.grad, atol=1e-3) for a, b in zip(of_weights, decoder.parameters(), strict=True))


def test_no_graph_where_none_is_asked_for(tmp_path: Path) -> None:
    decoder = TinyDecoder().eval()  # its weights ask for gradients
    toolchain = ExportToolchain()
    decode = VideoDecode(decoder, batch_size=2, settings=settings(tmp_path), toolchain=toolchain)
    asking = LATENTS.clone().requires_grad_()
    assert not decode(LATENTS).requires_grad
    with torch.no_grad():
        assert not decode(asking).requires_grad
    runs = toolchain.runs
    assert decode(asking).requires_grad
    assert toolchain.runs == runs
    assert not VideoDecode(decoder, batch_size=2, output="uint8")(asking).requires_grad


def test_gradients_through_a_decoder_in_train_mode_and_through_audio() -> None:
    latents = LATENTS.clone().requires_grad_()
    make_batched_decode_fn(TinyDecoder().train(), 2)(latents).float().sum().backward()
    assert latents.grad is not None
    clips = torch.randn(2, 5, 4, requires_grad=True)
    samples = AudioDecode(nn.Conv1d(4, 2, 1), batch_size=1)(clips)
    samples.float().sum().backward()
    assert samples.shape == (2, 5, 2)
    assert clips.grad is not None


def test_gradients_after_a_decode_in_inference_mode() -> None:
    decode = make_batched_decode_fn(TinyDecoder().train(), 2)
    sound = AudioDecode(nn.Sequential(weight_norm(nn.Conv1d(4, 2, 1))).train(), batch_size=1)
    for run, shape in ((decode, LATENTS.shape), (sound, (2, 5, 4))):
        with torch.inference_mode():
            run(torch.randn(shape))
        latents = torch.randn(shape, requires_grad=True)
        run(latents).float().sum().backward()
        assert latents.grad is not None


# ---- values that are not finite


class Overflowing(TinyDecoder):
    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return super().forward(z) * torch.where(z.abs().amax() > 50, float("inf"), 1.0)


@pytest.mark.parametrize("output", ["bf16", "uint8"])
@pytest.mark.parametrize("compiled", [True, False])
def test_frames_that_are_not_finite_are_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, compiled: bool, output: str
) -> None:
    decode = VideoDecode(
        Overflowing().eval(),
        batch_size=2,
        settings=settings(tmp_path, enabled=compiled),
        toolchain=ExportToolchain(),
        output=output,
    )
    decode(LATENTS)
    assert not [record for record in caplog.records if "finite" in record.getMessage()]
    bad = torch.cat([LATENTS, LATENTS * 1e4], 1)
    for _ in range(2):
        decode(bad)
    (record,) = [record for record in caplog.records if "finite" in record.getMessage()]
    assert record.levelname == "WARNING"
    assert "frames 2 to 3 have values that are not finite (NaN or infinite) in float32" in record.getMessage()
    assert decode.stats().non_finite == 8
    assert decode.stats().backend == ("export" if compiled else "pytorch")


@pytest.mark.parametrize("compiled", [True, False])
def test_check_error_raises(tmp_path: Path, compiled: bool) -> None:
    chosen = settings(tmp_path, enabled=compiled)
    decode = VideoDecode(
        Overflowing().eval(), batch_size=2, settings=chosen, toolchain=ExportToolchain(), check="error"
    )
    for _ in range(20):  # every call is looked at, not a sample of them
        decode(LATENTS)
    with pytest.raises(NonFiniteError, match="frames 0 to 1 have values that are not finite") as caught:
        decode(LATENTS * 1e4)
    assert caught.value.frame == 0
    with pytest.raises(ConfigError, match="check must be one of"):
        VideoDecode(TinyDecoder(), batch_size=2, check="errors")


def test_half_precision_names_a_wider_dtype(caplog: pytest.LogCaptureFixture) -> None:
    decoder = TinyDecoder().eval()
    with torch.no_grad():
        decoder.conv_out.bias.fill_(6e4)
    decode = VideoDecode(decoder.half(), batch_size=2)
    for _ in range(100):
        decode(LATENTS)
    decode(LATENTS * 3e4)
    assert "in float16; decode in a wider dtype (bf16, fp32)" in caplog.text


def test_sound_that_is_not_finite_is_told_once_or_raises(caplog: pytest.LogCaptureFixture) -> None:
    audio, clips = nn.Conv1d(4, 2, 1), torch.randn(3, 5, 4)
    decode = make_batched_audio_decode_fn(audio, 2)
    decode(clips)
    assert not caplog.records
    bad = clips.index_fill(0, torch.tensor([2]), torch.nan)
    for _ in range(2):
        assert bool(decode(bad)[:2].isfinite().all())
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "the sound of clips 2 to 2 has values that are not finite (NaN or infinite) in float32" in record.message
    for strict in (
        make_batched_audio_decode_fn(audio, 2, check="error"),
        AudioDecode(audio, batch_size=2, check="error"),
    ):
        copied = pickle.loads(pickle.dumps(copy.deepcopy(strict)))
        for _ in range(20):
            copied(clips)
        with pytest.raises(NonFiniteError, match="look at the latents and weights") as caught:
            copied(bad)
        assert caught.value.frame == 2
    half = AudioDecode(copy.deepcopy(audio).half(), batch_size=2)
    for _ in range(100):
        half(clips)
    half(clips * 1e6)
    assert "in float16; decode in a wider dtype (bf16, fp32)" in caplog.text
    with pytest.raises(ConfigError, match="check must be one of auto, always"):
        AudioDecode(audio, batch_size=1, check="canary")


# ---- a caller's signal


class JobTimeout(Exception):
    pass


def alarm(*_: object) -> None:
    raise JobTimeout


class Raises:
    def __call__(self, *_: object) -> None:
        alarm()


@pytest.mark.parametrize("handler", [alarm, functools.partial(alarm), Raises(), Raises().__call__])
@pytest.mark.parametrize("step", ["ready", "key_material", "build", "load"])
def test_a_signal_of_the_caller_passes_through_and_nothing_is_remembered(
    tmp_path: Path, step: str, handler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolchain = ExportToolchain()
    plain = getattr(toolchain, step)
    pending = [True]

    def slow(*args: Any) -> Any:
        if pending.pop() if pending else False:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.01)
                time.sleep(5)
            except JobTimeout as error:
                if step == "load":  # a library may word it in its own way
                    raise RuntimeError("reading was interrupted") from error
                raise
        return plain(*args)

    setattr(toolchain, step, slow)
    decode = VideoDecode(TinyDecoder().eval(), batch_size=2, settings=settings(tmp_path), toolchain=toolchain)
    before = signal.signal(signal.SIGALRM, handler)
    try:
        with pytest.raises(JobTimeout):
            decode(LATENTS)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert decode(LATENTS).isfinite().all()  # at once, for a second attempt would run into the same limit
    assert toolchain.runs == 0
    assert decode.stats().backend == "pytorch"
    assert "exception of the caller's" in decode.stats().reason
    later = time.monotonic() + slot_module.REST_SECONDS
    with monkeypatch.context() as patched:
        patched.setattr(slot_module.time, "monotonic", lambda: later)
        assert decode(LATENTS).isfinite().all()
    assert decode.stats().backend == "export"
    assert not decode.stats().failures


def test_latents_under_vmap_are_refused_and_no_fault_of_the_program(tmp_path: Path) -> None:
    toolchain = ExportToolchain(salt=str(tmp_path))
    decode = VideoDecode(TinyDecoder().eval(), batch_size=2, settings=settings(tmp_path), toolchain=toolchain)
    with pytest.raises(
        DataError, match=r"under torch\.vmap cannot be decoded; give them as one batch \[b, n, 4, h, w\]"
    ):
        torch.vmap(decode)(LATENTS[None])
    decode(LATENTS)
    assert decode.stats().fallbacks == 0
