"""Every way in which a decoder can change between two decodes, against PyTorch's answer of that moment."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize

from owl_wms.runtime import VideoDecode
from owl_wms.runtime.stamp import WeightsStamp, _cells, hindrance
from owl_wms.settings import TensorRTConfig
from owl_wms.vae import fold_weight_norm
from tests.runtime.toolchains import ExportToolchain, TinyDecoder, settings

LATENTS = torch.randn(1, 2, 4, 3, 3)


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    forward = TinyDecoder.forward
    yield
    TinyDecoder.forward = forward  # type: ignore[method-assign]
    if "__call__" in vars(TinyDecoder):
        del TinyDecoder.__call__
    for hooks in (nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks):
        hooks.clear()


def fused(decoder: nn.Module) -> None:
    _step(decoder, torch.optim.AdamW(decoder.parameters(), lr=0.5, fused=True))


def foreach(decoder: nn.Module) -> None:
    _step(decoder, torch.optim.SGD(decoder.parameters(), lr=0.5, foreach=True))


class ByData(torch.optim.Optimizer):
    """Writes past version counters, as several published optimisers do."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        super().__init__(weights, {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data.add_(weight.grad, alpha=0.5)


def by_data(decoder: nn.Module) -> None:
    _step(decoder, ByData(list(decoder.parameters())))


def of_a_view(decoder: nn.Module) -> None:
    """An optimiser that owns views of the weights, as sharded training does."""
    views = [nn.Parameter(weight.detach().view(-1)) for weight in decoder.parameters()]
    for view in views:
        view.grad = torch.ones_like(view)
    torch.optim.AdamW(views, lr=0.5, fused=True).step()


def _step(decoder: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for weight in decoder.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def another_class(decoder: nn.Module) -> None:
    """As torch's fully_shard and quantisation do it."""
    kind = type(decoder.conv_out)
    decoder.conv_out.__class__ = type("Doubled", (Doubled, kind), {}) if kind is not nn.Conv2d else Doubled


def averaged(decoder: nn.Module) -> None:
    """As moving averages write weights, without an optimiser."""
    weights = list(decoder.parameters())
    torch._foreach_lerp_([w.detach() for w in weights], [torch.ones_like(w) for w in weights], 0.5)


def in_place(decoder: nn.Module) -> None:
    with torch.no_grad():
        next(iter(decoder.parameters())).add_(0.5)


def swapped(decoder: nn.Module) -> None:
    for weight in decoder.parameters():
        weight.data = weight.data + 0.5


def swapped_twice(decoder: nn.Module) -> None:
    swapped(decoder)
    swapped(decoder)


def wrapped_again(decoder: nn.Module) -> None:
    decoder.conv_out.bias = nn.Parameter(decoder.conv_out.bias.data + 0.5)


def global_hook(decoder: nn.Module) -> None:
    nn_module.register_module_forward_hook(lambda module, inputs, out: out * 2 if isinstance(out, Tensor) else None)


def global_pre_hook(decoder: nn.Module) -> None:
    nn_module.register_module_forward_pre_hook(
        lambda module, inputs: (inputs[0] + 0.5,) if isinstance(module, nn.Conv2d) else None
    )


def hook(decoder: nn.Module) -> None:
    decoder.conv_in.register_forward_hook(lambda module, inputs, out: out * 2)


def class_forward(decoder: nn.Module) -> None:
    plain = TinyDecoder.forward
    TinyDecoder.forward = lambda self, z: plain(self, z) + 1  # type: ignore[method-assign]


def class_call(decoder: nn.Module) -> None:
    TinyDecoder.__call__ = lambda self, z: nn.Module.__call__(self, z) + 1  # type: ignore[method-assign]


def instance_forward(decoder: nn.Module) -> None:
    plain = decoder.conv_out.forward
    decoder.conv_out.forward = lambda x: plain(x) + 1


CHANGES: list[Callable[[nn.Module], None]] = [
    *(fused, foreach, by_data, of_a_view, averaged, in_place, swapped, swapped_twice, wrapped_again, another_class),
    *(global_hook, global_pre_hook, hook, class_forward, class_call, instance_forward),
]


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_no_old_frame_is_served(
    tmp_path: Path, change: Callable[[nn.Module], None], folded: bool, enabled: bool
) -> None:
    torch.manual_seed(0)
    decoder: nn.Module = TinyDecoder().eval()
    if folded:
        decoder = fold_weight_norm(decoder)
    chosen = settings(tmp_path, enabled=enabled, use_cache=False)
    decode = VideoDecode(decoder, batch_size=2, settings=chosen, toolchain=ExportToolchain())
    before = decode(LATENTS)
    change(decoder)
    with torch.no_grad():
        wanted = decoder(LATENTS[0])
    assert float((before[0].float() - wanted).abs().max()) > 0.05
    torch.testing.assert_close(decode(LATENTS)[0].float(), wanted, rtol=2e-2, atol=3e-2)


class Calling(nn.Module):
    """A class of a library, which the parts below inherit from."""


class Part(Calling):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(2, 2, 1), nn.Conv1d(2, 2, 1))
        self.second = nn.Sequential(nn.Conv1d(2, 2, 1))
        self.none, self.list, self.names = nn.Sequential(), nn.ModuleList(), nn.ModuleDict()

    def forward(self, z: Tensor) -> Tensor:
        return self.none(self.second(z + self.first(z)))


