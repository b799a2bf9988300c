"""The key material: every field matters, nothing accidental does."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from owl_wms.cache import cache_key
from owl_wms.errors import FastPathError
from owl_wms.request import Request
from owl_wms.trt import key
from owl_wms.trt.graph.recording import Recording
from tests.trt import decoders

MACHINE = {name: f"{name} 1" for name in key.MACHINE_FIELDS}


@pytest.fixture(scope="module")
def material() -> dict[str, Any]:
    decoder, shape = decoders.make("square")
    return key.key_material(decoder, Request(input_shape=shape))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [leaf for name, item in value.items() for leaf in leaves(item, (*path, name))]
    if isinstance(value, list):
        return [leaf for index, item in enumerate(value) for leaf in leaves(item, (*path, index))]
    return [path]


def changed(material: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    other = copy.deepcopy(material)
    place = other
    for step in path[:-1]:
        place = place[step]
    old = place[path[-1]]
    place[path[-1]] = (not old) if isinstance(old, bool) else old + 1 if isinstance(old, (int, float)) else f"{old}?"
    return other


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_leaf_changes_the_key(material: dict[str, Any], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(leaves(material)))
    assert cache_key(changed(material, path)) != cache_key(material), path


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_dict_order_does_not(material: dict[str, Any], data: st.DataObject) -> None:
    names = data.draw(st.permutations(list(material)))
    assert cache_key({name: material[name] for name in names}) == cache_key(material)


def test_hash_seed_does_not() -> None:
    code = (
        "from tests.trt import decoders; from owl_wms.trt import key; from owl_wms.request import Request\n"
        "from owl_wms.cache import cache_key\n"
        "d, s = decoders.make('square'); print(cache_key(key.key_material(d, Request(input_shape=s))))"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for seed in ("0", "77")
    }
    assert len(answers) == 1


def test_it_is_json_and_holds_what_the_cache_promises(material: dict[str, Any]) -> None:
    assert json.loads(json.dumps(material)) == material
    wanted = {
        "schema",
        "graph",
        "weights",
        "input_shape",
        "plans",
        "sources",
        "precision",
        "compile_settings",
        "flavour",
        "machine",
    }
    assert wanted <= set(material)
    machine = {
        "torch",
        "triton",
        "torch_tensorrt",
        "tensorrt",
        "cuda",
        "nvrtc",
        "driver",
        "gpu",
        "compute_capability",
        "sm_count",
    }
    assert machine <= set(material["machine"])


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "bf16"}, {"precision": "fp32"}, {"plans": ("tensorrt",)}, {"input_shape": (3, 8, 4, 4)},
        {"workspace_size": 1 << 20}, {"min_block_size": 1}, {"timeout_seconds": 7.0},
        {"seed": 9},
    ],
    ids=str,
)  # fmt: skip
def test_every_part_of_the_request_counts(material: dict[str, Any], change: dict[str, Any]) -> None:
    decoder, shape = decoders.make("square")
    other = key.key_material(decoder, Request(**{"input_shape": shape, **change}))
    assert cache_key(other) != cache_key(material)


class Net(nn.Module):
    def __init__(self, slope: float = 0.01, groups: int = 1, scale: float = 2.0, swap: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=groups)
        self.slope, self.scale, self.swap = slope, scale, swap
        self.table = torch.ones(4, 1, 1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.leaky_relu(self.conv(z), self.slope) * self.scale
        return (x - z if self.swap else z - x) * self.table


@pytest.mark.parametrize("change", [{"slope": 0.3}, {"groups": 2}, {"scale": 5.0}, {"swap": True}], ids=str)
def test_operator_arguments_are_in_the_graph(change: dict[str, Any]) -> None:
    spec = Request(input_shape=(1, 4, 5, 5))
    assert Recording.of(Net(**change), spec.input_shape).text != Recording.of(Net(), spec.input_shape).text
    assert key.key_material(Net(**change), spec) != key.key_material(Net(), spec)


def test_one_bit_of_one_weight_counts_also_outside_the_state_dict() -> None:
    net = Net()
    before = key.weights_digest(net)
    with torch.no_grad():
        net.conv.bias.view(torch.int32)[0] ^= 1
    after = key.weights_digest(net)
    net.table[0] = 2
    assert len({before, after, key.weights_digest(net)}) == 3


def test_dtype_of_the_same_weights_counts() -> None:
    assert key.weights_digest(Net().half()) != key.weights_digest(Net())


def test_machine_is_asked_for_the_right_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(key.env, "describe_machine", lambda index: asked.append(index) or dict(MACHINE))
    material = key.key_material(Net(), Request(input_shape=(1, 4, 5, 5), device="cuda:3"))
    assert asked == [3]
    assert material["machine"] == MACHINE


def hooked(decoder: nn.Module) -> None:
    decoder.conv_in.register_forward_hook(lambda module, inputs, output: output.clamp(-9, 9))  # type: ignore[union-attr]


def hooked_before(decoder: nn.Module) -> None:
    decoder.register_forward_pre_hook(lambda module, inputs: None)


def replaced(decoder: nn.Module) -> None:
    original = decoder.forward
    decoder.forward = lambda z: original(z).clamp(-9, 9)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (hooked, "its module conv_in has a forward hook"),
        (hooked_before, "the decoder has a forward hook"),
        (replaced, "the decoder has a forward of its own"),
    ],
)
def test_a_decoder_with_additions_has_no_program(change: Callable[[nn.Module], None], says: str) -> None:
    # A clamp that the latents of the parity gate never reach would otherwise be lost without a sign.
    decoder, shape = decoders.make("tiled")
    change(decoder)
    spec = Request(input_shape=shape, precision="fp16")
    with pytest.raises(FastPathError, match=says):
        key.key_material(decoder, spec)
    with pytest.raises(FastPathError, match=says):
        Recording.of(decoder, shape)
