"""The smallest variance of each scale: a fraction of the variance of the data that it explains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lvppl.conjugate import Nodes
from lvppl.inference.m_step.bindings import Binding, Bound, Key
from lvppl.inference.m_step.families import family_of
from lvppl.inference.m_step.weighted import Weighted, peel

__all__ = ["Floors"]

_SCALES = ("scale", "scale_tril")


class Floors:
    """Variances of the observed values, by site and feature, over all batches.

    A feature is an element of a site's event. One that is constant takes the mean variance of the
    others; where all are, the mean square of the values, or 1, stands for the variance.

    Args:
        batches: for each batch the sites of one run. Missing (masked) values are left out, and so
            are latents that are integrated: they have no data, and their scales no floor.
    """

    def __init__(self, batches: Iterable[Sequence[Weighted]]) -> None:
        self._moments: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for terms in batches:
            for term in terms:
                roles = getattr(family_of(peel(term).base), "roles", {})
                if any(name in roles for name in _SCALES) and not isinstance(term.fn, Nodes):
                    known = self._moments.get(term.name)
                    new = _moments(term)
                    self._moments[term.name] = new if known is None else _joined(known, new)

    def variances(self, site: str) -> Tensor:
        """Of a site's features, all positive, (*event) float64."""
        n, mean, second = self._moments[site]
        variance = second / n.clamp(min=1)
        varies = variance > 0
        if bool(varies.any()):
            return torch.where(varies, variance, variance[varies].mean())
        square = mean.square().mean()
        return torch.where(square > 0, square, torch.ones_like(square)).expand(variance.shape)

    def of_scales(self, keys: Iterable[Key], bindings: Mapping[Key, Binding], size: int) -> Tensor:
        """The mean variance of the features that each entry is the scale of, (entries,)."""
        total, count = (torch.zeros(size, dtype=torch.float64) for _ in range(2))
        for site, argument in keys:
            binding = bindings[site, argument]
            if site not in self._moments or not isinstance(binding, Bound):
                continue
            variance = self.variances(site).cpu()
            shape = torch.broadcast_shapes(binding.index.shape, variance.shape)
            index = binding.index.expand(shape).flatten()
            # of c · entry: the variance at the site is c² times that of the entry
            own = (variance / binding.coefficient.square()).expand(shape).flatten()
            bound = index >= 0
            total.index_add_(0, index[bound], own[bound])
            count.index_add_(0, index[bound], torch.ones_like(own[bound]))
        return total / count.clamp(min=1)

    def of_covariance(self, keys: Iterable[Key], bindings: Mapping[Key, Binding]) -> Tensor | None:
        """The variances of the features that a covariance is of, (features,)."""
        found = []
        for site, argument in keys:
            binding = bindings[site, argument]
            if site in self._moments and isinstance(binding, Bound):
                c = binding.coefficient[..., 0, 0].square().mean()
                found.append(self.variances(site).cpu() / c)
        return torch.stack(found).mean(0) if found else None


Moments = tuple[Tensor, Tensor, Tensor]


def _moments(term: Weighted) -> Moments:
    """Count, mean, and sum of squares about it, of each feature."""
    peeled = peel(term)
    value = term.value.detach().double()
    if type(peeled.base).__name__ == "LogNormal":
        value = value.log()
    event = term.fn.event_shape
    value = value.expand(torch.broadcast_shapes(value.shape, event))
    weight = peeled.weight.reshape(peeled.weight.shape + (1,) * len(peeled.base.event_shape))
    while weight.dim() > value.dim():  # states of latents
        weight = weight.amax(0)
    counts = (value.isfinite() & (weight > 0)).double()
    counts = counts.expand(value.shape).reshape(-1, *event)
    value = torch.where(counts > 0, value.reshape(-1, *event), 0.0)
    n = counts.sum(0)
    mean = value.sum(0) / n.clamp(min=1)
    return n, mean, (counts * (value - mean).square()).sum(0)


def _joined(one: Moments, other: Moments) -> Moments:
    """Of both together (Chan, Golub and LeVeque 1983)."""
    (n, mean, second), (m, others, more) = one, other
    total = (n + m).clamp(min=1)
    gap = others - mean
    return n + m, mean + gap * m / total, second + more + gap.square() * n * m / total
