r"""Sufficient statistics of a regression: normal equations about the present coefficients.

.. math:: Q = -\sum_n r_n \Big(\ln c_n θ + \frac{(e_n - J_n δ)^2}{2 c_n^2 θ^2}\Big)

in a step δ of the coefficients, for residuals e, Jacobians J and scales c θ. Numbers c that are
known fold into the weights: one cell for each scale θ that is learned, and one (θ = 1) for all
scales that are not, however many data have scales of their own.

=============  =======================
``n``          Σ r
``second``     Σ r e² / c²
``gradient``   Σ r Jᵀ e / c², (P,)
``gram``       Σ r Jᵀ J / c², (P, P)
=============  =======================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lvppl.inference.m_step.arguments import Affine
from lvppl.inference.m_step.cells import Cells
from lvppl.inference.m_step.moments import as_normal, coefficient_of, flat, keys_of
from lvppl.inference.m_step.statistics import Statistics
from lvppl.inference.m_step.weighted import Peeled, unexpanded

__all__ = ["regression"]


def regression(peeled: Peeled, bound: Mapping[str, Any], into: Statistics) -> None:
    affine: Affine = bound["loc"]
    base, value = as_normal(peeled)
    loc, scale = unexpanded(base.loc), unexpanded(base.scale)
    residual = (value - loc).double()
    full = torch.broadcast_shapes(peeled.weight.shape, residual.shape, scale.shape)
    rows = full.numel()
    J = affine.jacobian.to(value.device)
    J = J.expand((*full, J.shape[-1])).reshape(rows, -1)
    w, e = (x.double().expand(full).reshape(rows) for x in (peeled.weight, residual))
    keys, theta, c = _scales(bound["scale"], scale)
    cell, place = _cells_of(keys, scale.shape, full)
    known = w / c.expand(full).reshape(rows).square()

    def summed(each: Tensor) -> Tensor:
        zeros = each.new_zeros((len(place), *each.shape[1:]))
        return zeros.index_add_(0, cell, each)

    into.add_cells(
        f"regression {affine.group}",
        Cells(
            keys[place],
            {"scale": theta[place], "scale_coefficient": torch.ones_like(theta[place])},
            {
                "n": summed(w),
                "second": summed(known * e.square()),
                "gradient": summed(J * (known * e)[:, None]),
                "gram": _grams(J, known, cell, len(place)),
            },
        ),
    )


def _scales(binding: Any, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each element of a scale c θ: its entry (elements, 1), θ (elements,), and c, shaped.

    A scale that is not learned has c for its value, and θ = 1.
    """
    value, shape = scale.detach().double(), scale.shape
    keys = keys_of([binding], shape, scale.device)
    learned = (keys >= 0).reshape(shape)
    c = torch.where(learned, coefficient_of(binding, shape, scale.device).reshape(shape), value)
    return keys, flat(value / c, shape), c


def _cells_of(keys: Tensor, shape: torch.Size, full: torch.Size) -> tuple[Tensor, Tensor]:
    """The cell of each row, and for each cell an element of the scale that belongs to it."""
    entries, inverse = torch.unique(keys[:, 0], return_inverse=True)
    place = inverse.new_zeros(len(entries))
    place[inverse] = torch.arange(len(keys), device=keys.device)
    return inverse.reshape(shape).expand(full).reshape(-1), place


def _grams(J: Tensor, weight: Tensor, cell: Tensor, count: int) -> Tensor:
    """Σ w Jᵀ J of the rows of each cell, (count, P, P)."""
    if count == 1:
        return ((J * weight[:, None]).mT @ J)[None]
    order = cell.argsort()
    sizes = torch.bincount(cell, minlength=count).tolist()
    parts = zip(J[order].split(sizes), weight[order].split(sizes), strict=True)
    return torch.stack([(rows * w[:, None]).mT @ rows for rows, w in parts])
