"""The difference of two estimates of ln p(y) of the same data, with its error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.inference.likelihood.resampling import bootstrap_std_error

if TYPE_CHECKING:
    from lvppl.inference.likelihood.estimate import LikelihoodEstimate

__all__ = ["LikelihoodComparison", "compared"]

_INDEPENDENT = "independent draws: variances add"
_PAIRED = "the same seed: the bootstrap counts are the same, and replicates are subtracted in pairs"
_BOUND = (
    "the same seed, so that the draws may go together: standard errors are added, an upper bound; "
    "other seeds, or bootstrap= with as many draws in both, give the error itself"
)


@dataclass(frozen=True, eq=False)
class LikelihoodComparison:
    """ln p(y) of one estimate minus that of another, by datum, in nats."""

    difference: Tensor
    """First minus second, float64, (data,)."""
    std_error: Tensor
    """Its Monte Carlo standard error, float64, (data,)."""
    bias: Tensor
    """Its bias to first order, the difference of the two, float64, (data,)."""
    how: str
    """What the standard errors rest on."""

    @property
    def num_data(self) -> int:
        return self.difference.numel()

    @property
    def total(self) -> float:
        """Sum of the differences over data, nats."""
        return float(self.difference.sum())

    @property
    def total_std_error(self) -> float:
        """Monte Carlo standard error of ``total``, nats; draws are independent across data."""
        return float(self.std_error.square().sum().sqrt())

    @property
    def data_std_error(self) -> float:
        """Standard error of ``total`` over the choice of the data: sqrt(N) sd(difference), nats.

        The paired error of a comparison of two models (Vuong 1989, Econometrica 57); NaN for one
        datum. It holds the Monte Carlo error too, which is part of the spread.
        """
        if self.num_data < 2:
            return math.nan
        return float(self.difference.std() * math.sqrt(self.num_data))

    def summary(self) -> str:
        """A few lines to read."""
        number = self.num_data
        per = f"{self.total / number:+.4f} ± {self.total_std_error / number:.2g}"
        lines = [
            f"difference of ln p(y), first minus second: {number} "
            f"{'datum' if number == 1 else 'data'}",
            f"  mean per datum  {per} nats (Monte Carlo)",
            f"  total           {self.total:+.4f} ± {self.total_std_error:.2g} nats (Monte Carlo)",
        ]
        if number > 1:
            lines.append(f"  total, by the choice of the data  ± {self.data_std_error:.2g} nats")
        lines.append(f"  {self.how}")
        lines.append(f"  bias of the total about {float(self.bias.sum()):+.2g} nats to first order")
        return "\n".join(lines)

    __str__ = summary

    def __repr__(self) -> str:
        return (
            f"LikelihoodComparison({self.num_data} data, total {self.total:+.4f} ± "
            f"{self.total_std_error:.2g} nats)"
        )


def compared(first: LikelihoodEstimate, second: LikelihoodEstimate) -> LikelihoodComparison:
    """See :meth:`LikelihoodEstimate.compare`."""
    if first.num_data != second.num_data:
        raise ProgramError(
            f"compare pairs two estimates datum by datum, but one has {first.num_data} data and "
            f"the other {second.num_data}. Estimate both on the same data, in the same order."
        )
    error, how = _error(first, second)
    device = first.log_prob.device
    return LikelihoodComparison(
        difference=first.log_prob - second.log_prob.to(device),
        std_error=error,
        bias=first.bias - second.bias.to(device),
        how=how,
    )


def _error(first: LikelihoodEstimate, second: LikelihoodEstimate) -> tuple[Tensor, str]:
    device = first.log_prob.device
    errors = first.std_error, second.std_error.to(device)
    if first.seed != second.seed or 0 in (first.num_samples, second.num_samples):
        return torch.hypot(*errors), _INDEPENDENT
    if _same_counts(first, second):
        assert first.replicates is not None and second.replicates is not None
        return bootstrap_std_error(first.replicates - second.replicates.to(device)), _PAIRED
    return errors[0] + errors[1], _BOUND


def _same_counts(first: LikelihoodEstimate, second: LikelihoodEstimate) -> bool:
    """Whether draw i of both has the same bootstrap counts."""
    if first.replicates is None or second.replicates is None:
        return False
    same = len(first.replicates) == len(second.replicates) and first.defensive == second.defensive
    return same and first.num_samples == second.num_samples
