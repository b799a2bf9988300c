"""A program is run from its call list as from its exported graph, bit for bit, and without torch's compiler.

Run: python -m pytest tests/trt/run/test_calls.py
"""

from __future__ import annotations

import functools
import io
import json
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from owl_wms.cache import Key
from owl_wms.request import Request
from owl_wms.runtime import TensorRT, VideoDecode
from owl_wms.runtime.programs import staged
from owl_wms.settings import TensorRTConfig
from owl_wms.trt import plans
from owl_wms.trt.build import save as saving
from owl_wms.trt.build.candidate import Candidate
from owl_wms.trt.check import output
from owl_wms.trt.check.parity import example
from owl_wms.trt.graph.export import export_decoder
from owl_wms.trt.graph.recording import Recording
from owl_wms.trt.graph.shapes import fp32_copy
from owl_wms.trt.library import jit_kernels
from owl_wms.trt.run import calls
from owl_wms.trt.run.load import load_calls, load_exported, load_program
from tests.trt import decoders

CPU = torch.device("cpu")
STEP = "a step and its state"


@functools.cache
def lowered(family: str, plan: str = "ops") -> tuple[torch.export.ExportedProgram, tuple[Tensor, ...]]:
    """The exported program of a plan at bf16, and inputs for it."""
    if family == STEP:
        decoder, request = decoders.make_step()
    else:
        decoder, shape = decoders.make(family)
        request = Request(input_shape=shape, device="cpu", precision="bf16")
    recording = Recording.of(decoder, request.input_shape, request.state)
    module, _ = plans.PLANS[plan].lower(fp32_copy(decoder, "cpu"), request, "bf16", recording)
    inputs = example(request.input_shape, request.state, torch.bfloat16, CPU, seed=0)
    return export_decoder(module, *inputs), inputs


@functools.cache
def saved(family: str, plan: str = "ops") -> tuple[bytes, torch.export.ExportedProgram, Tensor]:
    """The program's file without a call list, what is read from it, and what that computes."""
    exported, inputs = lowered(family, plan)
    with torch.no_grad():
        wanted = exported.module()(*inputs)
    buffer = io.BytesIO()
    recorded = output.RecordedOutput.of(wanted, {}, seed=0).pack()
    torch.export.save(exported, buffer, extra_files={output.FILE: recorded})
    program, again = load_exported(buffer.getvalue(), "cpu", library=False)
    assert torch.equal(output.joined(program(*inputs)), output.joined(wanted))
    return buffer.getvalue(), again, output.joined(wanted)


def listed(family: str, plan: str = "ops") -> bytes:
    data, exported, _ = saved(family, plan)
    return calls.with_calls(data, exported, CPU)


