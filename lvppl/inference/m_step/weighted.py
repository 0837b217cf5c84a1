"""The expected complete-data log-likelihood: every site of a run, weighted by its posterior.

.. math:: Q(θ) = E_{p(z|y)} \\ln p(z, y; θ) = \\sum_s \\sum_i r_{si} \\ln p_s(v_{si} | a_{si}(θ))

The sum over i runs over the elements of site s: states of the enumerated latents that it depends
on, and its plates. An M-step maximises Q in θ at fixed weights r.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Independent, MaskedDistribution
from torch import Tensor
from torch.distributions import Independent as TorchIndependent

from lvppl.conjugate import Nodes

__all__ = [
    "Peeled",
    "Weighted",
    "peel",
    "sum_to",
    "unexpanded",
    "weight_total",
    "weighted_total",
]


@dataclass(frozen=True)
class Weighted:
    """One site of Q.

    Attributes:
        name: of the site.
        fn: its distribution in this run, with enumerated dimensions on the left.
        value: what it is evaluated at: data, or the states of an enumerated latent.
        weight: r, batch-shaped: posterior probability × mask × scale.
        is_prior: the site is the prior of a latent that is treated as a parameter.
    """

    name: str
    fn: Any
    value: Tensor
    weight: Tensor
    is_prior: bool = False


@dataclass(frozen=True)
class Peeled:
    """A distribution without its wrappers, and everything shaped as its own batch."""

    base: Any
    value: Tensor
    weight: Tensor


def peel(term: Weighted) -> Peeled:
    """Take off ``.to_event`` and ``.mask``; a mask becomes zero weight."""
    fn, weight = term.fn, term.weight
    while True:
        if isinstance(fn, MaskedDistribution):
            mask = torch.as_tensor(fn._mask, device=weight.device)
            weight = weight * mask.to(weight.dtype)
            fn = fn.base_dist
        elif isinstance(fn, Independent | TorchIndependent):
            weight = weight.reshape(weight.shape + (1,) * fn.reinterpreted_batch_ndims)
            fn = fn.base_dist
        elif isinstance(fn, Nodes):
            fn = fn.base_dist
        else:
            break
    return Peeled(fn, term.value, weight)


def unexpanded(tensor: Tensor, keep: int = 0) -> Tensor:
    """The tensor with every dimension that only repeats itself cut to size 1.

    Plates expand the arguments of a distribution without copying: such a dimension has stride 0.

    Args:
        keep: so many dimensions on the right are left alone.
    """
    for dim in range(tensor.dim() - keep):
        if tensor.stride(dim) == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def sum_to(tensor: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Sum the dimensions in which ``shape`` has size 1 or none; the inverse of broadcasting."""
    shape = (1,) * (tensor.dim() - len(shape)) + tuple(shape)
    dims = [i for i in range(tensor.dim()) if shape[i] == 1 and tensor.shape[i] != 1]
    return tensor.sum(dims, keepdim=True) if dims else tensor


def weight_total(weight: Tensor, value: Tensor, shape: torch.Size) -> Tensor:
    """Σ of the weights over everything that an argument of ``shape`` is shared by."""
    full = torch.broadcast_shapes(weight.shape, value.shape, shape)
    weight = weight.reshape((1,) * (len(full) - weight.dim()) + weight.shape)
    target = (1,) * (len(full) - len(shape)) + tuple(shape)
    repeats = 1
    for i, size in enumerate(full):
        if target[i] == 1 and weight.shape[i] == 1:
            repeats *= size  # the same weight so many times
    summed = sum_to(weight, target).double() * repeats
    return summed.expand(target).reshape(shape)


def weighted_total(weight: Tensor, value: Tensor, shape: torch.Size) -> Tensor:
    """Σ of weight × value over everything that an argument of ``shape`` is shared by."""
    product = weight * value
    full = torch.broadcast_shapes(product.shape, shape)
    target = (1,) * (len(full) - len(shape)) + tuple(shape)
    return sum_to(product.expand(full), target).double().expand(target).reshape(shape)
