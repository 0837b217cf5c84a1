"""The maximisers: for each form of Q in a parameter, the value where it is largest.

=============  ==============================================  ==================================
role           Q(θ) up to a constant                           maximum
=============  ==============================================  ==================================
simplex        Σ N_c ln θ_c                                    N_c / Σ N
probability    a ln θ + b ln(1 − θ)                            a / (a + b)
rate           N ln θ − S θ                                    N / S
concentration  n (α ln β − ln Γ(α)) + (α − 1) Σ r ln y         by Newton in one dimension
location       −½ Σ r (y − c θ)² / σ²                          a weighted mean, or least squares
scale          −N ln θ − S / (2 θ²)                            √(S / N)
cholesky       −N/2 ln |Σ| − ½ tr(Σ⁻¹ S)                       Σ = S / N
=============  ==============================================  ==================================

Locations come before scales: the second moments are then taken about the new location. Where the
best location itself depends on the scales (one location under two of them, a prior of its own
width), each is the maximum given the other: expectation conditional maximisation.

An entry that nothing weighs on, a component without data and without a prior, has no maximum: Q is
flat in it, and it stays where it is. Such entries are told by their weights, which are exactly
zero. A NaN that came out of the data or of the program is none of them, and goes through.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lvppl.inference.m_step.cells import Cells
from lvppl.inference.m_step.statistics import Statistics

__all__ = [
    "Maximum",
    "concentrations",
    "locations",
    "moved",
    "mvn_covariances",
    "mvn_locations",
    "mvn_moved",
    "probabilities",
    "rates",
    "regression",
    "regression_moved",
    "scale_totals",
    "scales",
    "simplexes",
]


class Maximum(NamedTuple):
    """Where Q is largest, and in which entries it has a maximum at all: the others stay."""

    value: Tensor
    exists: Tensor


def _ratio(numerator: Tensor, weight: Tensor) -> Maximum:
    exists = weight != 0
    return Maximum(numerator / torch.where(exists, weight, 1.0), exists.expand_as(numerator))


def simplexes(counts: Tensor) -> Maximum:
    """Rows of counts (..., C) -> rows of probabilities."""
    return _ratio(counts, counts.sum(-1, keepdim=True))


def probabilities(success: Tensor, failure: Tensor) -> Maximum:
    return _ratio(success, success + failure)


def rates(power: Tensor, slope: Tensor) -> Maximum:
    """N / S; nothing weighs on an entry where both are zero."""
    exists = (power != 0) | (slope != 0)
    return Maximum(power / torch.where(exists, slope, 1.0), exists)


def concentrations(cells: Cells, rate_is_free: Tensor, largest: Tensor) -> Maximum:
    r"""The root of :math:`\ln α - ψ(α) = s` for each entry, (entries,).

    With a rate of its own (maximised jointly) s = ln(Σ r c y / n) − Σ r ln (c y) / n for rates c β;
    at a fixed rate β the equation is ψ(α) = ln β + Σ r ln y / n. In both cases Q falls on either
    side of the root: where that is above ``largest``, it is largest there.

    Source: Minka 2002, "Estimating a Gamma distribution", for the start.
    """
    index = cells.keys[:, 0]
    bound = index >= 0

    def total(value: Tensor) -> Tensor:
        return torch.zeros_like(largest).index_add_(0, index[bound], value[bound])

    n, c = total(cells.values["n"]), cells.reference["coefficient"]
    exists = n != 0
    weight = torch.where(exists, n, 1.0)
    mean_log = total(cells.values["log"]) / weight
    mean = torch.where(exists, total(cells.values["sum"] * c) / weight, 1.0)
    log_rate = total(cells.values["n"] * cells.reference["rate"].log()) / weight
    log_c = total(cells.values["n"] * c.log()) / weight
    # where all values are alike, s is zero to rounding and the root at infinity
    s = (mean.log() - mean_log - log_c).clamp(min=1e-300)
    alpha = _root(s, log_rate + mean_log, rate_is_free)
    return Maximum(torch.minimum(alpha, largest), exists)


def _root(s: Tensor, psi: Tensor, free: Tensor) -> Tensor:
    """α with ln α − ψ(α) = s where the rate is free, and with ψ(α) = psi where it is not."""
    start = (3 - s + ((s - 3) ** 2 + 24 * s).sqrt()) / (12 * s)
    alpha = torch.where(free, start, psi.exp().clamp(min=1e-3))
    for _ in range(50):
        found, slope = torch.digamma(alpha), torch.polygamma(1, alpha)
        gap = torch.where(free, alpha.log() - found - s, psi - found)
        step = torch.where(free, 1 / alpha - slope, -slope)
        # in ln α: stays positive
        alpha = alpha * (-(gap / (step * alpha)).clamp(-1, 1)).exp()
    # a large α leaves no digits of ln α − ψ(α), but then the start is right to 3 / α⁴
    return torch.where(free & (start > 1e4), start, alpha)


# --------------------------------------------------------------------------- locations and scales


def locations(cells: Cells, num_entries: int) -> Tensor:
    """The step from the present to the best location of each entry, (entries,); 0 for none.

    δ = Σ c S₁/σ² / Σ c² N/σ². The scales cancel where an entry stands under one scale alone.
    """
    index, c = cells.keys[:, 0], cells.reference["loc_coefficient"]
    bound = index >= 0
    precision = cells.reference["scale"] ** -2
    # relative to the largest of the entry: precisions of tiny scales would overflow
    top = torch.full((num_entries,), -torch.inf, dtype=torch.float64, device=index.device)
    top.scatter_reduce_(0, index[bound], precision[bound], "amax")
    relative = torch.where(bound, precision / top[index.clamp(min=0)], 0.0)

    def total(value: Tensor) -> Tensor:
        return value.new_zeros(num_entries).index_add_(0, index[bound], value[bound])

    step = _ratio(
        total(c * relative * cells.values["first"]), total(c * c * relative * cells.values["n"])
    )
    return torch.where(step.exists, step.value, 0.0)


def moved(cells: Cells, step: Tensor) -> Cells:
    """The cells about the locations c (θ + step): S₁ − d N and S₂ − 2 d S₁ + d² N, d = c · step."""

    def change(old: Cells) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        index = old.keys[:, 0]
        there = step[index.clamp(min=0)]
        d = torch.where(index >= 0, old.reference["loc_coefficient"] * there, 0.0)
        n, first, second = (old.values[name] for name in ("n", "first", "second"))
        return (
            {"loc": old.reference["loc"] + d},
            {"first": first - d * n, "second": second - 2 * d * first + d * d * n},
        )

    return cells.updated(change)


def scales(n: Tensor, second: Tensor, smallest: Tensor) -> Maximum:
    """√(S / N), where Q falls on either side of it: not below ``smallest``."""
    variance = _ratio(second, n)
    # by rounding, a sum of squares about a mean may come out below zero
    return Maximum(torch.maximum(variance.value.clamp(min=0).sqrt(), smallest), variance.exists)


def scale_totals(cells: Cells, into: Statistics) -> None:
    """Add N and S / c² of every cell to the entries of their scales."""
    index, c = cells.keys[:, -1], cells.reference["scale_coefficient"]
    into.add("scale n", index, cells.values["n"])
    into.add("scale second", index, cells.values["second"] / c**2)


def regression(cells: Cells) -> tuple[Tensor, Cells]:
    """The step of all coefficients together, and the cells about the new ones.

    δ solves (Σ Jᵀ r J / σ²) δ = Σ Jᵀ r e / σ², of least norm where columns are collinear.
    """
    weight = (cells.reference["scale"] / cells.reference["scale"].min()) ** -2
    gram = (cells.values["gram"] * weight[:, None, None]).sum(0)
    gradient = (cells.values["gradient"] * weight[:, None]).sum(0)
    step = _least_norm(gram, gradient)
    return step, regression_moved(cells, step)


def _least_norm(gram: Tensor, gradient: Tensor) -> Tensor:
    """The shortest solution of G δ = g, G positive semidefinite, each coefficient in its own units.

    A unit is 1/√G_ii, so that neither the units of a covariate nor the mass of a component decide
    what is collinear. A coefficient that nothing weighs on (G_ii = 0) has no step.
    """
    diagonal = gram.diagonal()
    unit = torch.where(diagonal == 0, 0.0, diagonal.rsqrt())
    values, vectors = torch.linalg.eigh(unit[:, None] * gram * unit)
    rounding = len(values) * torch.finfo(values.dtype).eps * values[-1]
    inverse = torch.where(values > rounding, 1 / values, 0.0)
    return unit * (vectors @ (inverse * (vectors.mT @ (unit * gradient))))


def regression_moved(cells: Cells, step: Tensor) -> Cells:
    """The cells about coefficients + step."""

    def change(old: Cells) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        gram, gradient = old.values["gram"], old.values["gradient"]
        bent = gram @ step
        second = old.values["second"] - 2 * (gradient @ step) + bent @ step
        return {}, {"second": second.clamp(min=0), "gradient": gradient - bent}

    return cells.updated(change)


# ------------------------------------------------------------------------------ multivariate normal


def mvn_locations(cells: Cells, dim: int) -> tuple[Tensor, Tensor]:
    """Rows of entries (rows, D) and their steps (rows, D): Σ Λ N δ = Σ Λ S₁ over a row's cells.

    Where a row stands under one covariance alone, this is δ = S₁ / N. It is 0 for a row that
    nothing weighs on.
    """
    rows, inverse = torch.unique(cells.keys[:, :dim], dim=0, return_inverse=True)
    steps = torch.zeros((len(rows), dim), dtype=torch.float64, device=rows.device)
    for i in (rows >= 0).all(-1).nonzero().squeeze(1).tolist():
        mine = inverse == i
        n, first = cells.values["n"][mine], cells.values["first"][mine]
        c = cells.reference["loc_coefficient"][mine, 0]
        if bool((n == 0).all()):
            continue
        relative = _relative_precision(cells, mine, dim)
        if relative is not None:  # the covariance cancels
            left, right = (c**2 * relative * n).sum(), ((c * relative)[:, None] * first).sum(0)
            steps[i] = right / left
            continue
        precision = torch.cholesky_inverse(cells.reference["tril"][mine])
        left = ((c**2 * n)[:, None, None] * precision).sum(0)
        right = (c[:, None, None] * precision @ first.unsqueeze(-1)).sum(0)
        steps[i] = torch.linalg.solve(left, right).squeeze(-1)
    return rows, steps


def _relative_precision(cells: Cells, mine: Tensor, dim: int) -> Tensor | None:
    """For cells whose covariances are all multiples of one, 1 / the multiples."""
    patterns, tril = cells.keys[mine, dim:], cells.reference["tril"][mine]
    if not bool((patterns == patterns[0]).all()):
        return None
    if bool((patterns >= 0).any()):
        return cells.reference["tril_coefficient"][mine] ** -2
    return torch.ones_like(tril[:, 0, 0]) if bool((tril == tril[0]).all()) else None


def mvn_moved(cells: Cells, step: Tensor, dim: int) -> Cells:
    """The cells about the locations c (θ + step), for a step of each entry, (entries,)."""

    def change(old: Cells) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        index = old.keys[:, :dim]
        d = torch.where(index >= 0, step[index.clamp(min=0)], 0.0)
        d = d * old.reference["loc_coefficient"]
        n, first, second = (old.values[name] for name in ("n", "first", "second"))
        cross = first.unsqueeze(-1) * d.unsqueeze(-2)
        outer = d.unsqueeze(-1) * d.unsqueeze(-2)
        return (
            {"loc": old.reference["loc"] + d},
            {
                "first": first - d * n[:, None],
                "second": second - cross - cross.mT + n[:, None, None] * outer,
            },
        )

    return cells.updated(change)


def mvn_covariances(cells: Cells, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Patterns of entries (patterns, D·D), N (patterns,) and S (patterns, D, D): Σ = S / N."""
    patterns, inverse = torch.unique(cells.keys[:, dim:], dim=0, return_inverse=True)
    c = cells.reference["tril_coefficient"]
    n = cells.values["n"].new_zeros(len(patterns)).index_add_(0, inverse, cells.values["n"])
    second = cells.values["second"] / (c**2)[:, None, None]
    zeros = second.new_zeros((len(patterns), dim, dim))
    return patterns, n, zeros.index_add_(0, inverse, second)
