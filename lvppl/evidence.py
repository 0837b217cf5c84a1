r"""ln p(y) and the posterior of programs with discrete and linear-Gaussian latents, exactly.

.. math:: \ln p(y) = \ln \sum_z \int p(z, x, y) \, dx, \qquad p(z, x | y) = p(z, x, y) / p(y)

Any Pyro program will do: plates, nested plates, ``pyro.markov`` chains, trees, several sites. No
site needs to be marked for enumeration. Latents with Normal priors are integrated where every site
that depends on them is Normal, with a location affine in them (:mod:`lvppl.linear_gaussian`).
Latents that the distribution of an observed site sums out by itself (HiddenMarkov,
MixtureSameFamily) have a posterior too, and so have continuous latents that a fit by
:class:`lvppl.EM` integrates exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.exact_latents import (
    Gaussian,
    InnerState,
    Integrated,
    State,
    integrated_of,
    states_of,
)
from lvppl.factor_graph import FactorGraph, graph_of
from lvppl.missing import with_missing
from lvppl.packed import Reduction, log_max, log_sum_exp, log_sum_exp_sampled
from lvppl.seeding import seeded
from lvppl.tracing import kind_of, plates_of

__all__ = ["Assignment", "ExactPosterior", "LogEvidence", "Moments", "log_evidence", "posterior"]

Program = Callable[..., Any]
Latent = State | InnerState | Integrated | Gaussian

_DRAW_ELEMENTS = 2**24
"""Elements of the factors times draws of one pass."""


@dataclass(frozen=True, repr=False)
class LogEvidence:
    """ln p(y) in nats. ``float(e)`` is the total."""

    per_datum: Tensor
    """(data,); one entry where the whole data set is one datum."""
    total: Tensor
    """0-dim: the sum, scaled by full_size / size where a data plate is subsampled."""
    data_plates: tuple[str, ...]
    """The plates that ``data`` is flattened from; () where the data set is one datum."""
    temperature: float = 1.0
    """T, where this is F_T(y) rather than ln p(y)."""

    def __float__(self) -> float:
        return float(self.total.detach())

    def __repr__(self) -> str:
        return f"LogEvidence({self._name} = {float(self):.6g} nats; {self._data})"

    @property
    def _name(self) -> str:
        return "ln p(y)" if self.temperature == 1.0 else f"F_T(y) at T = {self.temperature:g}"

    @property
    def _data(self) -> str:
        """How many data there are, in words."""
        if not self.data_plates:
            return "the data set is one datum"
        count, plates = len(self.per_datum), ", ".join(self.data_plates)
        return f"{count:,} {'datum' if count == 1 else 'data'} of plate {plates}"


@dataclass(frozen=True, repr=False)
class Assignment:
    """The most probable values of all latents together."""

    values: dict[str, Tensor]
    """By site, (*plates, *event)."""
    log_joint: Tensor
    """max over z of ln p(z, y): 0-dim, in nats, summed over the data."""
    per_datum: Tensor
    """The same for each datum, (data,)."""

    def __repr__(self) -> str:
        shapes = _listed([f"{name} {tuple(v.shape)}" for name, v in self.values.items()])
        return f"Assignment(ln p(z, y) = {float(self.log_joint):.6g} nats; {shapes})"


@dataclass(frozen=True, repr=False)
class Moments:
    """Mean and covariance of a continuous latent given y."""

    mean: Tensor
    """E[u | y], (*plates, *event)."""
    covariance: Tensor
    """Cov[u | y], (*plates, *event, *event); the variance, (*plates), where u is a scalar."""

    @property
    def variance(self) -> Tensor:
        """Of each element, (*plates, *event)."""
        plates = self.covariance.shape[: 2 * self.mean.dim() - self.covariance.dim()]
        size = math.prod(self.mean.shape[len(plates) :])
        square = self.covariance.reshape(*plates, size, size)
        return square.diagonal(dim1=-2, dim2=-1).reshape(self.mean.shape)

    @property
    def std(self) -> Tensor:
        """Of each element, (*plates, *event)."""
        return self.variance.sqrt()

    def __repr__(self) -> str:
        return f"Moments(mean {tuple(self.mean.shape)}, covariance {tuple(self.covariance.shape)})"


def log_evidence(
    model: Program,
    *data: Any,
    temperature: float = 1.0,
    missing: str | None = None,
    **kwargs: Any,
) -> LogEvidence:
    r"""ln p(y), exactly: discrete latents summed out, linear-Gaussian ones integrated.

    .. math:: \ln p(y) = \ln \sum_z \int p(z, x, y) \, dx, \qquad
              F_T(y) = T \ln \sum_z \int p(z, x, y)^{1/T} dx = \max_q E_q \ln p(z, x, y) + T\,H(q)

    Differentiable in the parameters and in the data. The gradient is
    :math:`E_{p(z|y)} \nabla \ln p(z, y)`.

    Args:
        model: a Pyro program. Latents with finite support are enumerated, marked or not. Latents
            with Normal priors are integrated if what depends on them is Normal too, with a
            location that is affine in them: probabilistic PCA, factor analysers, Kalman smoothing,
            hierarchical and crossed effects; each also given discrete latents (mixtures of factor
            analysers, switching states of short sequences).
        data, kwargs: its arguments.
        temperature: T > 0. At T → 0 the value tends to max over z of ln p(z, y).
        missing: ``"nan"`` takes NaN in observed sites as missing values, which are summed out
            exactly (:mod:`lvppl.missing`); by default NaN is an error.

    Raises:
        ProgramError: missing values have no exact sum; a latent is unbounded, or continuous and not
            linear-Gaussian; a sum is too large (how large); a chain lacks ``pyro.markov``; plates
            overlap: by site, plate and shape, with the remedy.

    Source: Obermeyer, Bingham et al. (2019), "Tensor variable elimination for plated factor
    graphs", ICML.
    """
    model, _ = with_missing(model, None, missing, draws=False)
    graph = graph_of(model, data, kwargs, temperature=_positive(temperature))
    return _record(graph, graph.log_evidence())


def posterior(
    model: Program,
    *data: Any,
    temperature: float = 1.0,
    missing: str | None = None,
    **kwargs: Any,
) -> ExactPosterior:
    r"""p(z | y) of every latent, exactly, for these data; which may be new.

    Args:
        model: a Pyro program as for :func:`lvppl.log_evidence`. What a
            HiddenMarkov or MixtureSameFamily sums out by itself is a latent too, under the name
            ``"<site>_states"`` or ``"<site>_component"``; see :class:`ExactPosterior`.
        data, kwargs: its arguments.
        temperature: T of the distribution :math:`∝ p(z, y)^{1/T}`; 1 is the posterior, and T → 0
            tends to the most probable assignment.
        missing: as in ``log_evidence``. A datum of which nothing was observed has the prior.

    Raises:
        ProgramError: as ``log_evidence``; the program has no latent; a datum is impossible.
    """
    model, _ = with_missing(model, None, missing, draws=False)
    with torch.no_grad():
        graph = graph_of(model, data, kwargs, temperature=_positive(temperature))
        states, integrated = states_of(graph), integrated_of(graph)
        if states or integrated:
            return ExactPosterior(graph, states, integrated)
    if any(kind_of(site["fn"]) == "DiscreteHMM" for site in graph.sites.values()):
        raise ProgramError(
            "The states inside Pyro's DiscreteHMM have no posterior here. Use "
            "lvppl.distributions.HiddenMarkov, whose first state emits: its docstring says which "
            "initial logits make the two the same."
        )
    raise ProgramError(
        "The model has no latent, so that there is no posterior. Write pyro.sample('z', "
        "dist.Categorical(weights)) without obs=; lvppl.log_evidence gives ln p(y)."
    )


class ExactPosterior:
    """p(z | y), exactly: marginals, most probable values, moments, draws.

    ===========================  ========================================================
    latent                       its name, and the shape of its values
    ===========================  ========================================================
    a discrete site              the site's own; (*plates, *event)
    path of a HiddenMarkov       ``"<site>_states"``; (*plates, T)
    component of a               ``"<site>_component"``; (*plates), then what ``.to_event``
    MixtureSameFamily            declared independent of a mixture of scalars
    an integrated site           the site's own; (*plates, *event)
    ===========================  ========================================================

    Steps beyond the length of a sequence have state 0 and marginals of zero. Steps and elements
    that are missing, or hidden by a mask, have the posterior that the rest gives them. Components
    of a mixture inside a HiddenMarkov are summed out.

    Attributes:
        sites: names of the latents with states.
        integrated: names of the continuous latents, which have moments in place of marginals.
        log_evidence: ln p(y), see :class:`LogEvidence`.
    """

    sites: tuple[str, ...]
    integrated: tuple[str, ...]
    log_evidence: LogEvidence

    def __init__(
        self,
        graph: FactorGraph,
        states: Mapping[str, State | InnerState] | None = None,
        integrated: Mapping[str, Integrated | Gaussian] | None = None,
    ) -> None:
        self._graph = graph
        self._states = states_of(graph) if states is None else states
        self._integrated = integrated_of(graph) if integrated is None else integrated
        self.sites, self.integrated = tuple(self._states), tuple(self._integrated)
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        # at once: a program that has no posterior is refused here, not at the first question
        value, self._answers = self._solved(self._states)
        self.log_evidence = _record(graph, value)

    def marginals(self, site: str) -> Tensor:
        """p(z = k | y), (*shape of the values, K), the states in the order of the site's support.

        For a mixture these are the responsibilities; for a path, (*plates, T, K).

        Raises:
            ProgramError: the site has no states.
        """
        if site in self.integrated:
            raise ProgramError(
                f"latent '{site}' is continuous: it has no marginal probabilities of states. Its "
                f"mean and covariance are moments('{site}')."
            )
        name = self._known(site)
        return self._states[name].marginals(self._answers[name])

    def moments(self, site: str) -> Moments:
        r"""Mean and covariance of a continuous latent given y, its states averaged over.

        .. math:: E[u|y] = \sum_z p(z|y)\, E[u|z, y], \qquad
                  Cov[u|y] = \sum_z p(z|y) \big(Cov[u|z, y] + (E[u|z, y] - E[u|y])(...)^⊤\big)

        For a factor analyser these are the factor scores, for a Kalman filter the smoothed states.

        Raises:
            ProgramError: the site is not integrated; after EM with latents whose terms alone are
                Gaussian, it depends on another one.
        """
        if site not in self.integrated:
            self._known(site)
            raise ProgramError(
                f"latent '{site}' is discrete: moments are of latents that are integrated. The "
                f"probabilities of its states are marginals('{site}')."
            )
        latent = self._integrated[site]
        if site not in self._moments:  # those of a group are found together
            _, answers = self._solved({site: latent})
            if isinstance(latent, Gaussian):
                self._moments |= latent.moments_together(answers[site])
            else:
                self._moments[site] = latent.moments(answers[site])
        mean, covariance = self._moments[site]
        event = latent.site["fn"].event_shape
        plates = mean.shape[:-1]
        return Moments(mean.reshape(plates + event), covariance.reshape(plates + event + event))

    def joint(self, *sites: str) -> Tensor:
        """p(z_a = i, z_b = j | y) of latents together, (*plates of all, K_a, K_b).

        For neighbours in a chain these are the ξ of the Baum-Welch algorithm; for all neighbours
        in the path of a HiddenMarkov they are joint("<site>_states"), (*plates, T - 1, K, K),
        zero beyond a sequence's length. The cost grows if the sites share no factor.

        Raises:
            ProgramError: for sites that are unknown, repeated, integrated or inside a distribution.
        """
        if len(sites) == 1 and sites[0] in self.sites:
            return self._states[sites[0]].neighbours(self._answers[sites[0]])
        if len(set(sites)) < 2 or len(set(sites)) < len(sites):
            raise ProgramError(f"joint needs two or more different sites, but got {sites}")
        for site in map(self._known, sites):
            if not isinstance(self._states[site], State):
                raise ProgramError(
                    f"'{site}' is inside the distribution of '{self._states[site].site['name']}': "
                    "it has no joint with other sites. Draws of all latents together are sample()."
                )
        assert self._graph.enumerated is not None
        query = self._graph.enumerated.over_sites([self._states[site].site for site in sites])
        _, (answer,) = self._graph.solve([query])
        order = range(len(sites))
        return answer.movedim(tuple(order), tuple(i - len(sites) for i in order))

    def map(self) -> Assignment:
        """The most probable assignment of all states together; ties go to the first state.

        It is the maximum of the joint, not of each marginal: for a chain, Viterbi's path.
        Continuous latents are integrated, here too: a density's mode is that of its units.

        Raises:
            ProgramError: no latent has states.
        """
        if not self.sites:
            raise ProgramError(
                "every latent of this program is integrated, so that there are no states to "
                f"choose. posterior.moments('{self.integrated[0]}') has mean and covariance, and "
                "posterior.sample(n) draws."
            )
        inner = {s.site["name"]: s for s in self._states.values() if isinstance(s, InnerState)}
        graph = self._graph
        if inner:
            graph = graph.replaced({name: s.inside.log_max() for name, s in inner.items()})
        value, answers = self._solved(self._states, log_max, graph=graph)
        values = {name: s.best(answers[name]) for name, s in self._states.items()}
        return Assignment(values, value.sum() * self._graph.data_scale, value)

    def sample(self, num_samples: int = 1, *, seed: int | None = None) -> dict[str, Tensor]:
        """Exact joint draws of all latents given y, by site: (num_samples, *plates, *event).

        Args:
            num_samples: independent draws.
            seed: the same seed gives the same draws; the global generators are left alone.

        Raises:
            ProgramError: for a number of draws that is none; an integrated latent depends on
                another one.
        """
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
            raise ProgramError(
                f"num_samples must be a whole number of at least 1, not {num_samples!r}"
            )
        at_once = max(1, min(num_samples, _DRAW_ELEMENTS // max(self._elements, 1)))
        parts = []
        with seeded(seed), torch.no_grad():
            for start in range(0, num_samples, at_once):
                parts.append(self._drawn(min(at_once, num_samples - start)))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def plates(self, site: str) -> tuple[str, ...]:
        """Names of the plates around a latent, left to right."""
        latent = self._latents.get(site) or self._states[self._known(site)]
        return tuple(plate.name for plate in plates_of(latent.site))

    def inside(self, site: str) -> str | None:
        """The observed site whose distribution holds a latent, ``None`` for a latent site."""
        latent = self._latents.get(site) or self._states[self._known(site)]
        return latent.site["name"] if isinstance(latent, InnerState) else None

    def __repr__(self) -> str:
        states = [
            f"{name} {tuple(shape[:-1])} of {shape[-1]} states"
            for name, shape in ((name, self.marginals(name).shape) for name in self.sites)
        ]
        others = [f"{name} {self._shape(name)} integrated" for name in self.integrated]
        evidence = (
            f"{self.log_evidence._name} = {float(self.log_evidence):.6g} nats; "
            f"{self.log_evidence._data}"
        )
        return f"ExactPosterior({evidence}; {_listed([*states, *others])})"

    # ------------------------------------------------------------------------------------- details

    @property
    def _latents(self) -> dict[str, Latent]:
        return {**self._states, **self._integrated}

    def _solved(
        self,
        latents: Mapping[str, Latent],
        reduction: Reduction = log_sum_exp,
        *,
        graph: FactorGraph | None = None,
        num_draws: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The value of the contraction, and what it answers to each latent that asks."""
        asked = {name: latent.query(num_draws) for name, latent in latents.items()}
        queries = {name: query for name, query in asked.items() if query is not None}
        value, found = (graph or self._graph).solve([*queries.values()], reduction=reduction)
        answers = dict(zip(queries, found, strict=True))
        return value, {name: answers.get(name) for name in latents}

    def _drawn(self, count: int) -> dict[str, Tensor]:
        latents = self._latents
        _, answers = self._solved(latents, log_sum_exp_sampled, num_draws=count)
        drawn: dict[str, Tensor] = {}
        for name, latent in latents.items():
            if not isinstance(latent, Gaussian):
                drawn[name] = latent.drawn(answers[name], count)
            elif name not in drawn:
                drawn |= latent.drawn_together(answers[name], count)
        return drawn

    @property
    def _elements(self) -> int:
        """Of the tables that one draw needs."""
        enumerated = self._graph.enumerated
        factors = () if enumerated is None else enumerated.over_factors()
        inner = sum(state.elements for state in self._states.values())
        groups = sum(group.elements for group in self._graph.groups)
        return sum(factor.numel() for factor in factors) + inner + groups

    def _shape(self, name: str) -> tuple[int, ...]:
        site = self._integrated[name].site
        return (*(plate.size for plate in plates_of(site)), *site["fn"].event_shape)

    def _known(self, site: str) -> str:
        if site not in self.sites:
            known = sorted([*self.sites, *self.integrated])
            raise ProgramError(f"no latent {site!r} with states; there are {known}")
        return site


def _listed(items: Sequence[str], most: int = 5) -> str:
    """The first of some items, and how many there are."""
    shown = "; ".join(items[:most])
    return shown if len(items) <= most else f"{shown}; ... ({len(items)} sites)"


def _record(graph: FactorGraph, value: Tensor) -> LogEvidence:
    plates = tuple(plate.name for plate in graph.run.layout.data_plates)
    return LogEvidence(value, value.sum() * graph.data_scale, plates, graph.temperature)


def _positive(temperature: float) -> float:
    if not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
        raise ProgramError(
            f"temperature must be a number above 0, but is {temperature!r}; for the limit 0 use "
            "posterior(...).map()"
        )
    return float(temperature)
