"""The contract of an objective: a Pyro loss in nats, summed over data, minimised."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from pyro import poutine
from pyro.infer.elbo import ELBO as PyroLoss
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.layout import Layout, layout_of
from lvppl.objectives.schedules import Schedule
from lvppl.terms import Terms, trace_terms
from lvppl.tracing import trace_pair

__all__ = ["Objective", "Quantity", "Report", "expected", "leave_one_out_mean"]

Program = Callable[..., Any]


@dataclass(frozen=True)
class Quantity:
    """One number of a report, in nats unless the report says otherwise.

    Attributes:
        total: 0-dim tensor, summed over the whole data set (data-plate scale applied).
        per_datum: (data,), unscaled; the mean over particles.
    """

    total: Tensor
    per_datum: Tensor

    def __float__(self) -> float:
        return float(self.total)

    def __repr__(self) -> str:
        mean = float(self.per_datum.mean())
        return f"{float(self.total):,.4g} ({mean:,.4g} per datum, {len(self.per_datum)} data)"


@dataclass(frozen=True)
class Report:
    """What an objective measured, without gradients.

    ``elbo`` is always the unweighted ELBO, whatever the objective weighs;
    ``elbo = −(rate + distortion)``.

    Attributes:
        elbo: E_q [ln p(z, y) − ln q(z | y)].
        rate: KL(q(z | y), p(z)).
        distortion: −E_q ln p(y | z).
        entropy: H(q(z | y)).
        loss: the objective's loss.
        notes: what a reader of the numbers should know.
    """

    elbo: Quantity
    rate: Quantity
    distortion: Quantity
    entropy: Quantity
    loss: Quantity
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [(n, v) for n, v in vars(self).items() if isinstance(v, Quantity)]
        lines = [f"{name:<20} {value!r}" for name, value in rows]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


class Objective(PyroLoss):
    """Base of lvppl's losses. Each runs under ``pyro.infer.SVI(..., loss=objective)``.

    A subclass writes ``per_datum``, the loss of each datum as a formula over ``Terms``; it is not
    changed by being evaluated.

    Args:
        num_particles: draws from the guide for one evaluation. With draws that are not
            reparameterised at least two are made, for the baseline.
        data_plate: names of the plates that hold the data; default every plate common to all sites.
        strict: refuse sites that only one of model and guide has (see ``trace_terms``).

    Raises:
        ProgramError: ``num_particles`` is not a positive integer.
    """

    cut = False
    """Whether the guide's draws are held as leaves (gradients through the draws alone)."""

    score_function = True
    """Whether draws that are not reparameterised get a score function. Its baseline needs two."""

    def __init__(
        self,
        *,
        num_particles: int = 1,
        data_plate: str | Sequence[str] | None = None,
        strict: bool = True,
    ) -> None:
        if isinstance(num_particles, bool) or not isinstance(num_particles, int):
            raise ProgramError(
                f"num_particles must be a positive integer, got {num_particles!r}. It counts the "
                "draws from the guide."
            )
        if num_particles < 1:
            raise ProgramError(f"num_particles must be at least 1, got {num_particles}.")
        super().__init__(num_particles=num_particles)
        self.data_plate = data_plate
        self.strict = strict

    def __repr__(self) -> str:
        options = list(signature(type(self).__init__).parameters)[1:]
        shown = [
            f"{name}={value!r}" for name in options if (value := getattr(self, name)) is not None
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    # ---------------------------------------------------------------------------- to be written

    @abstractmethod
    def per_datum(self, terms: Terms) -> Tensor:
        """The loss of each datum, (data,), in nats, with its gradients."""

    def surrogate(self, terms: Terms) -> Tensor | None:
        """A 0-dim tensor with the gradients of the loss, where they are not those of its value."""
        return None

    def outcome(self, terms: Terms, prob: Tensor) -> Tensor:
        """What particles that come up with probability ``prob`` add to the expected loss, (data,).

        Summed over all that can be drawn it has the gradient that the loss's own is an unbiased
        estimate of: ``prob``, (data,), moves with the guide, and the draws do not.
        """
        return prob * self.per_datum(terms)

    @property
    def outcome_particles(self) -> int | None:
        """Particles of one outcome: 1 is enough where the loss is a mean over them.

        Their order does not count. ``None`` where outcomes do not sum to the expected loss, as when
        data are mixed in it.
        """
        return self.num_particles

    def describe(self, terms: Terms) -> Report:
        """The report of these terms."""
        return self.standard_report(terms, form="kl")

    def schedules(self) -> tuple[Schedule, ...]:
        """The schedules that a fit advances before each step."""
        return tuple(value for value in vars(self).values() if isinstance(value, Schedule))

    # --------------------------------------------------------------------------- the Pyro contract

    def terms(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Terms:
        """The log-terms that this objective needs."""
        particles = self.num_particles
        layout = layout_of(
            model, guide, args, kwargs, data_plate=self.data_plate, strict=self.strict
        )
        alone = particles == 1 and self.score_function
        if alone and needs_baseline(layout):
            particles, alone = 2, False
        options: Any = {
            "data_plate": self.data_plate,
            "strict": self.strict,
            "cut": self.cut and torch.is_grad_enabled(),
        }
        terms = trace_terms(model, guide, args, kwargs, num_particles=particles, **options)
        if alone and needs_baseline(terms.layout):  # the structure changed in this run
            terms = trace_terms(model, guide, args, kwargs, num_particles=2, **options)
        return terms

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss, a 0-dim tensor in nats, summed over data; its gradients are unbiased.

        Raises:
            ProgramError: model and guide do not fit each other or this objective.
        """
        terms = self.terms(model, guide, args, kwargs)
        terms.require_densities()
        loss = terms.total(self.per_datum(terms))
        surrogate = self.surrogate(terms) if torch.is_grad_enabled() else None
        return loss if surrogate is None else surrogate + (loss - surrogate).detach()

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss as a float, without gradients."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss as a float; its gradients are added to the parameters' ``grad``."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return float(loss.detach())

    def _get_trace(
        self, model: Program, guide: Program, args: Any, kwargs: Any
    ) -> tuple[poutine.Trace, poutine.Trace]:
        return trace_pair(model, guide, args, kwargs)

    # -------------------------------------------------------------------------------------- report

    def report(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Report:
        """The unweighted ELBO, rate, distortion, entropy and the loss, without gradients."""
        with torch.no_grad():
            return self.describe(self.terms(model, guide, args, kwargs))

    def standard_report(self, terms: Terms, *, form: str) -> Report:
        elbo = terms.elbo(form).mean(0)
        distortion = -terms.log_likelihood.mean(0)
        return Report(
            elbo=quantity(terms, elbo),
            rate=quantity(terms, -elbo - distortion),
            distortion=quantity(terms, distortion),
            entropy=quantity(terms, terms.entropy.mean(0)),
            loss=quantity(terms, self.per_datum(terms)),
            notes=terms.notes,
        )


def needs_baseline(layout: Layout) -> bool:
    """Whether gradients need a second particle, for the baseline of a score function."""
    return bool(layout.score_sites) and torch.is_grad_enabled()


def quantity(terms: Terms, per_datum: Tensor) -> Quantity:
    per_datum = per_datum.detach()
    return Quantity(total=terms.total(per_datum), per_datum=per_datum)


def leave_one_out_mean(values: Tensor) -> Tensor:
    """For each particle the mean of the others, (particles, data); needs two particles.

    Minus infinity where one of the others is.
    """
    impossible = values == -math.inf
    finite = values.masked_fill(impossible, 0.0)
    mean = (finite.sum(0) - finite) / (values.shape[0] - 1)
    others = impossible.sum(0) - impossible.long()
    return mean.masked_fill(others > 0, -math.inf)


def expected(terms: Terms, values: Tensor) -> Tensor:
    r"""The mean over particles, (data,), whose gradient is that of E_q[values].

    Reparameterised draws carry their derivative in ``values``. For the others,

    .. math:: \nabla E_q[f] = E_q[\nabla f + (f - b)\, \nabla \ln q],

    with b the mean of f over the other particles, independent of this one (Mnih and Rezende 2016,
    section 2.4; Kool et al. 2019). f is the datum's own cost: the plate scale comes later.
    """
    log_score = terms.log_score if torch.is_grad_enabled() else None
    if log_score is None:
        return values.mean(0)
    signal = (values - leave_one_out_mean(values)).detach()
    score = log_score * signal
    return (values + score - score.detach()).mean(0)


def log_mean_exp(log_weight: Tensor) -> Tensor:
    """ln of the mean weight; −∞, with gradient 0, where all weights are zero."""
    impossible = (log_weight == -math.inf).all(0)
    total = torch.logsumexp(log_weight.masked_fill(impossible, 0.0), 0)
    return (total - math.log(log_weight.shape[0])).masked_fill(impossible, -math.inf)


def require_plain_weights(terms: Terms, name: str, remedy: str) -> None:
    """Refuse a power or a mask of q, which leave the weights no ratio of densities.

    Raises:
        ProgramError: a draw of the guide has a scale or a mask of its own.
    """
    sites = terms.reweighted_draws
    if sites:
        raise ProgramError(
            f"{name} needs ln q of every draw in the weight as it is, but '{sites[0]}' "
            f"has a poutine.scale or a mask of its own. {remedy}"
        )


def require_reparameterised(terms: Terms, name: str) -> None:
    """Refuse estimators that need a derivative through every draw.

    Raises:
        ProgramError: a guide site is not reparameterised, or is enumerated.
    """
    if terms.adopted:
        raise ProgramError(
            f"gradient='{name}' needs every latent to be drawn by the guide; '{terms.adopted[0]}' "
            "is drawn from its prior. Add it to the guide, or use gradient='standard'."
        )
    sites = [*terms.layout.score_sites]
    sites += [n for n in terms.layout.enumerated if n in terms.guide_site_names]
    if sites:
        raise ProgramError(
            f"gradient='{name}' needs every guide site to be a reparameterised draw; "
            f"'{sites[0]}' is not. Use gradient='standard'."
        )
