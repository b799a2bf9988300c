"""Making controls long enough: controls of other items in the batch continue an item's own."""

from __future__ import annotations

import torch
from torch import Tensor


def check_controls(mouse: Tensor | None, button: Tensor | None, batch: int | None = None) -> None:
    """Refuse controls that do not belong to each other.

    Args:
        mouse: [b, n, 2].
        button: [b, n, n_buttons].
        batch: b of the latents that they steer; None is any.

    Raises:
        ValueError: one of them is missing, or they differ in b or n; says both shapes.
    """
    shapes = [None if part is None else list(part.shape) for part in (mouse, button)]
    leading = [shape[:2] if shape is not None and len(shape) == 3 else None for shape in shapes]
    if leading[0] is None or leading[0] != leading[1]:
        raise ValueError(
            f"mouse [b, n, 2] and button [b, n, n_buttons] must share [b, n], got {shapes[0]} and {shapes[1]}"
        )
    if batch is not None and leading[0][0] != batch:
        raise ValueError(
            f"mouse and button must have the {batch} items of the latents, got {leading[0][0]}; repeat the shorter"
        )


def batch_permute(
    mouse: Tensor, button: Tensor, factor: int = 1, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Double the length `factor` times by appending the same controls in another order of the batch.

    Args:
        mouse: [b, n, 2].
        button: [b, n, n_buttons]; permuted as the mouse is.
        factor: how often to double, 0 or more.
        generator: source of the orders, on any device.

    Returns:
        [b, n * 2^factor, 2] and [b, n * 2^factor, n_buttons].
    """
    device = "cpu" if generator is None else generator.device
    for _ in range(factor):
        order = torch.randperm(mouse.shape[0], generator=generator, device=device).to(mouse.device)
        mouse = torch.cat([mouse, mouse[order]], dim=1)
        button = torch.cat([button, button[order]], dim=1)
    return mouse, button


def batch_permute_to_length(
    mouse: Tensor, button: Tensor, length: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Double until at least `length` frames long, then cut to exactly that.

    Args:
        mouse: [b, n, 2], n at least 1.
        button: [b, n, n_buttons].
        length: frames wanted.
        generator: source of the orders, on any device.

    Returns:
        [b, length, 2] and [b, length, n_buttons].

    Raises:
        ValueError: as `check_controls`, or n is 0.
    """
    check_controls(mouse, button)
    if mouse.shape[1] == 0:
        raise ValueError(f"controls to continue need n > 0, got {list(mouse.shape)} and {list(button.shape)}")
    while mouse.shape[1] < length:
        mouse, button = batch_permute(mouse, button, 1, generator)
    return mouse[:, :length], button[:, :length]
