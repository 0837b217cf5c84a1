"""The smallest variance of each scale: a fraction of the variance of the data that it explains.

A likelihood has no bound where a density may shrink onto one datum. The parameters that could let
it are kept away from there, and so are maximised over a smaller set:

=============  ======================================================================
scale          θ² ≥ floor · variance of the data
cholesky       eigenvalues of Σ ≥ floor, each feature in units of its own deviation
concentration  1/α ≥ floor · (variance / mean²) of the data, where the rate is learned
=============  ======================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lvppl.conjugate import Nodes
from lvppl.inference.m_step.arguments import Binding, Bound, Key
from lvppl.inference.m_step.families import family_of
from lvppl.inference.m_step.weighted import Weighted, peel

__all__ = ["Floors", "floored", "least_eigenvalues"]

_SHRINK = ("scale", "scale_tril", "concentration")


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
                if any(name in roles for name in _SHRINK) and not isinstance(term.fn, Nodes):
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

    def variation(self, site: str) -> Tensor:
        """The squared coefficient of variation of a site's features, all positive, (*event)."""
        n, mean, second = self._moments[site]
        variation = second / n.clamp(min=1) / mean.square()
        return torch.where((variation > 0) & variation.isfinite(), variation, 1.0)

    def of_scales(self, keys: Iterable[Key], bindings: Mapping[Key, Binding], size: int) -> Tensor:
        """The median variance of the features that each entry is the scale of, (entries,).

        0 for what is no scale. As a median it follows neither the one feature in other units, nor
        the far nodes of a latent that scales are divided by.
        """
        return self._by_entry(self.variances, keys, bindings, size)

    def of_concentrations(
        self, keys: Iterable[Key], bindings: Mapping[Key, Binding], size: int
    ) -> Tensor:
        """The median squared variation of the features that each entry stands for, (entries,)."""
        return self._by_entry(self.variation, keys, bindings, size)

    def _by_entry(
        self,
        of_site: Callable[[str], Tensor],
        keys: Iterable[Key],
        bindings: Mapping[Key, Binding],
        size: int,
    ) -> Tensor:
        entries, values = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0, dtype=torch.float64)]
        for site, argument in keys:
            binding = bindings[site, argument]
            if site not in self._moments or not isinstance(binding, Bound):
                continue
            value = of_site(site).cpu()
            shape = torch.broadcast_shapes(binding.index.shape, value.shape)
            index = binding.index.expand(shape).flatten()
            # of c · entry: the variance at the site is c² times that of the entry
            own = (value / binding.coefficient.square()).expand(shape).flatten()
            entries.append(index[index >= 0])
            values.append(own[index >= 0])
        return _medians(torch.cat(entries), torch.cat(values), size)

    def of_covariance(self, keys: Iterable[Key], bindings: Mapping[Key, Binding]) -> Tensor | None:
        """The variances of the features that a covariance is of, (features,)."""
        found = []
        for site, argument in keys:
            binding = bindings[site, argument]
            if site in self._moments and isinstance(binding, Bound):
                c = binding.coefficient[..., 0, 0].square().median()
                found.append(self.variances(site).cpu() / c)
        return torch.stack(found).mean(0) if found else None


def _medians(index: Tensor, value: Tensor, size: int) -> Tensor:
    """The (lower) median of the values of each index, (size,); 0 for an index without any."""
    order = value.argsort()
    order = order[index[order].argsort(stable=True)]
    counts = torch.bincount(index, minlength=size)
    middle = counts.cumsum(0) - counts + (counts - 1).clamp(min=0) // 2
    found = torch.zeros(size, dtype=torch.float64)
    found[counts > 0] = value[order][middle[counts > 0]]
    return found


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


def floored(covariance: Tensor, floor: float, width: Tensor) -> Tensor:
    """Of the Σ whose eigenvalues in units of ``width`` are at least ``floor``, the best for S.

    ln |Σ| + tr(Σ⁻¹ S) is smallest at S itself, and over such Σ where the eigenvalues of S are
    raised to the floor and its eigenvectors kept.

    Args:
        covariance: S, (..., D, D) float64.
        width: a deviation of each feature, (D,).
    """
    units = width.unsqueeze(-1) * width
    covariance = (covariance + covariance.mT) / 2 / units
    values, vectors = torch.linalg.eigh(covariance)
    least = max(floor, torch.finfo(covariance.dtype).tiny)
    raised = (vectors * values.clamp(min=least).unsqueeze(-2)) @ vectors.mT
    enough = (values >= least).all(-1)[..., None, None]
    return torch.where(enough, covariance, raised) * units


def least_eigenvalues(covariance: Tensor, width: Tensor) -> Tensor:
    """Of Σ (..., D, D) in units of ``width`` (D,): (...,)."""
    units = width.unsqueeze(-1) * width
    return torch.linalg.eigvalsh((covariance + covariance.mT) / 2 / units)[..., 0]
