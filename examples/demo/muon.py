"""Muon for convolution weights, grouped ones too, which `owl_wms.trainers.optim.muon` takes as one matrix.

Why not AdamW alone: in a few minutes of training the number of useful steps is what counts. Matrices of one shape are
orthogonalised together, so a step costs a few dozen kernel launches. A grouped convolution is one matrix per group.

Usage: `Muon(pairs, lr=3e-3)` with pairs of (parameter, groups); then `step()` as any optimiser.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from owl_wms.trainers.optim.muon import orthogonalise


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; scaled by 0.2 sqrt(max(m, n)), so AdamW's rates fit (Liu et al. 2025)."""

    def __init__(self, parameters: list[tuple[torch.nn.Parameter, int]], lr: float, momentum: float = 0.95) -> None:
        self._groups_of = {id(p): groups for p, groups in parameters}
        super().__init__([p for p, _ in parameters], {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in parameters]
            for p in parameters:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum"] for p in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, momenta, group["momentum"])
            by_shape: dict[tuple[int, int], list[tuple[torch.nn.Parameter, Tensor]]] = defaultdict(list)
            for p, update in zip(parameters, updates, strict=True):
                matrices = update.reshape(self._groups_of[id(p)], p.shape[0] // self._groups_of[id(p)], -1)
                by_shape[tuple(matrices.shape[1:])].append((p, matrices))
            for (rows, columns), members in by_shape.items():
                stacked = orthogonalise(torch.cat([m for _, m in members])).float()
                scale = -group["lr"] * 0.2 * max(rows, columns) ** 0.5
                parts = stacked.split([len(m) for _, m in members])
                torch._foreach_add_(
                    [p for p, _ in members],
                    [u.view_as(p) for (p, _), u in zip(members, parts, strict=True)],
                    alpha=scale,
                )
