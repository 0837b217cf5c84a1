r"""ln p(y) and the posterior of programs whose latents are all discrete: exact, by elimination.

.. math:: \ln p(y) = \ln \sum_z p(z, y), \qquad p(z | y) = p(z, y) / p(y)

Any Pyro program will do: plates, nested plates, ``pyro.markov`` chains, trees, several sites. No
site needs to be marked for enumeration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvppl.conjugate import Nodes
from lvppl.errors import ProgramError
from lvppl.factor_graph import FactorGraph, graph_of
from lvppl.packed import log_max, log_sum_exp_sampled
from lvppl.seeding import seeded
from lvppl.tracing import kind_of, plates_of

__all__ = ["Assignment", "ExactPosterior", "LogEvidence", "log_evidence", "posterior"]

Program = Callable[..., Any]

_DRAW_ELEMENTS = 2**24
"""Elements of the factors times draws of one pass."""


@dataclass(frozen=True)
class LogEvidence:
    """ln p(y) in nats. ``float(e)`` is the total."""

    per_datum: Tensor
    """(data,); one entry where the whole data set is one datum."""
    total: Tensor
    """0-dim: the sum, scaled by full_size / size where a data plate is subsampled."""
    data_plates: tuple[str, ...]
    """The plates that ``data`` is flattened from; () where the data set is one datum."""

    def __float__(self) -> float:
        return float(self.total.detach())


@dataclass(frozen=True)
class Assignment:
    """The most probable values of all latents together."""

    values: dict[str, Tensor]
    """By site, (*plates, *event)."""
    log_joint: Tensor
    """max over z of ln p(z, y): 0-dim, in nats, summed over the data."""
    per_datum: Tensor
    """The same for each datum, (data,)."""


def log_evidence(
    model: Program, *data: Any, temperature: float = 1.0, **kwargs: Any
) -> LogEvidence:
    r"""ln p(y), exactly: every discrete latent summed out by variable elimination.

    .. math:: \ln p(y) = \ln \sum_z p(z, y), \qquad
              F_T(y) = T \ln \sum_z p(z, y)^{1/T} = \max_q E_q \ln p(z, y) + T\,H(q)

    Differentiable in the parameters and in the data. The gradient is
    :math:`E_{p(z|y)} \nabla \ln p(z, y)`.

    Args:
        model: a Pyro program whose latents are all discrete with finite support. They are
            enumerated whether or not they are marked.
        data, kwargs: its arguments.
        temperature: T > 0. At T → 0 the value tends to max over z of ln p(z, y).

    Raises:
        ProgramError: a latent is continuous or unbounded, a sum is too large (how large), a chain
            lacks ``pyro.markov``, plates overlap: by site, plate and shape, with the remedy.

    Source: Obermeyer, Bingham et al. (2019), "Tensor variable elimination for plated factor
    graphs", ICML.
    """
    graph = graph_of(model, data, kwargs, temperature=_positive(temperature))
    return _record(graph, graph.log_evidence())


def posterior(
    model: Program, *data: Any, temperature: float = 1.0, **kwargs: Any
) -> ExactPosterior:
    r"""p(z | y) of every discrete latent, exactly, for these data; which may be new.

    Args:
        model: a Pyro program whose latents are all discrete with finite support.
        data, kwargs: its arguments.
        temperature: T of the distribution :math:`∝ p(z, y)^{1/T}`; 1 is the posterior, and T → 0
            tends to the most probable assignment.

    Raises:
        ProgramError: as ``log_evidence``; the program has no latent; a datum is impossible.
    """
    with torch.no_grad():
        graph = graph_of(model, data, kwargs, temperature=_positive(temperature))
    if graph.enumerated is None:
        _refuse_summed_latents(graph)
        raise ProgramError(
            "The model has no discrete latent, so that there is no posterior. Write "
            "pyro.sample('z', dist.Categorical(weights)) without obs=; lvppl.log_evidence gives "
            "ln p(y)."
        )
    return ExactPosterior(graph)


class ExactPosterior:
    """p(z | y) of the enumerated latents: marginals, most probable values, draws.

    Attributes:
        sites: names of the latents.
        log_evidence: ln p(y), see :class:`LogEvidence`.
    """

    def __init__(self, graph: FactorGraph) -> None:
        assert graph.enumerated is not None
        self._graph = graph
        self._enumerated = graph.enumerated
        self.sites = tuple(n for n, s in graph.latents.items() if not isinstance(s["fn"], Nodes))
        # at once: a program that has no posterior is refused here, not at the first question
        self.log_evidence, self._marginals = self._summed()

    def marginals(self, site: str) -> Tensor:
        """p(z = k | y), (*plates, K), the states in the order of the site's support.

        For a mixture these are the responsibilities.
        """
        return self._marginals[self._known(site)]

    def _summed(self) -> tuple[LogEvidence, dict[str, Tensor]]:
        queries = [self._enumerated.over_sites([site]) for site in self._latents]
        value, answers = self._graph.solve(queries)
        found = {n: a.movedim(0, -1) for n, a in zip(self.sites, answers, strict=True)}
        return _record(self._graph, value), found

    def joint(self, *sites: str) -> Tensor:
        """p(z_a = i, z_b = j | y) of latents together, (*plates of all, K_a, K_b).

        For neighbours in a chain these are the ξ of the Baum-Welch algorithm. The cost grows if
        the sites share no factor.
        """
        if len(set(sites)) < 2 or len(set(sites)) < len(sites):
            raise ProgramError(f"joint needs two or more different sites, but got {sites}")
        messages = [self._graph.latents[self._known(site)] for site in sites]
        query = self._enumerated.over_sites(messages)
        _, (answer,) = self._graph.solve([query])
        order = range(len(sites))
        return answer.movedim(tuple(order), tuple(i - len(sites) for i in order))

    def map(self) -> Assignment:
        """The most probable assignment of all latents together; ties go to the first state.

        It is the maximum of the joint, not of each marginal: for a chain, Viterbi's path.
        """
        self._require_sites()
        queries = [self._enumerated.over_sites([site]) for site in self._latents]
        value, answers = self._graph.solve(queries, reduction=log_max)
        values = {
            name: self._support(name)[answer.argmax(0)]
            for name, answer in zip(self.sites, answers, strict=True)
        }
        return Assignment(values, value.sum() * self._graph.data_scale, value)

    def sample(self, num_samples: int = 1, *, seed: int | None = None) -> dict[str, Tensor]:
        """Exact joint draws z ~ p(z | y), by site: (num_samples, *plates, *event).

        Args:
            num_samples: independent draws.
            seed: the same seed gives the same draws; the global generators are left alone.
        """
        self._require_sites()
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
            raise ProgramError(
                f"num_samples must be a whole number of at least 1, not {num_samples!r}"
            )
        elements = sum(factor.numel() for factor in self._enumerated.over_factors())
        at_once = max(1, min(num_samples, _DRAW_ELEMENTS // max(elements, 1)))
        parts = []
        with seeded(seed):
            for start in range(0, num_samples, at_once):
                parts.append(self._drawn(min(at_once, num_samples - start)))
        return {name: torch.cat([part[name] for part in parts]) for name in self.sites}

    def _drawn(self, count: int) -> dict[str, Tensor]:
        queries = [self._enumerated.over_sites([site], count) for site in self._latents]
        _, answers = self._graph.solve(queries, reduction=log_sum_exp_sampled)
        return {
            name: self._support(name)[answer.argmax(1)]
            for name, answer in zip(self.sites, answers, strict=True)
        }

    def plates(self, site: str) -> tuple[str, ...]:
        """Names of the plates around a latent, left to right."""
        return tuple(plate.name for plate in plates_of(self._graph.latents[self._known(site)]))

    # ------------------------------------------------------------------------------------- details

    @property
    def _latents(self) -> Sequence[Any]:
        return [self._graph.latents[name] for name in self.sites]

    def _require_sites(self) -> None:
        if not self.sites:
            raise ProgramError(
                "every latent of this program is integrated, not enumerated, so that there are no "
                "states to choose or to draw. log_evidence has ln p(y), and fit.reconstruct(y) the "
                "mean of y given the posterior."
            )

    def _known(self, site: str) -> str:
        if site not in self.sites:
            raise ProgramError(f"no enumerated latent {site!r}; there are {sorted(self.sites)}")
        return site

    def _support(self, name: str) -> Tensor:
        """The values of a site, (K, *event)."""
        fn = self._graph.latents[name]["fn"]
        values: Tensor = fn.enumerate_support(expand=False)
        return values.reshape(values.shape[:1] + fn.event_shape)

    def __repr__(self) -> str:
        sites = ", ".join(f"{n} {tuple(self.marginals(n).shape)}" for n in self.sites)
        return f"ExactPosterior({sites}; ln p(y) = {float(self.log_evidence):.6g} nats)"


def _record(graph: FactorGraph, value: Tensor) -> LogEvidence:
    plates = tuple(plate.name for plate in graph.run.layout.data_plates)
    return LogEvidence(value, value.sum() * graph.data_scale, plates)


def _refuse_summed_latents(graph: FactorGraph) -> None:
    for name, site in graph.sites.items():
        kind = kind_of(site["fn"])
        if kind == "HiddenMarkov":
            remedy = (
                "Ask the distribution itself, HiddenMarkov(...).posterior(y) or .viterbi(y), or "
                "write the chain with pyro.markov and a pyro.sample for each state."
            )
        elif kind == "MixtureSameFamily":
            remedy = (
                "Write z = pyro.sample('z', dist.Categorical(weights)) and the component that z "
                "chooses."
            )
        else:
            continue
        raise ProgramError(
            f"The latents of site '{name}' are inside its {kind}, which sums them out by itself: "
            f"lvppl.log_evidence is exact, but no latent site is left to have a posterior. {remedy}"
        )


def _positive(temperature: float) -> float:
    if not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
        raise ProgramError(
            f"temperature must be a number above 0, but is {temperature!r}; for the limit 0 use "
            "posterior(...).map()"
        )
    return float(temperature)