def moved(part: Part) -> None:
    """The same modules in the same order, of which another container has one."""
    second = part.second[0]
    part.second._modules.clear()
    part.second._modules.update({"0": part.first._modules.pop("1"), "1": second})


def renamed(part: Part) -> None:
    modules = part._modules
    first, second = modules.pop("first"), modules.pop("second")
    rest = dict(modules)
    modules.clear()
    modules.update({"second": first, "first": second, **rest})


GROWTH: list[Callable[[Part], object]] = [
    *(moved, renamed, lambda part: part.none.append(nn.Tanh()), lambda part: part.list.append(nn.Tanh())),
    lambda part: part.names.update({"a": nn.Tanh()}),
]


@pytest.mark.parametrize("change", GROWTH)
def test_parts_that_move_or_grow(change: Callable[[Part], object]) -> None:
    part = Part().eval()
    stamp = WeightsStamp(part)
    assert stamp.matches(part)
    change(part)
    assert not stamp.matches(part)


def test_tracing_and_a_call_of_a_base_class(monkeypatch: pytest.MonkeyPatch) -> None:
    part = Part().eval()
    stamp = WeightsStamp(part)
    with monkeypatch.context() as tracing:
        tracing.setattr(nn.Module, "__call__", lambda self, *inputs: self.forward(*inputs))
        assert stamp.matches(part)
        assert hindrance(part) is None
    monkeypatch.setattr(Calling, "__call__", lambda self, z: nn.Module.__call__(self, z) + 1)
    assert not stamp.matches(part)
    assert "has a __call__ of its own" in str(hindrance(part))


class Noisy(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w * 1.5 if self.training else w


@pytest.mark.parametrize("enabled", [True, False])
def test_a_part_in_train_mode_is_in_the_frames(tmp_path: Path, enabled: bool) -> None:
    decoder = TinyDecoder().eval()
    parametrize.register_parametrization(decoder.conv_out, "weight", Noisy())
    chosen = settings(tmp_path, enabled=enabled, use_cache=False)
    decode = VideoDecode(decoder, batch_size=2, settings=chosen, toolchain=ExportToolchain())
    for mode in (False, True, False, True):
        decoder.conv_out.train(mode)
        with torch.no_grad():
            wanted = decoder(LATENTS[0])
        torch.testing.assert_close(decode(LATENTS)[0].float(), wanted, rtol=2e-2, atol=3e-2)
        assert decode.stats().backend == ("export" if enabled and not mode else "pytorch")
    if enabled:
        assert "in train mode while the decoder is in eval mode" in decode.stats().reason


def test_steps_of_other_optimisers_and_hooks_elsewhere_cost_no_program(tmp_path: Path) -> None:
    decoder, other = TinyDecoder().eval(), nn.Linear(2, 2)
    decode = VideoDecode(decoder, batch_size=2, settings=settings(tmp_path), toolchain=ExportToolchain())
    decode(LATENTS)
    for _ in range(3):
        _step(other, torch.optim.AdamW(other.parameters(), fused=True))
        other.register_forward_hook(lambda *_: None)
        decode(LATENTS)
    assert decode.stats().builds == 1
    assert decode.stats().chunks_program == 4


def test_a_version_that_falls_does_not_hide_one_that_rises() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    both = nn.Sequential(first, second)
    turned = nn.Parameter(first.weight.data.t())  # the same memory, and a version of its own
    with torch.no_grad():
        first.weight.add_(0)
    stamp, fallen = WeightsStamp(both), first.weight._version
    torch.utils.swap_tensors(first.weight, turned)
    with torch.no_grad():
        for _ in range(fallen - first.weight._version):
            second.weight.add_(1)
    assert not stamp.matches(both)


def test_a_part_that_torch_scripted_is_watched() -> None:
    scripted = torch.jit.script(nn.Conv2d(4, 3, 1))
    decoder = nn.Sequential(scripted, nn.Conv2d(3, 3, 1)).eval()
    decode = VideoDecode(decoder, batch_size=2, settings=TensorRTConfig(enabled=False))
    for _ in range(2):
        with torch.no_grad():
            wanted = decoder(LATENTS[0])
        assert torch.equal(decode(LATENTS)[0], wanted.to(torch.bfloat16))
        stamp = WeightsStamp(decoder)
        assert stamp.matches(decoder)
        with torch.no_grad():
            scripted.weight.add_(1)
        assert not stamp.matches(decoder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_steps_written_by_hand_show_on_a_cpu(dtype: torch.dtype) -> None:
    """As in `p.data -= rate * p.grad`, and as diffusers' average puts its weights into a model."""
    part = nn.Conv2d(2, 2, 3).to(dtype).to(memory_format=torch.channels_last)
    part.weight.data = part.weight.data[:, :1]  # a view, whose values do not lie one behind the other
    part.register_buffer("none", torch.empty(0))
    for weight in (part.weight, part.bias):
        assert weight is not None
        stamp = WeightsStamp(part)
        assert stamp.matches(part)
        weight.data.copy_((weight.data.float() * 2 + 1).to(dtype))
        assert not stamp.matches(part)


def test_a_weight_whose_memory_was_given_back_is_not_read() -> None:
    """As by what shards or offloads weights; the process would end."""
    part = nn.Conv2d(2, 2, 3)
    stamp = WeightsStamp(part)
    part.weight.untyped_storage().resize_(0)
    assert not stamp.matches(part)
    stamp = WeightsStamp(part)
    assert stamp.matches(part)
    part.weight.untyped_storage().resize_(part.weight.nbytes)
    assert not stamp.matches(part)
    part.weight.untyped_storage().resize_(part.weight.nbytes // 2)
    assert len(WeightsStamp(part)._cells) == len(part.bias), "of a weight that has lost a part nothing is read"


def test_a_buffer_without_a_shape_is_no_obstacle() -> None:
    part = nn.Conv2d(2, 2, 3)
    part.register_buffer("clips", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    assert WeightsStamp(part).matches(part)
    # As in torch.func.functionalize, where a tensor has no memory of its own.
    wrapped = torch._to_functional_tensor(torch.ones(3))
    assert not _cells(wrapped)


def test_frames_follow_a_step_written_by_hand() -> None:
    decoder = TinyDecoder().eval()
    decode, anew = (VideoDecode(decoder, batch_size=2, settings=TensorRTConfig(enabled=False)) for _ in range(2))
    before = decode(LATENTS)
    decoder(LATENTS[0]).square().mean().backward()
    for weight in decoder.parameters():
        weight.data -= weight.grad.sign()
    after = decode(LATENTS)
    assert torch.equal(after, anew(LATENTS))
    assert not torch.equal(after, before)


def test_what_a_stamp_does_not_see_is_written_down() -> None:
    """The limit that the class states: a write through `.data`, by nobody's optimiser, of a value that is not read."""
    decoder = TinyDecoder().eval()
    decoder.conv_out.bias = nn.Parameter(torch.zeros(5))
    stamp = WeightsStamp(decoder)
    decoder.conv_out.bias.data[1].add_(1)
    assert stamp.matches(decoder)
    assert "through `tensor.data`" in str(WeightsStamp.__doc__)
    assert not math.isnan(float(decoder.conv_out.bias.sum()))  # type: ignore[arg-type, operator]


def test_a_library_of_sharding_that_another_thread_is_importing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp", ModuleType("torch.distributed.fsdp"))
    part = nn.Sequential(nn.Linear(2, 2)).eval()
    assert hindrance(part) is None
    assert WeightsStamp(part).matches(part)
