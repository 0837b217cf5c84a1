"""The record of an estimate of ln p(y)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.inference.psis import khat_threshold, tail_size

__all__ = ["LikelihoodEstimate"]


_SOURCES = {"importance": "guide", "prior": "prior", "uniform": "states, all alike"}


@dataclass(frozen=True, eq=False)
class LikelihoodEstimate:
    """ln p(y) of each datum as estimated from S draws, in nats, with its reliability.

    All tensors are float64, in the order of the data, of shape (data,); (1,) where the whole data
    set is one datum.
    """

    log_prob: Tensor
    """ln of the mean weight. Minus infinity where every draw has weight zero."""
    std_error: Tensor
    """Delta-method standard error, sd(w) / (sqrt(S) mean(w)); NaN for one draw or no weight."""
    ess: Tensor
    """Effective number of draws, (sum w)^2 / sum w^2, between 1 and S; 0 with no weight."""
    khat: Tensor
    """Pareto shape of the weights' tail; see :func:`lvppl.inference.psis.psis`."""
    num_samples: int
    """S, draws per datum; 0 for exact sums."""
    estimator: str
    """``"importance"``, ``"prior"``, ``"uniform"`` or ``"exact"``."""
    seed: int
    """Gives the same numbers again."""
    num_discrete: int = 0
    """Observed discrete values that were scored, in all data: what a mask hides is not counted, and
    a one-hot vector or a vector of counts is one value."""
    num_continuous: int = 0
    """Observed continuous values that were scored, in all data."""
    bin_width: float | None = None
    """Width of the cells that continuous values were rounded to."""
    notes: tuple[str, ...] = field(default=())
    """What a reader of the numbers should know."""

    @property
    def num_data(self) -> int:
        return self.log_prob.numel()

    @property
    def total(self) -> float:
        """Sum of ln p(y) over data, nats."""
        return float(self.log_prob.sum())

    @property
    def total_std_error(self) -> float:
        """Monte Carlo standard error of ``total``, nats; draws are independent across data."""
        return float(self.std_error.square().sum().sqrt())

    @property
    def mean(self) -> float:
        """Average of ln p(y) over data, nats per datum."""
        return self.total / self.num_data

    @property
    def mean_std_error(self) -> float:
        """Monte Carlo standard error of ``mean``: of the estimate, not of the choice of data."""
        return self.total_std_error / self.num_data

    @property
    def bias(self) -> Tensor:
        """First-order bias of ``log_prob``, -std_error^2 / 2 (Jensen), shape (data,), nats."""
        return -0.5 * self.std_error.square()

    @property
    def bits_per_dim(self) -> float:
        """-log2 of the probability of the data, divided by the number of observed values.

        Values that a mask hides are not counted. A continuous value enters with the probability
        p(y) * bin_width of its cell.

        Raises:
            ProgramError: y is continuous and no bin width was given: a density is not a
                probability, and its logarithm changes with the unit of y.
        """
        return (-self.total - self._log_volume) / (self._num_dims * math.log(2.0))

    @property
    def bits_per_dim_std_error(self) -> float:
        """Monte Carlo standard error of ``bits_per_dim``."""
        return self.total_std_error / (self._num_dims * math.log(2.0))

    @property
    def _num_dims(self) -> int:
        if self.num_discrete + self.num_continuous == 0:
            raise ProgramError(
                "bits_per_dim needs observed values, but the model scores none: it has no observed "
                "site, or masks hide every value."
            )
        return self.num_discrete + self.num_continuous

    @property
    def _log_volume(self) -> float:
        if self.num_continuous == 0:
            return 0.0
        if self.bin_width is None:
            raise ProgramError(
                f"bits_per_dim needs probabilities, but {self.num_continuous} observed values "
                "are continuous and have densities, which depend on the unit of y. Pass "
                "bin_width=, the width of the cells that y was rounded to (1/255 for 8-bit pixels "
                "scaled to [0, 1]), or model y as discrete."
            )
        return self.num_continuous * math.log(self.bin_width)

    @property
    def khat_threshold(self) -> float:
        """min(1 - 1 / log10 S, 0.7): above it neither estimate nor standard error is reliable."""
        return khat_threshold(self.num_samples) if self.num_samples else math.inf

    @property
    def flagged(self) -> Tensor:
        """Indices of the data whose k-hat is above the threshold, int64."""
        return (self.khat > self.khat_threshold).nonzero().flatten()

    def summary(self) -> str:
        """A few lines to read."""
        number = self.num_data
        drawn = f", {self.num_samples} draws each from the {_SOURCES.get(self.estimator)}"
        lines = [
            f"ln p(y), {self.estimator}: {number} {'datum' if number == 1 else 'data'}"
            + (drawn if self.num_samples else ""),
            f"  mean per datum  {self.mean:.4f} ± {self.mean_std_error:.2g} nats",
            f"  total           {self.total:.4f} ± {self.total_std_error:.2g} nats",
        ]
        if self.num_discrete + self.num_continuous > 0 and (
            self.num_continuous == 0 or self.bin_width is not None
        ):
            lines.append(
                f"  bits per dim    {self.bits_per_dim:.5f} ± {self.bits_per_dim_std_error:.2g}"
            )
        if self.num_samples == 0:
            return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])
        lines.append(
            f"  effective draws {float(self.ess.median()):.1f} in the median, "
            f"{float(self.ess.min()):.1f} at worst"
        )
        lines.append(f"  {self._reliability()}")
        lines.append(
            "  ln of an unbiased estimate is biased low: here by about "
            f"{-float(self.bias.mean()):.2g} nats per datum to first order"
        )
        lines.extend(f"  note: {note}" for note in self.notes)
        return "\n".join(lines)

    def _reliability(self) -> str:
        if tail_size(self.num_samples) < 5:
            return f"k-hat cannot be fitted to {self.num_samples} draws: take at least 21"
        flagged = self.flagged.numel()
        text = f"k-hat above {self.khat_threshold:.2f} for {flagged} of {self.num_data} data"
        return text + (": their values and errors are not reliable" if flagged else "")

    def __repr__(self) -> str:
        return (
            f"LikelihoodEstimate({self.estimator}, {self.num_data} data, {self.num_samples} draws, "
            f"mean {self.mean:.4f} ± {self.mean_std_error:.2g} nats, "
            f"{self.flagged.numel()} flagged)"
        )

    __str__ = summary
