"""The E-step of programs that are Gaussian mixtures, by the mixture kernel.

A program is one where a single enumerated Categorical, whose weights are the same for all data,
chooses the location and the covariance of a single observed vector. It is still run at every
iteration, which costs a millisecond and says what its arguments are; only the densities,
the responsibilities and their moments are left to :class:`~lvppl.inference.mixture_kernel`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from lvppl.inference.e_step import Mode
from lvppl.inference.m_step.bindings import Binding, Bound, Key, Unbound
from lvppl.inference.m_step.cells import Cells
from lvppl.inference.m_step.statistics import Statistics
from lvppl.inference.m_step.weighted import Weighted, peel, unexpanded
from lvppl.inference.mixture_kernel import MixtureKernel, MixtureStatistics
from lvppl.layout import Layout
from lvppl.tracing import is_enumerated, is_masked

__all__ = ["FastMixture"]


@dataclass(frozen=True)
class _Arguments:
    """A mixture as the kernel takes it."""

    covariance: str
    y: Tensor
    log_weights: Tensor
    loc: Tensor
    scale: Tensor


class FastMixture:
    """One batch of data under a program that was found to be a Gaussian mixture."""

    def __init__(self, bindings: Mapping[Key, Binding], arguments: _Arguments, hard: bool) -> None:
        self.bindings = bindings
        self.covariance = arguments.covariance
        self.kernel = MixtureKernel(arguments.y, covariance=self.covariance, hard=hard)

    @staticmethod
    def of(
        sites: Sequence[Any], layout: Layout, bindings: Mapping[Key, Binding], mode: Mode
    ) -> FastMixture | None:
        """The kernel for these sites, ``None`` where the program is another one."""
        if any(isinstance(binding, Unbound) for binding in bindings.values()):
            return None
        arguments = _recognised(sites, layout)
        if arguments is None or not bool(arguments.y.isfinite().all()):
            return None
        return FastMixture(bindings, arguments, mode.hard)

    def __call__(
        self, sites: Sequence[Any], layout: Layout, mode: Mode, into: Statistics
    ) -> Tensor | None:
        """The objective, with statistics added; ``None`` where the run is not as recognised."""
        arguments = _recognised(sites, layout)
        if arguments is None or arguments.covariance != self.covariance:
            return None
        if arguments.y.data_ptr() != self.kernel.y.data_ptr():
            self.kernel = MixtureKernel(
                arguments.y, covariance=self.covariance, hard=self.kernel.hard
            )
        latent, observed = _roles(sites)
        free = self._scale_is_free(observed)
        found = self.kernel(
            arguments.log_weights,
            arguments.loc,
            arguments.scale,
            temperature=mode.temperature,
            second=free,
        )
        self._add(latent, observed, arguments, found, into, free)
        return found.objective

    def _scale_is_free(self, observed: Any) -> bool:
        name = "scale_tril" if self.covariance in ("full", "tied") else "scale"
        binding = self.bindings.get((observed["name"], name))
        return not (isinstance(binding, Bound) and binding.is_constant)

    def _add(
        self,
        latent: Any,
        observed: Any,
        arguments: _Arguments,
        found: MixtureStatistics,
        into: Statistics,
        free: bool,
    ) -> None:
        device, (K, D) = found.first.device, found.first.shape
        scalar = observed["fn"].event_dim == 0

        def by_component(value: Tensor, shape: tuple[int, ...]) -> Tensor:
            return _by_component(value.unsqueeze(-1) if scalar else value, shape)

        weights = self.bindings.get((latent["name"], "probs"))
        if isinstance(weights, Bound):
            into.add("count", weights.index.reshape(-1).to(device), found.counts)
        loc = self.bindings[observed["name"], "loc"]
        assert isinstance(loc, Bound)
        loc_index = by_component(loc.index, (K, D)).to(device)
        loc_coefficient = by_component(loc.coefficient, (K, D)).to(device)
        location = arguments.loc.double()
        if self.covariance in ("full", "tied"):
            tril = self.bindings[observed["name"], "scale_tril"]
            assert isinstance(tril, Bound)
            second = found.second if self.covariance == "full" else found.second / K
            matrix = arguments.scale.double()
            cells = Cells(
                torch.cat(
                    [loc_index, by_component(tril.index, (K, D, D)).to(device).reshape(K, D * D)],
                    1,
                ),
                {
                    "loc": location,
                    "loc_coefficient": loc_coefficient,
                    "tril": matrix.expand(K, D, D),
                    "tril_coefficient": by_component(tril.coefficient, (K, D, D)).to(device)[
                        :, 0, 0
                    ],
                },
                # tied: the kernel sums over k; all cells share the matrix, so any split will do
                {"n": found.counts, "first": found.first, "second": second.expand(K, D, D)},
            )
            into.add_cells(f"mvn {D}", cells)
            return
        scale = self.bindings[observed["name"], "scale"]
        assert isinstance(scale, Bound)
        second = found.second if free else torch.zeros_like(found.counts)
        if second.dim() == 1:  # summed over features, which share the scale: any split will do
            second = (second / D).unsqueeze(-1)
        index = torch.stack(
            [loc_index.reshape(-1), by_component(scale.index, (K, D)).to(device).reshape(-1)], 1
        )
        into.add_cells(
            "normal",
            Cells(
                index,
                {
                    "loc": location.reshape(-1),
                    "loc_coefficient": loc_coefficient.reshape(-1),
                    "scale": _diagonal(arguments, K, D).double().reshape(-1),
                    "scale_coefficient": by_component(scale.coefficient, (K, D))
                    .to(device)
                    .reshape(-1),
                },
                {
                    "n": found.counts.unsqueeze(-1).expand(K, D).reshape(-1),
                    "first": found.first.reshape(-1),
                    "second": second.expand(K, D).reshape(-1),
                },
            ),
        )


def _by_component(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An argument (K, 1, ...) as (K, ...), whatever of it is shared."""
    event = len(shape) - 1
    value = value.reshape((1,) * (event + 2 - value.dim()) + value.shape)
    return value.squeeze(1).expand(shape)


