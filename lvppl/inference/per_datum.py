"""The best member of a guide's family for each datum, found by search."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import transform_to

from lvppl.errors import ProgramError
from lvppl.factor_graph import enumerating
from lvppl.layout import layout_of
from lvppl.objectives.elbo import ELBO
from lvppl.seeding import derived_seed, seeded
from lvppl.simulation import HeldValues
from lvppl.sweep.joint import states_of
from lvppl.terms import trace_terms

__all__ = ["PerDatumSearch"]

Program = Callable[..., Any]

_FEW_STATES = 2**12
"""Joint states of a datum that a discrete guide's ELBO is summed over."""


class PerDatumSearch:
    """Free parameters for each datum in place of an encoder's, moved up the ELBO.

    Every latent keeps its family and starts where the guide has it. Discrete latents of few joint
    states are summed over, in the guide and in the search; the others get a score function.

    Args:
        name: of the function that searches, for messages.
        model, guide, data, kwargs: the pair and its arguments, one batch.
        num_particles: draws of one step.
        data_plate: names of the plates that hold the data.

    Attributes:
        guide: the guide, its discrete sites marked where they are summed over.
        objective: the ELBO that is climbed.
        history: mean ELBO of a datum in each step so far.

    Raises:
        ProgramError: no guide, no data plate; a latent of another family than Normal,
            MultivariateNormal, Bernoulli and Categorical, or whose parameters are random.
    """

    def __init__(
        self,
        name: str,
        model: Program,
        guide: Program | None,
        data: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        *,
        num_particles: int,
        data_plate: Any = None,
    ) -> None:
        if guide is None:
            raise ProgramError(
                f"{name} compares a guide with the best one of its family for each datum, but "
                "guide is None. Give a guide; where the posterior is exact (lvppl.posterior), "
                "there is no gap."
            )
        self.model, self.data, self.kwargs = model, data, dict(kwargs or {})
        options: dict[str, Any] = {"data_plate": data_plate}
        terms = trace_terms(model, guide, data, self.kwargs, **options)
        terms.require_per_datum(name)
        self.num_data = terms.num_data
        names = [
            n for n in terms.guide_site_names if n in {*terms.latents, *terms.layout.enumerated}
        ]
        sites = _searchable(name, guide, data, self.kwargs, names)
        self.guide = self._summed(guide, data_plate) or guide
        layout = layout_of(model, self.guide, data, self.kwargs, **options)
        # without noise at the optimum, where every draw has a derivative
        in_guide = any(site in terms.guide_site_names for site in layout.enumerated)
        gradient = "standard" if in_guide or layout.score_sites else "stl"
        self.objective = ELBO(num_particles=num_particles, gradient=gradient, **options)
        self.is_exact = not layout.score_sites and all(n in layout.enumerated for n in sites)
        self._free = _InPlace(sites)
        self.history = torch.empty(0)

    @property
    def found(self) -> Program:
        """The guide with the parameters that were found for each datum."""
        return self._free.around(self.guide)

    def climb(self, num_steps: int, learning_rate: float) -> None:
        """Ascend the ELBO in the free parameters alone, at a rate that falls along a cosine."""
        adam = torch.optim.Adam(self._free.parameters, lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, num_steps)
        found, losses = self.found, []
        for _ in range(num_steps):
            loss = self.objective.differentiable_loss(self.model, found, *self.data, **self.kwargs)
            # gradients of these parameters only: the programs' own are not touched
            gradients = torch.autograd.grad(loss, self._free.parameters)
            for parameter, gradient in zip(self._free.parameters, gradients, strict=True):
                parameter.grad = gradient
            adam.step()
            schedule.step()
            losses.append(loss.detach())
        history = -torch.stack(losses) / self.num_data
        self.history = torch.cat([self.history.to(history), history])

    def elbos(
        self, programs: Iterable[Program], num_repetitions: int, seed: int
    ) -> tuple[Tensor, ...]:
        """The ELBO of each datum under each program, (repetitions, data), draws in common."""
        columns = []
        for program in programs:
            rows = []
            for repetition in range(num_repetitions):
                with seeded(derived_seed(seed, f"evaluation {repetition}")):
                    report = self.objective.report(self.model, program, *self.data, **self.kwargs)
                rows.append(report.elbo.per_datum)
            columns.append(torch.stack(rows))
        return tuple(columns)

    def frozen(self) -> Program:
        """As ``found``, with the present parameters for good."""
        return self._free.frozen().around(self.guide)

    def _summed(self, guide: Program, data_plate: Any) -> Program | None:
        """The guide with its sites marked for enumeration, where that makes a small sum."""
        layout = layout_of(self.model, guide, self.data, self.kwargs, data_plate=data_plate)
        if not layout.score_sites:
            return None
        marked = enumerating(guide)
        try:
            space = states_of(guide, self.data, self.kwargs, layout)
            if space.size > _FEW_STATES:
                return None
            with torch.no_grad():
                objective = ELBO(data_plate=data_plate)
                objective.loss(self.model, marked, *self.data, **self.kwargs)
        except (ProgramError, NotImplementedError):  # continuous, or bits that .to_event took
            return None
        return marked


# ---------------------------------------------------------------------------------- free parameters


class _Free(Protocol):
    parameters: list[Tensor]

    def distribution(self) -> Any: ...


