"""Exponential moving average of a model's weights.

The decay warms up as in ema-pytorch (inverse gamma 1, power 2/3), which upstream uses: 1 - (1 + n)^(-2/3), at most
beta, so that the average follows early training instead of remembering the first weights. The state has its key names
without the copy of the online model that it stores beside the average.

Usage:
    ema = EMA(model, beta=0.999)
    ema.update(model)          # after every optimiser step
    ema.model(...)             # frozen, eval mode
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from owl_wms.errors import ConfigError

_PREFIX = "ema_model."
_POWER = 2 / 3


class EMA:
    """Holds a frozen copy of a model whose weights follow the original's."""

    def __init__(self, model: nn.Module, beta: float) -> None:
        """Copy `model`; `beta` in [0, 1) is the decay after warm-up.

        Raises:
            ConfigError: beta outside [0, 1).
        """
        if not 0 <= beta < 1:
            raise ConfigError(f"the decay of an average must lie in [0, 1), got {beta}")
        self.beta = beta
        self.steps = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def decay(self) -> float:
        """Return the weight of the old average in the next update."""
        return min(self.beta, 1 - (1 + self.steps) ** -_POWER) if self.steps else 0.0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards `model`; buffers are copied."""
        mine: list[Tensor] = list(self.model.parameters())
        theirs = list(model.parameters())
        torch._foreach_lerp_(
            mine, [p.detach().to(q.dtype) for p, q in zip(theirs, mine, strict=True)], 1 - self.decay()
        )
        for buffer, source in zip(self.model.buffers(), model.buffers(), strict=True):
            buffer.copy_(source)
        self.steps += 1

    def state_dict(self) -> dict[str, Tensor]:
        """`initted`, `step` and `ema_model.*`, as ema-pytorch names them."""
        weights = {_PREFIX + key: value for key, value in self.model.state_dict().items()}
        return {"initted": torch.tensor(True, device="cpu"), "step": torch.tensor(self.steps, device="cpu"), **weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take such a state; an `online_model.*` part, which ema-pytorch writes, is ignored.

        Raises:
            RuntimeError: weights of another architecture.
        """
        self.model.load_state_dict({k.removeprefix(_PREFIX): v for k, v in state.items() if k.startswith(_PREFIX)})
        self.steps = int(state["step"])
