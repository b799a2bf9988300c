"""PSNR, SSIM, depth error and contact sheets against values known by other means."""

from __future__ import annotations

import pytest
import torch

from owl_wms.media.metrics import depth_error, psnr, ssim
from owl_wms.media.pictures import contact_sheet, depth_bytes, difference_bytes, to_bytes


def test_psnr_of_a_known_error() -> None:
    a = torch.zeros(2, 3, 16, 16)
    b = a.clone()
    b[1] += 0.2  # range 2: 20 log10(2 / 0.2) = 20 dB
    assert psnr(a, b)[1].item() == pytest.approx(20.0, abs=1e-4)
    assert psnr(a, b)[0].item() == float("inf")


def test_ssim_against_its_definition() -> None:
    a = torch.rand(1, 1, 11, 11, dtype=torch.float64) * 2 - 1
    b = a * 0.8 + 0.1 * torch.randn_like(a)
    line = torch.exp(-((torch.arange(11.0, dtype=torch.float64) - 5) ** 2) / 4.5)
    weight = torch.outer(line, line) / line.sum() ** 2  # one window: the sums can be written out
    ma, mb = (weight * a).sum(), (weight * b).sum()
    va, vb = (weight * a * a).sum() - ma**2, (weight * b * b).sum() - mb**2
    cov = (weight * a * b).sum() - ma * mb
    expected = (2 * ma * mb + 4e-4) * (2 * cov + 3.6e-3) / ((ma**2 + mb**2 + 4e-4) * (va + vb + 3.6e-3))
    assert ssim(a, b).item() == pytest.approx(expected.item(), abs=1e-5)
    assert ssim(a, a).item() == pytest.approx(1.0, abs=1e-5)


def test_depth_error_is_the_mean_difference() -> None:
    assert depth_error(torch.zeros(2, 4, 4), torch.full((2, 4, 4), 0.25)).tolist() == [0.25, 0.25]


def test_bytes_and_sheet() -> None:
    frames = torch.tensor([-1.0, 0.0, 1.0, 3.0]).view(1, 1, 2, 2).expand(3, 3, 2, 2)
    assert to_bytes(frames)[0, ..., 0].tolist() == [[0, 128], [255, 255]]
    assert difference_bytes(frames, frames).max() == 0
    near, far = depth_bytes(torch.tensor([[[-1.0, 1.0]]]))[0, 0].int()
    assert near[0] > near[2]
    assert far[2] > far[0]
    picture = to_bytes(torch.rand(2, 3, 36, 64))
    sheet = contact_sheet({"a": picture, "b": picture}, times=["0 s", "1 s"], width=64)
    assert sheet.size == (8 + 2 * 72, 8 + 2 * (36 + 26 + 8))
    assert sheet.getpixel((8 + 32, 8 + 26 + 18)) != (24, 26, 30)
    for rows in ({}, {"a": picture, "b": picture[:1]}, {"a": picture[:0]}):
        with pytest.raises(ValueError, match="one common length"):
            contact_sheet(rows)
