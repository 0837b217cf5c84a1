"""How many values the observed sites score, for bits per dimension."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import DirichletMultinomial, Independent, MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions import MixtureSameFamily, constraints

from lvppl.observed_part import ObservedPart
from lvppl.terms import Terms

__all__ = ["observed_sizes"]


def observed_sizes(terms: Terms) -> tuple[int, int]:
    """Discrete and continuous values that were scored, in all data of these terms."""
    sizes = [0, 0]
    run = terms._runs[0]
    for message in run.observed_sites:
        # A mask that depends on draws is read at the first; enumerated dimensions are leftmost.
        scored = run.full(_scored(message["fn"], message["mask"]), message)
        scored = scored[(0,) * (scored.dim() - run.width + run.batched)]
        sizes[not terms.observed[message["name"]].is_discrete] += int(scored.sum())
    return sizes[0], sizes[1]


def _scored(fn: Any, mask: Any = None) -> Tensor:
    """How many values each batch element of a distribution scores, int64, (*batch)."""
    if isinstance(fn, ObservedPart):
        counts = (~fn.missing).flatten(-fn.event_dim).sum(-1)
    elif isinstance(fn, MixtureSameFamily) and fn.event_shape:
        counts = _scored(fn.component_distribution)[..., 0]
    elif isinstance(fn, MaskedDistribution):
        counts = _scored(fn.base_dist, fn._mask)
    elif isinstance(fn, ExpandedDistribution):
        counts = _scored(fn.base_dist)
    elif isinstance(fn, Independent):
        inner = _scored(fn.base_dist)
        counts = inner.sum(tuple(range(-fn.reinterpreted_batch_ndims, 0)))
    else:
        counts = torch.tensor(1 if _is_one_value(fn) else fn.event_shape.numel())
    counts = counts.expand(fn.batch_shape)
    return counts if mask is None else counts * torch.as_tensor(mask, device=counts.device)


def _is_one_value(fn: Any) -> bool:
    """Whether the elements of an event make one value together: one choice, or one tally."""
    tally = isinstance(fn, (torch.distributions.Multinomial, DirichletMultinomial))
    return tally or fn.support is constraints.one_hot
