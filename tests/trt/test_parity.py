"""The gate: what passes, what does not, and what the numbers mean."""

from __future__ import annotations

import json

import pytest
import torch

from owl_wms.trt.parity import SCALES, Reference, errors, latents

SHAPE = (2, 4, 3, 3)


def fp32(z: torch.Tensor) -> torch.Tensor:
    return torch.tanh(z * 0.7)


def eager(z: torch.Tensor) -> torch.Tensor:
    return torch.tanh(z * z.new_tensor(0.7))


def reference(dtype: torch.dtype) -> Reference:
    return Reference.measure(fp32, eager, SHAPE, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_eager_itself_passes(dtype: torch.dtype) -> None:
    result = reference(dtype).check(eager)
    assert result["passed"], result["reason"]
    assert [row["scale"] for row in result["scales"]] == list(SCALES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_program_three_times_as_wrong_fails(dtype: torch.dtype) -> None:
    known = reference(dtype)
    floor = 5e-5 if dtype == torch.float32 else 0.0
    factor = 1 + 3 * max(max(e.relative for e in known.eager), floor)
    result = known.check(lambda z: fp32(z.float()) * factor)
    assert not result["passed"]
    assert "relative error" in result["reason"]


def test_one_wrong_pixel_fails_although_the_mean_is_fine() -> None:
    def spot(z: torch.Tensor) -> torch.Tensor:
        x = eager(z).clone()
        x[0, 0, 0, 0] += 0.02 if z.abs().max() < 1 else 0
        return x

    big = Reference.measure(fp32, eager, (8, 64, 32, 32), torch.float16, "cpu")
    result = big.check(lambda z: spot(z))
    assert not result["passed"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_output_fails(bad: float) -> None:
    def broken(z: torch.Tensor) -> torch.Tensor:
        x = eager(z).clone()
        x[-1, -1, -1, -1] = bad
        return x

    result = reference(torch.float16).check(broken)
    assert not result["passed"]
    assert "non-finite" in result["reason"]
    json.dumps(result, allow_nan=False)
    assert result["relative_error"] is result["absolute_error"] is result["scales"][0]["relative_error"] is None
    assert result["scales"][0]["eager_relative_error"] > 0


def test_one_scale_that_overflows_leaves_the_others_their_numbers() -> None:
    def overflows(z: torch.Tensor) -> torch.Tensor:
        return eager(z) * (float("inf") if z.abs().max() > 3 else 1)

    result = reference(torch.float16).check(overflows)
    assert [row["relative_error"] is None for row in result["scales"]] == [False, False, True]
    assert result["relative_error"] is None
    assert "scale 3" in result["reason"]


def test_overflow_of_eager_is_seen() -> None:
    overflowing = Reference.measure(lambda z: z * 1e6, lambda z: z * 1e6, SHAPE, torch.float16, "cpu")
    assert not overflowing.eager_is_finite()
    assert reference(torch.bfloat16).eager_is_finite()


def test_latents_are_seeded_and_scaled() -> None:
    a, b = (latents(SHAPE, 3.0, torch.float32, "cpu", seed=4) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.allclose(a, 3 * latents(SHAPE, 1.0, torch.float32, "cpu", seed=4))
    assert not torch.equal(a, latents(SHAPE, 3.0, torch.float32, "cpu", seed=5))


def test_errors_ignore_what_the_reference_cannot_say() -> None:
    r = torch.tensor([1.0, float("inf"), -2.0])
    got = errors(torch.tensor([1.5, 0.0, -2.0]), r)
    assert got.finite
    assert got.absolute == 0.5
    assert got.relative == pytest.approx(0.5 / 5**0.5)
