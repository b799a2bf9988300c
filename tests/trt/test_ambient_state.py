"""What a caller's process has set for all of torch does not reach a key, a lowered form or a load."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from owl_wms import trt
from owl_wms.ops.stage import enlarge_matrix
from owl_wms.request import Request
from owl_wms.runtime import VideoDecode
from owl_wms.settings import TensorRTConfig
from owl_wms.trt import plans
from owl_wms.trt.check import output
from owl_wms.trt.check.output import RecordedOutput, sample_of
from owl_wms.trt.check.parity import latents
from owl_wms.trt.graph.recording import Recording
from owl_wms.trt.library import engines
from owl_wms.trt.rewrites.resize import bicubic_matrix
from owl_wms.trt.run.load import load_program
from owl_wms.vae import fold_weight_norm
from tests.process_state import STATES, set_in_process
from tests.trt import decoders

SHAPE = (2, 4, 3, 5)


def digest(*tensors: Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        assert tensor.device.type == "cpu"
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def program() -> bytes:
    """A program whose file holds its answer, as a build in a process of its own would leave it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.Tanh()).half().eval().requires_grad_(False)
    z = latents(SHAPE, 1.0, torch.float16, "cpu")
    buffer = io.BytesIO()
    built = RecordedOutput.of(model(z), {}, seed=0)
    torch.export.save(torch.export.export(model, (z,)), buffer, extra_files={output.FILE: built.pack()})
    return buffer.getvalue()


def small_parts() -> dict[str, str]:
    enlarge_matrix.cache_clear()
    drawn = latents(SHAPE, 0.5, torch.float16, "cpu", seed=3)
    return {
        "latents": digest(drawn),
        "sample": digest(sample_of(drawn)),
        "enlargement": digest(enlarge_matrix(5, 4, torch.device("cpu"))),
        "bicubic": digest(bicubic_matrix(5, 10)),
    }


@pytest.fixture(scope="module")
def neutral() -> dict[str, str]:
    return small_parts()


@pytest.mark.parametrize("state", STATES)
def test_constants_and_drawn_latents_are_the_same(state: str, neutral: dict[str, str]) -> None:
    with set_in_process(state):
        assert small_parts() == neutral


@pytest.mark.parametrize("state", STATES)
def test_a_program_that_was_built_elsewhere_is_accepted(
    state: str, program: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "attached", lambda: True)
    z = latents(SHAPE, 1.0, torch.float16, "cpu", seed=5)
    wanted = load_program(program, "cpu")(z)
    with set_in_process(state):
        assert torch.equal(load_program(program, "cpu")(z), wanted)


@pytest.fixture(scope="module", params=["tiled", "learned", "distill", "sana"])
def family(request: pytest.FixtureRequest) -> tuple[str, nn.Module, tuple[int, int, int, int]]:
    return (request.param, *decoders.make(request.param))


def lowered(decoder: nn.Module, shape: tuple[int, int, int, int]) -> dict[str, str]:
    """Digest of every parameter and constant of the decoder lowered by each plan of 16 bits, and the key's."""
    found: dict[str, Any] = {}
    spec = Request(input_shape=shape, precision="fp16")
    material = json.dumps(trt.key_material(decoder, spec), sort_keys=True, default=str)
    found["key"] = hashlib.sha256(material.encode()).hexdigest()
    folded = fold_weight_norm(decoder).eval().requires_grad_(False)
    recording = Recording.of(decoder, shape)
    for plan in plans.select(folded, spec, recording).plans["fp16"]:
        module, _ = plan.lower(folded, spec, "fp16", recording)
        found[plan.name] = digest(*module.state_dict(keep_vars=True).values(), *module.buffers())
    return found


@pytest.mark.parametrize("state", [state for state in STATES if state != "inference"])
def test_key_and_every_lowered_form_are_the_same(
    state: str, family: tuple[str, nn.Module, tuple[int, int, int, int]]
) -> None:
    _, decoder, shape = family
    wanted = lowered(decoder, shape)
    assert len(wanted) > 1
    with set_in_process(state):
        assert lowered(decoder, shape) == wanted


@pytest.mark.parametrize("state", STATES)
def test_pytorchs_answer_is_the_same(state: str) -> None:
    decoder, shape = decoders.make("tiled")
    z = latents(shape, 1.0, torch.float32, "cpu")[None]
    settings = TensorRTConfig(enabled=False)
    wanted = VideoDecode(decoder, batch_size=2, settings=settings)(z)
    with set_in_process(state):
        assert torch.equal(VideoDecode(decoder, batch_size=2, settings=settings)(z), wanted)
