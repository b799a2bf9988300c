"""PSNR, SSIM, depth error, contact sheets and labels against values known by other means."""

from __future__ import annotations

import pytest
import torch
from PIL import ImageChops

from owl_wms.media.metrics import depth_error, psnr, ssim
from owl_wms.media.pictures import contact_sheet, depth_bytes, difference_bytes, side_by_side, to_bytes
from tests.process_state import STATES, set_in_process


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
    plain = contact_sheet({"a": picture, "b": picture}, width=64)
    (left, top, _, bottom) = ImageChops.difference(sheet, plain).getbbox()  # where the times are
    assert left > 8
    assert top >= 8
    assert bottom <= 8 + 26, "above the first row only"
    assert contact_sheet({"a": picture}, width=540).size == (8 + 2 * 548, 8 + 304 + 41 + 8), "larger letters"
    for rows in ({}, {"a": picture, "b": picture[:1]}, {"a": picture[:0]}):
        with pytest.raises(ValueError, match="one common length"):
            contact_sheet(rows)


def test_each_half_has_its_own_label_in_its_corner_and_nothing_else_changes() -> None:
    left, right = (torch.full((2, 360, 640, 3), level, dtype=torch.uint8) for level in (90, 200))
    clip = side_by_side({"source": left, "decoded": right})
    assert clip.shape == (2, 360, 1280, 3)
    assert torch.equal(left.unique(), torch.tensor([90], dtype=torch.uint8)), "the frames that were given stay"
    marked = (clip[0] != torch.cat([left, right], dim=2)[0]).any(dim=2)
    assert not marked[60:].any(), "a label is a line in the corner"
    assert not marked[:, 160:640].any()
    assert not marked[:, 800:].any()
    tags = clip[0, :20, :60], clip[0, :20, 640:700]
    for tag in tags:
        assert tag.max() > 200, "light letters"
        assert tag.min() < 40, "on a dark ground"
    assert not torch.equal(*tags), "which half is which"
    assert torch.equal(clip[0], clip[1]), "in every frame"
    assert side_by_side({"a label wider than its frame": left[:, :8, :12]}).shape == (2, 8, 12, 3)


@pytest.mark.parametrize("state", STATES)
def test_nothing_set_for_all_of_torch_reaches_numbers_and_colours(state: str) -> None:
    a, b = torch.rand(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    wanted = ssim(a, b), depth_bytes(a[:, 0])
    with set_in_process(state):
        for got, value in zip((ssim(a, b), depth_bytes(a[:, 0])), wanted, strict=True):
            assert torch.equal(got, value)
