"""Mean, variance and tail of a stream of weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lvppl.inference.psis import khat_from_tail, tail_size

__all__ = ["WeightSums"]


class WeightSums:
    """Mean, variance and upper tail of the weights of some data, from a stream of draws."""

    def __init__(self, num_samples: int) -> None:
        self.keep = min(tail_size(num_samples) + 1, num_samples)
        self.count = 0
        self.observed = (0, 0)
        """Discrete and continuous values that these data score."""

    def add(self, log_weight: Tensor) -> None:
        """Add draws, (particles, data)."""
        self.epsilon = torch.finfo(log_weight.dtype).eps
        new = log_weight.to(torch.float64)
        if self.count == 0:
            self.largest, self.smallest = new[:0], new[0]
            self.mean = self.squares = torch.zeros_like(new[0])
            self.reference = torch.full_like(new[0], -math.inf)
        both = torch.cat([self.largest, new])
        self.largest = both.topk(min(self.keep, both.shape[0]), dim=0, sorted=False).values
        self.smallest = torch.minimum(self.smallest, new.amin(0))
        self._add_moments(new)

    def _add_moments(self, new: Tensor) -> None:
        """Chan, Golub & LeVeque's update of mean and squared deviations, weights over exp(max)."""
        top = torch.maximum(self.reference, new.amax(0))
        top = top.where(top > -math.inf, torch.zeros_like(top))  # all weights zero so far
        shrink = (self.reference - top).exp()
        old_mean, old_squares = self.mean * shrink, self.squares * shrink.square()
        weight = (new - top).exp()
        mean = weight.mean(0)
        squares = (weight - mean).square().sum(0)
        number = new.shape[0]
        total = self.count + number
        gap = mean - old_mean
        self.mean = old_mean + gap * (number / total)
        self.squares = old_squares + squares + gap.square() * (self.count * number / total)
        self.reference = top.where(self.mean > 0, torch.full_like(top, -math.inf))
        self.count = total

    @property
    def log_prob(self) -> Tensor:
        return torch.where(self.mean > 0, self.reference + self.mean.log(), -math.inf)

    @property
    def std_error(self) -> Tensor:
        if self.count < 2:
            return torch.full_like(self.mean, math.nan)
        return (self.squares / (self.count - 1) / self.count).sqrt() / self.mean

    @property
    def ess(self) -> Tensor:
        mean_square = self.squares / self.count + self.mean.square()
        return torch.where(self.mean > 0, self.count * self.mean.square() / mean_square, 0.0)

    @property
    def khat(self) -> Tensor:
        return khat_from_tail(self.largest, self.smallest, self.count, epsilon=self.epsilon)
