"""From weighted sites to sufficient statistics, by entry or by cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from lvppl.inference.m_step.bindings import Affine, Binding, Bound, Key
from lvppl.inference.m_step.cells import Cells
from lvppl.inference.m_step.families import family_of
from lvppl.inference.m_step.weighted import Peeled, Weighted, peel, sum_to, unexpanded

__all__ = ["Statistics", "gather"]


@dataclass
class Statistics:
    """What an M-step needs of the data; it adds up over batches.

    Attributes:
        by_entry: statistics of one entry each, (entries,) float64, by name: ``count`` (simplex),
            ``success`` and ``failure`` (probability), ``power`` N and ``slope`` S of N ln θ − S θ
            (rate).
        cells: of combinations, by form: ``normal``, ``mvn D``, ``gamma``, ``regression G``.
    """

    num_entries: int
    device: torch.device
    by_entry: dict[str, Tensor] = field(default_factory=dict)
    cells: dict[str, Cells] = field(default_factory=dict)

    def add(self, name: str, index: Tensor, value: Tensor) -> None:
        """Add values to their entries; those of constants (index -1) are left out."""
        if name not in self.by_entry:
            self.by_entry[name] = torch.zeros(
                self.num_entries, dtype=torch.float64, device=self.device
            )
        index, value = index.flatten(), value.double().expand(index.shape).flatten()
        bound = index >= 0
        self.by_entry[name].index_add_(0, index[bound], value[bound])

    def add_cells(self, form: str, cells: Cells) -> None:
        cells = cells.compressed()
        known = self.cells.get(form)
        self.cells[form] = cells if known is None else Cells.joined([known, cells])

    def scaled(self, factor: float) -> Statistics:
        return Statistics(
            self.num_entries,
            self.device,
            {name: value * factor for name, value in self.by_entry.items()},
            {form: cells.scaled(factor) for form, cells in self.cells.items()},
        )

    @staticmethod
    def joined(parts: Sequence[Statistics]) -> Statistics:
        total = Statistics(parts[0].num_entries, parts[0].device)
        for part in parts:
            for name, value in part.by_entry.items():
                known = total.by_entry.get(name)
                total.by_entry[name] = value if known is None else known + value
        for form in {form for part in parts for form in part.cells}:
            total.cells[form] = Cells.joined([p.cells[form] for p in parts if form in p.cells])
        return total


def gather(
    terms: Sequence[Weighted], bindings: Mapping[Key, Binding], into: Statistics
) -> Statistics:
    """Add the statistics of every site whose arguments are bound."""
    for term in terms:
        peeled = peel(term)
        family = family_of(peeled.base)
        if family is None:
            continue
        bound = {name: bindings.get((term.name, name)) for name in family.roles}
        if all(not isinstance(b, Bound | Affine) or _constant(b) for b in bound.values()):
            continue
        _COLLECT[family.name](peeled, bound, into)
    return into


def _constant(binding: Binding) -> bool:
    return isinstance(binding, Bound) and binding.is_constant


Collect = Callable[[Peeled, Mapping[str, Any], Statistics], None]


def _total(weight: Tensor, value: Tensor, shape: torch.Size) -> Tensor:
    """Σ of the weights over everything that an argument of ``shape`` is shared by."""
    full = torch.broadcast_shapes(weight.shape, value.shape, shape)
    weight = weight.reshape((1,) * (len(full) - weight.dim()) + weight.shape)
    target = (1,) * (len(full) - len(shape)) + tuple(shape)
    repeats = 1
    for i, size in enumerate(full):
        if target[i] == 1 and weight.shape[i] == 1:
            repeats *= size  # the same weight so many times
    summed = sum_to(weight, target).double() * repeats
    return summed.expand(target).reshape(shape)


def _share(weight: Tensor, value: Tensor, shape: torch.Size) -> Tensor:
    """Σ of weight × value over everything that an argument of ``shape`` is shared by."""
    product = weight * value
    full = torch.broadcast_shapes(product.shape, shape)
    target = (1,) * (len(full) - len(shape)) + tuple(shape)
    return sum_to(product.expand(full), target).double().expand(target).reshape(shape)


# ------------------------------------------------------------------------------- by entry: simplex


def _categorical(peeled: Peeled, bound: Mapping[str, Any], into: Statistics) -> None:
    index = bound["probs"].index
    batch, num = index.shape[:-1], index.shape[-1]
    value, weight = peeled.value.long().clamp(0, num - 1), peeled.weight
    full = torch.broadcast_shapes(weight.shape, value.shape, batch)
    # what neither the value nor the row depends on is summed first
    shared = [
        i
        for i in range(-len(full), 0)
        if _size(value, i) == 1 and (len(batch) < -i or batch[i] == 1) and full[i] > 1
    ]
    weight = weight.expand(full).sum(shared, keepdim=True) if shared else weight.expand(full)
    cell = torch.arange(batch.numel(), device=value.device).reshape(batch)
    flat = (cell * num + value).expand(weight.shape)
    counts = torch.zeros(batch.numel() * num, dtype=torch.float64, device=value.device)
    counts.index_add_(0, flat.flatten(), weight.double().flatten())
    into.add("count", index.to(value.device), counts.reshape(index.shape))


def _size(tensor: Tensor, dim: int) -> int:
    return tensor.shape[dim] if tensor.dim() >= -dim else 1


def _multinomial(peeled: Peeled, bound: Mapping[str, Any], into: Statistics) -> None:
    index = bound["probs"].index.to(peeled.value.device)
    into.add("count", index, _share(peeled.weight.unsqueeze(-1), peeled.value, index.shape))


# --------------------------------------------------------------------------- by entry: probability


def _bernoulli(peeled: Peeled, bound: Mapping[str, Any], into: Statistics) -> None:
    index = bound["probs"].index.to(peeled.value.device)
    total = getattr(peeled.base, "total_count", torch.ones(()).to(peeled.weight))
    value = peeled.value.to(peeled.weight)
    into.add("success", index, _share(peeled.weight, value, index.shape))
    into.add("failure", index, _share(peeled.weight, total - value, index.shape))


def _geometric(peeled: Peeled, bound: Mapping[str, Any], into: Statistics) -> None:
    index = bound["probs"].index.to(peeled.value.device)
    into.add("success", index, _total(peeled.weight, peeled.value, index.shape))
    into.add("failure", index, _share(peeled.weight, peeled.value, index.shape))


# ---------------------------------------------------------------------------------- by entry: rate


def _poisson(peeled: Peeled, bound: Mapping[str, Any], into: Statistics) -> None:
    binding = bound["rate"]
    index = binding.index.to(peeled.value.device)
    exposure = _total(peeled.weight, peeled.value, index.shape) * binding.coefficient.to(
        index.device
    )
    into.add("power", index, _share(peeled.weight, peeled.value.to(peeled.weight), index.shape))
    into.add("slope", index, exposure)


def _exponential(peeled: Peeled, bound: Mapping[str, Any], into: Statistics) -> None:
    binding = bound["rate"]
    index = binding.index.to(peeled.value.device)
    slope = _share(peeled.weight, peeled.value, index.shape) * binding.coefficient.to(index.device)
    into.add("power", index, _total(peeled.weight, peeled.value, index.shape))
    into.add("slope", index, slope)


# ---------------------------------------------------------------------------------------- by cells


def _gamma(peeled: Peeled, bound: Mapping[str, Any], into: Statistics) -> None:
    base, value, weight = peeled.base, peeled.value, peeled.weight
    arguments = {n: unexpanded(getattr(base, n)) for n in ("concentration", "rate")}
    shape = torch.broadcast_shapes(*(a.shape for a in arguments.values()))
    into.add_cells(
        "gamma",
        Cells(
            _keys([bound["concentration"], bound["rate"]], shape, value.device),
            {
                "concentration": _flat(arguments["concentration"], shape),
                "rate": _flat(arguments["rate"], shape),
                "coefficient": _coefficient(bound["rate"], shape, value.device),
            },
            {
                "n": _total(weight, value, shape).flatten(),
                "sum": _share(weight, value, shape).flatten(),
                "log": _share(weight, _log(value), shape).flatten(),
            },
        ),
    )


def _log(value: Tensor) -> Tensor:
    """ln of values that are positive wherever they have weight."""
    return value.clamp(min=torch.finfo(value.dtype).tiny).log()


def _normal(peeled: Peeled, bound: Mapping[str, Any], into: Statistics) -> None:
    base, value = peeled.base, peeled.value
    if isinstance(base, td.LogNormal):
        base, value = base.base_dist, _log(value)
    if isinstance(bound["loc"], Affine):
        _regression(base, value, peeled.weight, bound, into)
        return
    loc, scale = unexpanded(base.loc), unexpanded(base.scale)
    shape = torch.broadcast_shapes(loc.shape, scale.shape)
    residual = value - loc
    weighted = peeled.weight * residual
    into.add_cells(
        "normal",
        Cells(
            _keys([bound["loc"], bound["scale"]], shape, value.device),
            {
                "loc": _flat(loc, shape),
                "loc_coefficient": _coefficient(bound["loc"], shape, value.device),
                "scale": _flat(scale, shape),
                "scale_coefficient": _coefficient(bound["scale"], shape, value.device),
            },
            {
                "n": _total(peeled.weight, residual, shape).flatten(),
                "first": _share(weighted, weighted.new_ones(()), shape).flatten(),
                "second": _share(weighted, residual, shape).flatten(),
            },
        ),
    )


def _regression(
    base: Any, value: Tensor, weight: Tensor, bound: Mapping[str, Any], into: Statistics
) -> None:
    """Normal equations about the present parameters, one cell for each scale."""
    affine: Affine = bound["loc"]
    loc, scale = unexpanded(base.loc), unexpanded(base.scale)
    J = affine.jacobian.to(value.device)
    residual = (value - loc).double()
    full = torch.broadcast_shapes(weight.shape, residual.shape, scale.shape)
    cell = torch.arange(scale.numel(), device=value.device).reshape(scale.shape)
    cell = cell.expand(full).flatten()
    w = weight.double().expand(full).flatten()
    r = residual.expand(full).flatten()
    J = J.expand((*full, J.shape[-1])).reshape(len(w), -1)
    count = scale.numel()

    def summed(rows: Tensor) -> Tensor:
        zeros = torch.zeros((count, *rows.shape[1:]), dtype=torch.float64, device=rows.device)
        return zeros.index_add_(0, cell, rows)

    gram = torch.stack(
        [(J[cell == c] * w[cell == c, None]).mT @ J[cell == c] for c in range(count)]
    )
    into.add_cells(
        f"regression {affine.group}",
        Cells(
            _keys([bound["scale"]], scale.shape, value.device),
            {
                "scale": _flat(scale, scale.shape),
                "scale_coefficient": _coefficient(bound["scale"], scale.shape, value.device),
            },
            {
                "n": summed(w),
                "second": summed(w * r * r),
                "gradient": summed(J * (w * r)[:, None]),
                "gram": gram,
            },
        ),
    )


def _mvn(peeled: Peeled, bound: Mapping[str, Any], into: Statistics) -> None:
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


def _keys(bindings: Sequence[Binding | None], shape: torch.Size, device: torch.device) -> Tensor:
    columns = []
    for binding in bindings:
        index = binding.index if isinstance(binding, Bound) else torch.full((), -1)
        columns.append(index.to(device).expand(shape).flatten())
    return torch.stack(columns, 1)


def _coefficient(binding: Binding | None, shape: torch.Size, device: torch.device) -> Tensor:
    one = torch.ones((), dtype=torch.float64)
    value = binding.coefficient if isinstance(binding, Bound) else one
    return value.to(device).expand(shape).flatten()


def _flat(value: Tensor, shape: torch.Size) -> Tensor:
    return value.detach().double().expand(shape).flatten()


_COLLECT: dict[str, Collect] = {
    "Categorical": _categorical,
    "OneHotCategorical": _multinomial,
    "Multinomial": _multinomial,
    "Bernoulli": _bernoulli,
    "Binomial": _bernoulli,
    "Geometric": _geometric,
    "Poisson": _poisson,
    "Exponential": _exponential,
    "Gamma": _gamma,
    "Normal": _normal,
    "LogNormal": _normal,
    "MultivariateNormal": _mvn,
}
