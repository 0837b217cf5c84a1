"""Generalised M-step: Q is raised by L-BFGS in the parameters that have no formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lvppl.errors import ProgramFailure

__all__ = ["raise_by_gradient"]

_FIRST_STEPS = (1.0, 1e-2, 1e-4)
"""Tried in turn where a line search leaves the set on which the program runs."""


def raise_by_gradient(
    objective: Callable[[], Tensor], tensors: Sequence[Tensor], *, num_steps: int
) -> None:
    """Move unconstrained tensors, in place, to where ``objective`` is larger; never smaller.

    They are where they were if this is interrupted.

    Args:
        objective: Q, 0-dim, differentiable in the tensors.
        tensors: leaves that require gradients.
        num_steps: iterations of L-BFGS with a strong Wolfe line search.

    Source: Dempster, Laird and Rubin 1977 (generalised EM); Nocedal and Wright 2006, section 7.2.
    """
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    if not leaves:
        return
    with torch.no_grad():
        start = float(objective())
    before = [leaf.detach().clone() for leaf in leaves]
    for first_step in _FIRST_STEPS:
        best = _Best(start, before)
        reached = before
        try:
            failed = _climb(objective, leaves, best, num_steps, first_step)
            reached = best.values
        finally:  # a line search that is interrupted leaves them at any point
            _move(leaves, reached)
        if not failed or best.objective > start:
            return


def _move(leaves: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for leaf, value in zip(leaves, values, strict=True):
            leaf.grad = None
            leaf.copy_(value)


@dataclass
class _Best:
    """The largest objective that was met, and where."""

    objective: float
    values: list[Tensor]


def _climb(
    objective: Callable[[], Tensor],
    leaves: list[Tensor],
    best: _Best,
    num_steps: int,
    first_step: float,
) -> bool:
    """L-BFGS from the leaves on; whether it went where the program does not run."""
    scale = max(1.0, abs(best.objective))
    optimizer = torch.optim.LBFGS(
        leaves,
        lr=first_step,
        max_iter=num_steps,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective()
        reached = float(value.detach())
        if reached > best.objective:
            best.objective = reached
            best.values = [leaf.detach().clone() for leaf in leaves]
        loss = -value / scale
        loss.backward()
        return loss

    try:
        with torch.enable_grad():
            optimizer.step(closure)
    except ProgramFailure:
        return True
    return not all(bool(leaf.isfinite().all()) for leaf in leaves)
