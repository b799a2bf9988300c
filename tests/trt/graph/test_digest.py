"""The digest of the weights: every byte, name, shape and dtype counts; threads and the way the bytes travel do not."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from owl_wms.trt.graph import digest
from owl_wms.trt.graph.digest import weights_digest


def holder(**tensors: torch.Tensor) -> nn.Module:
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


@settings(deadline=None, max_examples=60)
@given(data=st.data(), pieces=st.sampled_from([1, 7, 64, 1 << 23]))
def test_one_bit_anywhere_counts_whatever_the_piece(data: st.DataObject, pieces: int) -> None:
    sizes = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    one = holder(**{f"t{i}": torch.randint(0, 255, (size,), dtype=torch.uint8) for i, size in enumerate(sizes)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest, "PIECE_BYTES", pieces)
        assert weights_digest(one) == weights_digest(copy.deepcopy(one))
        if not sum(sizes):
            return
        name = data.draw(st.sampled_from([f"t{i}" for i, size in enumerate(sizes) if size]))
        two = copy.deepcopy(one)
        buffer = two.get_buffer(name)
        buffer[data.draw(st.integers(0, len(buffer) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        assert weights_digest(one) != weights_digest(two)


def test_name_shape_dtype_and_border_between_tensors_count() -> None:
    whole = torch.arange(12, dtype=torch.uint8)
    digests = [
        weights_digest(holder(a=whole)),
        weights_digest(holder(b=whole)),
        weights_digest(holder(a=whole.view(3, 4))),
        weights_digest(holder(a=whole.view(torch.int8))),
        weights_digest(holder(a=whole[:4], b=whole[4:])),
        weights_digest(holder(a=whole[:5], b=whole[5:])),
        weights_digest(holder(a=whole, b=whole[:0])),
    ]
    assert len(set(digests)) == len(digests)


def test_memory_order_and_sharing_do_not_count() -> None:
    image = torch.randn(2, 3, 4, 5)
    other = image.contiguous(memory_format=torch.channels_last)
    assert weights_digest(holder(a=image)) == weights_digest(holder(a=other))
    assert weights_digest(holder(a=image, b=image)) == weights_digest(holder(a=image, b=image.clone()))
    assert weights_digest(holder(a=image[0, 0, 0, 0])) == weights_digest(holder(a=image[0, 0, 0, 0].clone()))


@pytest.mark.parametrize("threads", [1, 2, 12])
def test_threads_and_borrowed_buffers_do_not_count(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = holder(a=torch.randn(1000), b=torch.randn(33, 7).half(), c=torch.zeros(0), d=torch.tensor(3))
    monkeypatch.setattr(digest, "PIECE_BYTES", 64)
    wanted = weights_digest(module)
    monkeypatch.setattr(digest.os, "cpu_count", lambda: threads)
    assert weights_digest(module) == wanted
    # As if on a GPU: more pieces than buffers, so that each is used again and must not be overwritten while it is read.
    monkeypatch.setattr(digest, "_on_host", lambda _piece: False)
    assert weights_digest(module) == wanted


@pytest.mark.gpu
def test_device_does_not_count() -> None:
    module = holder(a=torch.randn(3_000_001), b=torch.randn(33, 7).half())
    wanted = weights_digest(module)
    assert weights_digest(module.cuda()) == wanted
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # on the caller's stream, so after what was enqueued there
        torch.cuda._sleep(100_000_000)
        module.a += 1
        changed = weights_digest(module)
    assert changed != wanted
