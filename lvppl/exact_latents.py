"""The latents of a factor graph, and what the answer to a query says of each.

====================  ========================================  ===================================
:class:`State`        a discrete site                           summed out by elimination
:class:`InnerState`   states inside an observed distribution    summed out by that distribution
:class:`Integrated`   a continuous site with nodes              integrated by elimination
:class:`Gaussian`     a Gaussian site                           integrated given all states
====================  ========================================  ===================================

A *query* is a packed tensor whose answer is the gradient of a contraction over its dimensions
(:mod:`lvppl.elimination`): marginals, the best assignment or draws, as indicators. A latent whose
posterior needs none has ``None`` for its query, and for the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvppl.enumerated import DRAWS
from lvppl.errors import ProgramError
from lvppl.factor_graph import FactorGraph
from lvppl.linear_gaussian import Group, Variable
from lvppl.marginalised import Inside, inside_of
from lvppl.packed import dims_of, named
from lvppl.tracing import plates_of

__all__ = ["Gaussian", "InnerState", "Integrated", "State", "integrated_of", "states_of"]


@dataclass(frozen=True)
class State:
    """A discrete site of the program."""

    graph: FactorGraph
    site: Any

    def query(self, num_draws: int | None = None) -> Tensor:
        assert self.graph.enumerated is not None
        return self.graph.enumerated.over_sites([self.site], num_draws)

    def marginals(self, answer: Tensor | None) -> Tensor:
        """(*plates, K)"""
        assert answer is not None
        return answer.movedim(0, -1)

    def best(self, answer: Tensor | None) -> Tensor:
        """(*plates, *event)"""
        assert answer is not None
        return self._support[answer.argmax(0)]

    def drawn(self, answer: Tensor | None, num_draws: int) -> Tensor:
        """(draws, *plates, *event)"""
        assert answer is not None
        return self._support[answer.argmax(1)]

    def neighbours(self, answer: Tensor | None) -> Tensor:
        raise ProgramError(
            f"joint needs two or more different sites, but got ('{self.site['name']}',)"
        )

    @property
    def elements(self) -> int:
        return 0

    @property
    def _support(self) -> Tensor:
        """The values of the site, (K, *event)."""
        values: Tensor = self.site["fn"].enumerate_support(expand=False)
        return values.reshape(values.shape[:1] + self.site["fn"].event_shape)


@dataclass(frozen=True)
class InnerState:
    """The states inside an observed site: p(outside | y) · p(inside | outside, y)."""

    graph: FactorGraph
    site: Any
    """The observed site."""
    inside: Inside

    def query(self, num_draws: int | None = None) -> Tensor | None:
        enumerated, name = self.graph.enumerated, self.site["name"]
        if enumerated is None or name not in enumerated.factors:
            return None
        factor = enumerated.factor_of(name)
        if num_draws is None:
            return factor
        dims = DRAWS + dims_of(factor)
        return named(factor.expand(num_draws, *factor.shape), dims)

    def marginals(self, answer: Tensor | None) -> Tensor:
        """(*plates, *independent, *steps, K)"""
        return self._averaged(self.inside.latents.marginals(), self._weight(answer), 1)

    def neighbours(self, answer: Tensor | None) -> Tensor:
        """(*plates, *independent, T - 1, K, K)"""
        return self._averaged(self.inside.latents.neighbours(), self._weight(answer), 2)

    def best(self, answer: Tensor | None) -> Tensor:
        """(*plates, *independent, *steps)"""
        return self._averaged(self.inside.latents.best()[0], self._weight(answer), 0)

    def drawn(self, answer: Tensor | None, num_draws: int) -> Tensor:
        """(draws, *plates, *independent, *steps)"""
        draws = self.inside.latents.drawn(num_draws).movedim(0, -1)
        weight = self._weight(answer, num_draws)
        return self._averaged(draws, weight, 1).movedim(-1, 0)

    @property
    def elements(self) -> int:
        return self.inside.latents.elements

    def _weight(self, answer: Tensor | None, *draws: int) -> Tensor | None:
        """An answer over the states outside and the plates, (*outside, *plates, *draws)."""
        if answer is None:
            return None
        shape = self.graph.run.log_prob(self.site).shape
        weight = answer.reshape(*draws, *shape)
        return weight.movedim(0, -1) if draws else weight

    def _averaged(self, values: Tensor, weight: Tensor | None, extra: int) -> Tensor:
        """Values for each state outside, averaged under their weights.

        Args:
            values: batch of the site, its event, then ``extra`` dimensions; draws are the last.
        """
        run, events = self.graph.run, self.inside.event_dim + extra
        whole = run.full(values, self.site, events)
        if weight is not None:
            batch = run.log_prob(self.site).dim()
            draws = weight.shape[batch:]
            ones = (1,) * (events - len(draws))
            weight = weight.reshape(weight.shape[:batch] + ones + draws).to(whole.dtype)
            outside = list(range(batch - run.width))
            whole = _weighted(weight, whole).sum(outside)
        return run.by_plates(whole, self.site, events)[0]


@dataclass(frozen=True)
class Integrated:
    """A continuous site: a mixture, over states, of densities that are known."""

    graph: FactorGraph
    site: Any

    def query(self, num_draws: int | None = None) -> Tensor | None:
        given = self.graph.given(self.site["name"])
        if given.num_states == 0:
            return None
        return given.query(num_draws, DRAWS)

    def moments(self, answer: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean (*plates, d) and covariance (*plates, d, d); d is the size of the event."""
        given = self.graph.given(self.site["name"])
        means, covariances = self.site["fn"].moments(given.table)
        if answer is None:
            return self._by_plates(means, 1), self._by_plates(covariances, 2)
        states = list(range(given.num_states))
        mean = _weighted(answer[..., None], means).sum(states)
        away = means - mean
        spread = covariances + away[..., :, None] * away[..., None, :]
        covariance = _weighted(answer[..., None, None], spread).sum(states)
        return self._by_plates(mean, 1), self._by_plates(covariance, 2)

    def drawn(self, answer: Tensor | None, num_draws: int) -> Tensor:
        """(draws, *plates, *event)"""
        given = self.graph.given(self.site["name"])
        table = given.table.expand(num_draws, *given.table.shape)
        if answer is not None:
            chosen = _weighted(answer[..., None], table)
            table = chosen.sum(list(range(1, 1 + given.num_states)))
        sizes = [plate.size for plate in plates_of(self.site)]
        drawn: Tensor = self.site["fn"].drawn(table)
        return drawn.reshape(num_draws, *sizes, *self.site["fn"].event_shape)

    @property
    def elements(self) -> int:
        return 0

    def _by_plates(self, values: Tensor, events: int) -> Tensor:
        sizes = [plate.size for plate in plates_of(self.site)]
        return values.reshape(*sizes, *values.shape[values.dim() - events :])


