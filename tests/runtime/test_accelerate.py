"""`owl_wms.accelerate`: an accelerated decoder is the decoder it wraps, whatever is done to it, and says what decoded.

Run: python -m pytest tests/runtime/test_accelerate.py
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import owl_wms
from owl_wms.errors import ConfigError, FastPathError
from owl_wms.runtime import VideoDecode, batches
from owl_wms.runtime.accelerated import MAX_PROGRAMS, AcceleratedDecoder
from owl_wms.runtime.stamp import WeightsStamp
from owl_wms.trt.graph.recording import require_unaltered
from owl_wms.vae.tiles import decode_in_tiles
from tests.runtime.sana import LATENTS, autoencoder
from tests.runtime.toolchains import ExportToolchain, settings

pytest.importorskip("diffusers")


class Offset(ExportToolchain):
    """Programs that add 0.125 to every frame, so that a test sees who decoded; the decoder is otherwise exact."""

    BY_PROGRAM = 0.125

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.damage = lambda frames: frames + self.BY_PROGRAM

    def key_material(self, decoder: nn.Module, request: Any) -> dict[str, Any]:
        require_unaltered(decoder)  # as the real one
        own = {"graph": bool(getattr(decoder, "in_shortcut", False)), "dtype": str(next(decoder.parameters()).dtype)}
        return {**super().key_material(decoder, request), **own}

    def build(self, decoder: nn.Module, *rest: Any) -> dict[str, Any]:
        # An export puts stand-ins in the place of a module's weights, and PyTorch may be decoding with them meanwhile.
        return super().build(copy.deepcopy(decoder), *rest)

    def load(self, *given: Any) -> Any:
        program = super().load(*given)

        def run(z: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):  # as the real one
                frames: Tensor = program(z)
                return frames

        return run


@pytest.fixture
def tools(tmp_path: Path) -> Offset:
    return Offset(salt=str(tmp_path))


@pytest.fixture
def original() -> nn.Module:
    decoder: nn.Module = autoencoder().decoder
    return decoder


@pytest.fixture
def fast(original: nn.Module, tools: Offset, tmp_path: Path) -> AcceleratedDecoder:
    return owl_wms.accelerate(original, cache_dir=tmp_path / "cache", toolchain=tools)  # type: ignore[return-value]


def latents(batch: int = 1, size: int = 4) -> Tensor:
    return torch.randn(batch, LATENTS, size, size)


@torch.no_grad()
def who(fast: AcceleratedDecoder, z: Tensor) -> str:
    """`program` or `pytorch`, by what comes out; anything else is a wrong picture."""
    got, wanted = fast(z), fast.original(z)
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    for name, value in (("program", Offset.BY_PROGRAM), ("pytorch", 0.0)):
        if torch.allclose(got, wanted + value, atol=4e-2 if got.dtype != torch.float32 else 1e-5):
            return name
    raise AssertionError(f"off by {(got - wanted).abs().max():.3g}")


def test_it_is_the_module_it_wraps(original: nn.Module, fast: AcceleratedDecoder) -> None:
    assert fast.original is original
    assert list(fast.state_dict()) == list(original.state_dict())
    assert [id(p) for p in fast.parameters()] == [id(p) for p in original.parameters()]
    assert [id(m) for m in list(fast.modules())[1:]] == [id(m) for m in list(original.modules())[1:]]
    assert fast.in_shortcut is original.in_shortcut
    assert owl_wms.accelerate(fast) is fast
    with pytest.raises(AttributeError, match="no_such"):
        fast.no_such  # noqa: B018
    assert "AcceleratedDecoder" in repr(fast)


def test_programs_answer_and_are_counted(fast: AcceleratedDecoder, tools: Offset) -> None:
    for _ in range(3):
        assert who(fast, latents()) == "program"
    assert who(fast, latents(size=5)) == "program"
    assert tools.builds == 2
    stats = fast.stats()
    assert (stats.calls, stats.program_calls, stats.pytorch) == (4, 4, {})
    assert stats.ways == {(1, LATENTS, 4, 4): (1,), (1, LATENTS, 5, 5): (1,)}
    assert stats.programs[1].builds == 2


def test_a_cached_program_is_found(
    original: nn.Module, fast: AcceleratedDecoder, tools: Offset, tmp_path: Path
) -> None:
    who(fast, latents())
    again: Any = owl_wms.accelerate(original, cache_dir=tmp_path / "cache", toolchain=tools)
    assert who(again, latents()) == "program"
    assert tools.builds == 1
    assert again.stats().programs[1].hits == 1


@pytest.mark.parametrize("wanted", ["latents", "weights"])
def test_gradients_come_from_pytorch(original: nn.Module, fast: AcceleratedDecoder, wanted: str) -> None:
    who(fast, latents())
    fast.requires_grad_(wanted == "weights")
    z = latents().requires_grad_(wanted == "latents")
    reference = z.detach().clone().requires_grad_(wanted == "latents")
    fast(z).square().sum().backward()
    got = [p.grad for p in fast.parameters()] if wanted == "weights" else [z.grad]
    got = [g.clone() for g in got if g is not None]
    original.zero_grad()
    original(reference).square().sum().backward()
    other = [p.grad for p in original.parameters()] if wanted == "weights" else [reference.grad]
    assert got
    assert all(torch.equal(a, b) for a, b in zip(got, [g for g in other if g is not None], strict=True))
    assert "gradients" in next(iter(fast.stats().pytorch))
    fast.requires_grad_(False)
    with torch.enable_grad():
        fast(latents())
    assert fast.stats().program_calls == 2


@torch.no_grad()
def test_modes_and_transforms_are_pytorchs(fast: AcceleratedDecoder, original: nn.Module) -> None:
    z = latents()
    who(fast, z)
    calls = fast.stats().program_calls
    fast.train()
    assert original.training
    assert all(module.training for module in original.modules())
    assert torch.equal(fast(z), original(z))
    fast.eval()
    original.up_blocks[0].train()  # type: ignore[union-attr,operator]
    assert torch.equal(fast(z), original(z))
    fast.eval()
    with FlopCounterMode(display=False) as counter:
        fast(z)
    assert counter.get_total_flops() > 0
    torch.func.vmap(fast)(z[None])
    torch.export.export(fast, (z,), strict=False)
    torch.func.jvp(fast, (z,), (torch.ones_like(z),))
    traced = torch.jit.trace(fast, z, check_trace=False)
    assert torch.allclose(traced(z), original(z), atol=1e-5)
    assert fast.stats().program_calls == calls
    for wrong in (z[:0], z[0]):
        for decode in (fast, original):
            with pytest.raises(RuntimeError, match=r"0 elements|must match the size"):
                decode(wrong)
    assert who(fast, z) == "program"


class _Doubled(TorchFunctionMode):
    """Somebody's own convolution, as simulated quantisation and profilers put in."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        return result * 2 if function in (torch.conv2d, nn.functional.conv2d) else result


