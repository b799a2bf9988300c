"""The recorded forward: equal for equal decoders, different wherever torch.export's graph is, and where it is blind."""

from __future__ import annotations

import copy
import hashlib
import os
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from owl_wms.errors import FastPathError
from owl_wms.request import Request
from owl_wms.trt import key
from owl_wms.trt.graph import recording
from owl_wms.trt.graph.export import export_decoder, graph_text
from owl_wms.trt.graph.record import record
from owl_wms.trt.graph.recording import Recording
from owl_wms.trt.graph.shapes import meta_copy
from tests.trt import decoders

SHAPE = (2, 4, 6, 6)

# One step of a made-up decoder: name -> arguments it may take.
STEPS: dict[str, list[Any]] = {
    "conv": [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 2), (2, 2, 2)],  # groups, padding, dilation
    "leaky": [0.01, 0.2, 0.3],
    "scale": [2.0, 2, 0.5, -1.0],
    "shift": [1.0, 1, 0.25],
    "permute": [(0, 1, 3, 2), (0, 1, 2, 3)],
    "subtract": ["x - z", "z - x"],
    "pool": [(3, 1, 1), (5, 1, 2)],
    "cast": [torch.float32, torch.float16, torch.float64],
    "softmax": [1, 2, 3],
    "enlarge": ["bicubic", "bilinear", "nearest"],
    "dropout": [0.1, 0.5],
    "norm": [1e-5, 1e-3],
    "roll": [1, 2],
}


