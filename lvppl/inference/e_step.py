r"""The E-step: the exact posterior of the discrete latents, as weights on the sites of Q.

What it maximises over q at fixed parameters, and the value of that maximum:

=============  ================================  =========================================
soft           E_q ln p(z, y) + H(q)             ln p(y)
temperature T  E_q ln p(z, y) + T·H(q)           T ln Σ_z p(z, y)^(1/T)
hard           ln p(z, y) at one z               max over z of ln p(z, y), the hard ELBO
=============  ================================  =========================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvppl.conjugate import Nodes
from lvppl.elimination import solve as solve_factors
from lvppl.enumerated import num_states
from lvppl.factor_graph import FactorGraph
from lvppl.inference.inner_latents import (
    assigned,
    has_inner_latents,
    opened,
    structure,
    tracked,
)
from lvppl.inference.m_step.weighted import Weighted
from lvppl.layout import Layout
from lvppl.missing import filler
from lvppl.packed import dims_of, log_max, log_sum_exp, named
from lvppl.tracing import sample_sites, trace_pair

__all__ = ["Expectation", "Mode", "expected_log_joint", "sites_of", "traced_sites"]

Program = Callable[..., Any]


@dataclass(frozen=True)
class Mode:
    """Which q the E-step looks for."""

    hard: bool = False
    temperature: float = 1.0

    @property
    def is_soft(self) -> bool:
        return not self.hard and self.temperature == 1.0

    def density(self, site: Any) -> Tensor | None:
        """What a site with latents inside counts in this mode; ``None`` for any other site."""
        if not has_inner_latents(site["fn"]):
            return None
        return tracked(site["fn"], site["value"], hard=self.hard, temperature=self.temperature)

    @property
    def tracked(self) -> str:
        if self.hard:
            return "hard ELBO"
        if self.temperature != 1.0:
            return f"E_q ln p(z, y) + {self.temperature:g} H(q)"
        return "ln p(y)"


@dataclass(frozen=True)
class Expectation:
    """One E-step.

    Attributes:
        objective: the maximum over q, 0-dim float64, summed over the data in nats.
        terms: the sites of Q.
    """

    objective: Tensor
    terms: list[Weighted]

    @staticmethod
    def of(
        program: Program, args: Any, kwargs: Mapping[str, Any], layout: Layout, mode: Mode
    ) -> Expectation:
        """Run the program at its present parameters and find the best q.

        Raises:
            ProgramError: a datum has probability zero.
        """
        with torch.no_grad():
            graph = FactorGraph(
                program,
                args,
                kwargs,
                layout,
                temperature=mode.temperature,
                density=None if mode.is_soft else mode.density,
            )
            if graph.enumerated is None:
                value, weights = graph.apart()[0], {}
            else:
                queries = graph.enumerated.over_factors()
                reduction = log_max if mode.hard else log_sum_exp
                value, answers = graph.solve(queries, reduction=reduction)
                weights = dict(zip(graph.enumerated.factors, answers, strict=True))
            objective = value.double().sum() * graph.data_scale
            terms: list[Weighted] = []
            for term in _weighted(graph, weights):
                terms += opened(term, hard=mode.hard, temperature=mode.temperature)
            return Expectation(objective, terms)

    @staticmethod
    def clamped(
        program: Program,
        args: Any,
        kwargs: Mapping[str, Any],
        layout: Layout,
        q: Mapping[str, Tensor],
    ) -> list[Weighted]:
        """The sites of Q under a given q, independent by site: ``q[site]`` is (*plates, K).

        A latent that ``q`` does not have is uniform.
        """
        with torch.no_grad():
            graph = FactorGraph(program, args, kwargs, layout)
            weights = _clamped_weights(graph, q) if graph.enumerated is not None else {}
            found: list[Weighted] = []
            for term in _weighted(graph, weights):
                if term.name in q and has_inner_latents(term.fn):
                    found += assigned(term, q[term.name])
                else:
                    found += opened(term, hard=False, temperature=1.0)
            return found


def _clamped_weights(graph: FactorGraph, q: Mapping[str, Tensor]) -> dict[str, Tensor]:
    assert graph.enumerated is not None
    factors = []
    for name, site in graph.latents.items():
        query = graph.enumerated.over_sites([site])
        if isinstance(site["fn"], Nodes):  # at its prior
            factors.append(graph.enumerated.factor_of(name))
            continue
        given = q.get(name)
        logs = query if given is None else given.movedim(-1, 0).to(query).log()
        if given is None:
            logs = query - torch.tensor(float(num_states(site))).log().to(query)
        factors.append(named(logs.expand(query.shape).contiguous(), dims_of(query)))
    _, answers = solve_factors(
        factors,
        graph.enumerated.over_factors(),
        eliminate=graph.enumerated.eliminate,
        plates=graph.enumerated.plates,
        integrals=graph.enumerated.integrals,
    )
    return dict(zip(graph.enumerated.factors, answers, strict=True))


def _weighted(graph: FactorGraph, posterior: Mapping[str, Tensor]) -> list[Weighted]:
    terms = []
    for name, site in graph.sites.items():
        log_prob = graph.run.log_prob(site)
        if name in posterior:
            weight = posterior[name].reshape(log_prob.shape)
        else:
            weight = log_prob.new_ones(()).expand(log_prob.shape)
        if site["mask"] is not None:
            weight = weight * site["mask"]
        if isinstance(site["scale"], Tensor) or site["scale"] != 1.0:
            weight = weight * site["scale"]
        terms.append(Weighted(name, site["fn"], _valid_value(site), weight))
    return terms


def _valid_value(site: Any) -> Tensor:
    """What a site observes, with something of its support where a mask hides it.

    A density outside the support may be NaN, and so is its gradient, whatever weight it has.
    """
    value: Tensor = site["value"]
    mask = site["mask"]
    if not site["is_observed"] or not isinstance(mask, Tensor):
        return value
    mask = mask.reshape(mask.shape + (1,) * site["fn"].event_dim)
    return torch.where(mask, value, filler(site["fn"], value))


def traced_sites(
    program: Program, args: Any, kwargs: Mapping[str, Any], layout: Layout
) -> list[Any]:
    """The sample sites of one run under enumeration, as Pyro records them."""
    trace, _ = trace_pair(program, None, args, kwargs, nesting=layout.nesting, enumerate_sites=True)
    return sample_sites(trace)


def sites_of(
    program: Program, args: Any, kwargs: Mapping[str, Any], layout: Layout
) -> list[Weighted]:
    """The sites of Q without a posterior: all weights are one."""
    return [
        term
        for site in traced_sites(program, args, kwargs, layout)
        for term in structure(
            Weighted(site["name"], site["fn"], _valid_value(site), torch.ones(()))
        )
    ]


def expected_log_joint(
    program: Program,
    args: Any,
    kwargs: Mapping[str, Any],
    layout: Layout,
    weights: Mapping[str, Tensor],
) -> Tensor:
    """Q(θ) at fixed weights, 0-dim, differentiable in the parameters."""
    total = torch.zeros((), dtype=torch.float64)
    for term in sites_of(program, args, kwargs, layout):
        log_prob, weight = term.fn.log_prob(term.value), weights[term.name]
        log_prob = log_prob.expand(weight.shape) if log_prob.dim() <= weight.dim() else log_prob
        # 0 x -inf: what is impossible, or masked, counts nothing
        possible = torch.where(weight != 0, log_prob, torch.zeros_like(log_prob))
        total = total.to(log_prob.device) + (weight * possible).sum().double()
    return total