def _weighted(weight: Tensor, values: Tensor) -> Tensor:
    """Their product, zero where the weight is: values of impossible states may be anything."""
    product = weight * values
    return torch.where(weight != 0, product, torch.zeros_like(product))


@dataclass(frozen=True)
class Gaussian:
    """A continuous site whose law, given the states, is Gaussian, alone and with its group."""

    group: Group
    variable: Variable

    @property
    def site(self) -> Any:
        return self.variable.site

    def query(self, num_draws: int | None = None) -> Tensor | None:
        return self.group.query(num_draws, DRAWS)

    def moments_together(self, answer: Tensor | None) -> dict[str, tuple[Tensor, Tensor]]:
        """Of every latent of the group, mean (*plates, d) and covariance (*plates, d, d).

        d is the size of the event.
        """
        found = {}
        for name, (mean, covariance) in self.group.moments(answer).items():
            latent = self.group.variables[name]
            plates, size = latent.plates, latent.site["fn"].event_shape.numel()
            found[name] = (
                latent.value(mean).reshape(*plates, size),
                latent.covariance(covariance).reshape(*plates, size, size),
            )
        return found

    def drawn_together(self, answer: Tensor | None, num_draws: int) -> dict[str, Tensor]:
        """Of every latent of the group, (draws, *plates, *event)."""
        found = self.group.drawn(answer, num_draws, DRAWS)
        return {name: self.group.variables[name].values(x) for name, x in found.items()}


# ------------------------------------------------------------------------------------ all of them


def states_of(graph: FactorGraph) -> dict[str, State | InnerState]:
    """Every latent that is summed out, by name: those of the program, then those inside sites."""
    found: dict[str, State | InnerState] = {
        name: State(graph, site) for name, site in graph.states.items()
    }
    for name, site in graph.sites.items():
        inside = inside_of(site, graph.temperature) if site["is_observed"] else None
        if inside is not None:
            free = _free(f"{name}_{inside.latents.suffix}", graph.sites)
            found[free] = InnerState(graph, site, inside)
    return found


def integrated_of(graph: FactorGraph) -> dict[str, Integrated | Gaussian]:
    """Every latent that is integrated, by name."""
    found: dict[str, Integrated | Gaussian] = {
        name: Integrated(graph, site) for name, site in graph.integrated.items()
    }
    for group in graph.groups:
        found |= {name: Gaussian(group, variable) for name, variable in group.variables.items()}
    return found


def _free(name: str, taken: Mapping[str, Any]) -> str:
    while name in taken:
        name += "_"
    return name
