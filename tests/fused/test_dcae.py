"""The fused decoder on the CPU in fp32: the same function as the decoder, for every variant and shape that ships."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from owl_wms.fused import dcae8
from owl_wms.fused.convolution import SHUFFLED
from owl_wms.fused.dcae import fuse, supports
from owl_wms.fused.dcae8 import fuse8
from owl_wms.vae.dcae import DCAEDecoder
from tests.ops.decoders import dcae, distill

CASES = {
    "tiled": (lambda: dcae(), (2, 16, 4, 4)),
    "one-block": (lambda: dcae(stages=(1, 1, 1)), (1, 16, 4, 4)),
    "square-four-channels": (lambda: dcae(channels=4, size=(32, 32)), (1, 16, 4, 4)),
    "seven-channels": (lambda: dcae(channels=7, stages=(2, 1)), (1, 16, 4, 4)),
    "capped-widths": (lambda: dcae(ch_0=16, ch_max=32, stages=(1, 2, 1, 1)), (1, 16, 2, 2)),
    "middle": (lambda: dcae(ch_0=24, ch_max=96, latent=12, use_middle_block=True), (1, 12, 4, 4)),
    "learned": (lambda: dcae("learned"), (1, 16, 4, 4)),
    "learned-middle": (lambda: dcae("learned", use_middle_block=True, size=32), (1, 16, 4, 4)),
    "learned-plain": (lambda: dcae("learned", skip_residuals=True, size=32), (1, 16, 4, 4)),
    "distill": (lambda: distill(), (2, 16, 2, 2)),
    "distill-square": (lambda: distill(size=(128, 128)), (1, 16, 2, 2)),
    "odd-latent": (lambda: dcae(stages=(1, 1, 1), size=(32, 32)), (1, 16, 3, 5)),
}


@pytest.mark.parametrize("case", CASES)
def test_fused_equals_decoder(case: str) -> None:
    build, shape = CASES[case]
    decoder = build()
    assert supports(decoder) == (True, "")
    z = torch.randn(shape)
    with torch.inference_mode():
        want, got = decoder(z), fuse(decoder, torch.float32)(z)
    assert got.shape == want.shape
    assert float((got - want).norm() / want.norm()) < 1e-5


@pytest.mark.parametrize("bits", [16, 8])
def test_shortcuts_that_add_themselves_are_the_same_function(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcae8, "LEAST_CHANNELS", 64)
    decoder, z = dcae("learned", ch_0=64, ch_max=128, stages=(2, 1), size=32), torch.randn(1, 16, 4, 4)
    with torch.inference_mode():
        fused = fuse(decoder, torch.float32) if bits == 16 else fuse8(decoder, torch.float32, torch.int8, z)
        want = fused(z)
        for stage in fused.stages:
            stage.shortcut.how = SHUFFLED
        got = fused(z)
        if bits == 16:
            assert float((got - decoder(z)).norm() / got.norm()) < 1e-5
    assert not torch.equal(got, torch.zeros_like(got))
    assert float((got - want).norm() / want.norm()) < (1e-5 if bits == 16 else 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [16, 8])
def test_shortcuts_that_add_themselves_on_the_gpu(bits: int, dtype: torch.dtype) -> None:
    """As accurate as shortcuts that are handed to their stage, for 32, 64 and 256 channels of a result."""
    decoder = dcae("learned", ch_0=32, ch_max=256, stages=(2, 1, 2, 1), size=64).cuda()
    z = torch.randn(3, 16, 16, 16, device="cuda")
    with torch.inference_mode():
        want = decoder(z)
        fused = fuse(decoder, dtype) if bits == 16 else fuse8(decoder, dtype, torch.int8, z)
        beside = fused(z.to(dtype)).float()
        for stage in fused.stages:
            stage.shortcut.how = SHUFFLED
        got = fused(z.to(dtype)).float()
    error, today = (float((x - want).norm() / want.norm()) for x in (got, beside))
    assert error < 1.1 * today
    assert torch.equal(fused(z.to(dtype)).float(), got), "a race"


def test_unsupported_decoders_say_why() -> None:
    supported, reason = supports(nn.Identity())
    assert not supported
    assert "Identity" in reason
    with pytest.raises(ValueError, match="Identity"):
        fuse(nn.Identity(), torch.float32)
    live = DCAEDecoder(dcae().config, "tiled")
    with pytest.raises(ValueError, match="fold_weight_norm"):
        fuse(live, torch.float32)


def test_a_shortcut_that_adds_itself_exports() -> None:
    fused, z = fuse(dcae("learned", size=32), torch.float32), torch.randn(1, 16, 4, 4)
    for stage in fused.stages:
        stage.shortcut.how = SHUFFLED
    exported = torch.export.export(fused, (z,))
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert sum("owl_wms.conv3x3_shuffled" in target for target in targets) == 3
    with torch.inference_mode():
        torch.testing.assert_close(exported.module()(z), fused(z))


def test_fused_exports_with_its_ops_intact() -> None:
    fused = fuse(dcae(), torch.float32)
    z = torch.randn(2, 16, 4, 4)
    exported = torch.export.export(fused, (z,))
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert sum("owl_wms.stage" in target for target in targets) == 3
    assert any("owl_wms.conv_out" in target for target in targets)
    with torch.inference_mode():
        torch.testing.assert_close(exported.module()(z), fused(z))
