r"""The amortization gap: what an encoder loses to a search for each datum's own parameters.

.. math:: gap(y) = \max_{λ} ELBO(y; q_λ) - ELBO(y; q_{φ(y)})

with q the guide's own Normal family, φ the encoder and λ free parameters. "Generation replaces
search": the encoder answers in one pass what a search would find, and the gap is its price.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import transform_to

from lvppl.errors import ProgramError
from lvppl.objectives.elbo import ELBO
from lvppl.seeding import derived_seed, seeded
from lvppl.terms import trace_terms

__all__ = ["AmortizationGap", "amortization_gap"]

Program = Callable[..., Any]


@dataclass(frozen=True)
class AmortizationGap:
    """ELBOs of the encoder and of the search, per datum, in nats; every field has shape (data,).

    Attributes:
        elbo_encoder: the ELBO under the guide as it is.
        elbo_search: the ELBO under the Normal found for each datum.
        gap: their difference. It can come out slightly negative, where the search has not ended or
            within the error.
        std_error: standard error of ``gap`` over repeated draws; NaN with one repetition.
        history: (num_steps,) mean ELBO of a datum during the search: it should have flattened.
    """

    elbo_encoder: Tensor
    elbo_search: Tensor
    gap: Tensor
    std_error: Tensor
    history: Tensor

    def __str__(self) -> str:
        rows = ("elbo_encoder", "elbo_search", "gap")
        return "\n".join(f"{row:<14}{getattr(self, row).mean():10.4f} nats a datum" for row in rows)


def amortization_gap(
    model: Program,
    guide: Program,
    *data: Any,
    num_steps: int = 500,
    learning_rate: float = 0.05,
    num_particles: int = 8,
    num_repetitions: int = 10,
    seed: int | None = 0,
) -> AmortizationGap:
    """Search the best Normal for each datum, from the guide's own, and report what it gains.

    Every latent keeps its family (diagonal Normal or MultivariateNormal) and gets free parameters
    for each datum, started where the guide is and moved by Adam, its rate falling to zero along a
    cosine. Model and guide are left as they are; put them into evaluation mode first. Both ELBOs
    use the same random numbers.

    Args:
        model, guide: any Pyro programs with a data plate around every site.
        data: their arguments: one batch.
        num_steps: steps of the search.
        learning_rate: initial rate, in standard deviations of the guide.
        num_particles: draws for one step, and for one repetition of the evaluation.
        num_repetitions: repetitions of the evaluation, for the estimate and its standard error.
        seed: of all draws; the global generators are restored.

    Raises:
        ProgramError: no data plate; a latent that is not Normal in the guide, or whose parameters
            are random (they depend on another latent, or the network is in training mode).

    References:
        Cremer, Li and Duvenaud 2018, "Inference suboptimality in variational autoencoders".
    """
    if guide is None:
        raise ProgramError(
            "amortization_gap compares a guide with the best one of its family for each datum, but "
            "guide is None. Give a guide; where the posterior is exact (lvppl.posterior), there is "
            "no gap."
        )
    if num_steps < 1 or num_repetitions < 1:
        raise ProgramError(
            "amortization_gap needs at least one step and one repetition, but got "
            f"num_steps={num_steps!r}, num_repetitions={num_repetitions!r}."
        )
    with seeded(seed) as seed:
        terms = trace_terms(model, guide, data)
        terms.require_per_datum("amortization_gap")
        # without noise at the optimum, unless the guide sums over a discrete site of its own
        sums = any(name in terms.guide_site_names for name in terms.layout.enumerated)
        gradient = "standard" if sums else "stl"
        objective = ELBO(num_particles=num_particles, gradient=gradient)
        search = _PerDatumNormals(_normal_sites(guide, data, terms.latents), terms.num_data)
        history = _maximise(
            objective, model, search.around(guide), data, search, num_steps, learning_rate
        )
        elbos = []
        for repetition in range(num_repetitions):
            common = derived_seed(seed, f"evaluation {repetition}")
            for program in (guide, search.around(guide)):
                with seeded(common):
                    elbos.append(objective.report(model, program, *data).elbo.per_datum)
    encoder, searched = torch.stack(elbos).unflatten(0, (num_repetitions, 2)).unbind(1)
    gaps = searched - encoder
    return AmortizationGap(
        elbo_encoder=encoder.mean(0),
        elbo_search=searched.mean(0),
        gap=gaps.mean(0),
        std_error=gaps.std(0) / num_repetitions**0.5,
        history=history,
    )


def _maximise(
    objective: ELBO,
    model: Program,
    guide: Program,
    data: tuple[Any, ...],
    search: _PerDatumNormals,
    num_steps: int,
    learning_rate: float,
) -> Tensor:
    """Ascend the ELBO in the free parameters alone; returns its history per datum."""
    adam = torch.optim.Adam(search.parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, num_steps)
    losses = []
    for _ in range(num_steps):
        loss = objective.differentiable_loss(model, guide, *data)
        # gradients of these parameters only: the programs' own are not touched
        gradients = torch.autograd.grad(loss, search.parameters)
        for parameter, gradient in zip(search.parameters, gradients, strict=True):
            parameter.grad = gradient
        adam.step()
        schedule.step()
        losses.append(loss.detach())
    return -torch.stack(losses) / search.num_data


def _normal_sites(guide: Program, data: tuple[Any, ...], names: Iterable[str]) -> dict[str, Any]:
    """The guide's latent distributions, each a fixed Normal; refuses all others by name."""
    with torch.no_grad():
        first, second = (poutine.trace(guide).get_trace(*data) for _ in range(2))
    sites = {}
    for name in names:
        normal, again = (_without_independent(t.nodes[name]["fn"]) for t in (first, second))
        if not isinstance(
            normal, (torch.distributions.Normal, torch.distributions.MultivariateNormal)
        ):
            raise ProgramError(
                f"amortization_gap searches Normal parameters, but latent '{name}' is "
                f"{type(normal).__name__} in the guide. Fit a per-datum guide of that family by "
                "SVI, and compare the two ELBOs."
            )
        if not (torch.equal(normal.mean, again.mean) and torch.equal(normal.stddev, again.stddev)):
            raise ProgramError(
                f"The parameters of latent '{name}' differ between two runs of the guide on the "
                "same data: they depend on another latent, or the encoder is in training mode "
                "(call .eval()). The search needs parameters that are functions of the data alone."
            )
        sites[name] = first.nodes[name]["fn"]
    return sites


