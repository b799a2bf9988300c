"""`owl_wms.accelerate` on a GPU, with programs that TensorRT builds.

Run: python -m pytest -m gpu tests/runtime/test_accelerate_gpu.py
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import owl_wms
from tests.runtime.sana import LATENTS, autoencoder

pytest.importorskip("diffusers")


@pytest.mark.gpu
@torch.no_grad()
def test_on_the_gpu_with_real_programs_and_real_offloading(tmp_path: Path) -> None:
    """Wide enough for our kernels; TensorRT builds, so this takes a minute or two."""
    widths = {"encoder_block_out_channels": (128, 128), "decoder_block_out_channels": (128, 128)}
    plain = autoencoder(**widths, attention_head_dim=32).to("cuda", torch.bfloat16)
    fast = owl_wms.accelerate(copy.deepcopy(plain), cache_dir=tmp_path)
    z = torch.randn(2, LATENTS, 32, 32, device="cuda").bfloat16()
    wanted = copy.deepcopy(plain).float().decode(z.float()).sample
    eager = (plain.decode(z).sample - wanted).norm()

    def error() -> float:
        got = fast.decode(z).sample
        assert got.dtype == torch.bfloat16
        return float((got - wanted).norm() / eager)

    assert error() <= 1.2
    stats = fast.decoder.stats()
    assert stats.program_calls == 1, stats
    fast.to("cpu")
    fast.to("cuda")
    assert error() <= 1.2
    stats = fast.decoder.stats()
    assert (stats.program_calls, stats.programs[2].builds, stats.programs[2].hits) == (2, 1, 0)
    z = z[:1]
    wanted, eager = wanted[:1], (plain.decode(z).sample - wanted[:1]).norm()
    assert error() <= 1.2
    with pytest.raises(RuntimeError):  # PyTorch's own, as from the plain decoder
        fast.decoder(z.cpu())
    before = fast.decoder(z)
    launched = fast.decoder(z)
    for parameter in fast.decoder.parameters():  # while the GPU still works on the call before
        parameter.mul_(1.1)
    assert torch.equal(launched, before)
    assert error() > 1.2
    again = fast.decoder(z)
    assert (again - fast.decoder.original(z)).norm() <= 4 * eager
