"""The fused form of diffusers' AutoencoderDC decoder equals the decoder, exports whole, refuses the rest.

Run: python -m pytest tests/fused/test_sana.py
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from owl_wms.fused.convolution import Conv3x3
from owl_wms.fused.sana import fold_batch_norm, fuse, supports
from owl_wms.request import Request
from owl_wms.trt import plans
from owl_wms.trt.graph.recording import Recording
from owl_wms.trt.graph.shapes import record_shapes
from owl_wms.trt.rewrites.apply import apply_rewrites

pytest.importorskip("diffusers")
pytest.importorskip("triton")


def make(**changes: object) -> nn.Module:
    """A four-stage sana decoder, 8 latent channels, every norm away from its neutral values."""
    from diffusers.models.autoencoders.autoencoder_dc import Decoder

    torch.manual_seed(3)
    values: dict[str, object] = {
        "in_channels": 3,
        "latent_channels": 8,
        "attention_head_dim": 8,
        "block_type": ["ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"],
        "block_out_channels": [8, 16, 32, 32],
        "layers_per_block": [0, 2, 1, 2],
        "qkv_multiscales": [[], [], [], []],
        "norm_type": ["batch_norm", "batch_norm", "rms_norm", "rms_norm"],
        "act_fn": ["relu", "relu", "silu", "silu"],
    }
    decoder = Decoder(**{**values, **changes}).eval().requires_grad_(False)
    for module in decoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.BatchNorm2d) or type(module).__name__ == "RMSNorm":
            module.weight.normal_(1, 0.3)
            module.bias.normal_()
    return decoder


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert got.shape == wanted.shape
    return (torch.linalg.vector_norm(got - wanted) / torch.linalg.vector_norm(wanted)).item()


@pytest.mark.parametrize("shape", [(2, 8, 4, 4), (1, 8, 2, 3), (1, 8, 3, 5)])
@torch.no_grad()
def test_fused_equals_diffusers(shape: tuple[int, ...]) -> None:
    decoder = make()
    z = torch.randn(shape)
    assert error(fuse(decoder, torch.float32, shape)(z), decoder(z)) < 1e-5


F32C32 = {
    "block_out_channels": [8, 16, 32, 32],
    "layers_per_block": [2, 2, 1, 2],
    "qkv_multiscales": [[], [], [5], [5]],
    "norm_type": "rms_norm",
    "act_fn": "silu",
    "upsample_block_type": "interpolate",
}
"""The Sana pipelines' decoder, tiny."""
VARIANTS: dict[str, dict[str, object]] = {
    "f32c32 of Sana": F32C32,
    "f32c32 of the first release": {"block_out_channels": [8, 16, 16, 32], "layers_per_block": [0, 2, 2, 1]},
    "f64c128": {
        "latent_channels": 16,
        "block_type": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 2,
        "block_out_channels": [8, 16, 16, 32, 64],
        "layers_per_block": [0, 2, 2, 1, 1],
        "qkv_multiscales": [[]] * 5,
        "norm_type": ["batch_norm"] * 3 + ["rms_norm"] * 2,
        "act_fn": ["relu"] * 3 + ["silu"] * 2,
    },
    "f128c512": {
        "latent_channels": 64,
        "block_type": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        "block_out_channels": [8, 16, 16, 32, 64, 64],
        "layers_per_block": [0, 2, 1, 1, 1, 1],
        "qkv_multiscales": [[]] * 6,
        "norm_type": ["batch_norm"] * 3 + ["rms_norm"] * 3,
        "act_fn": ["relu"] * 3 + ["silu"] * 3,
    },
    "both norms, interpolated, enlarging at the end": {
        "layers_per_block": [0, 1, 1, 1],
        "qkv_multiscales": [[], [], [3], []],
        "norm_type": ["rms_norm", "batch_norm", "rms_norm", "rms_norm"],
        "act_fn": ["relu", "silu", "silu", "silu"],
        "upsample_block_type": "interpolate",
    },
    "pixel shuffle before a plain output": {"layers_per_block": [1, 1, 1, 1], "qkv_multiscales": [[], [], [], [5]]},
}


@pytest.mark.parametrize("size", [(4, 4), (2, 3), (1, 5)])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_every_released_configuration_equals_diffusers(name: str, size: tuple[int, int]) -> None:
    decoder = make(**VARIANTS[name])
    z = torch.randn(2, decoder.conv_in.in_channels, *size)
    assert error(fuse(decoder, torch.float32, tuple(z.shape))(z), decoder(z)) < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_clean_operators_equal_diffusers(name: str) -> None:
    decoder = make(**VARIANTS[name])
    z = torch.randn(2, decoder.conv_in.in_channels, 3, 4)
    wanted = decoder(z)
    done = apply_rewrites(
        decoder, record_shapes(decoder, tuple(z.shape)), ("replace_attention_operations", "replace_sana_operations")
    )
    assert all(done.values()), done
    assert not any(type(module).__name__ == "DCUpBlock2d" for module in decoder.modules())
    assert error(decoder(z), wanted) < 1e-5