def list_of(data: bytes) -> dict[str, Any]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(calls.FILE)]
        return json.loads(archive.read(name))


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What `torch.export.load` is called with from now on."""
    seen: list[bytes] = []
    load = torch.export.load

    def spy(file: Any, **options: Any) -> Any:
        seen.append(file.getvalue())
        return load(file, **options)

    monkeypatch.setattr(torch.export, "load", spy)
    return seen


@pytest.mark.parametrize(
    ("family", "plan"), [*((family, "ops") for family in (*decoders.FAMILIES, STEP)), ("sana", "tensorrt")]
)
def test_every_family_computes_the_same_bits(family: str, plan: str, exports: list[bytes]) -> None:
    pytest.importorskip("triton")
    inputs, wanted = lowered(family, plan)[1], saved(family, plan)[2]
    exports.clear()
    data = listed(family, plan)
    program = load_program(data, "cpu", library=False)
    assert not exports, "the exported program was not read"
    assert (program.input_shape, program.input_dtype) == (tuple(inputs[0].shape), torch.bfloat16)
    assert program.state == tuple(tuple(state.shape) for state in inputs[1:])
    assert torch.equal(output.joined(program(*inputs)), wanted)
    assert len(data) - len(saved(family, plan)[0]) < 20_000, "weights are not written twice"
    exported, _ = load_exported(data, "cpu", library=False)
    assert torch.equal(output.joined(exported(*inputs)), wanted), "the file is an exported program as before"


def put(*way: Any) -> Callable[[dict[str, Any]], None]:
    """Returns what puts the last of `way` to the place in the list that the others lead to."""
    *path, last, value = way

    def change(made: dict[str, Any]) -> None:
        for step in path:
            made = made[step]
        made[last] = value

    return change


def exchange_two_weights(made: dict[str, Any]) -> None:
    seen: dict[str, dict[str, Any]] = {}
    for row in made["constants"]:
        other = seen.setdefault(str([row["dtype"], row["shape"]]), row)
        if other is not row:
            other["record"], row["record"] = row["record"], other["record"]
            return
    pytest.fail("no two weights are alike")


ALTERED: dict[str, Callable[[dict[str, Any]], None]] = {
    "empty": dict.clear,
    "another format": put("format", calls.FORMAT + 1),
    "another graph": put("graph", "0" * 64),
    "no calls": put("calls", []),
    "an operator of another namespace": put("calls", 0, 0, "prims.sin.default"),
    "no operator": put("calls", 0, 0, "aten.__class__.default"),
    "an operator that writes a file": put("calls", 0, ["aten.save.default", [{"value": 0}, "x"], {}]),
    "an operator that reads a file": put("calls", 0, ["aten.from_file.default", ["x"], {}]),
    "a value that comes later": put("calls", 0, 1, 0, {"value": 1}),
    "a value that never comes": put("calls", 0, 1, 0, {"value": -1}),
    "an argument of no kind": put("calls", 0, 1, 0, {"eval": "1"}),
    "a name that is no dtype": put("inputs", 0, "dtype", "save"),
    "inputs of another shape": put("inputs", 0, "shape", [1, 1, 1, 1]),
    "a record that is not there": put("constants", 0, "record", "data/weights/weight_99"),
    "a record beyond the end": put("constants", 0, "bytes", 1 << 40),
    "a shape that does not fit": put("constants", 0, "shape", [1 << 20]),
    "another result": put("outputs", {"value": 0}),
    "two weights in each other's place": exchange_two_weights,
}


@pytest.mark.parametrize("how", ALTERED)
def test_an_altered_list_is_not_used(how: str, exports: list[bytes]) -> None:
    pytest.importorskip("triton")
    made = list_of(listed("tiled"))
    ALTERED[how](made)
    buffer = io.BytesIO(saved("tiled")[0])
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(f"{archive.namelist()[0].split('/')[0]}/extra/{calls.FILE}", json.dumps(made))
    exports.clear()
    program = load_program(buffer.getvalue(), "cpu", library=False)
    assert len(exports) == 1, "the exported program was read"
    assert torch.equal(program(*lowered("tiled")[1]), saved("tiled")[2])


class TimeLimit(Exception):
    pass


def test_a_time_limit_of_the_caller_ends_the_reading(monkeypatch: pytest.MonkeyPatch, exports: list[bytes]) -> None:
    pytest.importorskip("triton")

    def limit(*_: object) -> None:
        raise TimeLimit

    data = listed("tiled")
    exports.clear()
    monkeypatch.setattr(calls, "read", lambda *_: signal.raise_signal(signal.SIGALRM))
    before = signal.signal(signal.SIGALRM, limit)
    try:
        with pytest.raises(TimeLimit):
            staged("load", load_program, data, "cpu", library=False)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not exports, "nothing else was tried within a limit that is over"


def test_engines_get_the_kernels_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    seen: list[Any] = []
    monkeypatch.setattr(jit_kernels, "attach", lambda engines, text: seen.append((list(engines), text)))
    buffer = io.BytesIO(listed("tiled"))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(f"{archive.namelist()[0].split('/')[0]}/extra/{jit_kernels.FILE}", "kernels")
    assert load_calls(buffer.getvalue(), CPU) is not None
    assert seen == [([], "kernels")]


class Journal:
    """Remembers what was attempted; `known` failed before."""

    def __init__(self, known: str = "") -> None:
        self.known, self.outcomes = known, dict[str, str]()

    def stage(self, name: str, **details: Any) -> None:
        pass

    def attempt(self, key: str) -> str | None:
        return self.known or None

    def outcome(self, key: str, reason: str) -> None:
        self.outcomes[key] = reason


def save(tmp_path: Path, journal: Journal) -> tuple[dict[str, Any], bytes]:
    exported, inputs = lowered("tiled")
    best = Candidate(plan="ops", precision="bf16", program=exported.module(), exported=exported)
    request = Request(input_shape=tuple(inputs[0].shape), device="cpu", precision="bf16")
    report = saving.save(best, tmp_path, request, journal, CPU)
    return report, (tmp_path / saving.PROGRAM_NAME).read_bytes()


def test_a_build_writes_the_list_and_its_reader_finds_it(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    journal = Journal()
    report, data = save(tmp_path, journal)
    assert (report["no_call_list"], report["program_bytes"]) == ("", len(data))
    assert journal.outcomes == {"calls|ops|bf16": ""}
    assert load_calls(data, CPU) is not None


def test_a_list_that_gives_other_frames_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    right = calls._written

    def wrong(*given: Any) -> dict[str, Any]:
        made = right(*given)
        return {**made, "constants": [made["constants"][0], *made["constants"][2:], made["constants"][1]]}

    monkeypatch.setattr(calls, "_written", wrong)
    report, data = save(tmp_path, Journal())
    assert report["no_call_list"]
    assert load_calls(data, CPU) is None
    assert report["reload_bit_equal"]


def test_a_list_that_killed_the_build_process_is_not_made_again(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    report, data = save(tmp_path, Journal(known="the build process ended with SIGSEGV"))
    assert "SIGSEGV" in report["no_call_list"]
    assert load_calls(data, CPU) is None


def test_a_program_that_writes_to_its_weights_has_no_list() -> None:
    class Counts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, z: Tensor) -> Tensor:
            self.seen.add_(1)
            return z + self.seen

    buffer, exported = io.BytesIO(), torch.export.export(Counts(), (torch.zeros(1, 2),)).run_decompositions({})
    torch.export.save(exported, buffer)
    with pytest.raises(ValueError, match="writes to its weights"):
        calls.with_calls(buffer.getvalue(), exported, CPU)


FIRST_DECODE = """
import sys, time, torch
from pathlib import Path
from owl_wms.runtime import TensorRT, VideoDecode
from owl_wms.settings import TensorRTConfig
from tests.trt import decoders

