"""Generalised M-step: Q is raised by L-BFGS in the parameters that have no formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["raise_by_gradient"]


def raise_by_gradient(
    objective: Callable[[], Tensor], tensors: Sequence[Tensor], *, num_steps: int
) -> None:
    """Move unconstrained tensors, in place, to where ``objective`` is larger; never smaller.

    Args:
        objective: Q, 0-dim, differentiable in the tensors.
        tensors: leaves that require gradients.
        num_steps: iterations of L-BFGS with a strong Wolfe line search.

    Source: Dempster, Laird and Rubin 1977 (generalised EM); Nocedal and Wright 2006, section 7.2.
    """
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    if not leaves:
        return
    before = [leaf.detach().clone() for leaf in leaves]
    with torch.no_grad():
        start = objective()
    scale = max(1.0, float(start.abs()))
    optimizer = torch.optim.LBFGS(
        leaves,
        max_iter=num_steps,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -objective() / scale
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    for leaf in leaves:
        leaf.grad = None
    with torch.no_grad():
        end = objective()
        if not bool(end >= start):  # a failed line search, or NaN
            for leaf, value in zip(leaves, before, strict=True):
                leaf.copy_(value)
