"""Weights that change over the steps of a fit, as 0-dim tensors that are updated in place."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lvppl.errors import ProgramError

__all__ = ["CyclicSchedule", "LinearSchedule", "Schedule"]


class Schedule(ABC):
    """A number as a function of the step.

    ``value`` is a 0-dim tensor that ``advance_to`` fills in place, so that a captured step sees it
    move. A fit advances the schedules of its objective before each step; under plain
    ``pyro.infer.SVI`` call ``advance_to`` yourself.
    """

    def __init__(self) -> None:
        self.value: Tensor = torch.tensor(float(self.at(0)), dtype=torch.float64)

    @abstractmethod
    def at(self, step: int) -> float:
        """The number at a step, counted from 0."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(now {float(self.value):.4g})"

    def to(self, device: torch.device | str) -> None:
        """Move ``value`` to a device; a fit does so before its first step."""
        self.value = self.value.to(device)

    def advance_to(self, step: int) -> None:
        """Set ``value`` to the number at ``step``."""
        self.value.fill_(self.at(step))


class LinearSchedule(Schedule):
    """From ``start`` to ``end`` in ``num_steps`` equal steps, then constant.

    With a weight on the rate it is the warm-up of Sønderby et al. 2016, section 2.2.

    Raises:
        ProgramError: ``num_steps`` is not positive, or a weight is negative.
    """

    def __init__(self, start: float, end: float, *, num_steps: int) -> None:
        _check(start, end, num_steps)
        self.start, self.end, self.num_steps = float(start), float(end), num_steps
        super().__init__()

    def at(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(step / self.num_steps, 1.0)


class CyclicSchedule(Schedule):
    """Repeated ramps from ``low`` to ``high`` (Fu et al. 2019, "Cyclical annealing schedule").

    Args:
        low, high: the ends of a ramp.
        period: steps of one cycle.
        ramp: fraction of a cycle that rises; the rest stays at ``high``.

    Raises:
        ProgramError: ``period`` is not positive, ``ramp`` is not in (0, 1], a weight is negative.
    """

    def __init__(self, low: float, high: float, *, period: int, ramp: float = 0.5) -> None:
        _check(low, high, period)
        if not 0 < ramp <= 1:
            raise ProgramError(f"ramp must be a fraction of the cycle in (0, 1], got {ramp}.")
        self.low, self.high, self.period, self.ramp = float(low), float(high), period, ramp
        super().__init__()

    def at(self, step: int) -> float:
        phase = (step % self.period) / (self.period * self.ramp)
        return self.low + (self.high - self.low) * min(phase, 1.0)


def _check(first: float, second: float, num_steps: int) -> None:
    if not (math.isfinite(first) and math.isfinite(second)):
        raise ProgramError(f"A weight must be a finite number, got {first} and {second}.")
    if num_steps < 1:
        raise ProgramError(f"A schedule needs at least one step, got {num_steps}.")
    if min(first, second) < 0:
        raise ProgramError(f"A weight must not be negative, got {min(first, second)}.")
