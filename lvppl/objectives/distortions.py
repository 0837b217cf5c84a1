"""Distortions D(y, ŷ) between data and reconstruction, element by element."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["DISTORTIONS", "absolute_error", "hamming", "squared_error"]


def squared_error(y: Tensor, reconstruction: Tensor) -> Tensor:
    """(y − ŷ)²"""
    return (y - reconstruction).square()


def absolute_error(y: Tensor, reconstruction: Tensor) -> Tensor:
    """|y − ŷ|"""
    return (y - reconstruction).abs()


def hamming(y: Tensor, reconstruction: Tensor) -> Tensor:
    """The probability that a binary y differs from a draw with mean ŷ: y (1 − ŷ) + (1 − y) ŷ.

    It is the Hamming distance where ŷ is 0 or 1, and differentiable in between.
    """
    y = y.to(torch.promote_types(y.dtype, reconstruction.dtype))
    return y * (1 - reconstruction) + (1 - y) * reconstruction


DISTORTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared": squared_error,
    "absolute": absolute_error,
    "hamming": hamming,
}
"""Distortions by name."""