@torch.no_grad()
def test_function_modes_are_pytorchs_unless_they_only_place_tensors(fast: AcceleratedDecoder) -> None:
    z = latents()
    with _Doubled():
        assert who(fast, z) == "pytorch"
    with torch.device("cpu"):
        assert who(fast, z) == "program"
    assert fast.stats().pytorch == {"a function mode": 1}


@torch.no_grad()
def test_latents_by_name(fast: AcceleratedDecoder, original: nn.Module) -> None:
    z = latents()
    torch.testing.assert_close(fast(hidden_states=z), fast(z))
    assert fast.stats().program_calls == 2
    for decode in (fast, original):
        with pytest.raises(TypeError, match="unexpected keyword argument 'x'"):
            decode(x=z)
        with pytest.raises(TypeError, match="missing 1 required"):
            decode()


@torch.no_grad()
def test_a_forward_put_onto_the_wrapped_decoder_later(fast: AcceleratedDecoder, original: nn.Module) -> None:
    """As libraries do that hold the decoder itself, to move its weights or to count."""
    z, forward = latents(), original.forward
    assert who(fast, z) == "program"
    original.forward = lambda x: forward(x) + 1  # type: ignore[method-assign]
    assert who(fast, z) == "pytorch"
    del original.forward
    assert who(fast, z) == "program"


