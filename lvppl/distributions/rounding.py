"""Rounding to a grid, with a gradient."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lvppl.errors import ProgramError

__all__ = ["require_step", "round_to_step", "straight_through_round"]


def require_step(step: Any) -> float:
    """``step`` as a float; raises :class:`ProgramError` unless it is a positive finite number."""
    is_number = isinstance(step, (int, float)) and not isinstance(step, bool)
    if not is_number or not (math.isfinite(step) and step > 0):
        raise ProgramError(
            f"step must be a positive finite number, but is {step!r}. "
            "For a step per dimension, or a learned one, scale the variable instead."
        )
    return float(step)


def round_to_step(x: Tensor, step: float) -> Tensor:
    """The multiple of ``step`` nearest to ``x`` (ties to even multiples). No gradient passes."""
    return (x / step).round() * step


def straight_through_round(x: Tensor, step: float = 1.0) -> Tensor:
    """Round ``x`` to the nearest multiple of ``step``; the gradient is that of the identity.

    The value is exactly a multiple of ``step`` (``x + (round(x) - x)`` would miss by an ulp).

    :param x: any shape.
    :param step: distance between two grid points, in the units of ``x``.
    :raises ProgramError: if ``step`` is not a positive finite number.

    Source: Bengio, Léonard, Courville (2013), "Estimating or propagating gradients through
    stochastic neurons", section 4 (straight-through estimator).
    """
    x_detached = x.detach()
    return round_to_step(x_detached, require_step(step)) + (x - x_detached)
