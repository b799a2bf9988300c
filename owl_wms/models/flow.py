"""Rectified flow with a noise level per frame, and the dropping of controls: what every world model's loss shares.

Convention: t = 0 is data, t = 1 is noise; x_t = (1 - t) x + t z; the model predicts v = z - x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl_wms.configs.levels import LevelsConfig
from owl_wms.errors import ConfigError
from owl_wms.nn.setting import setting


def frame_times(x: Tensor) -> Tensor:
    """Noise levels, independent for every frame: sigmoid of a standard normal.

    Args:
        x: [b, n, ...].

    Returns:
        [b, n] fp32 in (0, 1). In bf16 the levels near 1 would collapse onto a few values.
    """
    return torch.randn(x.shape[:2], dtype=torch.float32, device=x.device).sigmoid()


def draw_levels(
    x: Tensor,
    levels: LevelsConfig | None,
    doc_id: Tensor | None = None,
    history: Tensor | None = None,
    sinks: int = 0,
    sink_level: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw the noise levels of a training step.

    Args:
        x: [b, n, ...].
        levels: what to draw; None draws `frame_times`, as upstream does, and counts all frames.
        doc_id: [b, n] integers, the clip that each frame of a packed sequence belongs to; every clip has a history of
            its own.
        history: [b] int64, frames of each row that are history, known beforehand because they are of another kind (the
            model's own); a negative number draws as configured. With `levels` only.
        sinks: frames at the beginning of every clip that are history in any case. With `levels` only.
        sink_level: their level; None is that of the clip's history.

    Returns:
        (levels [b, n] fp32 in [0, 1], bool [b, n] that is True for the frames whose loss counts).
    """
    if levels is None:
        return frame_times(x), torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    shape, device = x.shape[:2], x.device

    def uniform() -> Tensor:
        return torch.rand(shape, dtype=torch.float32, device=device)

    kind, normal = uniform(), torch.randn(shape, dtype=torch.float32, device=device)
    alone = torch.where(kind < levels.uniform, uniform(), (levels.mean + levels.std * normal).sigmoid())
    alone = alone.masked_fill(kind >= 1 - levels.ones, 1.0)

    first, length = clip_bounds(shape, doc_id, device)

    def per_clip() -> Tensor:
        return uniform().gather(1, first)

    shortest = length.clamp(max=levels.prefix_min + 1) - 1  # a frame remains to be learnt from
    history_length = shortest + (per_clip() * (length - shortest)).floor()
    low, high = levels.context
    context = low + (high - low) * per_clip()
    context = context.masked_fill(per_clip() < levels.context_low_share, levels.context_low)
    u = uniform()
    behind = levels.shift * u / (1 + (levels.shift - 1) * u)
    behind = behind.masked_fill(uniform() < levels.prefix_ones, 1.0)
    prefixed = (per_clip() < levels.prefix) & (length > 1)
    if history is not None:
        known = (history >= 0)[:, None]
        prefixed, length_known = prefixed | known, history[:, None].clamp(min=0, max=shape[1] - 1)
        history_length = torch.where(known, length_known, history_length)
    place = torch.arange(shape[1], device=device) - first
    sink = place < (length - 1).clamp(max=sinks)
    remembered = (prefixed & (place < history_length)) | sink
    levels_drawn = torch.where(remembered, context, torch.where(prefixed, behind, alone))
    return levels_drawn if sink_level is None else levels_drawn.masked_fill(sink, sink_level), ~remembered


def clip_bounds(shape: torch.Size, doc_id: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where each frame's clip begins and how long it is, int64 [b, n] each; without `doc_id` rows are clips."""
    index = torch.arange(shape[1], device=device).expand(shape)
    if doc_id is None:
        return torch.zeros_like(index), torch.full_like(index, shape[1])
    changes = doc_id[:, 1:] != doc_id[:, :-1]
    edge = torch.ones_like(changes[:, :1])
    first = torch.where(torch.cat([edge, changes], dim=1), index, 0).cummax(dim=1).values
    last = torch.where(torch.cat([changes, edge], dim=1), index, shape[1]).flip(1).cummin(dim=1).values.flip(1)
    return first, last - first + 1


def counted_mse(predicted: Tensor, wanted: Tensor, counted: Tensor) -> Tensor:
    """Mean squared difference of [b, n, ...] over the frames where `counted` bool [b, n] is True, in fp32."""
    squared = (predicted.float() - wanted.float()).square().flatten(2).mean(dim=2)
    return (squared * counted).sum() / counted.sum()


def noised(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The interpolated sample and the noise it holds.

    Args:
        x: [b, n, ...] data.
        t: [b, n] noise levels.

    Returns:
        (x_t, z), both of the shape and dtype of x.
    """
    z = torch.randn_like(x)
    level = t.reshape(*t.shape, *[1] * (x.ndim - 2)).to(x.dtype)
    return x.lerp(z, level), z


def drop_controls(has_controls: Tensor, probability: float) -> Tensor:
    """Take the controls from some items, so that `probability` of all items are expected to be without.

    Items without controls count towards that share. No value is read back from the device.

    Args:
        has_controls: [b] bool.
        probability: 0 to 1.

    Returns:
        [b] bool.
    """
    present = has_controls.float().mean()
    # p(drop | present) with which the share without controls, 1 - present, rises to `probability`.
    drop = ((probability - (1 - present)) / present.clamp(min=1e-9)).clamp(0, 1)
    drawn = torch.rand(has_controls.shape, dtype=torch.float32, device=has_controls.device)
    return has_controls & (drawn >= drop)


def require_dit(config: object) -> None:
    """Refuse a backbone that is not built here.

    Raises:
        ConfigError: `backbone` is not `dit`.
    """
    backbone = setting(config, "backbone", "dit")
    if backbone != "dit":
        raise ConfigError(
            f"backbone must be 'dit', got {backbone!r}: 'mmdit' and 'uvit' are not built, no checkpoint of them exists",
            key="model.backbone",
        )
