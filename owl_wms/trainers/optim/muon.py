"""Muon: momentum whose update is made (nearly) orthogonal, for weight matrices; AdamW for everything else.

Why not `torch.optim.Muon`, which computes the same update (a test compares them): it iterates every matrix by itself
and on every rank. Here ranks share the matrices, matrices of one shape are iterated as a batch, and more than two axes
are taken, such as a convolution's.

Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024): Nesterov momentum, five steps
of a quintic Newton-Schulz iteration with coefficients 3.4445, -4.7750, 2.0315 in bfloat16, learning rate scaled by
sqrt(max(1, rows / columns)).

Rank i mod world orthogonalises matrix i and broadcasts the result. Every rank stores every momentum, so that rank 0's
checkpoint is whole.

Usage:
    optimiser = build_muon(model.named_parameters(), lr=1e-3, momentum=0.95, adamw_lr=1e-4, adamw_keys=["core.proj_in"])
    optimiser.step()
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from owl_wms.errors import ConfigError
from owl_wms.trainers.distributed import is_distributed

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Push all singular values towards 1: [k, r, c] any float -> [k, r, c] bfloat16, values about 0.7 to 1.2."""
    a, b, c = _COEFFICIENTS
    x: Tensor = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    turned: Tensor = x.mT if tall else x
    return turned


class Muon(torch.optim.Optimizer):
    """Updates matrices; every parameter must have at least two axes, and further ones are folded into the columns."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        """Set up; lr above 0, momentum in [0, 1), weight_decay at least 0.

        Raises:
            ConfigError: numbers outside these ranges, or a parameter that is no matrix.
        """
        if lr <= 0 or not 0 <= momentum < 1 or weight_decay < 0:
            raise ConfigError(
                f"Muon needs lr > 0, 0 <= momentum < 1, weight_decay >= 0; got {lr}, {momentum}, {weight_decay}"
            )
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        if any(p.ndim < 2 for group in self.param_groups for p in group["params"]):
            raise ConfigError("Muon takes matrices only; give vectors to AdamW")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self._step_shape(parameters, group)

    def _step_shape(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        momenta = []
        for p in parameters:
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            momenta.append(state["momentum_buffer"])
        grads = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        nesterov = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"])).flatten(2)
        rows, columns = nesterov.shape[-2:]
        updates = self._share(nesterov)
        scale = group["lr"] * max(1.0, rows / columns) ** 0.5
        weights: list[Tensor] = list(parameters)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(
            weights, [u.view_as(p).to(p.dtype) for u, p in zip(updates, parameters, strict=True)], alpha=-scale
        )

    def _share(self, matrices: Tensor) -> Tensor:
        """Orthogonalised matrices [k, r, c], each done by one rank."""
        if not is_distributed():
            return orthogonalise(matrices)
        rank, world = dist.get_rank(), dist.get_world_size()
        results = torch.empty_like(matrices, dtype=torch.bfloat16)
        if rank < len(matrices):
            results[rank::world] = orthogonalise(matrices[rank::world])
        for work in [dist.broadcast(results[i], src=i % world, async_op=True) for i in range(len(matrices))]:
            work.wait()
        return results


class MuonWithAdamW:
    """Joins the two optimisers into one; its state is `{"adamw": ..., "muon": ...}`, as upstream stores it."""

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW) -> None:
        self.muon, self.adamw = muon, adamw

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of both, for whoever changes learning rates."""
        return [*self.muon.param_groups, *self.adamw.param_groups]

    def step(self) -> None:
        """Update all parameters."""
        self.muon.step()
        self.adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients."""
        self.muon.zero_grad(set_to_none=set_to_none)
        self.adamw.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """State of both."""
        return {"adamw": self.adamw.state_dict(), "muon": self.muon.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take such a state."""
        self.adamw.load_state_dict(state["adamw"])
        self.muon.load_state_dict(state["muon"])


def build_muon(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float = 1e-3,
    momentum: float = 0.95,
    weight_decay: float = 0.01,
    adamw_lr: float = 1e-4,
    adamw_wd: float = 1e-4,
    adamw_eps: float = 1e-15,
    adamw_betas: Sequence[float] = (0.9, 0.95),
    adamw_keys: Sequence[str] = (),
) -> MuonWithAdamW:
    """Split parameters: those whose name contains an entry of `adamw_keys`, and all vectors, go to AdamW; the rest to
    Muon.

    Raises:
        ConfigError: an entry that matches no parameter (most likely a misspelling), or nothing left for one of the two.
    """
    trained = [(name, p) for name, p in named_parameters if p.requires_grad]
    for key in adamw_keys:
        if not any(key in name for name, _ in trained):
            raise ConfigError(f"opt_kwargs.adamw_keys: {key!r} matches no parameter", key="train.opt_kwargs")
    plain = [p.ndim < 2 or any(key in name for key in adamw_keys) for name, p in trained]
    matrices = [p for (_, p), is_plain in zip(trained, plain, strict=True) if not is_plain]
    others = [p for (_, p), is_plain in zip(trained, plain, strict=True) if is_plain]
    if not matrices or not others:
        raise ConfigError(f"Muon got {len(matrices)} matrices and AdamW {len(others)} other parameters; both need some")
    first, second = adamw_betas
    adamw = torch.optim.AdamW(others, lr=adamw_lr, weight_decay=adamw_wd, eps=adamw_eps, betas=(first, second))
    return MuonWithAdamW(Muon(matrices, lr, momentum, weight_decay), adamw)
