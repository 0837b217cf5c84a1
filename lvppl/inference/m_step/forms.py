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

Locations come before scales: the second moments are then taken about the new location.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lvppl.inference.m_step.cells import Cells
from lvppl.inference.m_step.statistics import Statistics

__all__ = [
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


def simplexes(counts: Tensor) -> Tensor:
    """Rows of counts (..., C) -> rows of probabilities; NaN where a row has no count at all."""
    return counts / counts.sum(-1, keepdim=True)


def probabilities(success: Tensor, failure: Tensor) -> Tensor:
    return success / (success + failure)


def rates(power: Tensor, slope: Tensor) -> Tensor:
    return power / slope


def concentrations(cells: Cells, num_entries: int, rate_is_free: Tensor) -> Tensor:
    r"""The root of :math:`\ln α - ψ(α) = s` for each entry, (entries,); NaN where unused.

    With a rate of its own (maximised jointly) s = ln(Σ r y / n) − Σ r ln y / n; at a fixed rate β
    the equation is ψ(α) = ln β + Σ r ln y / n.
    """
    index = cells.keys[:, 0]
    bound = index >= 0

    def total(value: Tensor) -> Tensor:
        return value.new_zeros(num_entries).index_add_(0, index[bound], value[bound])

    n, c = total(cells.values["n"]), cells.reference["coefficient"]
    target = total(cells.values["log"]) / n
    mean = total(cells.values["sum"] * c) / n
    log_rate = total(cells.values["n"] * cells.reference["rate"].log()) / n
    free = rate_is_free
    log_c = total(cells.values["n"] * c.log()) / n
    s = torch.where(free, mean.log() - target - log_c, torch.ones_like(mean))
    start = (3 - s + ((s - 3) ** 2 + 24 * s).sqrt()) / (12 * s)
    alpha = torch.where(free, start, (log_rate + target).exp().clamp(min=1e-3))
    for _ in range(50):
        psi, slope = torch.digamma(alpha), torch.polygamma(1, alpha)
        gap = torch.where(free, alpha.log() - psi - s, log_rate + target - psi)
        step = torch.where(free, 1 / alpha - slope, -slope)
        # in ln α: stays positive
        alpha = alpha * (-(gap / (step * alpha)).clamp(-1, 1)).exp()
    return alpha


# --------------------------------------------------------------------------- locations and scales


def locations(cells: Cells, num_entries: int) -> Tensor:
    """The step from the present to the best location of each entry, (entries,); NaN if unused.

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

    first = total(c * relative * cells.values["first"])
    return first / total(c * c * relative * cells.values["n"])


def moved(cells: Cells, step: Tensor) -> Cells:
    """The cells about the locations c (θ + step): S₁ − d N and S₂ − 2 d S₁ + d² N, d = c · step."""

    def change(old: Cells) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        index = old.keys[:, 0]
        there = step.nan_to_num(0.0)[index.clamp(min=0)]
        d = torch.where(index >= 0, old.reference["loc_coefficient"] * there, 0.0)
        n, first, second = (old.values[name] for name in ("n", "first", "second"))
        return (
            {"loc": old.reference["loc"] + d},
            {"first": first - d * n, "second": second - 2 * d * first + d * d * n},
        )

    return cells.updated(change)


def scales(n: Tensor, second: Tensor) -> Tensor:
    """√(S / N), (entries,); NaN where unused."""
    return (second / n).clamp(min=0).sqrt()


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
    step = torch.linalg.lstsq(gram, gradient.unsqueeze(-1), driver=_driver(gram)).solution[:, 0]

    return step, regression_moved(cells, step)


def regression_moved(cells: Cells, step: Tensor) -> Cells:
    """The cells about coefficients + step."""

    def change(old: Cells) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        gram, gradient = old.values["gram"], old.values["gradient"]
        bent = gram @ step
        second = old.values["second"] - 2 * (gradient @ step) + bent @ step
        return {}, {"second": second.clamp(min=0), "gradient": gradient - bent}

    return cells.updated(change)


def _driver(matrix: Tensor) -> str:
    return "gelsd" if matrix.device.type == "cpu" else "gels"


# ------------------------------------------------------------------------------ multivariate normal


def mvn_locations(cells: Cells, dim: int) -> tuple[Tensor, Tensor]:
    """Rows of entries (rows, D) and their steps (rows, D): Σ Λ N δ = Σ Λ S₁ over a row's cells.

    Where a row stands under one covariance alone, this is δ = S₁ / N.
    """
    rows, inverse = torch.unique(cells.keys[:, :dim], dim=0, return_inverse=True)
    c = cells.reference["loc_coefficient"][:, 0]
    steps = torch.full((len(rows), dim), torch.nan, dtype=torch.float64, device=rows.device)
    for i in range(len(rows)):
        mine = inverse == i
        n, first = cells.values["n"][mine], cells.values["first"][mine]
        patterns = cells.keys[mine, dim:]
        constant = bool((patterns[0] < 0).all())
        one = cells.reference["tril" if constant else "tril_coefficient"][mine]
        if _same(patterns) and _same(one):
            steps[i] = (c[mine, None] * first).sum(0) / (c[mine] ** 2 * n).sum()
            continue
        precision = torch.cholesky_inverse(cells.reference["tril"][mine])
        left = ((c[mine] ** 2 * n)[:, None, None] * precision).sum(0)
        right = (c[mine, None, None] * precision @ first.unsqueeze(-1)).sum(0)
        steps[i] = torch.linalg.solve(left, right).squeeze(-1)
    return rows, steps


def _same(values: Tensor) -> bool:
    return bool((values == values[0]).all())


def mvn_moved(cells: Cells, rows: Tensor, steps: Tensor, dim: int) -> Cells:
    """The cells about the new locations."""
    by_entry = torch.zeros(int(rows.max()) + 2, dtype=torch.float64, device=rows.device)
    keep = rows >= 0
    by_entry[rows[keep]] = steps[keep].nan_to_num(0.0)

    def change(old: Cells) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        index = old.keys[:, :dim]
        d = torch.where(index >= 0, by_entry[index.clamp(min=0)], 0.0)
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
