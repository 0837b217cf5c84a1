r"""ln p(y) of simulated data between two bounds: bidirectional Monte Carlo.

The z that a model drew with y is an exact draw from p(z | y). Annealed from the start to the
posterior, and from that draw back to the start, weights give

.. math:: E \ln \frac1S \sum_s w_s \le \ln p(y) \le E\Big[-\ln \frac1S \sum_s \frac1{w_s}\Big]

(Grosse, Ghahramani & Adams 2015, arXiv:1511.02543, section 4). Their gap bounds the error of
either, and so of annealing with these settings on real data like the simulated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.inference.likelihood.annealed.estimate import Ladder, notes_of, unmarked
from lvppl.inference.likelihood.annealed.options import Annealing
from lvppl.inference.likelihood.checks import check_data, check_weights
from lvppl.inference.likelihood.job import Job, plan_of
from lvppl.inference.likelihood.proposals import importance, prior
from lvppl.inference.likelihood.weights import WeightSums
from lvppl.seeding import checked_seed, derived_seed, seeded
from lvppl.simulation import simulated

__all__ = ["Bidirectional", "bidirectional"]

Program = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Bidirectional:
    """Bounds on ln p(y), nats. Tensors are float64, (data,), in the order of the data."""

    lower: Tensor
    """ln of the mean weight of forward chains: below ln p(y) in expectation."""
    upper: Tensor
    """-ln of the mean of 1 / weight of backward chains: above ln p(y) in expectation."""
    lower_std_error: Tensor
    """Delta-method standard error over chains."""
    upper_std_error: Tensor
    """The same, given the posterior draw: chains that share one share its luck. ``mean_upper``
    has an error that counts it."""
    num_chains: int
    """Chains for each datum, each way."""
    seed: int
    """Gives the same numbers again."""
    observed: dict[str, Tensor] = field(default_factory=dict)
    """Simulated values by observed site, (*plates, *event); empty where data were given."""
    draws: dict[str, Tensor] = field(default_factory=dict)
    """The exact draws from the posterior by latent, as the backward chains started."""
    notes: tuple[str, ...] = ()
    """What a reader of the numbers should know."""

    @property
    def num_data(self) -> int:
        return self.lower.numel()

    @property
    def gap(self) -> Tensor:
        """upper - lower, (data,), nats: positive but for noise."""
        return self.upper - self.lower

    @property
    def mean_lower(self) -> tuple[float, float]:
        """Mean over data, nats per datum, and its standard error."""
        return _mean(self.lower, self.lower_std_error)

    @property
    def mean_upper(self) -> tuple[float, float]:
        """Mean over data, nats per datum, and its standard error."""
        return _mean(self.upper, self.upper_std_error)

    @property
    def mean_gap(self) -> tuple[float, float]:
        """Mean over data, nats per datum, and its standard error."""
        return _mean(self.gap, torch.hypot(self.lower_std_error, self.upper_std_error))

    def summary(self) -> str:
        """A few lines to read."""
        rows = [
            f"  {name:<6} {value:.4f} ± {error:.2g} nats per datum"
            for name, (value, error) in (
                ("lower", self.mean_lower),
                ("upper", self.mean_upper),
                ("gap", self.mean_gap),
            )
        ]
        title = (
            f"ln p(y) between two bounds: {self.num_data} data, {self.num_chains} chains each way"
        )
        return "\n".join([title, *rows, *(f"  note: {note}" for note in self.notes)])

    def __repr__(self) -> str:
        low, high = self.mean_lower[0], self.mean_upper[0]
        return f"Bidirectional({self.num_data} data, {low:.4f} to {high:.4f} nats per datum)"

    __str__ = summary


def _mean(values: Tensor, errors: Tensor) -> tuple[float, float]:
    """Mean and standard error over data; of one datum the error over chains.

    Data are drawn from the model, and the spread of ln p(y) over them is part of the error.
    """
    number = values.numel()
    error = float(values.std()) / math.sqrt(number) if number > 1 else float(errors[0])
    return float(values.mean()), error


def bidirectional(
    model: Program,
    *data: Any,
    guide: Program | None = None,
    draws: Mapping[str, Tensor] | None = None,
    num_chains: int = 16,
    annealing: Annealing | None = None,
    seed: int | None = None,
    data_plate: str | Sequence[str] | None = None,
    **kwargs: Any,
) -> Bidirectional:
    """Bound ln p(y) from both sides, on data simulated from the model.

    Args:
        model: a Pyro program ``model(*data, **kwargs)``.
        *data: arguments of the program, which say how many data to simulate and of which shapes.
            Their observed values are replaced by simulated ones, wherever a site observes them.
            With ``draws`` they are kept.
        guide: where chains start; the prior by default.
        draws: exact draws from p(z | y) by latent, (*plates, *event), or with a dimension of
            ``num_chains`` before that; by default y is simulated along with one draw.
        num_chains: for each datum, each way.
        annealing: how chains move, and in how many steps.
        seed: whole number; a fresh one by default. The global generators are left untouched.
        data_plate: as in :func:`lvppl.log_likelihood`.
        **kwargs: passed to the programs.

    Raises:
        ProgramError: the model cannot be simulated (``pyro.factor``); a guide would read
            arguments that are not what was simulated; ``draws`` lack a latent or have another
            shape; what :func:`lvppl.log_likelihood` refuses with ``estimator="ais"``.
    """
    seed, options = checked_seed(seed), annealing or Annealing()
    if not isinstance(num_chains, int) or isinstance(num_chains, bool) or num_chains < 1:
        raise ProgramError(f"num_chains must be a whole number of at least 1, got {num_chains!r}.")
    with torch.no_grad():
        observed: dict[str, Tensor] = {}
        if draws is None:
            with seeded(derived_seed(seed, "simulation")):
                made = simulated(model, data, kwargs, "Pass draws=, or write a distribution.")
            if guide is not None:
                made.require_replaced(
                    "Write obs=y with y an argument, start from the prior, or simulate yourself "
                    "and pass draws=."
                )
            observed, draws, data = made.observed, made.latents, made.args
            model = poutine.condition(model, data=observed)
        proposal = prior() if guide is None else importance(guide)
        job = Job(model, proposal, data, kwargs, check_data(data), seed, data_plate)
        plan = plan_of(unmarked(job), num_chains, job.rows, num_chains)
        ladder = Ladder(job, plan, 0, job.rows or 1, options)
        both = ladder.up(0, num_chains), ladder.down(draws, num_chains)
    lower, upper = (_sums(sign * one.log_weight) for sign, one in zip((1, -1), both, strict=True))
    rates = [one.acceptance for one in both if one.acceptance is not None]
    return Bidirectional(
        lower=lower.log_prob,
        upper=-upper.log_prob,
        lower_std_error=lower.std_error,
        upper_std_error=upper.std_error,
        num_chains=num_chains,
        seed=seed,
        observed=observed,
        draws=dict(draws),
        notes=notes_of(job, options, rates),
    )


def _sums(log_weight: Tensor) -> WeightSums:
    check_weights(log_weight, 0)
    sums = WeightSums(len(log_weight))
    sums.add(log_weight)
    return sums
