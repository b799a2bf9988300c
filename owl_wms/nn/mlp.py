"""The two-layer perceptron that every part of the world model uses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear, SiLU, Linear, both biased; keys `fc1` and `fc2`.

    Weights start at a Kaiming normal scaled once more by fan_in^-1/2, biases at zero: a branch starts near zero, as
    in the checkpoints this package must be able to continue.
    """

    def __init__(self, dim_in: int, dim_hidden: int, dim_out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim_in, dim_hidden)
        self.fc2 = nn.Linear(dim_hidden, dim_out)
        if self.fc1.weight.is_meta:  # without values, and torch would import its compiler (seconds) to draw them
            return
        for layer in (self.fc1, self.fc2):
            nn.init.kaiming_normal_(layer.weight)
            with torch.no_grad():
                layer.weight.mul_(layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x [..., dim_in]. Returns: [..., dim_out], same dtype."""
        out: Tensor = self.fc2(F.silu(self.fc1(x)))
        return out
