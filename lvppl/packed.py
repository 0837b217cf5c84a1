"""Packed tensors, and three ways to take one variable out of a log-table.

A packed tensor, as in ``pyro.ops.packed``, names each of its dimensions by one symbol, in the
attribute ``_pyro_dims``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any

import torch
from pyro.ops.packed import broadcast_all
from pyro.ops.special import safe_log
from torch import Tensor

__all__ = [
    "Reduction",
    "dims_of",
    "log_max",
    "log_sum_exp",
    "log_sum_exp_sampled",
    "named",
    "product",
    "sizes_of",
    "sum_out",
]

Reduction = Callable[[Tensor, int], Tensor]
"""Takes one variable out of a log-table: (tensor, dimension) -> tensor without it."""


def named(tensor: Tensor, dims: str) -> Tensor:
    """``tensor`` as a packed tensor whose dimensions are called ``dims``."""
    tensor = tensor[...]  # a view of its own to carry the attribute
    tensor._pyro_dims = dims  # type: ignore[attr-defined]
    return tensor


def dims_of(tensor: Tensor) -> str:
    dims: str = tensor._pyro_dims  # type: ignore[attr-defined]
    return dims


def sum_out(tensor: Tensor, symbols: Set[str]) -> Tensor:
    """Sum a packed tensor over the ``symbols`` it has."""
    dims = dims_of(tensor)
    positions = [i for i, symbol in enumerate(dims) if symbol in symbols]
    if not positions:
        return tensor
    return named(tensor.sum(positions), "".join(s for s in dims if s not in symbols))


# ------------------------------------------------------------------------- taking a variable out


def log_sum_exp(tensor: Tensor, dim: int) -> Tensor:
    """ln Σ exp over one dimension, with zero gradient where everything is impossible."""
    top = tensor.detach().amax(dim, keepdim=True).clamp(min=torch.finfo(tensor.dtype).min)
    return safe_log((tensor - top).exp().sum(dim)) + top.squeeze(dim)


def log_max(tensor: Tensor, dim: int) -> Tensor:
    """The maximum over one dimension; its gradient goes to the first of several maxima."""
    best = tensor.detach().argmax(dim, keepdim=True)
    return tensor.gather(dim, best).squeeze(dim)


def log_sum_exp_sampled(tensor: Tensor, dim: int) -> Tensor:
    """ln Σ exp over one dimension, whose gradient goes to one state drawn with p ∝ exp.

    Elimination followed by its gradient is then forward filtering, backward sampling.
    """
    result: Tensor = _Sampled.apply(tensor, dim)
    return result


class _Sampled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(tensor)
        ctx.dim = dim
        return log_sum_exp(tensor, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (tensor,) = ctx.saved_tensors
        # Gumbel's maximum is a draw from the softmax
        noise = torch.empty_like(tensor).exponential_().log_().neg_()
        drawn = (tensor + noise).argmax(ctx.dim, keepdim=True)
        zeros = torch.zeros_like(tensor)
        return zeros.scatter_(ctx.dim, drawn, grads[0].unsqueeze(ctx.dim)), None


def product(terms: Sequence[Tensor]) -> Tensor:
    """The product of log-factors, over all of their symbols."""
    if len(terms) == 1:
        return terms[0]
    aligned = broadcast_all(*terms)
    total = aligned[0]
    for term in aligned[1:]:
        total = total + term
    return named(total, dims_of(aligned[0]))


def sizes_of(terms: Sequence[Tensor]) -> dict[str, int]:
    """How large each symbol is."""
    return {s: n for term in terms for s, n in zip(dims_of(term), term.shape, strict=True)}
