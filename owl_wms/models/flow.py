"""Rectified flow with a noise level per frame, and the dropping of controls: what every world model's loss shares.

Convention: t = 0 is data, t = 1 is noise; x_t = (1 - t) x + t z; the model predicts v = z - x.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
