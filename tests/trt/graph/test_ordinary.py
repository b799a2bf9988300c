"""The fused forms are offered only for a decoder that does what its configuration says."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from owl_wms.errors import FastPathError
from owl_wms.fused.dcae import standard
from owl_wms.request import Request
from owl_wms.trt.graph.ordinary import is_ordinary
from owl_wms.trt.graph.recording import Recording
from owl_wms.trt.graph.shapes import record_shapes
from owl_wms.trt.rewrites.apply import apply_rewrites
from owl_wms.vae import fold_weight_norm
from tests.trt import decoders

FAMILIES = ("tiled", "learned", "square", "distill")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoders_as_they_are_built(family: str, folded: bool, dtype: torch.dtype) -> None:
    decoder, shape = decoders.make(family)
    decoder = decoder.to(dtype)
    assert ordinary(fold_weight_norm(decoder) if folded else decoder.train(), shape)  # type: ignore[arg-type]
    assert ordinary(decoder.to(memory_format=torch.channels_last), shape)  # type: ignore[arg-type, call-overload]


def of_a_subclass(decoder: Any) -> None:
    class Clamped(type(decoder)):  # type: ignore[misc]
        def forward(self, z: Tensor) -> Tensor:
            return super().forward(z).clamp(-100, 100)

    decoder.__class__ = Clamped


def with_another_block(decoder: Any) -> None:
    block = next(module for module in decoder.modules() if type(module).__name__ == "ResBlock")

    class Steep(type(block)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.clamp_max(1000))

    block.__class__ = Steep


def with_a_replaced_convolution(decoder: Any) -> None:
    decoder.conv_in = nn.Sequential(decoder.conv_in, nn.Hardtanh(-100, 100))


def with_a_norm(decoder: Any) -> None:
    spectral_norm(decoder.conv_in if isinstance(decoder.conv_in, nn.Conv2d) else decoder.conv_in.proj)


def that_cannot_be_followed(decoder: Any) -> None:
    original = decoder.forward
    decoder.forward = types.MethodType(lambda self, z: original(z) * float(z.sum()), decoder)


def ordinary(decoder: Any, shape: tuple[int, ...]) -> bool:
    """As the plans ask it: of a decoder that has a recording."""
    try:
        recording = Recording.of(decoder, shape)
    except FastPathError:
        return False
    return is_ordinary(decoder, recording, standard)


ALTERATIONS = [of_a_subclass, with_another_block, with_a_replaced_convolution, with_a_norm, that_cannot_be_followed]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alter", ALTERATIONS)
def test_altered_ones_are_not(family: str, alter: Callable[[Any], None]) -> None:
    decoder, shape = decoders.make(family)
    alter(decoder)
    assert not ordinary(fold_weight_norm(decoder), shape)


@pytest.mark.parametrize("alter", ALTERATIONS[:4])
def test_altered_ones_have_plans_that_follow_their_forward(alter: Callable[[Any], None]) -> None:
    decoder, shape = decoders.make("tiled")
    spec = Request(input_shape=shape, precision="fp16")
    assert "tensorrt+ops" in decoders.plan_names(fold_weight_norm(decoder), spec, "fp16")
    alter(decoder)
    names = decoders.plan_names(fold_weight_norm(decoder), spec, "fp16")
    assert "tensorrt" in names
    assert "tensorrt+ops" not in names


def test_a_rewrite_leaves_subclasses_of_what_it_knows() -> None:
    decoder, shape = decoders.make("tiled")
    folded = fold_weight_norm(decoder).eval()
    up = next(module for module in folded.modules() if type(module).__name__ == "Upsample")

    class Doubling(type(up)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    up.__class__ = Doubling
    z = torch.randn(shape)
    with torch.no_grad():
        wanted = folded(z)
        apply_rewrites(folded, record_shapes(folded, shape), ("replace_bicubic", "replace_landscape_operations"))
        torch.testing.assert_close(folded(z), wanted, rtol=1e-3, atol=1e-4)