class Steps(nn.Module):
    """A forward given as data."""

    def __init__(self, steps: list[tuple[str, Any]]) -> None:
        super().__init__()
        self.steps = steps
        self.weights = nn.ParameterList(
            [nn.Parameter(torch.ones(4, 4 // (argument[0] if name == "conv" else 1), 3, 3)) for name, argument in steps]
        )

    def forward(self, z: Tensor) -> Tensor:
        x = z
        for (name, a), weight in zip(self.steps, self.weights, strict=True):
            x = self.step(name, a, weight, x, z)
        return x

    def step(self, name: str, a: Any, weight: Tensor, x: Tensor, z: Tensor) -> Tensor:
        if name == "conv":
            return F.conv2d(x, weight, None, 1, a[1], a[2], a[0])
        if name == "subtract":
            return x - z if a == "x - z" else z - x
        if name == "enlarge":
            return F.interpolate(x, scale_factor=2, mode=a)[..., ::2, ::2]
        if name == "cast":
            return x.to(a).to(z.dtype)
        if name == "dropout":
            return F.dropout(x, a, self.training)
        functions = {
            "leaky": lambda: F.leaky_relu(x, a), "scale": lambda: x * a, "shift": lambda: x + a,
            "permute": lambda: x.permute(a), "pool": lambda: F.max_pool2d(x, *a),
            "softmax": lambda: x.softmax(a), "norm": lambda: F.group_norm(x, 2, eps=a), "roll": lambda: x.roll(a, 3),
        }  # fmt: skip
        return functions[name]()


def on_meta(module: nn.Module) -> nn.Module:
    return meta_copy(module).eval().requires_grad_(False)


def text_of(module: nn.Module, shape: tuple[int, ...] = SHAPE) -> str:
    return record(on_meta(module), torch.empty(shape, device="meta"))


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[str, Any]]:
    names = draw(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=5))
    return [(name, draw(st.sampled_from(STEPS[name]))) for name in names]


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_whatever_one_argument_changes_in_exports_graph_changes_the_record(data: st.DataObject) -> None:
    steps = data.draw(programs())
    place = data.draw(st.integers(0, len(steps) - 1))
    name = steps[place][0]
    # In eval mode dropout gives its input back, and then `x - z` and `z - x` are both `z - z`.
    assume(name != "subtract" or any(step != "dropout" for step, _ in steps[:place]))
    other = list(steps)
    other[place] = (name, data.draw(st.sampled_from(STEPS[name])))
    one, two = Steps(steps), Steps(other)
    if steps == other and [repr(step) for step in steps] == [repr(step) for step in other]:
        assert text_of(one) == text_of(two)
        return
    z = torch.empty(SHAPE, device="meta")
    if graph_text(export_decoder(on_meta(one), z)) != graph_text(export_decoder(on_meta(two), z)):
        assert text_of(one) != text_of(two)


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_the_order_of_steps_counts_as_it_does_in_exports_graph(data: st.DataObject) -> None:
    steps = data.draw(programs())
    other = data.draw(st.permutations(steps))
    z = torch.empty(SHAPE, device="meta")
    graphs = [graph_text(export_decoder(on_meta(Steps(list(each))), z)) for each in (steps, other)]
    if graphs[0] != graphs[1]:
        assert text_of(Steps(steps)) != text_of(Steps(list(other)))


class Probe(nn.Module):
    """A forward given as a function of the module and its input."""

    def __init__(self, forward: Any, **attributes: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.body = forward
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, z: Tensor) -> Tensor:
        return self.body(self, z)


def autocast(dtype: torch.dtype, enabled: bool = True) -> Any:
    def run(m: Probe, z: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            return m.conv(z)

    return run


def data_alias(write: bool) -> Any:
    def run(m: Probe, z: Tensor) -> Tensor:
        x = m.conv(z)
        (x.data if write else x.clone()).add_(1)
        return x

    return run


PAIRS: dict[str, tuple[Probe, Probe]] = {
    # Where the operators are the same today and the program is not: a cast that does nothing at this dtype.
    "idle cast": (Probe(lambda m, z: m.conv(z.to(torch.float32))), Probe(lambda m, z: m.conv(z))),
    "idle contiguous": (Probe(lambda m, z: m.conv(z).contiguous()), Probe(lambda m, z: m.conv(z))),
    "autocast": (Probe(autocast(torch.bfloat16)), Probe(autocast(torch.float16))),
    "autocast at all": (Probe(autocast(torch.bfloat16)), Probe(autocast(torch.bfloat16, enabled=False))),
    "constant in forward": (
        Probe(lambda m, z: z * torch.tensor([1.0, 2.0, 3.0]).to(z.device).sum()),
        Probe(lambda m, z: z * torch.tensor([1.0, 2.0, 4.0]).to(z.device).sum()),
    ),
    "constant from numpy": (
        Probe(lambda m, z: z * torch.from_numpy(np.array([1.0, 2.0])).to(z.device).sum()),
        Probe(lambda m, z: z * torch.from_numpy(np.array([1.0, 2.5])).to(z.device).sum()),
    ),
    "tensor in a list": (
        Probe(lambda m, z: z * m.held[0].to(z.device), held=[torch.full((4, 1, 1), 2.0)]),
        Probe(lambda m, z: z * m.held[0].to(z.device), held=[torch.full((4, 1, 1), 3.0)]),
    ),
    "operands": (Probe(lambda m, z: m.conv(z) - z), Probe(lambda m, z: z - m.conv(z))),
    "which tensor": (Probe(lambda m, z: m.conv(z) + z), Probe(lambda m, z: z + z)),
    "index": (Probe(lambda m, z: z[:, 1:3]), Probe(lambda m, z: z[:, 0:2])),
    "write through data": (Probe(data_alias(True)), Probe(data_alias(False))),
    "transposed by property": (Probe(lambda m, z: z.mT), Probe(lambda m, z: z)),
    "returned twice": (Probe(lambda m, z: (z, z)), Probe(lambda m, z: (z,))),
    "int and float": (Probe(lambda m, z: z * 2), Probe(lambda m, z: z * 2.0)),
    "attribute": (Probe(lambda m, z: z * m.gain, gain=0.5), Probe(lambda m, z: z * m.gain, gain=0.25)),
    "memory format": (
        Probe(lambda m, z: m.conv(z).contiguous(memory_format=torch.channels_last)),
        Probe(lambda m, z: m.conv(z).contiguous()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_pairs_are_told_apart(pair: str) -> None:
    one, two = PAIRS[pair]
    assert text_of(one) == text_of(copy.deepcopy(one))
    assert text_of(one) != text_of(two)


@pytest.mark.parametrize(
    "change",
    [{"stride": 2}, {"padding": 2}, {"dilation": 2}, {"groups": 2}, {"kernel_size": 5}, {"bias": False}],
    ids=str,
)
def test_every_argument_of_a_convolution_counts(change: dict[str, Any]) -> None:
    wanted = {"kernel_size": 3, "padding": 1}
    assert text_of(nn.Conv2d(4, 4, **{**wanted, **change})) != text_of(nn.Conv2d(4, 4, **wanted))


def test_unused_weights_and_their_order_in_memory_count() -> None:
    one, two, three = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    two.spare = nn.Parameter(torch.zeros(3))
    three.weight.data = three.weight.data.contiguous(memory_format=torch.channels_last)
    assert len({text_of(one), text_of(two), text_of(three)}) == 3


def test_the_callers_context_does_not_count() -> None:
    net, spec = nn.Conv2d(4, 4, 3), Request(input_shape=SHAPE)
    plain = Recording.of(net, spec.input_shape).text
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
        assert Recording.of(net, spec.input_shape).text == plain
    with torch.inference_mode():
        assert Recording.of(net, spec.input_shape).text == plain
        assert Recording.of(nn.Conv2d(4, 4, 3), spec.input_shape).text == plain


def test_numbers_that_another_thread_draws_meanwhile_do_not_come_again() -> None:
    drawn: list[Tensor] = []

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 3, 1)

        def forward(self, z: Tensor) -> Tensor:
            trains = threading.Thread(target=lambda: drawn.append(torch.rand(4)))
            trains.start()
            trains.join()
            return self.conv(z)

    Recording.of(Beside().eval(), SHAPE)
    assert not torch.equal(torch.rand(4), drawn[-1])


def test_the_callers_random_numbers_are_not_drawn() -> None:
    net = Probe(lambda m, z: m.conv(z) * torch.rand(3).sum().item())
    torch.manual_seed(5)
    wanted = torch.rand(4)
    torch.manual_seed(5)
    text_of(net)
    assert torch.equal(torch.rand(4), wanted)


@pytest.mark.parametrize("family", decoders.FAMILIES)
def test_no_address_and_no_hash_seed_is_in_it(family: str) -> None:
    code = (
        "import sys, hashlib; from tests.trt import decoders; from owl_wms.trt.graph.recording import Recording\n"
        f"d, s = decoders.make({family!r}); text = Recording.of(d, s).text\n"
        "assert text.startswith('recorded'), text[:300]\nassert ' at 0x' not in text\n"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    answers = set()
    for seed in ("0", "77"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-800:]
        answers.add(done.stdout)
    decoder, shape = decoders.make(family)
    here = Recording.of(decoder, shape).text
    assert answers == {f"{hashlib.sha256(here.encode()).hexdigest()}\n"}


def test_a_key_in_a_fresh_process_is_quick_and_imports_no_compiler() -> None:
    code = (
        "import sys, time, torch; from owl_wms.trt import key; from owl_wms.request import Request\n"
        "from tests.trt import decoders\n"
        "d, s = decoders.make('tiled'); before = time.process_time()\n"
        "key.key_material(d, Request(input_shape=s)); print(time.process_time() - before)\n"
        "print([name for name in ('sympy', 'torch._dynamo', 'torch._inductor') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-800:]
    seconds, modules = done.stdout.splitlines()
    assert modules == "[]"
    assert float(seconds) < 2.0, "seconds of the processor"


class Counting(nn.Module):
    """Needs a value, which a tensor on the meta device does not have."""

    def forward(self, z: Tensor) -> Tensor:
        return z * float(z.sum())


def test_what_cannot_be_recorded_is_exported_and_what_cannot_be_exported_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = Request(input_shape=(1, 4, 5, 5))
    net = nn.Conv2d(4, 4, 3)
    as_recorded = Recording.of(net, spec.input_shape).text
    monkeypatch.setattr(recording, "record", lambda *_: (_ for _ in ()).throw(NotImplementedError("no meta form")))
    exported = Recording.of(net, spec.input_shape).text
    assert (as_recorded.split("\n")[0], exported.split("\n")[0]) == ("recorded", "exported")
    monkeypatch.undo()
    with pytest.raises(FastPathError) as raised:
        Recording.of(Counting(), spec.input_shape)
    assert raised.value.stage == "export"


def test_the_decoder_itself_is_not_touched() -> None:
    decoder, shape = decoders.make("tiled")
    before = {name: (tensor.data_ptr(), tensor._version) for name, tensor in decoder.state_dict().items()}
    training = decoder.train().training
    key.key_material(decoder, Request(input_shape=shape))
    assert {name: (tensor.data_ptr(), tensor._version) for name, tensor in decoder.state_dict().items()} == before
    assert decoder.training is training
