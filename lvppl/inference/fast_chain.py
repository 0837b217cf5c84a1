"""The E-step of programs that are one Gaussian hidden Markov model, by kernels.

A program is one whose only site is a :class:`~lvppl.distributions.HiddenMarkov` with the same
transitions and the same Gaussians at every step. Densities and moments are matrix products of
:mod:`~lvppl.mixtures`, the states are summed by :mod:`lvppl.chains` in buffers that
are used again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvppl.chains import ChainWorkspace, forward_backward
from lvppl.distributions import HiddenMarkov
from lvppl.inference.e_step import Mode
from lvppl.inference.gaussians import Gaussians, add_gaussians, gaussians_of
from lvppl.inference.m_step.bindings import Binding, Bound, Key
from lvppl.inference.m_step.statistics import Statistics
from lvppl.inference.m_step.weighted import Weighted, peel, unexpanded
from lvppl.layout import Layout
from lvppl.mixtures import MixtureKernel
from lvppl.tracing import is_masked

__all__ = ["FastChain"]


@dataclass(frozen=True)
class _Chain:
    """What one run says."""

    name: str
    fn: HiddenMarkov
    y: Tensor
    gaussians: Gaussians


class FastChain:
    """One batch of sequences under a program that was found to be a Gaussian chain."""

    def __init__(self, bindings: Mapping[Key, Binding], run: _Chain) -> None:
        self.bindings = bindings
        self.given = run.y
        self.kernel = MixtureKernel(_flat(run), covariance=run.gaussians.covariance)
        self.workspace = ChainWorkspace()

    @staticmethod
    def of(
        sites: Sequence[Any], layout: Layout, bindings: Mapping[Key, Binding], mode: Mode
    ) -> FastChain | None:
        """The kernel for these sites, ``None`` where the program or the mode is another one."""
        run = _recognised(sites)
        if run is None or mode.hard or not bool(_flat(run).isfinite().all()):
            return None
        return FastChain(bindings, run)

    def __call__(
        self, sites: Sequence[Any], layout: Layout, mode: Mode, into: Statistics
    ) -> Tensor | None:
        """The objective, with statistics added; ``None`` where the run is not as recognised."""
        run = _recognised(sites)
        if run is None or mode.hard or mode.temperature != 1.0:
            return None
        gaussians, fn = run.gaussians, run.fn
        if gaussians.covariance != self.kernel.covariance:
            return None
        if not self.kernel.resolves(gaussians.scale):
            return None
        if run.y.data_ptr() != self.given.data_ptr():
            return None
        _, observed = fn.observations(run.y)
        K = len(gaussians.loc)
        shape = (*run.y.shape[: len(fn.batch_shape) + 1], K)
        emission = self.kernel.log_densities(gaussians.loc, gaussians.scale).reshape(shape)
        if observed is not None:
            emission = torch.where(observed[..., None], emission, 0.0)
        found = forward_backward(
            unexpanded(fn.initial_logits, 1).double().reshape(K),
            fn.transition_logits.double(),
            emission,
            lengths=fn.lengths,
            workspace=self.workspace,
        )
        r = found.marginals if observed is None else found.marginals * observed[..., None]
        moments = self.kernel.moments(r.reshape(-1, K), gaussians.loc, gaussians.scale)
        add_gaussians(self.bindings, f"{run.name}.emission", gaussians, moments, into)
        first = found.marginals[..., 0, :].reshape(-1, K).sum(0)
        self._add_counts(f"{run.name}.initial", first, into)
        self._add_counts(f"{run.name}.transition", found.transitions, into)
        return found.log_evidence.double().sum()

    def _add_counts(self, site: str, counts: Tensor, into: Statistics) -> None:
        binding = self.bindings.get((site, "probs"))
        if isinstance(binding, Bound):
            into.add("count", binding.index.reshape(counts.shape).to(counts.device), counts)


def _flat(run: _Chain) -> Tensor:
    clean, _ = run.fn.observations(run.y)
    D = run.gaussians.loc.shape[-1]
    return clean.reshape(-1, D)


def _recognised(sites: Sequence[Any]) -> _Chain | None:
    if len(sites) != 1 or not sites[0]["is_observed"] or is_masked(sites[0]):
        return None
    site = sites[0]
    fn, y = site["fn"], site["value"]
    if not isinstance(fn, HiddenMarkov) or isinstance(site["scale"], Tensor):
        return None
    if site["scale"] != 1.0 or fn.differs_by_step or fn.transition_logits.dim() != 2:
        return None
    if unexpanded(fn.initial_logits, 1).shape[:-1].numel() != 1:
        return None
    states, base = len(fn.transition_logits), fn.observation_dist
    if tuple(base.batch_shape) != (states,) or not y.is_floating_point():
        return None
    inner = peel(Weighted(site["name"], base, y, y.new_ones(()))).base
    gaussians = gaussians_of(inner, states, len(base.event_shape), plate=False)
    if gaussians is None or y.shape[: len(fn.batch_shape)] != fn.batch_shape:
        return None
    if gaussians.loc.shape[-1] != max(base.event_shape.numel(), 1):
        return None  # one location for all columns
    return _Chain(site["name"], fn, y, gaussians)
