"""Every rewrite against the module it replaces, in float64 where the module allows it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from owl_wms.errors import FastPathError
from owl_wms.request import Request
from owl_wms.trt import plans
from owl_wms.trt.graph.recording import Recording
from owl_wms.trt.graph.shapes import fp32_copy, meta_copy, record_shapes
from owl_wms.trt.rewrites.apply import REWRITES, apply_rewrites
from owl_wms.trt.rewrites.resize import MatmulResize, bicubic_matrix, fitted
from tests.trt import decoders


@pytest.mark.parametrize(
    ("small", "large"), [((8, 8), (16, 16)), ((64, 64), (45, 80)), ((4, 2), (16, 8)), ((1, 1), (2, 2))]
)
def test_resize_is_torchs_bicubic(small: tuple[int, int], large: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *small, dtype=torch.float64)
    wanted = F.interpolate(x, size=large, mode="bicubic")
    assert torch.allclose(MatmulResize(small, large, dtype=torch.float64)(x), wanted, atol=1e-13)


def test_doubling_fits_bf16_but_for_two_border_rows_that_still_sum_to_one() -> None:
    matrix = bicubic_matrix(16, 32)
    narrow = fitted(matrix, torch.bfloat16)
    assert narrow is not None
    assert torch.equal(narrow.double()[2:-2], matrix[2:-2])
    assert torch.equal(narrow.double().sum(1), torch.ones(32, dtype=torch.float64))
    assert (narrow.double() - matrix).abs().max() <= 1 / 256
    half = fitted(matrix, torch.float16)
    assert half is not None
    assert torch.equal(half.double(), matrix)
    assert fitted(bicubic_matrix(512, 360), torch.bfloat16) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_resize_keeps_the_dtype_and_a_constant(dtype: torch.dtype) -> None:
    x = torch.full((1, 1, 8, 8), 0.75, dtype=dtype)
    for size in ((16, 16), (9, 17)):
        y = MatmulResize((8, 8), size, dtype=dtype)(x)
        assert y.dtype == dtype
        assert torch.equal(y, torch.full_like(y, 0.75))


@pytest.mark.parametrize("family", ["tiled", "learned", "square", "distill"])
@pytest.mark.parametrize("name", ["replace_bicubic", "replace_landscape_operations"])
def test_dcae_rewrites_change_nothing_in_float64(family: str, name: str) -> None:
    decoder, shape = decoders.make(family)
    reference = fp32_copy(decoder, "cpu").double()
    rewritten = copy.deepcopy(reference)
    places = apply_rewrites(rewritten, record_shapes(rewritten, shape), (name,))[name]
    assert places > 0 or (name, family) == ("replace_landscape_operations", "square")
    z = torch.randn(shape, dtype=torch.float64)
    assert torch.allclose(rewritten(z), reference(z), atol=1e-10)


@pytest.mark.parametrize("widths", [[16, 16, 32], [16, 32, 32], [16, 64, 64]])
@pytest.mark.parametrize("side", [2, 4])
def test_sana_rewrites_change_nothing(widths: list[int], side: int) -> None:
    from diffusers.models.autoencoders.autoencoder_dc import Decoder

    decoder = Decoder(
        in_channels=3,
        latent_channels=8,
        attention_head_dim=8,
        block_type=["ResBlock", "ResBlock", "EfficientViTBlock"],
        block_out_channels=widths,
        layers_per_block=[1, 1, 1],
        qkv_multiscales=[[], [], [5]],
        norm_type=["batch_norm", "rms_norm", "rms_norm"],
        act_fn=["relu", "silu", "silu"],
    )
    decoder = decoder.eval().double().requires_grad_(False)
    shape = (2, 8, side, side)
    z = torch.randn(shape, dtype=torch.float64)
    wanted = decoder(z)
    rewritten = copy.deepcopy(decoder)
    done = apply_rewrites(
        rewritten, record_shapes(rewritten, shape), ("replace_attention_operations", "replace_sana_operations")
    )
    assert done == {"replace_attention_operations": 1, "replace_sana_operations": 4}
    # The decoder itself goes through float32 inside norms and attention, so float32's rounding is what separates them.
    assert torch.allclose(rewritten(z), wanted, atol=2e-6)


def test_constants_live_where_the_weights_are() -> None:
    decoder, shape = decoders.make("tiled")
    module = meta_copy(fp32_copy(decoder, "cpu"))
    apply_rewrites(module, record_shapes(module, shape), tuple(REWRITES))
    assert {t.device.type for t in [*module.parameters(), *module.buffers()]} == {"meta"}


def test_plans_leave_the_decoder_alone_and_cast() -> None:
    decoder, shape = decoders.make("tiled")
    folded = fp32_copy(decoder, "cpu")
    request = Request(input_shape=shape)
    before = {name: t.clone() for name, t in folded.state_dict().items()}
    for name in ("tensorrt", "tensorrt-plain"):
        module, _ = plans.PLANS[name].lower(folded, request, "bf16", Recording.of(decoder, shape))
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert all(torch.equal(t, before[name]) for name, t in folded.state_dict().items())


def test_unknown_rewrite_is_named() -> None:
    with pytest.raises(FastPathError, match="replace_bicubic"):
        apply_rewrites(nn.Conv2d(1, 1, 1), {}, ("replace_cubic",))


def test_shapes_are_recorded_without_weights() -> None:
    decoder, shape = decoders.make("square")
    shapes = record_shapes(fp32_copy(decoder, "cpu"), shape)
    assert shapes[""] == shape
    assert shapes["blocks.1.up"][-2:] == (8, 8)