def _diagonal(arguments: _Arguments, K: int, D: int) -> Tensor:
    scale = arguments.scale
    return scale.expand(K, D) if scale.dim() != 1 else scale.unsqueeze(-1).expand(K, D)


def _roles(sites: Sequence[Any]) -> tuple[Any, Any]:
    latent = next(site for site in sites if is_enumerated(site))
    return latent, next(site for site in sites if site["is_observed"])


def _recognised(sites: Sequence[Any], layout: Layout) -> _Arguments | None:
    if len(sites) != 2 or len(layout.data_plates) != 1 or layout.nesting != 1:
        return None
    if sum(map(is_enumerated, sites)) != 1 or sum(s["is_observed"] for s in sites) != 1:
        return None
    latent, observed = _roles(sites)
    if any(is_masked(s) or isinstance(s["scale"], Tensor) or s["scale"] != 1.0 for s in sites):
        return None
    choice = latent["fn"]
    if not isinstance(choice, td.Categorical):
        return None
    probs = unexpanded(choice.probs, 1)
    if probs.shape[:-1].numel() != 1:
        return None  # a gate P(z | x)
    peeled = peel(Weighted(observed["name"], observed["fn"], observed["value"], probs.new_ones(())))
    K = probs.shape[-1]
    log_weights = probs.reshape(K).log()
    if isinstance(peeled.base, td.MultivariateNormal):
        return _full(peeled.base, peeled.value, log_weights)
    if isinstance(peeled.base, td.Normal):
        return _diag(peeled.base, peeled.value, log_weights, observed["fn"].event_dim)
    return None


def _full(base: Any, y: Tensor, log_weights: Tensor) -> _Arguments | None:
    K, D = len(log_weights), y.shape[-1]
    loc, tril = unexpanded(base.loc, 1), unexpanded(base._unbroadcasted_scale_tril, 2)
    if y.dim() != 2 or loc.shape != (K, 1, D):
        return None
    if tril.shape == (K, 1, D, D):
        return _Arguments("full", y, log_weights, loc[:, 0], tril[:, 0])
    if tril.shape[:-2].numel() == 1:
        return _Arguments("tied", y, log_weights, loc[:, 0], tril.reshape(D, D))
    return None


def _diag(base: Any, y: Tensor, log_weights: Tensor, event_dim: int) -> _Arguments | None:
    K = len(log_weights)
    loc, scale = unexpanded(base.loc), unexpanded(base.scale)
    if event_dim == 0:
        if y.dim() != 1 or loc.dim() > 2 or scale.dim() > 2:
            return None
        y, loc, scale = y.unsqueeze(-1), loc.unsqueeze(-1), scale.unsqueeze(-1)
    D = y.shape[-1]
    if y.dim() != 2 or event_dim > 1 or loc.shape != (K, 1, D):
        return None
    scale = scale.reshape((1,) * (3 - scale.dim()) + scale.shape)
    if scale.shape[1] != 1 or scale.dim() != 3:
        return None
    scale = scale[:, 0]
    if scale.numel() == 1:
        return _Arguments("unit", y, log_weights, loc[:, 0], scale.reshape(()))
    if scale.shape == (K, 1) and D > 1:
        return _Arguments("spherical", y, log_weights, loc[:, 0], scale[:, 0])
    return _Arguments("diag", y, log_weights, loc[:, 0], scale.expand(K, D))
