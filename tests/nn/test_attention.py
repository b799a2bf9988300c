"""flex_attention and scaled_dot_product_attention give one answer for one mask, on the CPU and on a GPU."""

from __future__ import annotations

import pytest
import torch

from owl_wms.nn.attention import FLEX_FROM_PAIRS, Masks
from owl_wms.nn.mask import FrameMask
from tests.world import inputs, relative, tiny_core

CASES = {
    "causal": {"causal": True},
    "window": {"window": 2},
    "causal window": {"causal": True, "window": 3},
    "documents": {"causal": True, "doc_id": torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 2, 2]])},
    "cached": {"causal": True, "window": 4, "queries": 2},
}


def compare(case: dict, device: str, dtype: torch.dtype, tokens: int) -> float:
    case = {"queries": 6, "keys": 6, **case}
    if case.get("doc_id") is not None:
        case["doc_id"] = case["doc_id"].to(device)
    mask = FrameMask(tokens=tokens, **case)
    q = torch.randn(2, 2, mask.queries * tokens, 32, device=device, dtype=dtype)
    k, v = torch.randn(2, 2, 2, mask.keys * tokens, 32, device=device, dtype=dtype)
    flex = Masks(torch.device(device), "flex").attend(q, k, v, mask)
    sdpa = Masks(torch.device(device), "sdpa").attend(q, k, v, mask)
    assert not torch.equal(sdpa, torch.nn.functional.scaled_dot_product_attention(q, k, v)), "the mask must matter"
    return relative(flex.float(), sdpa.float())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", CASES)
def test_both_implementations_agree(name: str) -> None:
    assert compare(CASES[name], "cpu", torch.float32, tokens=4) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_both_implementations_agree_on_a_gpu(name: str) -> None:
    assert compare(CASES[name], "cuda", torch.bfloat16, tokens=64) < 2e-2
    assert compare(CASES[name], "cuda", torch.float32, tokens=64) < 5e-3  # flex uses TF32 products


@pytest.mark.gpu
def test_a_model_and_its_gradients_agree_on_a_gpu() -> None:
    core = tiny_core(sample_size=8, tokens_per_frame=64, n_frames=32).cuda()
    x, t, mouse, buttons = (a.cuda() for a in inputs(2, 24, side=8))
    doc_id = (torch.arange(24, device="cuda") // 9).expand(2, -1).contiguous()
    results = {}
    for backend in ("flex", "sdpa"):
        core.transformer.attention_backend = backend
        core.zero_grad()
        y = core(x, t, mouse, buttons, doc_id)
        y.square().mean().backward()
        results[backend] = y.detach(), core.proj_in.weight.grad.clone()
    for flex, sdpa in zip(results["flex"], results["sdpa"], strict=True):
        assert relative(flex, sdpa) < 2e-2


def test_flex_is_for_large_masks_on_a_gpu_only() -> None:
    mask = FrameMask(queries=64, keys=64, tokens=64, causal=True)
    assert FLEX_FROM_PAIRS < (64 * 64) ** 2
    assert not Masks(torch.device("cpu")).uses_flex(mask)
    assert Masks(torch.device("cuda")).uses_flex(mask)
    assert not Masks(torch.device("cuda")).uses_flex(FrameMask(queries=8, keys=8, tokens=64, causal=True))


def test_a_kept_mask_can_be_saved_for_a_backward_pass_wherever_it_was_built() -> None:
    mask = FrameMask(queries=5, keys=5, tokens=2, causal=True)
    with torch.inference_mode():
        kept = mask.block_mask(torch.device("cpu"))
    assert mask.block_mask(torch.device("cpu")) is kept
    assert not kept.kv_indices.is_inference()
    assert not kept.kv_num_blocks.is_inference()


@pytest.mark.gpu
def test_a_model_that_sampled_in_inference_mode_trains_on_a_gpu() -> None:
    core = tiny_core(sample_size=8, tokens_per_frame=64, n_frames=32, local_window=5).cuda()
    core.transformer.attention_backend = "flex"
    x, t, mouse, buttons = (a.cuda() for a in inputs(2, 24, side=8))
    with torch.inference_mode():
        sampled = core(x, t, mouse, buttons)
    trained = core(x, t, mouse, buttons)
    trained.square().mean().backward()
    assert relative(trained.detach(), sampled) < 1e-5
