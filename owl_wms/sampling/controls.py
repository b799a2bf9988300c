"""Making controls long enough: controls of other items in the batch continue an item's own."""

from __future__ import annotations

import torch
from torch import Tensor


def batch_permute(
    mouse: Tensor, button: Tensor, factor: int = 1, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Double the length `factor` times by appending the same controls in another order of the batch.

    Args:
        mouse: [b, n, 2].
        button: [b, n, n_buttons]; permuted as the mouse is.
        factor: how often to double, 0 or more.
        generator: a CPU generator for the orders.

    Returns:
        [b, n * 2^factor, 2] and [b, n * 2^factor, n_buttons].
    """
    for _ in range(factor):
        order = torch.randperm(mouse.shape[0], generator=generator).to(mouse.device)
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
        generator: a CPU generator for the orders.

    Returns:
        [b, length, 2] and [b, length, n_buttons].
    """
    if mouse.shape[:2] != button.shape[:2] or mouse.shape[1] == 0:
        raise ValueError(
            f"mouse and button must share [b, n] with n > 0, got {list(mouse.shape)} and {list(button.shape)}"
        )
    while mouse.shape[1] < length:
        mouse, button = batch_permute(mouse, button, 1, generator)
    return mouse[:, :length], button[:, :length]
