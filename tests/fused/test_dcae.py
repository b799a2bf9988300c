"""The fused decoder on the CPU in fp32: the same function as the decoder, for every variant and shape that ships."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from owl_wms.fused.dcae import fuse, supports
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


def test_unsupported_decoders_say_why() -> None:
    supported, reason = supports(nn.Identity())
    assert not supported
    assert "Identity" in reason
    with pytest.raises(ValueError, match="Identity"):
        fuse(nn.Identity(), torch.float32)
    live = DCAEDecoder(dcae().config, "tiled")
    with pytest.raises(ValueError, match="fold_weight_norm"):
        fuse(live, torch.float32)


def test_fused_exports_with_its_ops_intact() -> None:
    fused = fuse(dcae(), torch.float32)
    z = torch.randn(2, 16, 4, 4)
    exported = torch.export.export(fused, (z,))
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert sum("owl_wms.stage" in target for target in targets) == 3
    assert any("owl_wms.conv_out" in target for target in targets)
    with torch.inference_mode():
        torch.testing.assert_close(exported.module()(z), fused(z))
