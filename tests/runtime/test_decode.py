"""VideoDecode where nothing fails: cached, built, padded, typed, and never changing the caller's module."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from owl_wms.errors import ConfigError, DataError, FastPathError, LatentShapeError
from owl_wms.ops.frame_bytes import frame_bytes
from owl_wms.runtime import VideoDecode
from owl_wms.vae import fold_weight_norm
from tests.runtime.toolchains import ExportToolchain, TinyDecoder, settings


def plain(decoder: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """The answer by definition: fold in fp32, run each frame, cast."""
    folded = fold_weight_norm(decoder).eval()
    with torch.no_grad():
        frames = folded(latents.reshape(-1, *latents.shape[2:]).to(next(folded.parameters()).dtype))
    return frames.to(torch.bfloat16).reshape(*latents.shape[:2], *frames.shape[1:])


def test_built_then_cached_then_the_same_bits(tmp_path: Path) -> None:
    decoder, latents = TinyDecoder().eval(), torch.randn(2, 4, 4, 3, 5)
    first, second = ExportToolchain(), ExportToolchain()
    one = VideoDecode(decoder, batch_size=4, settings=settings(tmp_path), toolchain=first)
    two = VideoDecode(decoder, batch_size=4, settings=settings(tmp_path), toolchain=second)
    built, cached = one(latents), two(latents)
    assert torch.equal(built, cached)
    torch.testing.assert_close(built.float(), plain(decoder, latents).float(), rtol=1e-2, atol=1e-3)
    assert (first.builds, one.stats().builds, one.stats().hits) == (1, 1, 0)
    assert (second.builds, two.stats().builds, two.stats().hits) == (0, 0, 1)
    state = two.stats()
    assert state.backend == "export"
    assert state.reason.startswith("cached program tiny_")
    assert state.chunks_program == 2
    assert state.chunks_pytorch == state.fallbacks == 0
    assert state.cache_bytes == sum(f.stat().st_size for f in (tmp_path / "cache").rglob("program.pt2"))
    assert state.programs[0]["plan"] == "export"


@pytest.mark.parametrize("enabled", [True, False])
def test_bytes_are_the_frames_clamped_and_rounded(tmp_path: Path, enabled: bool) -> None:
    decoder, latents = TinyDecoder().bfloat16().eval(), 3 * torch.randn(2, 5, 4, 3, 3)
    made = {
        output: VideoDecode(
            decoder,
            batch_size=4,
            settings=settings(tmp_path, enabled=enabled),
            toolchain=ExportToolchain(),
            output=output,
        )
        for output in ("bf16", "uint8")
    }
    frames, pictures = made["bf16"](latents), made["uint8"](latents)
    assert pictures.dtype == torch.uint8
    assert pictures.shape == (2, 5, 6, 6, 3)
    assert torch.equal(pictures.flatten(0, 1), frame_bytes(frames.flatten(0, 1)))
    assert made["uint8"](latents[:, :0]).shape == (2, 0, 6, 6, 3)
    assert made["uint8"].stats().hits == int(enabled), "both use one program"


def test_without_cache_nothing_is_kept(tmp_path: Path) -> None:
    toolchain = ExportToolchain()
    decode = VideoDecode(TinyDecoder(), batch_size=2, settings=settings(tmp_path, use_cache=False), toolchain=toolchain)
    decode(torch.randn(1, 2, 4, 3, 3))
    assert decode.stats().builds == toolchain.builds == 1
    assert not (tmp_path / "cache").exists()


def test_each_latent_shape_has_its_own_program(tmp_path: Path) -> None:
    toolchain = ExportToolchain()
    decode = VideoDecode(TinyDecoder(), batch_size=2, settings=settings(tmp_path), toolchain=toolchain)
    for size in (3, 4, 3, 4):
        assert decode(torch.randn(1, 3, 4, size, size)).shape == (1, 3, 3, 2 * size, 2 * size)
    assert toolchain.builds == 2
    assert [entry["shape"] for entry in decode.stats().programs] == [[2, 4, 3, 3], [2, 4, 4, 4]]


def test_one_output_is_allocated_and_filled(tmp_path: Path) -> None:
    decode = VideoDecode(TinyDecoder(), batch_size=4, settings=settings(tmp_path), toolchain=ExportToolchain())
    latents = torch.randn(2, 5, 4, 3, 3)
    frames = decode(latents)
    assert frames.is_contiguous()
    assert frames.dtype == torch.bfloat16
    assert not frames.requires_grad
    assert frames.untyped_storage().nbytes() == frames.numel() * 2


@pytest.mark.parametrize("enabled", [True, False])
def test_no_frames(tmp_path: Path, enabled: bool) -> None:
    decode = VideoDecode(
        TinyDecoder(), batch_size=4, settings=settings(tmp_path, enabled=enabled), toolchain=ExportToolchain()
    )
    for shape in ((2, 0, 4, 3, 5), (0, 7, 4, 3, 5)):
        frames = decode(torch.randn(shape))
        assert frames.shape == (*shape[:2], 3, 6, 10)
        assert frames.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("shape", "word"),
    [((4, 4, 3, 3), "rank 5, got rank 4"), ((1, 2, 5, 3, 3), "4 channels, got 5"), ((1, 2, 4, 0, 3), "at least 1")],
)
def test_wrong_shapes_show_both(tmp_path: Path, shape: tuple[int, ...], word: str) -> None:
    decode = VideoDecode(TinyDecoder(), batch_size=4, settings=settings(tmp_path, enabled=False))
    with pytest.raises(LatentShapeError, match=word) as caught:
        decode(torch.zeros(shape))
    assert isinstance(caught.value, ValueError)
    assert caught.value.got == shape
    assert str(list(shape)) in str(caught.value)
    assert "[b, n, 4, h, w]" in str(caught.value)


@pytest.mark.parametrize("shape", [(4, 3), (5, 3, 3), (4, 0, 3), (4, -1, 3)])
def test_nothing_is_built_for_a_shape_that_cannot_be_decoded(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    toolchain = ExportToolchain()
    decode = VideoDecode(TinyDecoder(), batch_size=4, settings=settings(tmp_path), toolchain=toolchain)
    with pytest.raises(LatentShapeError, match=r"must be \[b, n, 4, h, w\]"):
        decode.prepare(shape)
    assert toolchain.builds == 0


def test_what_is_no_latent_is_refused(tmp_path: Path) -> None:
    decode = VideoDecode(TinyDecoder(), batch_size=4, settings=settings(tmp_path, enabled=False))
    with pytest.raises(DataError, match=r"torch\.Tensor"):
        decode([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="complex64"):
        decode(torch.zeros(1, 1, 4, 3, 3, dtype=torch.complex64))


@pytest.mark.parametrize(("argument", "value"), [("batch_size", 0), ("check", "sometimes")])
def test_bad_arguments(argument: str, value: object) -> None:
    with pytest.raises(ConfigError, match=argument):
        VideoDecode(TinyDecoder(), **{"batch_size": 2, argument: value})  # type: ignore[arg-type]


def test_disabled_is_plain_pytorch_bit_for_bit(tmp_path: Path) -> None:
    decoder = TinyDecoder().bfloat16()
    toolchain = ExportToolchain()
    decode = VideoDecode(decoder, batch_size=8, settings=settings(tmp_path, enabled=False), toolchain=toolchain)
    latents = torch.randn(2, 4, 4, 3, 3)
    assert torch.equal(decode(latents), plain(decoder, latents))
    assert toolchain.builds == 0
    assert not (tmp_path / "cache").exists()
    assert decode.stats().backend == "pytorch"
    assert "enabled=False" in decode.stats().reason


@pytest.mark.parametrize("enabled", [True, False])
def test_the_callers_module_is_never_changed(tmp_path: Path, enabled: bool) -> None:
    decoder = TinyDecoder().train()
    decoder.conv_out.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    flags = [parameter.requires_grad for parameter in decoder.parameters()]
    decode = VideoDecode(
        decoder, batch_size=2, settings=settings(tmp_path, enabled=enabled), toolchain=ExportToolchain()
    )
    decode(torch.randn(1, 3, 4, 3, 3))
    assert decoder.training
    assert flags == [parameter.requires_grad for parameter in decoder.parameters()]
    assert before.keys() == decoder.state_dict().keys(), "weight norm stays live in the caller's module"
    assert all(torch.equal(before[name], tensor) for name, tensor in decoder.state_dict().items())


def test_folded_weights_are_shared_not_copied() -> None:
    decoder = fold_weight_norm(TinyDecoder()).train()
    decode = VideoDecode(decoder, batch_size=2)
    decode(torch.randn(1, 1, 4, 3, 3))
    assert decode._generation is not None
    pairs = zip(decode._generation.eager.module.parameters(), decoder.parameters(), strict=True)
    assert all(ours is theirs for ours, theirs in pairs)
    assert not decode._generation.eager.module.training


def test_changed_weights_are_noticed(tmp_path: Path) -> None:
    decoder, toolchain = TinyDecoder().eval(), ExportToolchain()
    decode = VideoDecode(decoder, batch_size=2, settings=settings(tmp_path), toolchain=toolchain)
    latents = torch.randn(1, 2, 4, 3, 3)
    before = decode(latents)
    with torch.no_grad():
        decoder.conv_out.bias.add_(1.0)  # type: ignore[union-attr, operator]
    after = decode(latents)
    torch.testing.assert_close(after.float(), before.float() + 1, rtol=1e-2, atol=1e-2)
    assert toolchain.builds == 2, "other weights are another key"


def test_moved_decoder_is_followed() -> None:
    decoder = TinyDecoder()
    decode = VideoDecode(decoder, batch_size=2)
    latents = torch.randn(1, 2, 4, 3, 3)
    decode(latents)
    decoder.to(torch.float64)
    assert torch.equal(decode(latents), plain(decoder, latents))


def test_autocast_around_does_not_change_the_answer() -> None:
    decode = VideoDecode(TinyDecoder(), batch_size=2)
    latents = torch.randn(1, 2, 4, 3, 3)
    expected = decode(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(decode(latents), expected)


def test_latents_of_another_size_than_the_autoencoders_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    decoder = TinyDecoder()
    decoder.config = SimpleNamespace(latent_size=3, sample_size=[360, 640])
    decode = VideoDecode(decoder, batch_size=2)
    with caplog.at_level(logging.INFO, "owl_wms"):
        decode(torch.randn(1, 2, 4, 3, 3))
        assert "latents are" not in caplog.text
        for _ in range(2):
            decode(torch.randn(1, 2, 4, 5, 3))
    assert caplog.text.count("latents are 5x3, the autoencoder's own are 3x3") == 1


def test_batch_size_is_capped_by_the_settings(tmp_path: Path) -> None:
    decode = VideoDecode(
        TinyDecoder(), batch_size=64, settings=settings(tmp_path, max_batch_size=3), toolchain=ExportToolchain()
    )
    decode(torch.randn(1, 7, 4, 3, 3))
    assert decode.stats().chunks_program == 3
    assert decode.stats().programs[0]["shape"] == [3, 4, 3, 3]


def test_prepare_builds_ahead(tmp_path: Path) -> None:
    toolchain = ExportToolchain()
    decode = VideoDecode(TinyDecoder(), batch_size=2, settings=settings(tmp_path), toolchain=toolchain)
    assert decode.stats().backend == "none"
    assert decode.prepare((4, 3, 3)).backend == "export"
    decode(torch.randn(1, 2, 4, 3, 3))
    assert toolchain.builds == 1


def test_timing_is_opt_in(tmp_path: Path) -> None:
    quiet = VideoDecode(TinyDecoder(), batch_size=2, settings=settings(tmp_path), toolchain=ExportToolchain())
    timed = VideoDecode(
        TinyDecoder(), batch_size=2, settings=settings(tmp_path), toolchain=ExportToolchain(), timing=True
    )
    latents = torch.randn(1, 6, 4, 3, 3)
    quiet(latents), timed(latents)
    assert quiet.stats().latency_ms is None
    measured = timed.stats().latency_ms
    assert measured is not None
    assert measured["samples"] == 3
    assert 0 < measured["p50"] <= measured["p90"] <= measured["p99"] < 60_000


def test_sixteen_threads_each_get_their_own_frames(tmp_path: Path) -> None:
    decoder, toolchain = TinyDecoder().eval(), ExportToolchain()
    decode = VideoDecode(decoder, batch_size=4, settings=settings(tmp_path), toolchain=toolchain)
    clips = [torch.full((1, 1 + i % 6, 4, 3, 3), float(i)) for i in range(16)]
    expected = [plain(decoder, clip) for clip in clips]
    wrong: list[str] = []

    def work(index: int) -> None:
        for _ in range(10):
            try:
                torch.testing.assert_close(decode(clips[index]).float(), expected[index].float(), rtol=2e-2, atol=1e-2)
            except Exception as error:
                wrong.append(f"{index}: {error}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert wrong == []
    state = decode.stats()
    assert toolchain.builds == 1
    assert state.decodes == 160
    assert state.fallbacks == 0
    assert state.chunks_program == sum(10 * -(-clip.shape[1] // 4) for clip in clips)


def test_two_decode_functions_build_once(tmp_path: Path) -> None:
    """What several ranks of one machine do: whoever is first builds, the others wait and load."""
    decoder, toolchain = TinyDecoder().eval(), ExportToolchain()
    functions = [VideoDecode(decoder, batch_size=2, settings=settings(tmp_path), toolchain=toolchain) for _ in range(6)]
    threads = [threading.Thread(target=f.prepare, args=((4, 3, 3),)) for f in functions]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert toolchain.builds == 1
    assert sum(f.stats().builds for f in functions) == 1
    assert sum(f.stats().hits for f in functions) == 5


@pytest.mark.parametrize("frames", [5, 0])
def test_what_a_caller_records_is_pytorchs_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: int) -> None:
    decoder, latents, toolchain = TinyDecoder().eval(), torch.randn(2, frames, 4, 3, 5), ExportToolchain()
    decode = VideoDecode(decoder, batch_size=4, settings=settings(tmp_path), toolchain=toolchain, timing=True)
    with monkeypatch.context() as recording:
        recording.setattr(torch.cuda, "is_initialized", lambda: True)
        recording.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        recorded = decode(latents)
        # Nothing that was computed while recording may serve later: in a capture it was never computed.
        assert decode._generation is None
        strict = VideoDecode(decoder, batch_size=4, settings=settings(tmp_path), toolchain=toolchain, strict=True)
        with pytest.raises(FastPathError, match="decode outside of the graph"):
            strict(latents)
    assert (toolchain.builds, toolchain.runs) == (0, 0)
    torch.testing.assert_close(recorded.float(), plain(decoder, latents).float(), rtol=1e-2, atol=1e-3)
    assert recorded.shape == decode(latents).shape
    assert (decode.stats().decodes, decode.stats().frames) == (2, 4 * frames)
