"""Rate and distortion with a weight between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.objectives.base import Objective, Quantity, Report, expected, quantity
from lvppl.objectives.distortions import DISTORTIONS
from lvppl.objectives.schedules import Schedule
from lvppl.terms import Terms

__all__ = ["RateDistortion", "RateDistortionReport"]

LOG_WEIGHT = "rate_distortion.log_weight"
"""Name of the parameter that holds ln λ while λ is driven to a target."""


@dataclass(frozen=True)
class RateDistortionReport(Report):
    """A report with the distortion that was weighed.

    Attributes:
        measured_distortion: E_q D(y, ŷ(z)), in the distortion's own unit, summed over the datum's
            dimensions.
        rate_in_unit: the rate in ``unit``.
        unit: "nats" or "bits": the unit of ``rate_in_unit`` and of a target rate.
        weight: λ.
    """

    measured_distortion: Quantity = None  # type: ignore[assignment]
    rate_in_unit: Quantity = None  # type: ignore[assignment]
    unit: str = "nats"
    weight: float = 1.0


class RateDistortion(Objective):
    r"""rate + λ · distortion, in nats.

    .. math:: \beta\, KL(q(z \mid y), p(z)) + \lambda\, E_q D(y, \hat y(z))

    The rate, averaged over y, is at least the mutual information I(y, z) of the channel q(z | y).
    With D = −ln p(y | z) and λ = 1 it is the negative ELBO; "rate–distortion is to the VAE as hard
    EM is to EM": for a point guide over discrete or quantised z the rate is the code length
    −ln p(z). A density at a point is no code length, so a point guide over continuous z is refused;
    quantise it (``lvppl.distributions.Quantized`` with straight-through rounding, or ``Dithered``
    with uniform noise).

    Args:
        weight: λ ≥ 0, in nats per unit of distortion: a number, a :class:`Schedule`, or the start
            value when a target drives it.
        distortion: ``None`` for −ln p(y | z) in nats; ``"bits"`` for −log2 p(y | z), beside the
            rate in bits; ``"squared"``, ``"absolute"``, ``"hamming"``; or a callable
            D(y, reconstruction) → distortion by element, summed over the datum. The reconstruction
            is the mean of p(y | z).
        target: ``{"rate": r}`` or ``{"distortion": d}``, means per datum. λ then is a parameter,
            ln λ, which the optimiser moves against the constraint's gap (Platt and Barr 1988):
            up while the distortion is above its target or the rate below its own.
        rate_weight: β ≥ 0, a number or a schedule (warm-up from 0, cyclic annealing).
        free_nats: each latent site's rate counts at least this much, averaged over the batch (free
            bits, Kingma et al. 2016, appendix C.8).
        unit: unit of the reported rate and of a target rate; ``"bits"`` divides by ln 2. The loss
            itself is in nats, and nats are never added to bits.
        num_particles, data_plate, strict: see :class:`Objective`.

    Raises:
        ProgramError: a negative weight, an unknown distortion or unit, a target that is not exactly
            one positive number, a point guide over continuous z.

    References:
        Alemi et al. 2018, "Fixing a broken ELBO"; Higgins et al. 2017; Ballé et al. 2017.
    """

    def __init__(
        self,
        *,
        weight: float | Schedule = 1.0,
        distortion: str | Callable[[Tensor, Tensor], Tensor] | None = None,
        target: Mapping[str, float] | None = None,
        rate_weight: float | Schedule = 1.0,
        free_nats: float = 0.0,
        unit: str | None = None,
        num_particles: int = 1,
        data_plate: str | Sequence[str] | None = None,
        strict: bool = True,
    ) -> None:
        super().__init__(num_particles=num_particles, data_plate=data_plate, strict=strict)
        self.weight = _checked_weight("weight", weight)
        self.rate_weight = _checked_weight("rate_weight", rate_weight)
        self.distortion = distortion
        self.unit = unit or ("bits" if distortion == "bits" else "nats")
        self.free_nats = float(free_nats)
        self.target = _checked_target(target, weight)
        _check_options(distortion, self.unit, self.free_nats)

    # ---------------------------------------------------------------------------------- formula

    def per_datum(self, terms: Terms) -> Tensor:
        _refuse_points(terms)
        distortion = self._distortion(terms)
        weight, rate_weight = self._current_weight(distortion), _number(self.rate_weight)
        if not self.free_nats:
            loss = expected(terms, rate_weight * terms.kl + weight * distortion)
        else:
            loss = rate_weight * self._free_rate(terms) + weight * expected(terms, distortion)
        return loss if self.target is None else loss + self._multiplier_step(terms, distortion)

    def _distortion(self, terms: Terms) -> Tensor:
        """E D(y, ŷ), (particles, data); the log-loss stays in nats."""
        if self.distortion is None or self.distortion == "bits":
            return -terms.log_likelihood
        function = self.distortion
        if isinstance(function, str):
            function = DISTORTIONS[function]
        return terms.distortion(function)

    def _free_rate(self, terms: Terms) -> Tensor:
        by_latent = list(terms.kl_by_latent().values())
        means = torch.stack([expected(terms, kl).mean() for kl in by_latent])
        rest = expected(terms, terms.kl - torch.stack(by_latent).sum(0))
        free = means.clamp(min=self.free_nats).sum()
        return rest + free.expand(terms.num_data)

    @property
    def outcome_particles(self) -> int | None:
        return None if self.free_nats else 1  # which are free on average over the batch

    # ----------------------------------------------------------------------- λ driven to a target

    def _current_weight(self, like: Tensor) -> Tensor | float:
        if self.target is None:
            return _number(self.weight)
        return _log_weight(like, float(self.weight)).detach().exp()  # type: ignore[arg-type]

    def _multiplier_step(self, terms: Terms, distortion: Tensor) -> Tensor:
        """A zero whose gradient in ln λ is the constraint's relative gap, to be descended."""
        assert self.target is not None
        ((name, goal),) = self.target.items()
        measured = terms.kl if name == "rate" else distortion
        unit = math.log(2.0) if self._counts_in_bits(name) else 1.0
        gap = measured.detach().mean() / (goal * unit) - 1.0
        sign = 1.0 if name == "rate" else -1.0
        log_weight = _log_weight(distortion, float(self.weight))  # type: ignore[arg-type]
        step = sign * gap * (log_weight - log_weight.detach())
        return step.expand(terms.num_data) / (terms.num_data * terms.scale)  # counted once

    def _counts_in_bits(self, name: str) -> bool:
        return self.distortion == "bits" or (self.unit == "bits" and name == "rate")

    # --------------------------------------------------------------------------------------- report

    def describe(self, terms: Terms) -> RateDistortionReport:
        report = self.standard_report(terms, form="kl")
        distortion = self._distortion(terms)
        in_bits = math.log(2.0)
        measured = distortion.mean(0) / (in_bits if self.distortion == "bits" else 1.0)
        rate = report.rate.per_datum / (in_bits if self.unit == "bits" else 1.0)
        return RateDistortionReport(
            **vars(report),
            measured_distortion=quantity(terms, measured),
            rate_in_unit=quantity(terms, rate),
            unit=self.unit,
            weight=float(self._current_weight(distortion)),
        )


