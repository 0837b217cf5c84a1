"""Sufficient statistics of combinations of entries: moments about the present location.

Taken about it and in float64, nothing cancels, however far from zero the data are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from lvppl.inference.m_step.arguments import Binding, Bound
from lvppl.inference.m_step.cells import Cells
from lvppl.inference.m_step.statistics import Statistics
from lvppl.inference.m_step.weighted import Peeled, unexpanded, weight_total, weighted_total

__all__ = ["as_normal", "coefficient_of", "flat", "gamma", "keys_of", "mvn", "normal"]


def gamma(peeled: Peeled, bound: Mapping[str, Any], into: Statistics) -> None:
    base, value, weight = peeled.base, peeled.value, peeled.weight
    arguments = {n: unexpanded(getattr(base, n)) for n in ("concentration", "rate")}
    shape = torch.broadcast_shapes(*(a.shape for a in arguments.values()))
    into.add_cells(
        "gamma",
        Cells(
            keys_of([bound["concentration"], bound["rate"]], shape, value.device),
            {
                "concentration": flat(arguments["concentration"], shape),
                "rate": flat(arguments["rate"], shape),
                "coefficient": coefficient_of(bound["rate"], shape, value.device),
            },
            {
                "n": weight_total(weight, value, shape).flatten(),
                "sum": weighted_total(weight, value, shape).flatten(),
                "log": weighted_total(weight, _log(value), shape).flatten(),
            },
        ),
    )


def _log(value: Tensor) -> Tensor:
    """ln of values that are positive wherever they have weight."""
    return value.clamp(min=torch.finfo(value.dtype).tiny).log()


def as_normal(peeled: Peeled) -> tuple[Any, Tensor]:
    """A Normal and its value; those of the logarithm for a LogNormal."""
    if isinstance(peeled.base, td.LogNormal):
        return peeled.base.base_dist, _log(peeled.value)
    return peeled.base, peeled.value


def normal(peeled: Peeled, bound: Mapping[str, Any], into: Statistics) -> None:
    base, value = as_normal(peeled)
    loc, scale = unexpanded(base.loc), unexpanded(base.scale)
    shape = torch.broadcast_shapes(loc.shape, scale.shape)
    residual = value - loc
    weighted = peeled.weight * residual
    into.add_cells(
        "normal",
        Cells(
            keys_of([bound["loc"], bound["scale"]], shape, value.device),
            {
                "loc": flat(loc, shape),
                "loc_coefficient": coefficient_of(bound["loc"], shape, value.device),
                "scale": flat(scale, shape),
                "scale_coefficient": coefficient_of(bound["scale"], shape, value.device),
            },
            {
                "n": weight_total(peeled.weight, residual, shape).flatten(),
                "first": weighted_total(weighted, weighted.new_ones(()), shape).flatten(),
                "second": weighted_total(weighted, residual, shape).flatten(),
            },
        ),
    )


def mvn(peeled: Peeled, bound: Mapping[str, Any], into: Statistics) -> None:
    base, value, weight = peeled.base, peeled.value, peeled.weight
    loc, tril = unexpanded(base.loc, 1), unexpanded(base._unbroadcasted_scale_tril, 2)
    D = loc.shape[-1]
    batch = torch.broadcast_shapes(loc.shape[:-1], tril.shape[:-2])
    residual = value - loc
    n, first, second = _moments(weight, residual, batch)
    loc_index, tril_index = (
        _index(bound[n], a.shape) for n, a in (("loc", loc), ("scale_tril", tril))
    )
    device = value.device
    keys = torch.cat(
        [
            loc_index.to(device).expand((*batch, D)).reshape(-1, D),
            tril_index.to(device).expand((*batch, D, D)).reshape(-1, D * D),
        ],
        1,
    )
    coefficient = torch.ones(tril.shape, dtype=torch.float64)
    if isinstance(bound["scale_tril"], Bound):
        coefficient = bound["scale_tril"].coefficient
    loc_coefficient = torch.ones(loc.shape, dtype=torch.float64)
    if isinstance(bound["loc"], Bound):
        loc_coefficient = bound["loc"].coefficient
    into.add_cells(
        f"mvn {D}",
        Cells(
            keys,
            {
                "loc": loc.double().expand((*batch, D)).reshape(-1, D),
                "loc_coefficient": loc_coefficient.to(device).expand((*batch, D)).reshape(-1, D),
                "tril": tril.double().expand((*batch, D, D)).reshape(-1, D, D),
                "tril_coefficient": coefficient[..., 0, 0].to(device).expand(batch).reshape(-1),
            },
            {
                "n": n.reshape(-1),
                "first": first.reshape(-1, D),
                "second": second.reshape(-1, D, D),
            },
        ),
    )


def _moments(weight: Tensor, residual: Tensor, batch: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """Σ r, Σ r e and Σ r e eᵀ over everything that a cell of ``batch`` is shared by."""
    full = torch.broadcast_shapes(weight.shape, residual.shape[:-1], batch)
    target = (1,) * (len(full) - len(batch)) + tuple(batch)
    D = residual.shape[-1]
    w = weight.expand(full)
    e = residual.expand((*full, D))
    rows = [i for i in range(len(full)) if target[i] == 1]
    cells = [i for i in range(len(full)) if target[i] != 1]
    w = w.permute(cells + rows).reshape(batch.numel(), -1)
    e = e.permute([*cells, *rows, len(full)]).reshape(batch.numel(), -1, D)
    weighted = w.unsqueeze(-1) * e
    return (
        w.sum(-1).double().reshape(batch),
        weighted.sum(-2).double().reshape((*batch, D)),
        (weighted.mT @ e).double().reshape((*batch, D, D)),
    )


def _index(binding: Binding | None, shape: torch.Size) -> Tensor:
    return binding.index if isinstance(binding, Bound) else torch.full(shape, -1)


def keys_of(bindings: Sequence[Binding | None], shape: torch.Size, device: torch.device) -> Tensor:
    """The entries that meet in each element of ``shape``, (elements, arguments); -1: a constant."""
    columns = []
    for binding in bindings:
        index = binding.index if isinstance(binding, Bound) else torch.full((), -1)
        columns.append(index.to(device).expand(shape).flatten())
    return torch.stack(columns, 1)


def coefficient_of(binding: Binding | None, shape: torch.Size, device: torch.device) -> Tensor:
    """c of each element of ``shape``; 1 where the argument is bound to nothing."""
    one = torch.ones((), dtype=torch.float64)
    value = binding.coefficient if isinstance(binding, Bound) else one
    return value.to(device).expand(shape).flatten()


def flat(value: Tensor, shape: torch.Size) -> Tensor:
    return value.detach().double().expand(shape).flatten()
