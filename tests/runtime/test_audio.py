"""Audio: upstream's results, batch by clips, any strides."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from owl_wms.errors import ConfigError, DecodeMemoryError, LatentShapeError
from owl_wms.runtime import AudioDecode


class TinyAudio(nn.Module):
    """`[B, 3, n] -> [B, 2, 5n]`; notes its batch sizes."""

    latent_channels = 3

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(3, 2, 5, stride=5)
        self.sizes: list[int] = []

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(z))
        return self.up(z)


def test_result_and_batches() -> None:
    decoder = TinyAudio().eval()
    latents = torch.randn(10, 7, 3)
    samples = AudioDecode(decoder, batch_size=4)(latents)
    assert samples.shape == (10, 35, 2)
    assert samples.dtype == torch.bfloat16
    assert not samples.requires_grad
    assert decoder.sizes == [4, 4, 2]
    with torch.no_grad():
        expected = decoder.up(latents.transpose(1, 2)).transpose(1, 2).to(torch.bfloat16)
    assert torch.equal(samples, expected)


def test_strides_no_clips_and_wrong_shapes() -> None:
    decode = AudioDecode(TinyAudio().eval(), batch_size=4)
    latents = torch.randn(3, 14, 7).transpose(1, 2)[:, :, ::2][:, :, :3]
    assert torch.equal(decode(latents), decode(latents.contiguous()))
    assert decode(torch.zeros(0, 7, 3)).shape == (0, 35, 2)
    with pytest.raises(LatentShapeError, match=r"\[b, n, 3\].*got \[1, 7, 4\]"):
        decode(torch.zeros(1, 7, 4))
    with pytest.raises(LatentShapeError, match="rank 3, got rank 2"):
        decode(torch.zeros(7, 3))
    with pytest.raises(ConfigError, match="batch_size"):
        AudioDecode(TinyAudio(), batch_size=0)


@pytest.mark.parametrize(("shape", "expected"), [((2, 0, 3), (2, 0, 2)), ((0, 0, 3), (0, 0, 2))])
def test_no_latents_are_no_samples(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    samples = AudioDecode(TinyAudio().eval(), batch_size=4)(torch.zeros(shape))
    assert (tuple(samples.shape), samples.dtype) == (expected, torch.bfloat16)


def test_one_clip_too_large() -> None:
    class Full(TinyAudio):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(DecodeMemoryError):
        AudioDecode(Full(), batch_size=4)(torch.zeros(2, 7, 3))


def test_nothing_is_kept_from_a_graph_that_the_caller_records(monkeypatch: pytest.MonkeyPatch) -> None:
    decode, latents = AudioDecode(TinyAudio().eval(), batch_size=4), torch.randn(3, 7, 3)
    with monkeypatch.context() as while_recording:
        while_recording.setattr(torch.cuda, "is_initialized", lambda: True)
        while_recording.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        recorded = decode(latents)
    assert decode._eager is None
    assert torch.equal(decode(latents), recorded)
    assert decode._eager is not None
