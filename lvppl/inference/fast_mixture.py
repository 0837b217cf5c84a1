"""The E-step of programs that are Gaussian mixtures, by the mixture kernel.

A program is one where a single enumerated Categorical, whose weights are the same for all data,
chooses the location and the covariance of a single observed vector. It is still run at every
iteration, which costs a millisecond and says what its arguments are; only the densities,
the responsibilities and their moments are left to :mod:`~lvppl.mixtures`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch import distributions as td

from lvppl.inference.e_step import Mode
from lvppl.inference.gaussians import Gaussians, add_gaussians, gaussians_of, scale_is_free
from lvppl.inference.m_step.bindings import Binding, Bound, Key
from lvppl.inference.m_step.statistics import Statistics
from lvppl.inference.m_step.weighted import Weighted, peel, unexpanded
from lvppl.layout import Layout
from lvppl.mixtures import MixtureKernel
from lvppl.tracing import is_enumerated, is_masked

__all__ = ["FastMixture"]


@dataclass(frozen=True)
class _Mixture:
    """What one run says."""

    latent: str
    observed: str
    y: Tensor
    log_weights: Tensor
    gaussians: Gaussians


class FastMixture:
    """One batch of data under a program that was found to be a Gaussian mixture."""

    def __init__(self, bindings: Mapping[Key, Binding], y: Tensor, covariance: str, hard: bool):
        self.bindings = bindings
        self.kernel = MixtureKernel(y, covariance=covariance, hard=hard)

    @staticmethod
    def of(
        sites: Sequence[Any], layout: Layout, bindings: Mapping[Key, Binding], mode: Mode
    ) -> FastMixture | None:
        """The kernel for these sites, ``None`` where the program is another one."""
        found = _recognised(sites, layout)
        if found is None or not bool(found.y.isfinite().all()):
            return None
        return FastMixture(bindings, found.y, found.gaussians.covariance, mode.hard)

    def __call__(
        self, sites: Sequence[Any], layout: Layout, mode: Mode, into: Statistics
    ) -> Tensor | None:
        """The objective, with statistics added; ``None`` where the run is not as recognised."""
        run = _recognised(sites, layout)
        if run is None or run.gaussians.covariance != self.kernel.covariance:
            return None
        if run.y.data_ptr() != self.kernel.y.data_ptr():
            hard, covariance = self.kernel.hard, self.kernel.covariance
            self.kernel = MixtureKernel(run.y, covariance=covariance, hard=hard)
        gaussians = run.gaussians
        if not self.kernel.resolves(gaussians.scale):
            return None
        found = self.kernel(
            run.log_weights,
            gaussians.loc,
            gaussians.scale,
            temperature=mode.temperature,
            second=scale_is_free(self.bindings, run.observed, gaussians.covariance),
        )
        weights = self.bindings.get((run.latent, "probs"))
        if isinstance(weights, Bound):
            into.add("count", weights.index.reshape(-1).to(found.counts.device), found.counts)
        add_gaussians(self.bindings, run.observed, gaussians, found, into)
        return found.objective


def _recognised(sites: Sequence[Any], layout: Layout) -> _Mixture | None:
    if len(sites) != 2 or len(layout.data_plates) != 1 or layout.nesting != 1:
        return None
    if sum(map(is_enumerated, sites)) != 1 or sum(s["is_observed"] for s in sites) != 1:
        return None
    if any(is_masked(s) or isinstance(s["scale"], Tensor) or s["scale"] != 1.0 for s in sites):
        return None
    latent = next(site for site in sites if is_enumerated(site))
    observed = next(site for site in sites if site["is_observed"])
    if not isinstance(latent["fn"], td.Categorical):
        return None
    probs = unexpanded(latent["fn"].probs, 1)
    if probs.shape[:-1].numel() != 1:
        return None  # a gate P(z | x)
    y, event_dim = observed["value"], observed["fn"].event_dim
    base = peel(Weighted(observed["name"], observed["fn"], y, probs.new_ones(()))).base
    gaussians = gaussians_of(base, probs.shape[-1], event_dim)
    if gaussians is None or not y.is_floating_point() or y.dim() != 1 + event_dim:
        return None
    y = y.unsqueeze(-1) if event_dim == 0 else y
    if y.shape[-1] != gaussians.loc.shape[-1]:
        return None  # one location for all columns
    log_weights = probs.reshape(-1).log()
    return _Mixture(latent["name"], observed["name"], y, log_weights, gaussians)
