"""diffusers' SanaPipeline, real classes and tiny random weights, with its decoder accelerated: the same images.

Programs come from a stand-in for TensorRT (torch.export), so that all of it runs without a GPU.

Run: python -m pytest tests/runtime/test_sana_pipeline.py
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import owl_wms
from owl_wms.runtime.accelerated import AcceleratedDecoder
from tests.runtime.sana import LATENTS, autoencoder, picture, pipeline
from tests.runtime.toolchains import ExportToolchain

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
CLOSE = {"rtol": 0.0, "atol": 1e-5}  # of images in [0, 1]


@pytest.fixture(scope="module")
def plain() -> Any:
    return pipeline()


@pytest.fixture
def fast(plain: Any, tmp_path: Path) -> Any:
    """A pipeline of its own; the plain one is left alone."""
    pipe = copy.deepcopy(plain)
    made = owl_wms.accelerate(pipe, cache_dir=tmp_path / "cache", toolchain=ExportToolchain(salt=str(tmp_path)))
    assert made is pipe
    assert isinstance(pipe.vae.decoder, AcceleratedDecoder)
    return pipe


def same(fast: Any, plain: Any, batch: int = 1) -> None:
    torch.testing.assert_close(picture(fast, batch), picture(plain, batch), **CLOSE)


def test_the_images_are_those_of_the_plain_pipeline(fast: Any, plain: Any) -> None:
    same(fast, plain)
    same(fast, plain, batch=2)
    same(fast, plain)
    stats = fast.vae.decoder.stats()
    assert stats.program_calls >= 2
    assert (1, LATENTS, 32, 32) in stats.ways


def test_slicing_and_tiling(fast: Any, plain: Any) -> None:
    for pipe in (fast, plain):
        pipe.vae.enable_slicing()
        pipe.vae.enable_tiling(32, 32, 24, 24)
    same(fast, plain, batch=2)
    stats = fast.vae.decoder.stats()
    assert stats.pytorch == {}
    sides = {shape[2:] for shape in stats.ways}
    assert sides == {(16, 16), (8, 16), (16, 8), (8, 8)}, "the tiles of the middle, of both edges and of the corner"
    assert {shape[0] for shape in stats.ways} == {1}
    for pipe in (fast, plain):
        pipe.vae.disable_slicing()
        pipe.vae.disable_tiling()
    same(fast, plain, batch=2)


def test_model_offload_hooks_move_it_and_keep_its_programs(fast: Any, plain: Any) -> None:
    """What enable_model_cpu_offload hangs onto the autoencoder, with the CPU in the place of the GPU."""
    from accelerate.hooks import CpuOffload, add_hook_to_module, remove_hook_from_module

    same(fast, plain)
    built = fast.vae.decoder.stats().programs[1].builds
    add_hook_to_module(fast.vae, CpuOffload("cpu"), append=True)
    same(fast, plain)
    fast.vae._apply(torch.clone)  # a move to another device and back
    same(fast, plain)
    remove_hook_from_module(fast.vae)
    assert fast.vae.decoder.stats().programs[1].builds == built
    assert fast.vae.decoder.stats().program_calls == 3


def test_sequential_offload_is_pytorchs(fast: Any, plain: Any) -> None:
    """It keeps the weights of every layer elsewhere until that layer runs, so no program can be compared with them."""
    from accelerate import cpu_offload

    same(fast, plain)
    cpu_offload(fast.vae, torch.device("cpu"))
    same(fast, plain)
    assert fast.vae.decoder.stats().program_calls == 1


def test_a_deep_copy_is_whole_and_apart(fast: Any, plain: Any) -> None:
    same(fast, plain)
    twin = copy.deepcopy(fast)
    assert isinstance(twin.vae.decoder, AcceleratedDecoder)
    with torch.no_grad():
        twin.vae.decoder.conv_out.bias.add_(0.25)
    same(fast, plain)
    assert (picture(twin) - picture(plain)).abs().max() > 0.05


def test_saved_and_loaded_again(fast: Any, plain: Any, tmp_path: Path) -> None:
    from diffusers import AutoencoderDC

    same(fast, plain)
    fast.vae.save_pretrained(tmp_path / "vae")
    loaded = AutoencoderDC.from_pretrained(tmp_path / "vae").eval()
    assert list(loaded.state_dict()) == list(plain.vae.state_dict())
    fast.vae = loaded
    same(fast, plain)
    owl_wms.accelerate(fast, cache_dir=tmp_path / "cache", toolchain=ExportToolchain(salt=str(tmp_path)))
    same(fast, plain)
    assert fast.vae.decoder.stats().programs[1].hits == 1


def test_weights_loaded_into_it(fast: Any, plain: Any) -> None:
    same(fast, plain)
    other = copy.deepcopy(plain)
    with torch.no_grad():
        for parameter in other.vae.decoder.parameters():
            parameter.mul_(1.1)
    fast.vae.load_state_dict(other.vae.state_dict())
    same(fast, other)


def test_casts_and_the_original_put_back(fast: Any, plain: Any) -> None:
    z = torch.randn(1, LATENTS, 4, 4)
    fast.vae.to(torch.bfloat16)
    other = copy.deepcopy(plain.vae).to(torch.bfloat16)
    with torch.no_grad():
        got, wanted = (vae.decode(z.bfloat16()).sample for vae in (fast.vae, other))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-2)
    fast.vae.to(torch.float32)
    fast.vae.decoder = fast.vae.decoder.original
    assert type(fast.vae.decoder).__name__ == "Decoder"


def test_training_the_autoencoder_is_pytorchs() -> None:
    vae = autoencoder().train()
    fast = owl_wms.accelerate(copy.deepcopy(vae))
    x = torch.randn(1, 3, 16, 16)
    for model in (vae, fast):
        model(x).sample.square().mean().backward()
    for (name, a), (other, b) in zip(vae.named_parameters(), fast.named_parameters(), strict=True):
        assert name == other
        assert a.grad is not None, name
        assert torch.equal(a.grad, b.grad), name
