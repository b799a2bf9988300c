"""The rotary table: one for all layers, in fp32 whatever happens to the model, and linear in the frame."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from owl_wms.errors import ConfigError
from owl_wms.nn.rope import RotaryTable, rotate_by
from tests.world import golden, relative, tiny_config, tiny_core


def rotated(table: RotaryTable, x: torch.Tensor, first_frame: int) -> torch.Tensor:
    """Whole frames [b, heads, n * t, e] at their positions."""
    return rotate_by(x, *table.at(first_frame, x.shape[2] // table.cos.shape[1]))


def test_motion_table_is_upstreams() -> None:
    data = golden()
    table = RotaryTable(tiny_config(n_frames=8, rope_ats_delta=2.0))
    assert relative(table.cos.flatten(0, 1), data["rope_cos"]) < 1e-5
    assert relative(table.sin.flatten(0, 1), data["rope_sin"]) < 1e-5


def test_ortho_axes_own_a_quarter_each() -> None:
    table = RotaryTable(tiny_config(rope_impl="ortho", n_frames=5))
    angles = torch.atan2(table.sin, table.cos)
    assert table.cos.shape == (5, 4, 16)
    assert torch.equal(angles[..., 12:], torch.zeros(5, 4, 4))
    # The lowest frequency is pi: from -pi in the first frame to pi in the last, in equal steps.
    steps = table.step[0] * torch.arange(5) - torch.pi
    assert torch.allclose(table.cos[:, 0, 0], steps.cos().float(), atol=1e-6)
    # Tokens 0 and 1 share a row, 0 and 2 a column.
    assert torch.equal(table.cos[:, 0, 4:8], table.cos[:, 1, 4:8])
    assert torch.equal(table.cos[:, 0, 8:12], table.cos[:, 2, 8:12])
    assert not torch.equal(table.cos[:, 0, 8:12], table.cos[:, 1, 8:12])


def test_a_wide_grid_has_the_places_of_squares() -> None:
    """3x5: `motion` counts from the middle, so it is the middle rows of 5x5; `ortho` has the rows of 3x3."""
    wide, square = (
        RotaryTable(tiny_config(sample_size=size, n_frames=4)).cos.unflatten(1, (-1, 5)) for size in ((3, 5), 5)
    )
    assert torch.equal(wide, square[:, 1:4])
    wide, tall, square = (
        RotaryTable(tiny_config(rope_impl="ortho", sample_size=size, n_frames=4)).cos.unflatten(1, grid)
        for size, grid in (((3, 5), (3, 5)), (3, (3, 3)), (5, (5, 5)))
    )
    assert torch.equal(wide[:, :, 0, 4:8], tall[:, :, 0, 4:8])
    assert torch.equal(wide[:, 0, :, 8:12], square[:, 0, :, 8:12])


@pytest.mark.parametrize("impl", ["motion", "ortho"])
@pytest.mark.parametrize("audio", [False, True])
def test_shift_is_rotation_at_the_other_place(impl: str, audio: bool) -> None:
    table = RotaryTable(tiny_config(rope_impl=impl, has_audio=audio))
    keys = torch.randn(1, 2, 3 * table.cos.shape[1], 32)
    assert relative(table.shift(rotated(table, keys, 20), -17), rotated(table, keys, 3)) < 1e-5
    assert relative(rotated(table, keys, 20), rotated(table, keys, 3)) > 0.1


@pytest.mark.parametrize("impl", ["motion", "ortho"])
def test_only_the_distance_between_frames_counts(impl: str) -> None:
    table = RotaryTable(tiny_config(rope_impl=impl))
    q, k = torch.randn(2, 1, 1, table.cos.shape[1], 32)

    def scores(at: int) -> torch.Tensor:
        return rotated(table, q, at + 5) @ rotated(table, k, at).transpose(-1, -2)

    assert relative(scores(30), scores(0)) < 1e-5


def test_casts_leave_the_one_table_alone() -> None:
    core = tiny_core()
    tables = [m for m in core.modules() if isinstance(m, RotaryTable)]
    assert len(tables) == 1
    before = tables[0].cos.clone()
    core.bfloat16()
    assert core.proj_in.weight.dtype == torch.bfloat16
    assert tables[0].cos.dtype == torch.float32
    assert torch.equal(tables[0].cos, before)
    assert not any("rope" in key for key in core.state_dict())


@pytest.mark.parametrize("cast", [torch.nn.Module.bfloat16, torch.nn.Module.half, lambda m: m.to(torch.bfloat16)])
@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_cast_after_a_move_leaves_the_table_on_its_device(
    cast: Callable[[torch.nn.Module], torch.nn.Module], device: str
) -> None:
    """`.to(device).bfloat16()` once sent the table back to the CPU; meta stands for a GPU here."""
    with torch.device(device):
        table = RotaryTable(tiny_config())
    for buffer in (cast(table).cos, table.sin, table.step):
        assert buffer.device.type == device
        assert buffer.dtype in (torch.float32, torch.float64)


def test_a_model_from_the_meta_device_gets_a_table() -> None:
    with torch.device("meta"):
        table = RotaryTable(tiny_config())
    assert table.cos.is_meta
    assert torch.equal(table.to_empty(device="cpu").cos, RotaryTable(tiny_config()).cos)


@pytest.mark.parametrize(
    "changes", [{"rope_impl": "spiral"}, {"rope_dim_t": 2}, {"rope_impl": "ortho", "n_heads": 16, "d_model": 64}]
)
def test_unusable_layouts_are_refused(changes: dict) -> None:
    with pytest.raises(ConfigError):
        RotaryTable(tiny_config(**changes))
