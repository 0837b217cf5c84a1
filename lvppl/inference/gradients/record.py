"""The record of a gradient audit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import scipy.stats
import torch
from torch import Tensor

from lvppl.columns import in_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Bias", "GradientAudit", "GradientRow", "bias_of", "row_of"]

_FALSE_ALARM = 1e-4
"""Chance that an unbiased gradient is called biased, in one row."""


@dataclass(frozen=True)
class Bias:
    """How far a mean gradient is from another gradient.

    Attributes:
        norm: ‖mean − other‖ over the elements, nats per unit of the parameter.
        std_error: what the norm would be by chance alone: the root of the summed squared standard
            errors.
        largest: the largest |mean − other| of an element, in its standard errors.
        significant: whether ``largest`` is too large to be chance: beyond what one row in 10,000
            of unbiased gradients reaches (Student's t, Bonferroni over the elements), and beyond
            rounding.
    """

    norm: float
    std_error: float
    largest: float
    significant: bool

    def __str__(self) -> str:
        verdict = "biased" if self.significant else "unbiased within error"
        return f"{_short(self.norm)} ± {_short(self.std_error)}, {verdict}"


@dataclass(frozen=True)
class GradientRow:
    """What an audit says of one parameter under one objective, or of all of a program's together.

    Attributes:
        objective, parameter: their names; ``parameter`` is "all of the model" and the like in rows
            of totals.
        program: ``"model"``, ``"guide"`` or ``"both"``.
        size: number of elements.
        norm: of the mean gradient of the loss, nats per unit of the unconstrained parameter.
        std_dev: root of the summed variances of the elements, in one evaluation.
        snr: root mean square of |E g_i| / sd(g_i) over the elements i that have noise; infinite
            where none has, NaN where nothing moves.
        snr_norm: ‖E g‖ / ``std_dev``.
        bias: against the exact gradient of the objective's own expectation; ``None`` where that is
            not known.
        likelihood_bias: against the gradient of −ln p(y); of the model's parameters, where ln p(y)
            has an exact sum.
        reference_bias: against the mean gradient of ``reference=``.
        cosine: mean cosine of one evaluation's gradient with the exact one; with that of
            ``reference=`` where the exact one is not known.
        seconds: of one evaluation, loss and gradient of all parameters.
    """

    objective: str
    parameter: str
    program: str
    size: int
    norm: float
    std_dev: float
    snr: float
    snr_norm: float
    bias: Bias | None
    likelihood_bias: Bias | None
    reference_bias: Bias | None
    cosine: float | None
    seconds: float


@dataclass(frozen=True, eq=False)
class GradientAudit:
    """Bias, variance and signal-to-noise ratio of gradients. Printing it shows the totals.

    Attributes:
        rows: by objective and then by parameter.
        totals: by objective and then by program, all parameters together.
        means, variances: objective → parameter → tensor of the parameter's shape, float64: the
            mean gradient of the loss and the variance of one evaluation.
        exact: the same, of the gradients that the biases are against, where they are known.
        likelihood: parameter → gradient of −ln p(y), where known.
        num_repetitions: evaluations of each objective.
        seed: gives the same numbers again.
    """

    rows: tuple[GradientRow, ...]
    totals: tuple[GradientRow, ...]
    means: dict[str, dict[str, Tensor]]
    variances: dict[str, dict[str, Tensor]]
    exact: dict[str, dict[str, Tensor]]
    likelihood: dict[str, Tensor]
    num_repetitions: int
    seed: int

    def row(self, objective: str, parameter: str) -> GradientRow:
        """The row of one parameter, or of ``"model"``, ``"guide"`` or ``"both"``: their totals."""
        for row in (*self.rows, *self.totals):
            name = row.program if row in self.totals else row.parameter
            if (row.objective, name) == (objective, parameter):
                return row
        raise KeyError((objective, parameter))

    def table(self, *, totals: bool = False) -> str:
        """Aligned text, a line for each parameter under each objective; or for their totals."""
        return _aligned(self.totals if totals else self.rows)

    def __str__(self) -> str:
        lines = [
            f"gradients of {len(self.means)} objectives, {self.num_repetitions} evaluations each, "
            f"seed {self.seed}; audit.table() has every parameter",
            "",
            self.table(totals=True),
            "",
            "a bias is beside what chance alone gives; marked biased, or unbiased within error",
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        names = ", ".join(self.means)
        return f"GradientAudit({names}; {self.num_repetitions} evaluations each)"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the signal-to-noise ratio of each objective's gradients, for model and guide.

        Args:
            ax: axes to draw in; a new figure by default.
        """
        from lvppl.inspection.diagnostics import gradient_snr

        return gradient_snr(self, ax)


# ------------------------------------------------------------------------------------------- rows


def row_of(
    *,
    objective: str,
    parameter: str,
    program: str,
    mean: Tensor,
    variance: Tensor,
    count: int,
    bias: Bias | None,
    likelihood_bias: Bias | None,
    reference_bias: Bias | None,
    cosine: float | None,
    seconds: float,
) -> GradientRow:
    """A row from the moments of all its elements, (elements,)."""
    snr, snr_norm = _signal_to_noise(mean, variance, count)
    return GradientRow(
        objective=objective,
        parameter=parameter,
        program=program,
        size=mean.numel(),
        norm=float(mean.norm()),
        std_dev=float(variance.sum().sqrt()),
        snr=snr,
        snr_norm=snr_norm,
        bias=bias,
        likelihood_bias=likelihood_bias,
        reference_bias=reference_bias,
        cosine=cosine,
        seconds=seconds,
    )


def _signal_to_noise(mean: Tensor, variance: Tensor, count: int) -> tuple[float, float]:
    """Root mean square over the elements with noise, and by norms.

    The noise of the mean itself is taken off: E mean² = (E g)² + variance / count, without which a
    gradient of mean zero would show 1 / sqrt(count).
    """
    noisy = variance > 0
    if not bool(noisy.any()):
        ratio = math.inf if bool((mean != 0).any()) else math.nan
        return ratio, ratio
    ratios = (mean.square() / variance)[noisy] - 1.0 / count
    by_norm = mean.square().sum() / variance.sum() - 1.0 / count
    return float(ratios.mean().clamp(min=0.0).sqrt()), float(by_norm.clamp(min=0.0).sqrt())


def bias_of(
    mean: Tensor, variance: Tensor, count: int, other: Tensor, epsilon: float, dof: int
) -> Bias:
    """The bias of a mean of ``count`` against ``other``, (elements,) each.

    Args:
        variance: of one evaluation; of the difference where ``other`` is a mean as well.
        epsilon: relative precision of the parameters' dtype.
        dof: degrees of freedom of the variance.
    """
    error = (variance / count).sqrt()
    distance = (mean - other).abs()
    rounding = 256 * epsilon * (mean.abs() + other.abs() + variance.sqrt())
    excess = torch.where(distance > rounding, distance / error, torch.zeros_like(error))
    limit = float(scipy.stats.t.isf(0.5 * _FALSE_ALARM / mean.numel(), dof))
    largest = float(excess.max())
    return Bias(
        norm=float(distance.norm()),
        std_error=float(error.norm()),
        largest=largest,
        significant=largest > limit,
    )


# ------------------------------------------------------------------------------------------- table

_HEADINGS = {
    "objective": "objective",
    "parameter": "parameter",
    "size": "size",
    "norm": "‖gradient‖",
    "std_dev": "std. dev.",
    "snr": "SNR",
    "snr_norm": "SNR (norm)",
    "bias": "bias to own target",
    "likelihood_bias": "bias to ln p(y)",
    "reference_bias": "bias to reference",
    "cosine": "cosine",
    "seconds": "ms",
}


def _aligned(rows: Sequence[GradientRow]) -> str:
    """Columns as wide as what they hold; a column of biases that nothing knows is left out."""
    names = [field.name for field in fields(GradientRow) if field.name in _HEADINGS]
    if all(row.reference_bias is None for row in rows):
        names.remove("reference_bias")
    cells = [[_HEADINGS[name] for name in names]]
    cells += [[_cell(name, getattr(row, name)) for name in names] for row in rows]
    first = names.index("size")  # names to the left, numbers to the right
    numbers = [i for i, name in enumerate(names) if i >= first and "bias" not in name]
    return "\n".join(in_columns(cells, numbers))


def _cell(name: str, value: object) -> str:
    if value is None or value != value:
        return "–"
    if isinstance(value, Bias):
        size = f"{_short(value.norm)} ± {_short(value.std_error)}"
        return f"{size} biased" if value.significant else size
    if isinstance(value, float):
        return f"{1e3 * value:.1f}" if name == "seconds" else _short(value)
    return str(value)


def _short(value: float) -> str:
    return f"{value:.3g}"
