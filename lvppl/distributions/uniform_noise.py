"""A location with additive uniform noise: the guide that stands in for rounding."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from lvppl.distributions.rounding import require_step

__all__ = ["UniformNoise"]


class UniformNoise(TorchDistribution):
    r"""Uniform on the interval of width ``step`` about ``loc``: q(z) = 1/step.

    As ``Uniform(loc - step/2, loc + step/2)``, for use as a guide: there, rounding in float32 now
    and then puts a draw on an endpoint or outside, where ln q = −∞ ends the training. Here the
    density is 1/step up to rounding beyond the endpoints, and its gradient in ``loc`` is zero.

    :param loc: centre of the interval, any batch shape.
    :param step: width of the interval, a positive number, in the units of ``loc``.
    :raises ProgramError: if ``step`` is not a positive finite number.

    Source: Ballé, Laparra, Simoncelli (2017), "End-to-end optimized image compression", section 3.
    """

    arg_constraints: ClassVar = {"loc": constraints.real}
    has_rsample = True

    def __init__(
        self, loc: Tensor, step: float = 1.0, *, validate_args: bool | None = None
    ) -> None:
        self.loc, self.step = torch.as_tensor(loc), require_step(step)
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.interval(self.loc - self._reach(), self.loc + self._reach())

    def _reach(self) -> Tensor:
        """Half the step, and what rounding may add at this location."""
        eps = torch.finfo(self.loc.dtype).eps
        return 0.5 * self.step + 2 * eps * (self.loc.detach().abs() + self.step)

    def expand(self, batch_shape: Any, _instance: Any = None) -> UniformNoise:
        new = self._get_checked_instance(UniformNoise, _instance)
        new.loc, new.step = self.loc.expand(torch.Size(batch_shape)), self.step
        super(UniformNoise, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        inside = (value - self.loc).abs() <= self._reach()
        log_density = torch.full_like(self.loc, -math.log(self.step))
        return torch.where(inside, log_density, -math.inf)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        loc = self.loc.expand(self._extended_shape(torch.Size(sample_shape)))
        return loc + self.step * (torch.rand_like(loc) - 0.5)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return torch.full_like(self.loc, self.step**2 / 12)

    def entropy(self) -> Tensor:
        """ln step, in nats."""
        return torch.full_like(self.loc, math.log(self.step))
