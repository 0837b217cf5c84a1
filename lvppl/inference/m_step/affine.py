"""Arguments bound to no single entry: which parameters they depend on, and whether affinely.

A location that is an affine function of real parameters is a regression. Its Jacobian is found by
moving one entry at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lvppl.inference.m_step.arguments import Affine, Binding, Key, Unbound
from lvppl.inference.m_step.entries import Parameter, Parameters

__all__ = ["loose_bindings"]

_MOST_ENTRIES = 512
_MOST_JACOBIAN = 2**26

Point = Mapping[str, Tensor]
"""Unconstrained parameters, by name."""
Arguments = dict[Key, Tensor]


def loose_bindings(
    keys: Sequence[Key],
    roles: Mapping[Key, str],
    at: Callable[[Point], Arguments],
    parameters: Parameters,
    points: Sequence[Point],
) -> dict[Key, Binding]:
    """For arguments bound to no single entry: the parameters they depend on, and how.

    Args:
        at: the arguments of the program where the given parameters have been moved to.
        points: at least two, at random.
    """
    base = at(points[0])
    depends: dict[Key, set[str]] = {key: set() for key in keys}
    for name in parameters:
        moved = at({**points[0], name: points[1][name]})
        for key in keys:
            if moved[key].shape != base[key].shape or not torch.equal(moved[key], base[key]):
                depends[key].add(name)
    found: dict[Key, Binding] = {key: Unbound(frozenset(depends[key])) for key in keys}
    for key in keys:
        owners = [parameters[name] for name in parameters if name in depends[key]]
        if roles[key] == "location" and _small(owners, base[key]):
            affine = _affine(key, at, owners, points)
            found[key] = affine or found[key]
    return found


def _small(owners: Sequence[Parameter], argument: Tensor) -> bool:
    """Whether a Jacobian can be held, of parameters that take any real value."""
    size = sum(parameter.size for parameter in owners)
    real = all(torch.equal(parameter.value, parameter.tensor.detach()) for parameter in owners)
    return real and size <= _MOST_ENTRIES and size * argument.numel() <= _MOST_JACOBIAN


def _affine(
    key: Key,
    at: Callable[[Point], Arguments],
    owners: Sequence[Parameter],
    points: Sequence[Point],
) -> Affine | None:
    """The Jacobian by moving one entry at a time; ``None`` where the argument is not affine."""
    zero = {p.name: torch.zeros_like(p.tensor) for p in owners}
    others = {n: v for n, v in points[0].items() if n not in zero}
    base = at({**others, **zero})[key]
    columns, entries = [], []
    for parameter in owners:
        for i in range(parameter.size):
            unit = torch.zeros_like(parameter.tensor)
            unit.view(-1)[i] = 1.0
            columns.append(at({**others, **zero, parameter.name: unit})[key] - base)
            entries.append(parameter.offset + i)
    if any(column.shape != base.shape for column in columns):
        return None
    jacobian = torch.stack(columns, -1).double()
    tolerance = 1e-8 if base.dtype == torch.float64 else 1e-3
    for point in points[:2]:
        value = torch.cat([point[p.name].flatten() for p in owners]).double()
        predicted = base.double() + jacobian @ value.to(jacobian)
        actual = at({**others, **{p.name: point[p.name] for p in owners}})[key].double()
        size = float(actual.abs().max()) + 1.0
        if float((predicted - actual).abs().max()) > tolerance * size:
            return None
    return Affine(torch.tensor(entries), jacobian)