@torch.no_grad()
def test_replicas_of_data_parallel_have_their_own_weights(
    fast: AcceleratedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two GPUs of a pretended machine; the second gets weights of twice the value, to tell them apart."""
    z = latents()
    assert who(fast, z) == "program"
    monkeypatch.setattr(
        sys.modules["torch.nn.parallel.replicate"],
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach: [[tensor * (1 + place) for tensor in tensors] for place in range(2)],
    )
    first, second = torch.nn.parallel.replicate(fast, [0, 1], detach=True)  # type: ignore[arg-type]
    doubled = copy.deepcopy(fast.original)
    for tensor in (*doubled.parameters(), *doubled.buffers()):
        tensor.mul_(2)
    assert torch.equal(first(z), fast.original(z))
    assert torch.equal(second(z), doubled(z))


class _Quantised(Tensor):
    """A weight around two others, as quantising libraries make them; those are what is written."""

    @staticmethod
    def __new__(cls, codes: Tensor, step: Tensor) -> _Quantised:
        made: _Quantised = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=step.dtype)  # type: ignore[attr-defined]
        return made

    def __init__(self, codes: Tensor, step: Tensor) -> None:
        self.codes, self.step = codes, step

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].step)
        return function(*(arg.codes * arg.step if isinstance(arg, cls) else arg for arg in args), **(kwargs or {}))


@torch.no_grad()
def test_weights_that_are_no_plain_tensors_are_pytorchs(
    fast: AcceleratedDecoder, tools: Offset, tmp_path: Path
) -> None:
    z = latents()
    assert who(fast, z) == "program"
    conv: Any = fast.original.conv_in
    step = conv.weight.abs().max() / 127
    conv.weight = nn.Parameter(_Quantised((conv.weight / step).round().to(torch.int8), step), requires_grad=False)
    assert who(fast, z) == "pytorch"
    conv.weight.codes.mul_(-1)
    assert who(fast, z) == "pytorch"
    decode = VideoDecode(fast.original, batch_size=1, settings=settings(tmp_path), toolchain=tools)
    for _ in range(2):
        torch.testing.assert_close(decode(z[None])[0].float(), fast.original(z), rtol=0, atol=2e-2)
        conv.weight.codes.mul_(-1)
    assert "no plain tensor" in decode.stats().programs[0]["reason"]


@torch.no_grad()
def test_weights_sharded_after_a_program_was_made(fast: AcceleratedDecoder) -> None:
    """FSDP writes gathered weights into the same memory before each forward, without a new version of them."""
    z, plain = latents(), copy.deepcopy(fast.original)
    assert who(fast, z) == "program"
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(fast, mesh=init_device_mesh("cpu", (1,)))
        assert torch.equal(fast(z), plain(z))
        fast.reshard()  # type: ignore[operator]
        for decoder in (fast, plain):
            decoder.conv_in.weight.add_(0.5)  # type: ignore[union-attr,operator]
        assert torch.equal(fast(z), plain(z))
    finally:
        torch.distributed.destroy_process_group()
    assert fast.stats().program_calls == 1


def test_other_arguments_replace_the_earlier_ones(fast: AcceleratedDecoder, tmp_path: Path, tools: Offset) -> None:
    given: Any = {"cache_dir": tmp_path / "cache", "toolchain": tools}
    assert owl_wms.accelerate(fast, **given) is fast
    other: Any = owl_wms.accelerate(fast, **given, precision="fp32")
    assert other is not fast
    assert other.original is fast.original
    vae = autoencoder()
    vae.decoder = fast
    owl_wms.accelerate(vae, **given)
    assert vae.decoder is fast
    owl_wms.accelerate(vae, **given, strict=True)
    with torch.no_grad():
        assert who(vae.decoder, latents()) == "program"
    assert vae.decoder._options.strict
    assert vae.decoder.original is fast.original


def test_what_hangs_on_the_earlier_one_stays(fast: AcceleratedDecoder, tmp_path: Path, tools: Offset) -> None:
    given: Any = {"cache_dir": tmp_path / "cache", "toolchain": tools}
    seen: list[Any] = []
    fast.register_forward_hook(lambda module, args, out: seen.append("forward"))
    fast.register_full_backward_hook(lambda module, grads, outs: seen.append(grads[0].shape))
    other: Any = owl_wms.accelerate(fast, **given, precision="fp32")
    other(latents().requires_grad_()).sum().backward()
    assert seen == ["forward", (1, LATENTS, 4, 4)], "a hook about the inputs' gradients"
    inner = fast.forward
    fast.forward = lambda z: inner(z).clamp(max=0.5)  # type: ignore[method-assign]  # as accelerate's hooks do
    again: Any = owl_wms.accelerate(fast, **given, strict=True)
    with torch.no_grad():
        assert again(latents()).max() <= 0.5
    assert again.stats().program_calls == 1
    assert again._options.strict


@torch.no_grad()
def test_a_copy_of_a_compiled_one_decodes_by_its_own_weights(fast: AcceleratedDecoder) -> None:
    z = latents()
    fast.compile(backend="eager")
    for twin in (copy.deepcopy(fast), copy.copy(fast)):
        twin.original.conv_in.weight.mul_(2)
        assert who(twin, z) == "program"


@torch.no_grad()
def test_other_dtypes_are_refused_or_cast_as_pytorch_does(fast: AcceleratedDecoder, original: nn.Module) -> None:
    who(fast, latents())
    with pytest.raises(RuntimeError):
        original(latents().bfloat16())
    with pytest.raises(RuntimeError):
        fast(latents().bfloat16())
    fast.bfloat16()
    assert {p.dtype for p in original.parameters()} == {torch.bfloat16}
    assert who(fast, latents().bfloat16()) == "program"
    fast.float()
    assert who(fast, latents()) == "program"
    next(fast.parameters()).data = next(fast.parameters()).data.double()
    with pytest.raises(RuntimeError):
        fast(latents())


@torch.no_grad()
def test_autocast_decides_the_dtype(fast: AcceleratedDecoder) -> None:
    who(fast, latents())
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert who(fast, latents()) == "pytorch"  # what comes out under it is seen once
            assert who(fast, latents()) == "program"
            assert fast(latents()).dtype == dtype
    assert fast(latents()).dtype == torch.float32
    assert fast.stats().pytorch == {"first call under autocast": 2}


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.conv_in.weight.add_(0.5),
        lambda d: setattr(d.conv_in.weight, "data", torch.randn_like(d.conv_in.weight)),
        lambda d: setattr(d.conv_in, "weight", nn.Parameter(torch.randn_like(d.conv_in.weight))),
        lambda d: setattr(d, "conv_in", nn.Conv2d(LATENTS, 8, 3, padding=1)),
        lambda d: d.load_state_dict({k: v + 0.1 for k, v in d.state_dict().items()}),
        lambda d: setattr(d, "in_shortcut", False),
        lambda d: _fused_step(d.conv_in.weight),
        lambda d: d.up_blocks[0].register_forward_hook(lambda module, args, out: out + 1),
    ],
)
@pytest.mark.parametrize("through", ["wrapper", "original"])
def test_weights_that_change_under_it(fast: AcceleratedDecoder, change: Any, through: str) -> None:
    z = latents()
    assert who(fast, z) == "program"
    if through == "original" and "in_shortcut" in change.__code__.co_consts:
        pytest.skip("plain attributes of the wrapped decoder do not show, as for every decode function")
    before = fast.original(z)
    change(fast if through == "wrapper" else fast.original)
    assert not torch.allclose(fast.original(z), before, atol=1e-3)
    who(fast, z)  # raises if the frames are those of the old weights
    who(fast, z)


def _fused_step(weight: nn.Parameter) -> None:
    """A step of an optimiser that writes the weight without raising its version."""
    weight.grad, version = torch.ones_like(weight), weight._version
    torch.optim.AdamW([weight], lr=0.5, fused=True).step()
    weight.grad = None
    assert weight._version == version


@torch.no_grad()
@pytest.mark.parametrize("first", [Offset.BY_PROGRAM, float("nan")])
@pytest.mark.parametrize("change", ["in place", "train mode"])
def test_a_change_while_the_program_runs(fast: AcceleratedDecoder, tools: Offset, change: str, first: float) -> None:
    """What was launched is thrown away unseen: it is neither returned nor counted as a fault of the program."""
    z = latents()
    assert who(fast, z) == "program"
    added = [first]

    def run(frames: Tensor) -> Tensor:
        if not added:
            return frames + Offset.BY_PROGRAM
        if change == "in place":
            fast.original.conv_in.weight.add_(0.5)  # type: ignore[union-attr,operator]
        else:
            fast.original.train()
        return frames + added.pop()

    tools.damage = run
    assert who(fast, z) == ("program" if change == "in place" else "pytorch")
    assert not added
    assert fast.stats().programs[1].failures == {}
    fast.eval()
    assert who(fast, z) == "program"


class _Looked:
    """Stands for the scalar on the GPU that says whether the frames are finite."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def __bool__(self) -> bool:
        self.events.append("waited")
        return True


@torch.no_grad()
def test_the_order_of_events(original: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program is launched first and the weights are compared before anything waits for the GPU; frames that they
    do not fit are never waited for."""
    events: list[str] = []
    matches = WeightsStamp.matches

    def compare(stamp: WeightsStamp, decoder: nn.Module) -> bool:
        same = matches(stamp, decoder)
        events.append("same" if same else "changed")
        return same

    tools = Offset(precision="fp16")  # looks at the frames of every call
    fast: Any = owl_wms.accelerate(original, cache_dir=tmp_path, toolchain=tools)
    z = latents()
    assert who(fast, z) == "program"
    tools.damage = lambda frames: (events.append("launched"), frames + Offset.BY_PROGRAM)[1]
    monkeypatch.setattr(WeightsStamp, "matches", compare)
    monkeypatch.setattr("owl_wms.runtime.images.all_finite", lambda frames: _Looked(events))
    assert who(fast, z) == "program"
    assert events == ["launched", "same", "waited"]
    events.clear()
    _fused_step(original.conv_in.weight)  # type: ignore[union-attr,arg-type]
    assert who(fast, z) == "program"
    assert events[:2] == ["launched", "changed"]
    assert events[-3:] == ["launched", "same", "waited"]
    assert events.count("waited") == 1


@torch.no_grad()
@pytest.mark.parametrize("graphed", [True, False])
def test_frames_are_copied_once(fast: AcceleratedDecoder, graphed: bool) -> None:
    """Those of a CUDA graph are a copy already, and those of another program may be its buffer."""

    class Program:
        def __init__(self) -> None:
            self.graphed = graphed
            self.frames: Tensor | None = None

        def __call__(self, z: Tensor) -> Tensor:
            self.frames = torch.zeros(len(z), 3, 8, 8) if graphed or self.frames is None else self.frames.add_(1)
            return self.frames

    assert who(fast, latents(2)) == "program"
    slot = next(iter(fast._state.decodes[2]._found.values())).slot
    assert slot.loaded is not None
    program = Program()
    slot.loaded = dataclasses.replace(slot.loaded, program=program)
    first, second = fast(latents(2)), fast(latents(2))
    assert (second is program.frames) is graphed
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, torch.zeros(2, 3, 8, 8))
    part = fast._state.decode(2).images(latents(1), torch.float32)
    assert part is not None
    assert part.untyped_storage().nbytes() == part.nbytes, "the frames of the padding stay in memory"


@torch.no_grad()
def test_hooks_on_the_decoder_itself_run_around_the_program(fast: AcceleratedDecoder, original: nn.Module) -> None:
    seen: list[str] = []
    z = latents()
    fast.register_forward_pre_hook(lambda module, args: seen.append("before"))
    handle = original.register_forward_hook(lambda module, args, out: seen.append("after"))
    fast(z)
    assert seen == ["before", "after"]
    assert fast.stats().program_calls == 1
    handle.remove()
    fast(z)
    assert seen == ["before", "after", "before"]


def test_inference_mode_channels_last_and_views(fast: AcceleratedDecoder) -> None:
    z = latents(2)
    with torch.inference_mode():
        assert who(fast, torch.randn(2, LATENTS, 4, 4)) == "program"
        assert fast(z).is_inference()
    assert who(fast, z) == "program"  # what was made in inference mode does not stay
    assert who(fast, z.to(memory_format=torch.channels_last)) == "program"
    assert who(fast, z.transpose(2, 3)) == "program"
    assert fast.stats().pytorch == {}


@torch.no_grad()
def test_latents_without_values_are_pytorchs(fast: AcceleratedDecoder) -> None:
    z = latents()
    assert who(fast, z) == "program"
    for decode in (fast, fast.original):
        with pytest.raises(RuntimeError, match="device meta"):
            decode(z.to("meta"))
    assert who(fast, z) == "program"
    fast.to("meta")
    assert fast(z.to("meta")).shape == (1, 3, 8, 8)


@torch.no_grad()
def test_threads_get_their_own_frames(fast: AcceleratedDecoder, tools: Offset) -> None:
    given = [latents() for _ in range(24)]
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(torch.no_grad()(fast), given))
    for z, frames in zip(given, got, strict=True):
        torch.testing.assert_close(frames, fast.original(z) + Offset.BY_PROGRAM, rtol=0, atol=1e-5)
    assert tools.builds == 1


@torch.no_grad()
def test_copies_and_pickles_are_whole(fast: AcceleratedDecoder, tools: Offset) -> None:
    z = latents()
    who(fast, z)
    holder = nn.ModuleDict({"decoder": fast})
    twin: Any = copy.deepcopy(holder)["decoder"]
    assert isinstance(twin, AcceleratedDecoder)
    assert twin.original is not fast.original
    twin.original.conv_in.weight.mul_(2)
    assert who(fast, z) == "program"
    assert who(twin, z) == "program"
    assert not torch.equal(twin(z), fast(z))
    assert tools.builds == 2
    plain: Any = owl_wms.accelerate(copy.deepcopy(fast.original))
    again = pickle.loads(pickle.dumps(plain))
    assert torch.equal(again(z), fast.original(z))
    shallow = copy.copy(plain)
    assert torch.equal(shallow(z), fast.original(z))


@torch.no_grad()
def test_torch_compile_around_it(fast: AcceleratedDecoder) -> None:
    z = latents()
    compiled = torch.compile(lambda x: 2 * fast(x), backend="eager")
    assert torch.equal(compiled(z), 2 * fast(z))
    assert fast.stats().program_calls == 2
    assert torch.equal(torch.compile(fast, backend="eager")(z), fast(z))


@pytest.mark.parametrize("step", ["ready", "key_material", "build", "load", "run"])
@torch.no_grad()
def test_what_fails_ends_in_pytorch_or_in_an_error(original: nn.Module, tmp_path: Path, step: str) -> None:
    z = latents()
    for strict in (False, True):
        tools = Offset(fail={step: RuntimeError("on order")}, salt=str(strict))
        fast: Any = owl_wms.accelerate(original, cache_dir=tmp_path, toolchain=tools, strict=strict)
        if strict:
            with pytest.raises(FastPathError, match="on order"):
                fast(z)
        else:
            assert who(fast, z) == "pytorch"
            assert fast.stats().pytorch == {"no program": 1}


@torch.no_grad()
def test_frames_that_are_not_finite_are_pytorchs(fast: AcceleratedDecoder, tools: Offset) -> None:
    who(fast, latents())
    tools.damage = lambda frames: frames.index_fill(0, torch.tensor([0]), float("nan"))
    assert who(fast, latents()) == "pytorch"
    assert fast.stats().programs[1].failures == {"run": 1}


@torch.no_grad()
def test_values_too_large_for_the_callers_dtype(original: nn.Module, tmp_path: Path) -> None:
    """PyTorch overflows in the same places: then infinity is the answer."""
    tools = ExportToolchain()
    fast: Any = owl_wms.accelerate(original.half(), cache_dir=tmp_path, toolchain=tools)
    original.conv_out.bias.fill_(65504)  # type: ignore[union-attr,operator]
    original.conv_out.weight.mul_(100)  # type: ignore[union-attr,operator]
    z = latents().half()
    assert torch.equal(fast(z), original(z))
    assert not fast(z).isfinite().all()


@torch.no_grad()
def test_a_picture_that_does_not_fit_is_decoded_in_tiles(original: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    fast: Any = owl_wms.accelerate(original)  # no GPU here, so no program
    z = latents(2, size=40)
    wanted = original(z)
    plain = type(original).forward
    sides: list[int] = []

    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    def tiled(decoder: nn.Module, z: Tensor, side: int) -> Tensor:
        sides.append(side)
        return full() if side > 20 else decode_in_tiles(decoder, z, side)

    monkeypatch.setattr(type(original), "forward", full)
    monkeypatch.setattr("owl_wms.runtime.accelerated.decode_in_tiles", tiled)
    monkeypatch.setattr("owl_wms.runtime.accelerated.is_sana_decoder", lambda module: True)
    monkeypatch.setattr("owl_wms.runtime.accelerated.LARGEST_TILE", 40)
    torch.testing.assert_close(fast(z), wanted, rtol=0, atol=1e-5)
    assert sides == [40, 20]
    monkeypatch.setattr("owl_wms.runtime.accelerated.LARGEST_TILE", 24)
    with pytest.raises(torch.OutOfMemoryError):
        fast(z)
    monkeypatch.setattr(type(original), "forward", plain)
    assert "in tiles" in " ".join(fast.stats().pytorch)


# ---- batches


@pytest.mark.parametrize(
    ("batch", "sizes", "ways"),
    [
        (5, (2, 4), [(4, 2), (2, 2, 2), (4, 4)]),
        (4, (4,), [(4,)]),
        (3, (8,), [(8,)]),
        (7, (1, 2, 4), [(4, 2, 1), (1,) * 7, (2,) * 4, (4, 4)]),
    ],
)
def test_covers(batch: int, sizes: tuple[int, ...], ways: list[tuple[int, ...]]) -> None:
    assert batches.covers(batch, sizes) == ways


def test_the_fastest_way_is_measured_and_failures_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("owl_wms.timing.time.perf_counter", lambda: clock[0])

    def slow(_: Tensor) -> None:
        clock[0] += 0.01

    def broken(_: Tensor) -> None:
        raise torch.OutOfMemoryError("too much")

    z = torch.zeros(1)
    assert batches.measured({(4,): slow, (2, 2): lambda _: None, (): broken}, z) == (2, 2)
    assert batches.measured({(4,): slow, (): lambda _: None}, z) == ()
    assert batches.measured({(4,): broken, (): broken}, z) == ()


@torch.no_grad()
def test_other_batches_are_decoded_right_whatever_is_fastest(
    original: nn.Module, tools: Offset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast: Any = owl_wms.accelerate(original, batch_sizes=(2, 4), cache_dir=tmp_path, toolchain=tools)
    assert who(fast, latents(4)) == "program"
    assert tools.builds == 1
    for way in ((4, 2), (4, 4), (2, 2, 2), ()):
        monkeypatch.setattr("owl_wms.runtime.accelerated.measured", lambda *_, way=way: way)
        fast._state.ways.clear()
        assert who(fast, latents(5)) == ("program" if way else "pytorch")
        assert fast.stats().ways[(5, LATENTS, 4, 4)] == way
    monkeypatch.undo()
    fast._state.ways.clear()
    who(fast, latents(3))
    assert tools.builds == 2


@torch.no_grad()
def test_without_sizes_the_first_batch_of_a_shape_decides(fast: AcceleratedDecoder, tools: Offset) -> None:
    who(fast, latents(2))
    who(fast, latents(3))
    who(fast, latents(1))
    assert tools.builds == 1
    who(fast, latents(3, size=5))
    assert tools.builds == 2


@torch.no_grad()
def test_programs_in_memory_are_limited(fast: AcceleratedDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_PROGRAMS >= 4  # a tiled picture has four sizes of tile
    monkeypatch.setattr("owl_wms.runtime.accelerated.MAX_PROGRAMS", 1)
    assert who(fast, latents(size=4)) == "program"
    assert who(fast, latents(size=5)) == "pytorch"
    assert who(fast, latents(size=4)) == "program"


@torch.no_grad()
def test_in_the_background(original: nn.Module, tools: Offset, tmp_path: Path) -> None:
    fast: Any = owl_wms.accelerate(original, background=True, cache_dir=tmp_path, toolchain=tools)
    assert who(fast, latents()) == "pytorch"
    deadline = time.monotonic() + 60
    while who(fast, latents()) == "pytorch" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert who(fast, latents()) == "program"
    assert tools.builds == 1


@torch.no_grad()
def test_a_move_keeps_the_programs_if_the_values_are_the_same(fast: AcceleratedDecoder, tools: Offset) -> None:
    z = latents()
    who(fast, z)
    loads = tools.loads
    nn.ModuleDict({"decoder": fast})._apply(torch.clone)  # what .to(device) does: every weight anew
    assert who(fast, z) == "program"
    assert (tools.builds, tools.loads) == (1, loads)
    fast._apply(lambda tensor: tensor * 2)
    assert who(fast, z) == "program"
    assert tools.builds == 2


# ---- what is accelerated


def test_autoencoders_and_the_unknown(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model = autoencoder()
    decoder = model.decoder
    with caplog.at_level(logging.INFO, "owl_wms.runtime"):
        assert owl_wms.accelerate(model, cache_dir=tmp_path) is model
        assert model.decoder.original is decoder
        assert "decoder: Decoder" in caplog.text
        assert owl_wms.accelerate(model) is model
        assert model.decoder.original is decoder
    assert caplog.records[-1].levelno == logging.INFO
    caplog.clear()
    stranger = nn.Linear(2, 2)
    assert owl_wms.accelerate(stranger) is stranger
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "Linear is left as it is" in record.getMessage()
    assert "AutoencoderDC" in record.getMessage()


@torch.no_grad()
def test_our_own_decoders(tools: Offset, tmp_path: Path) -> None:
    from owl_wms.vae import build_decoder
    from tests.vae.helpers import small_dcae

    decoder = build_decoder(small_dcae()).eval()
    fast: Any = owl_wms.accelerate(decoder, cache_dir=tmp_path, toolchain=tools)
    assert fast.config is decoder.config
    z = torch.randn(2, decoder.latent_channels, 2, 2)
    assert who(fast, z) == "program"
    assert who(fast, z) == "program"


def test_settings_are_checked() -> None:
    decoder = autoencoder().decoder
    with pytest.raises(ConfigError, match="batch_sizes"):
        owl_wms.accelerate(decoder, batch_sizes=(0,))
    with pytest.raises(ConfigError, match="precision"):
        owl_wms.accelerate(decoder, precision="half")


@torch.no_grad()
def test_what_a_call_costs(fast: AcceleratedDecoder) -> None:
    """Against the program itself, with the tree of modules that f32c32 has, weights compared after the launch included.

    Loose, for machines that do other things; docs/diffusers.md has the measured cost.
    """
    z = latents()
    who(fast, z)
    slot = next(iter(fast._state.decodes[1]._found.values())).slot
    assert slot.loaded is not None
    slot.loaded = type(slot.loaded)(**{**_fields(slot.loaded), "program": lambda x: x})
    for _ in range(100):
        fast(z)
    began = time.thread_time()
    for _ in range(1000):
        fast(z)
    assert (time.thread_time() - began) / 1000 < 1e-3


def _fields(loaded: Any) -> dict[str, Any]:
    return {name: getattr(loaded, name) for name in type(loaded).__slots__}