@torch.no_grad()
def test_a_decoder_without_batch_norm_stages_or_input_shortcut() -> None:
    decoder = make(
        block_type=["ResBlock", "EfficientViTBlock", "EfficientViTBlock", "EfficientViTBlock"],
        norm_type=["batch_norm", "rms_norm", "rms_norm", "rms_norm"],
        block_out_channels=[8, 16, 16, 64],
        in_shortcut=False,
    )
    z = torch.randn(1, 8, 4, 4)
    assert error(fuse(decoder, torch.float32)(z), decoder(z)) < 1e-5


@torch.no_grad()
def test_batch_norm_folds_into_a_convolution_with_and_without_bias() -> None:
    norm = nn.BatchNorm2d(6).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.weight.normal_()
    norm.bias.normal_()
    x = torch.randn(1, 4, 5, 5)
    for bias in (False, True):
        conv = nn.Conv2d(4, 6, 3, padding=1, bias=bias)
        weight, shift = fold_batch_norm(conv, norm)
        assert error(nn.functional.conv2d(x, weight, shift, padding=1), norm(conv(x))) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", [{}, F32C32], ids=["first release", "Sana"])
@torch.no_grad()
def test_sixteen_bit_error_is_eagers_or_less(changes: dict[str, object], dtype: torch.dtype) -> None:
    decoder = make(**changes)
    z = torch.randn(1, 8, 4, 4).to(dtype)
    wanted = decoder(z.float())
    eager = make(**changes).to(dtype)(z).float()
    got = fuse(decoder, dtype)(z)
    assert got.dtype == dtype
    assert error(got.float(), wanted) <= 1.2 * error(eager, wanted)


@pytest.mark.parametrize("changes", [{}, F32C32], ids=["first release", "Sana"])
@torch.no_grad()
def test_the_whole_decoder_exports_as_ops_of_ours(changes: dict[str, object]) -> None:
    z = torch.randn(1, 8, 4, 4)
    fused = fuse(make(**changes), torch.float32)
    exported = torch.export.export(fused, (z,), strict=False)
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert targets
    assert all(target.startswith("owl_wms.") for target in targets)
    assert torch.equal(exported.module()(z), fused(z))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"qkv_multiscales": [[], [], [], [3, 5]]}, "one scale"),
        ({"norm_type": ["layer_norm"] * 2 + ["rms_norm"] * 2}, "batch norm"),
        ({"norm_type": ["batch_norm"] * 4}, "attention with RMS norm"),
        ({"act_fn": ["gelu"] * 4}, "ReLU or SiLU"),
        ({"conv_act_fn": "silu"}, "ReLU"),
        ({"layers_per_block": [1, 2, 1, 1], "in_channels": 9}, "output"),
        ({"in_channels": 5}, "output"),
    ],
)
def test_other_decoders_are_refused_with_a_reason(changes: dict[str, object], word: str) -> None:
    yes, why = supports(make(**changes))
    assert not yes
    assert word in why
    with pytest.raises(ValueError, match=word):
        fuse(make(**changes), torch.float32)


def test_plans_offer_it() -> None:
    request = Request(input_shape=(1, 8, 4, 4))
    recording = Recording.of(make(), request.input_shape)
    names = [plan.name for plan in plans.select(make(), request, recording).plans["fp16"]]
    assert {"tensorrt", "tensorrt+ops"} <= set(names)
    with torch.no_grad():
        module, _ = plans.PLANS["tensorrt+ops"].lower(make(), request, "fp16", recording)
        z = torch.randn(1, 8, 4, 4)
        assert error(module(z.half()).float(), make()(z)) < 2e-2
    assert all(conv.how == -1 for conv in module.modules() if isinstance(conv, Conv3x3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", [{"layers_per_block": [0, 1, 1, 1]}, F32C32], ids=["first release", "Sana"])
@torch.no_grad()
def test_on_the_gpu(changes: dict[str, object], dtype: torch.dtype) -> None:
    # The upper stages have the 128 channels that a norm in the convolution's kernel needs.
    widths = {**changes, "attention_head_dim": 16, "block_out_channels": [128, 128, 256, 256]}
    decoder = make(**widths).cuda()
    z = torch.randn(1, 8, 32, 32, device="cuda").to(dtype)  # wide enough for our convolution tiles
    wanted = decoder(z.float())
    eager = error(make(**widths).cuda().to(dtype)(z).float(), wanted)
    fused = fuse(decoder, dtype, tuple(z.shape))
    assert error(fused(z).float(), wanted) <= 1.2 * eager