def _without_independent(fn: Any) -> Any:
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn


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
        self.offset = torch.zeros_like(self.loc).requires_grad_()
        self.free_scale = torch.zeros_like(self.scale).requires_grad_()

    def distribution(self) -> Any:
        if self.is_full:
            factor = transform_to(constraints.lower_cholesky)(self.free_scale)
            loc = self.loc + (self.scale @ self.offset.unsqueeze(-1)).squeeze(-1)
            return dist.MultivariateNormal(loc, scale_tril=self.scale @ factor)
        scale = self.scale * self.free_scale.exp()
        return dist.Normal(self.loc + self.scale * self.offset, scale).to_event(self.event_dim)


class _PerDatumNormals(Messenger):
    """Replaces the guide's distributions by Normals with free parameters for each datum."""

    def __init__(self, sites: Mapping[str, Any], num_data: int) -> None:
        super().__init__()
        self.normals = {name: _FreeNormal(fn) for name, fn in sites.items()}
        self.parameters = [p for n in self.normals.values() for p in (n.offset, n.free_scale)]
        self.num_data = num_data

    def around(self, guide: Program) -> Program:
        def searched(*args: Any, **kwargs: Any) -> Any:
            with self:
                return guide(*args, **kwargs)

        return searched

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.normals:
            msg["fn"] = self.normals[msg["name"]].distribution()
