"""The record of an estimate of ln p(y)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.inference.likelihood.comparison import LikelihoodComparison, compared
from lvppl.inference.likelihood.resampling import bootstrap_std_error
from lvppl.inference.likelihood.weights import Trajectory
from lvppl.inference.psis import MIN_TAIL, khat_threshold, tail_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LikelihoodEstimate"]


_SOURCES = {
    "ais": "prior or the guide, annealed",
    "importance": "guide",
    "prior": "prior",
    "uniform": "states, all alike",
}


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
    defensive: float = 0.0
    """Share of draws from the prior, beside the guide's."""
    replicates: Tensor | None = None
    """``log_prob`` of each bootstrap replicate, (replicates, data), with ``bootstrap=``."""
    trajectory: Trajectory | None = None
    """The estimate from 2, 4, 8 ... draws and from all, with ``trajectory=True``."""

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
    def bias_corrected(self) -> Tensor:
        r"""``log_prob`` without its bias of order 1 / S, shape (data,), nats.

        With :math:`\hat p = p (1 + \delta)` and :math:`v = E \delta^2`, which is of order 1 / S,

        .. math:: E \ln \hat p = \ln p - v / 2 + O(S^{-2}), \qquad
            \text{bias corrected} = \ln \hat p + \hat v / 2, \quad
            \hat v = \text{std\_error}^2.

        To the same order this is the jackknife, :math:`\ln\hat p - \frac{S-1}{S} \sum_i \ln(1 -
        u_i)` with :math:`u_i = (w_i - \hat p) / ((S - 1) \hat p)`, whose first term is
        :math:`\hat v / 2`, so that running sums are enough. For independent draws what is left is
        :math:`(\tfrac34 c_2^2 - \tfrac23 c_3) / S^2 + O(S^{-3})`, c_k the central moments of w / p.

        It is no lower bound on ln p. The correction is half a nat at most, when one weight
        outweighs all others, however much is missing: where k-hat is large it corrects little. NaN
        for one draw or no weight.

        Source: Efron & Tibshirani (1993), An introduction to the bootstrap, ch. 10; Nowozin
        (2018), ICLR (the jackknife of this estimate).
        """
        return self.log_prob - self.bias

    @property
    def bootstrap_std_error(self) -> Tensor | None:
        """Standard deviation of ``log_prob`` over bootstrap replicates, (data,), nats.

        Beside the delta-method error it sees that ln p is skewed; its own relative error is
        about 1 / sqrt(2 B). Infinite where a replicate has weight zero. ``None`` without
        ``bootstrap=``.
        """
        return None if self.replicates is None else bootstrap_std_error(self.replicates)

    def compare(self, other: LikelihoodEstimate) -> LikelihoodComparison:
        """This estimate minus another of the same data in the same order, with its error.

        Estimates with different seeds are independent, and their variances add. With the same
        seed the draws may be the same, and the errors of the two go together or against each
        other: with ``bootstrap=`` and as many draws in both, replicates are subtracted in pairs,
        which is the error of the difference; without, the standard errors are added, an upper
        bound whatever the correlation. ``comparison.how`` says which.

        Raises:
            ProgramError: the two have different numbers of data.
        """
        return compared(self, other)

    def plot(
        self,
        ax: Axes | None = None,
        *,
        exact: Any = None,
        datum: int | None = None,
        **others: LikelihoodEstimate,
    ) -> Axes:
        """Draw the estimate against the number of draws, beside ``others`` by name.

        Args:
            ax: axes to draw in; a new figure by default.
            exact: ln p(y) per datum, a number or (data,), drawn as a line.
            datum: of one datum, by its index; by default the mean over all.
            **others: estimates of the same data with ``trajectory=True``.

        Raises:
            ProgramError: an estimate was made without ``trajectory=True``.
        """
        from lvppl.inspection.plots import likelihood_convergence

        name = self.estimator + (", defensive" if self.defensive else "")
        return likelihood_convergence({name: self, **others}, ax, exact=exact, datum=datum)

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

    @property
    def rough(self) -> Tensor:
        """Indices of data that are not flagged, but whose standard error may be too small, int64.

        Weights of Pareto shape k have a variance for k < 1/2 alone. Above, the mean still
        converges, but a standard error from the draws leaves out the large weights that were not
        drawn, and intervals are too short. These are the data whose k-hat is within one of its
        own standard errors, (1 + k) / sqrt(M) from a tail of M weights, of 1/2 or above.

        Source: Smith (1987), Annals of Statistics 15 (the standard error of a Pareto shape);
        Vehtari et al. (2024), JMLR 25:72, section 3 (what k says of the variance).
        """
        error = (1.0 + self.khat) / math.sqrt(max(tail_size(self.num_samples), 1))
        unsure = (self.khat + error.clamp(min=0.0) > 0.5) & (self.khat <= self.khat_threshold)
        return unsure.nonzero().flatten()

    def summary(self) -> str:
        """A few lines to read."""
        number = self.num_data
        lines = [
            f"ln p(y), {self.estimator}: {number} {'datum' if number == 1 else 'data'}"
            + self._drawn(),
            f"  mean per datum  {self.mean:.4f} ± {self.mean_std_error:.2g} nats",
            f"  total           {self.total:.4f} ± {self.total_std_error:.2g} nats",
        ]
        if self.num_discrete + self.num_continuous > 0 and (
            self.num_continuous == 0 or self.bin_width is not None
        ):
            lines.append(
                f"  bits per dim    {self.bits_per_dim:.5f} ± {self.bits_per_dim_std_error:.2g}"
            )
        if self.num_samples:
            lines.extend(self._words_on_draws())
        lines.extend(f"  note: {note}" for note in self.notes)
        return "\n".join(lines)

    def _drawn(self) -> str:
        if self.num_samples == 0:
            return ""
        source = _SOURCES.get(self.estimator)
        if self.defensive:
            source = f"{source} and the prior, {1 - self.defensive:g} : {self.defensive:g}"
        return f", {self.num_samples} draws each from the {source}"

    def _words_on_draws(self) -> list[str]:
        lines = [
            f"  effective draws {float(self.ess.median()):.1f} in the median, "
            f"{float(self.ess.min()):.1f} at worst",
            f"  {self._reliability()}",
            "  ln of an unbiased estimate is biased low: here by about "
            f"{-float(self.bias.mean()):.2g} nats per datum to first order",
        ]
        corrected = float(self.bias_corrected.mean())
        if math.isfinite(corrected):
            lines.append(f"  corrected for it: mean per datum {corrected:.4f} nats, no lower bound")
        error = self.bootstrap_std_error
        if error is not None and self.replicates is not None:
            mean_error = float(error.square().sum().sqrt()) / self.num_data
            lines.append(
                f"  bootstrap of {len(self.replicates)}: mean per datum ± {mean_error:.2g} nats"
            )
        return lines

    def _reliability(self) -> str:
        if tail_size(self.num_samples) < MIN_TAIL:
            return f"k-hat cannot be fitted to {self.num_samples} draws: take at least 21"
        flagged = self.flagged.numel()
        text = f"k-hat above {self.khat_threshold:.2f} for {flagged} of {self.num_data} data"
        text += ": their values and errors are not reliable" if flagged else ""
        rough = self.rough.numel()
        if rough:
            text += (
                f"\n  k-hat about 0.5 or above for {rough} more: large weights that were not drawn "
                "may count, and their errors be larger than stated"
            )
        return text

    def __repr__(self) -> str:
        return (
            f"LikelihoodEstimate({self.estimator}, {self.num_data} data, {self.num_samples} draws, "
            f"mean {self.mean:.4f} ± {self.mean_std_error:.2g} nats, "
            f"{self.flagged.numel()} flagged)"
        )

    __str__ = summary
