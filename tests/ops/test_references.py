"""The references against PyTorch's own operators, and the packed layouts against their definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from owl_wms.ops import conv_out, grouped_conv, stage, up_residual
from owl_wms.ops.common.register import aligned
from owl_wms.ops.stage import enlarge_matrix


def test_grouped_packing_is_a_permutation() -> None:
    weight = torch.randn(48, 16, 3, 3)
    packed = grouped_conv.pack(weight)
    assert packed.shape == (3, 9, 32, 8)
    assert torch.equal(grouped_conv.unpack(packed), weight)
    # Lane 4g + t, tile n, register r, half e: output 4 (g // 2) + 2n + g % 2, input 2t + 8r + e.
    assert packed[1, 4, 4 * 3 + 2, 4 * 1 + 2 * 1 + 1] == weight[16 + 4 * 1 + 2 * 1 + 1, 2 * 2 + 8 + 1, 1, 1]
    with pytest.raises(ValueError, match="16, 3, 3"):
        grouped_conv.pack(torch.randn(48, 8, 3, 3))


@pytest.mark.parametrize(("outputs", "channels"), [(3, 96), (4, 40), (7, 24), (1, 32)])
def test_conv_out_packing_round_trips(outputs: int, channels: int) -> None:
    weight = torch.randn(outputs, channels, 3, 3)
    back = conv_out.unpack(conv_out.pack(weight))
    assert torch.equal(back[:outputs, :channels], weight)
    assert back[outputs:].abs().sum() == 0
    assert back[:, channels:].abs().sum() == 0


def test_conv_out_refuses_more_than_eight_channels() -> None:
    with pytest.raises(ValueError, match="1 to 8"):
        conv_out.pack(torch.randn(9, 16, 3, 3))


@pytest.mark.parametrize("up2", [False, True])
def test_grouped_conv_is_the_middle_of_a_residual_block(up2: bool) -> None:
    x, weight, bias = torch.randn(2, 5, 7, 32), torch.randn(32, 16, 3, 3), torch.randn(32)
    image = x.permute(0, 3, 1, 2)
    if up2:
        image = F.interpolate(image, scale_factor=2, mode="bicubic")
    want = F.leaky_relu(F.conv2d(F.leaky_relu(image, 0.01), weight, bias, padding=1, groups=2), 0.01)
    got = torch.ops.owl_wms.grouped_conv(x, grouped_conv.pack(weight), bias, up2)
    torch.testing.assert_close(got, want.permute(0, 2, 3, 1))


@pytest.mark.parametrize(("channels", "shortcut_channels"), [(16, 16), (16, 32), (16, 64)])
def test_up_residual_is_bicubic_plus_tiled_pixel_shuffle(channels: int, shortcut_channels: int) -> None:
    low, shortcut = torch.randn(2, 3, 5, channels), torch.randn(2, 3, 5, shortcut_channels)
    up = F.interpolate(low.permute(0, 3, 1, 2), scale_factor=2, mode="bicubic")
    tiled = F.pixel_shuffle(shortcut.permute(0, 3, 1, 2), 2).repeat(1, 4 * channels // shortcut_channels, 1, 1)
    torch.testing.assert_close(torch.ops.owl_wms.up_residual(low, shortcut), (up + tiled).permute(0, 2, 3, 1))
    torch.testing.assert_close(torch.ops.owl_wms.up_residual(low, None), up.permute(0, 2, 3, 1))
    base = torch.randn(2, 6, 10, channels)
    want = base + tiled.permute(0, 2, 3, 1)
    assert up_residual.add_shortcut_(base, shortcut) is base
    torch.testing.assert_close(base, want)


def test_resize() -> None:
    square = torch.randn(2, 16, 16, 4)
    image = F.interpolate(square[..., :3].permute(0, 3, 1, 2), size=(9, 16), mode="bicubic")
    torch.testing.assert_close(torch.ops.owl_wms.resize(square, 3, 9, 16, torch.float32), image)
    same = torch.ops.owl_wms.resize(square, 4, 16, 16, torch.float32)
    assert torch.equal(same, square.permute(0, 3, 1, 2))


def test_frame_bytes() -> None:
    x = 2 * torch.randn(2, 3, 9, 16)
    frames = torch.ops.owl_wms.frame_bytes(x)
    assert frames.dtype == torch.uint8
    assert frames.is_contiguous()
    assert torch.equal(frames.float(), ((x / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1))
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, -2.0, 2.0, -1.0, 1.0, 0.0]).reshape(1, 1, 1, 8)
    assert torch.ops.owl_wms.frame_bytes(odd).flatten().tolist() == [0, 255, 0, 0, 255, 0, 255, 128]
    every = torch.arange(256) / 127.5 - 1  # the bytes of a picture survive the way through floats
    assert torch.ops.owl_wms.frame_bytes(every.reshape(1, 1, 16, 16)).flatten().tolist() == list(range(256))
    kept = x.clone()
    torch.ops.owl_wms.frame_bytes(x)
    assert torch.equal(x, kept), "the input is not written to"


@pytest.mark.parametrize("scale", [2, 4])
def test_enlarge_matrix_is_bicubic(scale: int) -> None:
    line = torch.randn(1, 1, 6, 1, dtype=torch.float32).expand(1, 1, 6, 4).contiguous()
    want = F.interpolate(line, size=(6 * scale, 4), mode="bicubic")[0, 0, :, 0]
    torch.testing.assert_close(stage.enlarge_matrix(6, scale, torch.device("cpu")) @ line[0, 0, :, 0], want)


def arguments(
    depth: int,
    scale: int,
    shortcut: bool,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    channels: int = 16,
) -> tuple:
    """Arguments of the stage op: twice `channels` to `channels`, `depth` blocks, 3x5 pixels, two images."""
    c, wide = channels, 2 * channels
    make = lambda *shape: (torch.randn(*shape, device=device) * 0.2).to(dtype)  # noqa: E731
    x = torch.randn(2, 3, 5, wide, device=device).to(dtype)
    blocks = [
        (make(wide, c), make(wide), grouped_conv.pack(make(wide, 16, 3, 3)), make(wide).float(), make(c, wide))
        for _ in range(depth)
    ]
    return (x, x if shortcut else None, make(c, wide), *(list(column) for column in zip(*blocks, strict=True)), scale)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("scale", "shortcut"), [(2, True), (2, False), (1, False), (4, False)])
def test_stage_rewrites_are_exact(depth: int, scale: int, shortcut: bool) -> None:
    values = arguments(depth, scale, shortcut)
    kept = [value.clone() if isinstance(value, torch.Tensor) else value for value in values]
    got = torch.ops.owl_wms.stage(*values)
    torch.testing.assert_close(got, stage.reference(*values), rtol=1e-5, atol=1e-5)
    assert torch.equal(values[0], kept[0]), "the op must not write its input"


def test_arguments_that_do_not_fit_are_refused_by_the_fakes() -> None:
    packed = grouped_conv.pack(torch.randn(32, 16, 3, 3)).to("meta")
    x, bias = torch.randn(1, 4, 4, 48, device="meta"), torch.randn(48, device="meta")
    with pytest.raises(RuntimeError, match="48 channels"):
        torch.ops.owl_wms.grouped_conv(x, packed, bias, False)
    with pytest.raises(RuntimeError, match=r"weights torch\.float32"):
        torch.ops.owl_wms.grouped_conv(x[..., :32].half(), packed, bias[:32], False)
    with pytest.raises(RuntimeError, match="shortcut"):
        torch.ops.owl_wms.up_residual(x, torch.randn(1, 4, 5, 48, device="meta"))
    last = conv_out.pack(torch.randn(3, 32, 3, 3)).to("meta")
    with pytest.raises(RuntimeError, match="48 channels to 4"):
        torch.ops.owl_wms.conv_out(x, last, bias[:4], True)


def test_ops_pass_opcheck() -> None:
    x, bias = torch.randn(1, 4, 4, 32), torch.randn(32)
    packed = grouped_conv.pack(torch.randn(32, 16, 3, 3))
    torch.library.opcheck(torch.ops.owl_wms.grouped_conv, (x, packed, bias, True))
    torch.library.opcheck(torch.ops.owl_wms.up_residual, (x, torch.randn(1, 4, 4, 64)))
    torch.library.opcheck(
        torch.ops.owl_wms.conv_out, (x, conv_out.pack(torch.randn(3, 32, 3, 3)), torch.randn(4), True)
    )
    square = torch.randn(1, 4, 4, 4)
    torch.library.opcheck(torch.ops.owl_wms.resize, (square, 3, 3, 5, torch.float32))
    torch.library.opcheck(torch.ops.owl_wms.frame_bytes, (torch.randn(2, 3, 4, 5),))
    torch.library.opcheck(torch.ops.owl_wms.stage, arguments(2, 2, True))


def test_operands_start_where_sixteen_byte_copies_can() -> None:
    flat = torch.arange(33, dtype=torch.float16)
    shifted = flat[1:].view(4, 8)
    moved = aligned(shifted)
    assert moved.data_ptr() % 16 == 0
    assert torch.equal(moved, shifted)
    whole = torch.zeros(4, 8)
    assert aligned(whole) is whole, "what is aligned is not copied"
    assert aligned(whole.t()).is_contiguous()


def test_matrices_that_captured_graphs_read_are_never_let_go() -> None:
    assert enlarge_matrix.cache_info().maxsize is None
