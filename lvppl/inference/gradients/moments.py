"""Mean and variance of gradients, by running sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["RunningMoments", "flat"]


def flat(gradients: Sequence[Tensor]) -> Tensor:
    """Gradients one after another, (elements,), float64."""
    device = gradients[0].device
    return torch.cat([g.detach().flatten().to(device, torch.float64) for g in gradients])


class RunningMoments:
    """Mean and variance of each element of a vector, without keeping what was added.

    Source: Welford 1962, Technometrics 4.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._square: Tensor | None = None

    def add(self, value: Tensor) -> None:
        self.count += 1
        if self._mean is None or self._square is None:
            self._mean, self._square = value.clone(), torch.zeros_like(value)
            return
        step = value - self._mean
        self._mean += step / self.count
        self._square += step * (value - self._mean)

    @property
    def mean(self) -> Tensor:
        assert self._mean is not None
        return self._mean

    @property
    def variance(self) -> Tensor:
        """Of one value, unbiased."""
        assert self._square is not None
        return self._square / (self.count - 1)
