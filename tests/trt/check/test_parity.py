"""The gate: what passes, what does not, and what the numbers mean."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from owl_wms.trt.check.parity import SCALES, Reference, errors, latents, reference_arithmetic

SHAPE = (2, 4, 3, 3)


def fp32(z: torch.Tensor) -> torch.Tensor:
    return torch.tanh(z * 0.7)


def eager(z: torch.Tensor) -> torch.Tensor:
    return torch.tanh(z * z.new_tensor(0.7))


def reference(dtype: torch.dtype) -> Reference:
    return Reference.measure(fp32, eager, SHAPE, dtype, "cpu")


@pytest.mark.parametrize(("allowed", "precision"), [(False, "none"), (False, "ieee"), (True, "tf32")])
def test_fp32_leaves_no_setting_behind(allowed: bool, precision: str) -> None:
    """`torch.compile` has them in its cache's keys: one that stays changed compiles every model of a process anew."""
    matmul = torch.backends.cuda.matmul
    found = matmul.allow_tf32, matmul.fp32_precision
    try:
        matmul.allow_tf32, matmul.fp32_precision = allowed, precision
        with reference_arithmetic():
            assert (matmul.allow_tf32, matmul.fp32_precision) == (False, "ieee")
        assert (matmul.allow_tf32, matmul.fp32_precision) == (allowed, precision)
    finally:
        matmul.allow_tf32, matmul.fp32_precision = found


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_fp32_leaves_the_precision_of_products(precision: str) -> None:
    """`torch.compile` with max-autotune asks for it."""
    try:
        torch.set_float32_matmul_precision(precision)
        with reference_arithmetic():
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("place", "precision"),
    [("cuda.matmul", "tf32"), ("cudnn.conv", "ieee"), ("cudnn.conv", "tf32"), ("cudnn", "tf32"), ("", "tf32")],
)
def test_fp32_beside_the_newer_settings_of_tf32(place: str, precision: str) -> None:
    """torch refuses to read the older ones then. In a process of its own: they cannot all be put back."""
    code = f"""
import torch
from owl_wms.trt.check.parity import reference_arithmetic
backends = torch.backends
places = [backends, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul]
backends.{place}{"." if place else ""}fp32_precision = "{precision}"
before = [place.fp32_precision for place in places], backends.cudnn.enabled
with reference_arithmetic():
    assert backends.cuda.matmul.fp32_precision == "ieee" and not backends.cudnn.enabled
    assert backends.cudnn.conv.fp32_precision != "tf32"
assert ([place.fp32_precision for place in places], backends.cudnn.enabled) == before
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_eager_itself_passes(dtype: torch.dtype) -> None:
    result = reference(dtype).check(eager)
    assert result["passed"], result["reason"]
    assert [row["scale"] for row in result["scales"]] == list(SCALES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_program_three_times_as_wrong_fails(dtype: torch.dtype) -> None:
    known = reference(dtype)
    factor = 1 + 3 * (5e-5 if dtype == torch.float32 else max(e.relative for e in known.eager))
    result = known.check(lambda z: fp32(z.float()) * factor)
    assert not result["passed"]
    assert "relative error" in result["reason"]


def tf32(x: torch.Tensor) -> torch.Tensor:
    """`x` with the mantissa that TF32 products read: 10 bits of 23."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def test_fp32_does_not_take_tf32_although_eager_does() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 4, 3, 3) / 6

    def exact(z: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(z, weight, padding=1)

    def rounded(z: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(tf32(z), tf32(weight), padding=1)

    def as_cudnn(z: torch.Tensor) -> torch.Tensor:
        return rounded(z) if torch.backends.cudnn.enabled and torch.backends.cudnn.allow_tf32 else exact(z)

    for usual in (as_cudnn, rounded):
        known = Reference.measure(exact, usual, (2, 4, 8, 8), torch.float32, "cpu")
        result = known.check(rounded)
        assert not result["passed"]
        assert [row["relative_limit"] for row in result["scales"]] == [1e-4] * 3
        assert 2e-4 < result["relative_error"] < 2e-3
        # Another order of summation is no other arithmetic.
        other = known.check(lambda z: exact(z) * (1 + 3e-5))
        assert other["passed"], other["reason"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cudnn_that_is_wrong_does_not_widen_the_gate(dtype: torch.dtype) -> None:
    def faulty(z: torch.Tensor) -> torch.Tensor:
        return eager(z) * (1.12 if torch.backends.cudnn.enabled else 1)

    honest = reference(dtype)
    known = Reference.measure(fp32, faulty, SHAPE, dtype, "cpu")
    assert known.eager == honest.eager, "the run without cuDNN counts"
    assert known.check(eager)["passed"]
    assert not known.check(faulty)["passed"]
    # A run that is a little further off is no fault: that is the error that whoever runs eager has.
    drift = 1 + honest.eager[1].relative
    little = Reference.measure(
        fp32, lambda z: eager(z).float() * (drift if torch.backends.cudnn.enabled else 1), SHAPE, dtype, "cpu"
    )
    assert little.eager[1].relative > 1.1 * honest.eager[1].relative
    # Wrong both times, as far as eager can tell: bounded by what the dtype can be blamed for.
    twice = Reference.measure(fp32, lambda z: eager(z) * 1.5, SHAPE, dtype, "cpu")
    limits = [row["relative_limit"] for row in twice.check(eager)["scales"]]
    assert limits == [16 * torch.finfo(dtype).eps] * 3
    assert not twice.check(lambda z: eager(z) * 1.4)["passed"]


def test_an_eager_that_needs_cudnn_is_measured_once() -> None:
    def needs_it(z: torch.Tensor) -> torch.Tensor:
        if not torch.backends.cudnn.enabled:
            raise NotImplementedError("not implemented for 'BFloat16'")
        return eager(z)

    known = Reference.measure(fp32, needs_it, SHAPE, torch.bfloat16, "cpu")
    assert known.eager == reference(torch.bfloat16).eager


def test_where_eager_overflows_a_program_must_still_be_near() -> None:
    def overflows(z: torch.Tensor) -> torch.Tensor:
        return eager(z) / torch.zeros(())

    known = Reference.measure(fp32, overflows, SHAPE, torch.float16, "cpu")
    assert not known.eager_is_finite()
    result = known.check(eager)
    assert result["passed"], result["reason"]
    assert result["scales"][0]["absolute_limit"] is result["scales"][0]["eager_relative_error"] is None
    assert "relative error" in known.check(lambda z: eager(z) * 1.1)["reason"]


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
