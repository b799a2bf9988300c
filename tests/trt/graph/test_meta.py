"""The quick shape rules agree with torch's own in shape, dtype and strides, wherever they apply."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from owl_wms.trt.graph.meta import RULES, QuickShapes, result_of
from owl_wms.trt.graph.shapes import meta_copy, module_dtype, record_shapes
from owl_wms.vae import fold_weight_norm
from tests.trt import decoders

aten = torch.ops.aten
SIZES = st.integers(1, 6)
FLOATS = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
LAYOUTS = st.sampled_from(["rows", "channels last", "transposed", "sliced", "expanded"])


@st.composite
def images(draw: st.DrawFn, channels: int | None = None) -> Tensor:
    """A meta tensor `[b, c, h, w]` in one of several memory orders."""
    dtype, layout = draw(FLOATS), draw(LAYOUTS)
    b, c, h, w = draw(SIZES), channels or draw(SIZES), draw(SIZES), draw(SIZES)
    x = torch.empty((b, c, h, w), dtype=dtype, device="meta")
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = torch.empty((b, c, w, h), dtype=dtype, device="meta").transpose(2, 3)
    elif layout == "sliced":
        x = torch.empty((b, c, h, w + 2), dtype=dtype, device="meta")[..., 1:-1]
    elif layout == "expanded":
        x = torch.empty((1, c, h, w), dtype=dtype, device="meta").expand(b, c, h, w)
    return x


def same(func: Any, *args: Any) -> None:
    """`answer` gives what `func` gives, or raises where it raises."""
    try:
        wanted = func(*args)
    except Exception as error:
        with pytest.raises(type(error)):
            result_of(func, args, {})
        return
    got = result_of(func, args, {})
    assert (got.shape, got.dtype, got.stride(), got.device) == (
        wanted.shape,
        wanted.dtype,
        wanted.stride(),
        wanted.device,
    )


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_convolution(data: st.DataObject) -> None:
    groups, wide, out = data.draw(st.integers(1, 3)), data.draw(SIZES), data.draw(SIZES)
    x = data.draw(images(channels=data.draw(st.sampled_from([groups * wide, groups * wide, wide + 1]))))
    shape = (groups * out, wide, data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)))
    weight = torch.empty(shape, dtype=data.draw(st.sampled_from([x.dtype, x.dtype, torch.float64])), device="meta")
    if data.draw(st.booleans()):
        weight = weight.contiguous(memory_format=torch.channels_last)
    bias = torch.empty(groups * out, dtype=x.dtype, device="meta") if data.draw(st.booleans()) else None
    pair = st.lists(st.integers(1, 2), min_size=2, max_size=2)
    padding = data.draw(st.lists(st.integers(0, 2), min_size=2, max_size=2))
    transposed = data.draw(st.sampled_from([False, False, True]))
    same(
        aten.convolution.default, x, weight, bias, data.draw(pair), padding, data.draw(pair), transposed, [0, 0], groups
    )


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_enlargement_and_pixel_shuffle(data: st.DataObject) -> None:
    x = data.draw(images())
    size = [data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))]
    op = data.draw(st.sampled_from([aten.upsample_bicubic2d.default, aten.upsample_bilinear2d.default]))
    same(op, x, size, data.draw(st.booleans()), None, None)
    same(aten.upsample_nearest2d.default, x, size, None, None)
    factor = data.draw(st.integers(1, 3))
    same(aten.pixel_shuffle.default, data.draw(images(channels=factor**2 * data.draw(st.integers(1, 3)))), factor)
    same(aten.pixel_shuffle.default, x, factor)
    same(aten.repeat.default, x, data.draw(st.lists(st.integers(1, 3), min_size=4, max_size=5)))


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_pointwise(data: st.DataObject) -> None:
    x = data.draw(images())
    for op in (aten.leaky_relu.default, aten.relu.default, aten.silu.default, aten.tanh.default):
        same(op, x)
    bound = st.sampled_from([None, -1, 0.5])
    same(aten.clamp.default, x, data.draw(bound), data.draw(bound))
    other = data.draw(st.one_of(images(), st.just(x), st.integers(-2, 2), st.floats(-2, 2), st.booleans()))
    for op in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor):
        if op is not aten.sub.Tensor or not isinstance(other, bool):
            same(op, x, other)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_cat(data: st.DataObject) -> None:
    x = data.draw(images())
    tensors = [x] * data.draw(st.integers(1, 3)) + data.draw(st.lists(images(channels=x.shape[1]), max_size=2))
    same(aten.cat.default, tensors, data.draw(st.integers(-5, 4)))
    clips = [one.unsqueeze(data.draw(st.sampled_from([1, 1, 2]))) for one in tensors]
    same(aten.cat.default, clips, data.draw(st.integers(-5, 4)))


def test_every_rule_is_compared_somewhere_above_or_here() -> None:
    x = torch.empty((2, 3, 4, 5), device="meta")
    for op in (aten.leaky_relu_.default, aten.relu_.default, aten.silu_.default):
        assert result_of(op, (x,), {}) is x
    source = open(__file__, encoding="utf-8").read()  # noqa: SIM115
    assert not [str(op) for op in RULES if str(op) not in source], "a rule without a comparison"


def test_in_place_on_other_layouts_and_integers_is_left_to_torch() -> None:
    for x in (torch.empty((2, 3, 4, 5), dtype=torch.int64), torch.zeros(2, 3, 4, 5), torch.zeros(1, 1)):
        assert torch.equal(result_of(aten.relu.default, (x,), {}), torch.relu(x)), "a real tensor has values"
    with pytest.raises(RuntimeError):
        result_of(aten.add.Tensor, (torch.empty(2, 3, device="meta"), torch.empty(2, 4, device="meta")), {})


@pytest.mark.parametrize("family", decoders.FAMILIES)
def test_whole_decoders_agree(family: str) -> None:
    decoder, shape = decoders.make(family)
    twin = fold_weight_norm(meta_copy(decoder))
    z = torch.empty(shape, dtype=module_dtype(decoder), device="meta")
    with torch.no_grad():
        wanted = twin(z)
        with QuickShapes():
            got = twin(z)
    assert (got.shape, got.dtype, got.stride()) == (wanted.shape, wanted.dtype, wanted.stride())


def test_shapes_inside_a_decoder_are_the_real_ones() -> None:
    decoder, shape = decoders.make("tiled")
    found = record_shapes(decoder, shape)
    seen: dict[str, tuple[int, ...]] = {}

    def note(name: str, args: tuple[Tensor, ...]) -> None:
        if args:  # parametrizations are called with nothing
            seen.setdefault(name, tuple(args[0].shape))

    for name, child in decoder.named_modules():
        child.register_forward_pre_hook(lambda _child, args, name=name: note(name, args))
    decoder(torch.zeros(shape))
    assert found
    assert {name: size for name, size in seen.items() if name in found} == found


def test_functions_of_torch_pass_through() -> None:
    x = torch.empty((2, 16, 4, 4), device="meta")
    with torch.no_grad(), QuickShapes():
        y = F.interpolate(F.pixel_shuffle(x, 2), scale_factor=2.0, mode="bicubic")
    assert y.shape == (2, 4, 16, 16)