def _log_weight(like: Tensor, start: float) -> Tensor:
    """The parameter ln λ; read, and created only where gradients are wanted."""
    initial = like.new_tensor(math.log(start))
    if not torch.is_grad_enabled() and LOG_WEIGHT not in pyro.get_param_store():
        return initial
    value: Tensor = pyro.param(LOG_WEIGHT, initial)
    return value


def _number(weight: float | Schedule) -> Tensor | float:
    return weight.value if isinstance(weight, Schedule) else weight


def _refuse_points(terms: Terms) -> None:
    points = terms.has_point()
    if points:
        raise ProgramError(
            f"Guide site '{points[0]}' is a point on a continuous space: the density there is no "
            "code length, and rescaling z would change it at will. Quantise the latent: "
            "lvppl.distributions.Quantized as its prior with straight_through_round in the guide, "
            "or Dithered with a uniform guide."
        )


def _checked_weight(name: str, weight: float | Schedule) -> float | Schedule:
    if isinstance(weight, Schedule):
        return weight
    if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise ProgramError(
            f"{name} must be a finite number ≥ 0 or a Schedule, got {weight!r}. It weighs the "
            f"{'rate' if name == 'rate_weight' else 'distortion'}."
        )
    return float(weight)


def _checked_target(
    target: Mapping[str, float] | None, weight: float | Schedule
) -> dict[str, float] | None:
    if target is None:
        return None
    if (
        not isinstance(target, Mapping)
        or len(target) != 1
        or next(iter(target)) not in ("rate", "distortion")
    ):
        raise ProgramError(f"target must be {{'rate': r}} or {{'distortion': d}}, got {target!r}.")
    ((name, goal),) = target.items()
    if not 0 < goal < math.inf:
        raise ProgramError(f"The target {name} must be a positive number, got {goal!r}.")
    if isinstance(weight, Schedule) or weight <= 0:
        raise ProgramError(
            "A target drives the weight from its start value: give weight as a positive number, "
            f"not {weight!r}."
        )
    return {name: float(goal)}


def _check_options(distortion: object, unit: str, free_nats: float) -> None:
    known = [*DISTORTIONS, "bits"]
    if isinstance(distortion, str) and distortion not in known:
        raise ProgramError(f"distortion must be one of {known} or a callable, got {distortion!r}.")
    if distortion is not None and not isinstance(distortion, str) and not callable(distortion):
        raise ProgramError(f"distortion must be one of {known} or a callable, got {distortion!r}.")
    if unit not in ("nats", "bits"):
        raise ProgramError(f"unit must be 'nats' or 'bits', got {unit!r}.")
    if distortion == "bits" and unit == "nats":
        raise ProgramError(
            "distortion='bits' is weighed beside a rate in bits, but unit='nats' was asked for. "
            "Leave unit out, or use distortion=None for both in nats."
        )
    if not 0 <= free_nats < math.inf:
        raise ProgramError(f"free_nats must be a finite number ≥ 0, got {free_nats!r}.")