class _FreeNormal:
    """A Normal of the same shape with free parameters, in units of the one it starts from.

    z = loc + L (offset + S ε), L the scale it starts from: a step then means the same for a latent
    that the data determine sharply and for one that they leave open.
    """

    def __init__(self, start: Any) -> None:
        normal = _without_independent(start)
        self.is_full = isinstance(normal, torch.distributions.MultivariateNormal)
        self.loc = normal.mean.detach().clone()
        self.scale = (normal.scale_tril if self.is_full else normal.scale).detach().clone()
        self.event_dim = start.event_dim
        offset = torch.zeros_like(self.loc).requires_grad_()
        free_scale = torch.zeros_like(self.scale).requires_grad_()
        self.parameters = [offset, free_scale]

    def distribution(self) -> Any:
        offset, free_scale = self.parameters
        if self.is_full:
            factor = transform_to(constraints.lower_cholesky)(free_scale)
            loc = self.loc + (self.scale @ offset.unsqueeze(-1)).squeeze(-1)
            law = dist.MultivariateNormal(loc, scale_tril=self.scale @ factor)
            return law.to_event(self.event_dim - 1)
        scale = self.scale * free_scale.exp()
        return dist.Normal(self.loc + self.scale * offset, scale).to_event(self.event_dim)


class _FreeLogits:
    """A Bernoulli or Categorical of the same shape with free logits.

    In steps of several nats: what the data decide lies ten and more away.
    """

    unit = 4.0

    def __init__(self, start: Any) -> None:
        base = _without_independent(start)
        self.family = _DISCRETE[type(base).__name__]
        self.to_event = start.event_dim - base.event_dim
        furthest = 0.5 * torch.finfo(base.logits.dtype).eps  # what probability zero starts from
        bound = -float(torch.tensor(furthest).log())
        self.logits = base.logits.detach().clamp(-bound, bound).clone()
        self.parameters = [torch.zeros_like(self.logits).requires_grad_()]

    def distribution(self) -> Any:
        logits = self.logits + self.unit * self.parameters[0]
        return self.family(logits=logits).to_event(self.to_event)


_DISCRETE = {
    "Bernoulli": dist.Bernoulli,
    "Categorical": dist.Categorical,
    "OneHotCategorical": dist.OneHotCategorical,
}
_NORMALS = (torch.distributions.Normal, torch.distributions.MultivariateNormal)


class _InPlace(Messenger):
    """Replaces the guide's distributions by ones with free parameters for each datum."""

    def __init__(self, sites: Mapping[str, Any]) -> None:
        super().__init__()
        self.free: dict[str, _Free] = {
            name: _FreeNormal(fn)
            if isinstance(_without_independent(fn), _NORMALS)
            else _FreeLogits(fn)
            for name, fn in sites.items()
        }

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for free in self.free.values() for parameter in free.parameters]

    def frozen(self) -> _InPlace:
        with torch.no_grad():
            return _InPlace({name: free.distribution() for name, free in self.free.items()})

    def around(self, guide: Program) -> Program:
        def searched(*args: Any, **kwargs: Any) -> Any:
            with self:
                return guide(*args, **kwargs)

        return searched

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.free:
            msg["fn"] = self.free[msg["name"]].distribution()


# --------------------------------------------------------------------------- what can be searched


def _searchable(
    caller: str,
    guide: Program,
    data: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    names: Iterable[str],
) -> dict[str, Any]:
    """The guide's distributions, each a function of the data; refuses all others by name."""
    with torch.no_grad():
        first, second = _two_runs(guide, data, kwargs)
    sites = {}
    for name in names:
        found, again = (_without_independent(t.nodes[name]["fn"]) for t in (first, second))
        kind = type(found).__name__
        if not isinstance(found, _NORMALS) and kind not in _DISCRETE:
            raise ProgramError(
                f"{caller} searches the parameters of Normals, Bernoullis and Categoricals, but "
                f"latent '{name}' is {kind} in the guide. Fit a per-datum guide of that family by "
                "SVI, and compare the two ELBOs."
            )
        pairs = zip(_parameters_of(found), _parameters_of(again), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            raise ProgramError(
                f"The parameters of latent '{name}' differ between two runs of the guide on the "
                "same data: they depend on another latent, or the encoder is in training mode "
                "(call .eval()). The search needs parameters that are functions of the data alone."
            )
        sites[name] = first.nodes[name]["fn"]
    return sites


def _two_runs(guide: Program, data: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Traces with other draws: of a discrete latent the first and the last of its values."""
    trace = poutine.trace(guide).get_trace(*data, **kwargs)
    supports: dict[str, tuple[Tensor, Tensor]] = {}
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site["is_observed"]:
            base: Any = _without_independent(site["fn"])
            if type(base).__name__ in _DISCRETE:
                value: Any = site["value"]
                supports[name] = base.enumerate_support(expand=False), value
    ends = []
    for end in (0, -1):
        values = {name: all_[end].expand_as(like) for name, (all_, like) in supports.items()}
        ends.append(poutine.trace(HeldValues(values)(guide)).get_trace(*data, **kwargs))
    return ends[0], ends[1]


def _parameters_of(fn: Any) -> tuple[Tensor, ...]:
    return (fn.mean, fn.stddev) if isinstance(fn, _NORMALS) else (fn.logits,)


def _without_independent(fn: Any) -> Any:
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn
