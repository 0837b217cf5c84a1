"""Supports of distributions on equally spaced points."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from lvppl.errors import ProgramError

__all__ = ["FiniteGrid", "Lattice", "require_on_grid"]


def _is_near_integer(index: Tensor) -> Tensor:
    """Whether ``index`` is an integer but for rounding: a few units in the last place, or 1e-3."""
    slack = 1e-3 + 4 * torch.finfo(index.dtype).eps * index.abs()
    return (index - index.round()).abs() <= slack


class Lattice(constraints.Constraint):
    """The points ``step * k`` for all integers k.

    A value passes when it is within a thousandth of a step of a point: what rounding leaves.
    """

    is_discrete = True
    event_dim = 0

    def __init__(self, step: float) -> None:
        self.step = step
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return _is_near_integer(torch.as_tensor(value / self.step))

    def __repr__(self) -> str:
        return f"the lattice of multiples of {self.step:g}"


class FiniteGrid(constraints.Constraint):
    """The ``num_levels`` equally spaced points from ``low`` to ``high``, both included."""

    is_discrete = True
    event_dim = 0

    def __init__(self, low: float, high: float, num_levels: int) -> None:
        self.low, self.high, self.num_levels = low, high, num_levels
        super().__init__()

    @property
    def step(self) -> float:
        """The distance between two neighbours."""
        return (self.high - self.low) / (self.num_levels - 1)

    def check(self, value: Tensor) -> Tensor:
        index = torch.as_tensor((value - self.low) / self.step)
        inside = (index > -0.5) & (index < self.num_levels - 0.5)
        return inside & _is_near_integer(index)

    def __repr__(self) -> str:
        return f"the grid of {self.num_levels} levels from {self.low:g} to {self.high:g}"


def require_on_grid(
    distribution: Distribution, value: Tensor, grid: constraints.Constraint
) -> None:
    """Raise :class:`~lvppl.errors.ProgramError` naming the first value off the grid."""
    on_grid = grid.check(value)
    if on_grid.all():
        return
    where = (~on_grid).nonzero()[0].tolist()
    worst = float(value[tuple(where)].detach())
    if math.isnan(worst):
        remedy = "fill or mask missing values"
    else:
        remedy = "round the values to the grid, or describe the grid that they have"
    raise ProgramError(
        f"{type(distribution).__name__} gives probability to {grid} only; "
        f"the value at index {tuple(where)} is {worst:.9g}: {remedy}."
    )
