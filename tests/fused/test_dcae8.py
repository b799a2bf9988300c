"""8-bit stages on the CPU: error, calibration, what is quantised, the plan, its key and its rule of parity."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from owl_wms.errors import FastPathError
from owl_wms.fused import dcae8
from owl_wms.fused.dcae import FusedStage
from owl_wms.fused.dcae8 import FusedStage8, fuse8, reaches, supports8
from owl_wms.media.arrays import save_array
from owl_wms.media.facts import Facts
from owl_wms.ops.codes import FORMATS
from owl_wms.request import Request
from owl_wms.trt import key_material
from owl_wms.trt.build import parent
from owl_wms.trt.check.calibration import MOST, SEEDED, calibration_latents
from owl_wms.trt.check.parity import Reference
from owl_wms.vae.blocks import ResBlock
from tests.ops.decoders import dcae, distill
from tests.trt import decoders

SHAPE = (2, 16, 4, 4)


@pytest.fixture(autouse=True)
def _small_is_wide_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcae8, "LEAST_CHANNELS", 64)


def wide(**changes: object) -> nn.Module:
    """Stages of 128, 128 and 64 channels, two of them of several blocks."""
    return dcae(**{"stages": (2, 3, 1), "ch_0": 64, "ch_max": 256, "size": 32, "latent": 16, **changes})


def decibel(got: torch.Tensor, want: torch.Tensor) -> float:
    """PSNR against the range of the wanted frames."""
    return 20 * math.log10(want.abs().max() / (got - want).square().mean().sqrt())


@pytest.mark.parametrize(("name", "least"), [("int8", 42), ("fp8", 37)])
@pytest.mark.parametrize(
    "decoder",
    [wide(), wide(use_middle_block=True), dcae("learned", ch_0=64, ch_max=128, stages=(2, 1), size=32)],
    ids=["tiled", "middle", "learned"],
)
def test_error_is_that_of_eight_bits(decoder: nn.Module, name: str, least: float) -> None:
    z, calibration = torch.randn(SHAPE), torch.randn(SEEDED, *SHAPE[1:])
    fused = fuse8(decoder, torch.float32, FORMATS[name], calibration)
    with torch.no_grad():
        want, got = decoder(z), fused(z)
        assert decibel(got, want) > least
        assert torch.equal(fused(torch.cat([z[:1], 9 * z[1:]]))[:1], got[:1]), (
            "an image must not depend on its neighbours"
        )
        # Four times as far as anything calibrated: the steps widen, nothing saturates beyond recognition.
        assert decibel(fused(4 * z), decoder(4 * z)) > least - 8


def test_the_x4_enlargement_and_its_stage() -> None:
    decoder = distill(ch_0=64)
    fused = fuse8(decoder, torch.float32, torch.int8, torch.randn(SEEDED, 16, 2, 2))
    assert 4 in [stage.scale for stage in fused.stages if isinstance(stage, FusedStage8)]
    z = torch.randn(1, 16, 2, 2)
    with torch.no_grad():
        assert decibel(fused(z), decoder(z)) > 42


def test_narrow_stages_stay_in_sixteen_bits() -> None:
    fused = fuse8(wide(ch_0=32, ch_max=128), torch.float32, torch.int8, torch.randn(4, *SHAPE[1:]))
    assert [type(stage) for stage in fused.stages] == [FusedStage8, FusedStage8, FusedStage]
    supported, reason = supports8(dcae(ch_0=8, ch_max=32))
    assert not supported
    assert "64 channels" in reason
    with pytest.raises(ValueError, match="64 channels"):
        fuse8(dcae(ch_0=8, ch_max=32), torch.float32, torch.int8, torch.randn(1, 16, 4, 4))


def test_reach_is_the_largest_magnitude_of_every_channel() -> None:
    decoder = wide()
    blocks = [module for module in decoder.modules() if isinstance(module, ResBlock)]
    z = torch.randn(3, *SHAPE[1:])
    met: list[torch.Tensor] = []
    handle = blocks[1].register_forward_pre_hook(lambda _, arguments: met.append(arguments[0]))
    with torch.no_grad():
        decoder(z)
    handle.remove()
    found = reaches(decoder, blocks, z)
    torch.testing.assert_close(found[blocks[1]].block, met[0].abs().amax(dim=(0, 2, 3)), rtol=1e-5, atol=1e-6)
    assert not any(block._forward_pre_hooks or block.conv1._forward_pre_hooks for block in blocks)


def test_silent_channels_do_not_divide_by_zero() -> None:
    decoder = wide()
    with torch.no_grad():
        for module in decoder.modules():
            if isinstance(module, ResBlock):
                module.conv1.weight[:4] = 0
                module.conv1.bias[:4] = 0
    fused = fuse8(decoder, torch.float32, torch.int8, torch.zeros(1, *SHAPE[1:]))
    with torch.no_grad():
        assert fused(torch.randn(SHAPE)).isfinite().all()


def test_exports_with_its_ops_intact() -> None:
    fused = fuse8(wide(), torch.float32, torch.int8, torch.randn(2, *SHAPE[1:]))
    z = torch.randn(SHAPE)
    exported = torch.export.export(fused, (z,), strict=False)
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert sum("owl_wms.stage8" in target for target in targets) == 3
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(z), fused(z))


def test_the_plan_is_taken_by_name_and_never_by_auto() -> None:
    decoder = wide()
    for precision in ("fp8", "int8"):
        spec = Request(input_shape=SHAPE, precision=precision)
        assert spec.precisions() == (precision,)
        assert decoders.plan_names(decoder, spec, precision) == ["tensorrt+ops8"]
    auto = Request(input_shape=SHAPE)
    assert all("tensorrt+ops8" not in decoders.plan_names(decoder, auto, p) for p in auto.precisions())
    with pytest.raises(FastPathError, match="64 channels"):
        decoders.selected(dcae(ch_0=8, ch_max=32), Request(input_shape=SHAPE, precision="int8"))


def test_an_older_gpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (8, 6))
    with pytest.raises(FastPathError, match=r"compute capability 9\.0.*has 8\.6"):
        decoders.selected(wide(), Request(input_shape=SHAPE, precision="fp8"))


def test_calibration_comes_from_a_file_and_is_part_of_the_key(tmp_path: Path) -> None:
    seeded = Request(input_shape=SHAPE, precision="int8")
    assert calibration_latents(seeded, "cpu").shape == (SEEDED, *SHAPE[1:])
    path = tmp_path / "latents.safetensors"
    save_file({"latents": torch.randn(5, 40, *SHAPE[1:]).half()}, path)
    spec = Request(input_shape=SHAPE, precision="int8", calibration=str(path))
    z = calibration_latents(spec, "cpu")
    assert z.dtype == torch.float32
    assert MOST // 2 < len(z) <= MOST
    keys = [key_material(wide(), each)["calibration"] for each in (seeded, spec)]
    save_file({"latents": torch.randn(5, 40, *SHAPE[1:])}, path)
    again = Request(input_shape=SHAPE, precision="int8", calibration=str(path))
    keys.append(key_material(wide(), again)["calibration"])
    assert len(set(keys)) == 3
    assert key_material(wide(), dataclasses.replace(spec, precision="bf16"))["calibration"] == ""


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file"),
        (b"not a safetensors file", "SafetensorError"),
        ({"frames": torch.zeros(1, 16, 4, 4)}, "holds frames"),
        ({"latents": torch.zeros(1, 16, 8, 8)}, r"\[1, 16, 8, 8\]"),
        ({"latents": torch.full((1, 16, 4, 4), float("nan"))}, "not finite"),
        ({"latents": torch.zeros(3, 16, 4, 4)}, "nothing but zeros"),
    ],
)
def test_a_bad_calibration_file_is_one_clear_error(content: object, why: str, tmp_path: Path) -> None:
    path = tmp_path / "latents.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        save_file(content, path)
    spec = Request(input_shape=SHAPE, precision="int8", calibration=str(path))
    with pytest.raises(FastPathError, match=why) as caught:
        calibration_latents(spec, "cpu")
    assert "safetensors" in caught.value.remedy
    assert spec.calibration_digest


def test_calibration_is_on_what_the_decoder_takes(tmp_path: Path) -> None:
    """`owl-wms encode --scale 4` divides latents by 4 and says so."""
    z = torch.randn(3, *SHAPE[1:])
    save_array(tmp_path / "plain.safetensors", z)
    save_array(tmp_path / "scaled.safetensors", z / 4, facts=Facts(vae_scale=4.0))
    plain, scaled = (
        calibration_latents(Request(input_shape=SHAPE, precision="int8", calibration=str(tmp_path / name)), "cpu")
        for name in ("plain.safetensors", "scaled.safetensors")
    )
    assert torch.equal(plain, scaled)


def test_a_file_replaced_after_the_key_was_made_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latents.safetensors"
    save_file({"latents": torch.randn(3, *SHAPE[1:])}, path)
    asked = Request(input_shape=SHAPE, precision="int8", calibration=str(path))
    spec = dataclasses.replace(asked, calibration_digest=key_material(wide(), asked)["calibration"])
    assert torch.equal(calibration_latents(spec, "cpu"), calibration_latents(asked, "cpu"))
    save_file({"latents": torch.full((3, *SHAPE[1:]), 9.0)}, path)
    with pytest.raises(FastPathError, match=r"latents\.safetensors was replaced"):
        calibration_latents(spec, "cpu")
    path.write_bytes(b"no longer readable as latents")
    with pytest.raises(FastPathError, match="was replaced"):
        calibration_latents(spec, "cpu")
    # One that could not be read when the key was made, and can be now.
    late = dataclasses.replace(asked, calibration_digest="unreadable: No such file or directory")
    save_file({"latents": torch.randn(3, *SHAPE[1:])}, path)
    with pytest.raises(FastPathError, match="was replaced"):
        calibration_latents(late, "cpu")
    seeded = Request(input_shape=SHAPE, precision="int8")
    assert len(calibration_latents(seeded, "cpu")) == SEEDED


def test_the_child_is_told_what_it_is_calibrated_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "latents.safetensors"
    save_file({"latents": torch.randn(3, *SHAPE[1:])}, path)
    told: list[Request] = []

    def child(self: parent.Build) -> dict[str, object]:
        told.append(Request.from_json(self.request.to_json()))
        return {}

    monkeypatch.setattr(parent.Build, "run", child)
    for precision in ("int8", "bf16"):
        spec = Request(input_shape=SHAPE, precision=precision, calibration=str(path))
        parent.build_program(wide(), spec, tmp_path)
        parent.build_program(wide(), dataclasses.replace(spec, calibration_digest="the key's"), tmp_path)
    assert [spec.calibration_digest for spec in told] == [
        hashlib.sha256(path.read_bytes()).hexdigest(),
        "the key's",
        "",
        "the key's",
    ]


def test_parity_of_eight_bits_is_a_matter_of_psnr() -> None:
    decoder = wide()
    reference = Reference.measure(decoder, decoder, SHAPE, torch.float32, "cpu", psnr_gate_db=40.0)
    within = reference.check(lambda z: decoder(z) + 0.009 * torch.randn(1))
    assert within["passed"], within["reason"]
    assert within["psnr_db"] > 40
    beyond = reference.check(lambda z: decoder(z) + 0.1)
    assert not beyond["passed"]
    assert "dB against fp32 is under 40 dB" in beyond["reason"]
    endless = reference.check(lambda z: decoder(z) / torch.zeros(()))
    assert "non-finite" in endless["reason"]