TensorRT.ready = lambda self, request: None
decoder, shape = decoders.make("tiled")
settings = TensorRTConfig(cache_dir=Path(sys.argv[1]), precision="bf16", plans=("ops",))
decode = VideoDecode(decoder, batch_size=shape[0], settings=settings, strict=True)
frames = decode(torch.zeros(1, *shape))
assert decode.stats().reason.startswith("cached program"), decode.stats().reason
print(*[name for name in ("torch._dynamo", "torch._inductor", "sympy", "torch._export.serde.serialize", "triton",
    "torch.export.pt2_archive", "torch_tensorrt", "torch.fx.experimental.symbolic_shapes") if name in sys.modules])
"""


def test_a_new_process_decodes_by_a_cached_program_without_torchs_compiler(tmp_path: Path) -> None:
    """`import torch` loads torch.export itself in 2.11; what costs seconds is what its deserializer imports."""
    pytest.importorskip("triton")
    decoder, shape = decoders.make("tiled")

    class Quick(TensorRT):
        def ready(self, request: Request) -> None:
            return None

        def build(self, decoder: Any, request: Request, key: Key, folder: Path, *_rest: Any) -> dict[str, Any]:
            (folder / "program.pt2").write_bytes(listed("tiled"))
            return {"library": False, "precision": "bf16", "plan": "ops"}

    settings = TensorRTConfig(cache_dir=tmp_path / "cache", precision="bf16", plans=("ops",))
    decode = VideoDecode(decoder, batch_size=shape[0], settings=settings, strict=True, toolchain=Quick())
    assert decode.prepare(shape[1:]).builds == 1
    command = [sys.executable, "-c", FIRST_DECODE, str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == []
