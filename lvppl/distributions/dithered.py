"""A continuous distribution with additive uniform noise."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints

from lvppl.distributions.bin_mass import log_bin_mass
from lvppl.distributions.quantized import require_univariate
from lvppl.distributions.rounding import require_step

__all__ = ["Dithered"]


class Dithered(TorchDistribution):
    r"""The density of x + u with x from ``base`` and u uniform on (−step/2, step/2).

    .. math:: p(z) = \frac{F(z + step/2) - F(z - step/2)}{step}, \qquad z \in ℝ

    It is the continuous relaxation of :class:`~lvppl.distributions.Quantized`: on the grid,
    step · p(z) = P(z). As the prior of z under the guide
    :class:`~lvppl.distributions.UniformNoise` (density 1/step), ln q(z) − ln p(z) is
    −ln P(bin of width step about z), a code length in nats: the rate is a rate, not a density.

    :param base: a univariate continuous distribution with a ``cdf``, see
        :func:`~lvppl.distributions.log_bin_mass`.
    :param step: width of the noise, a positive number, in the units of ``base``.
    :raises ProgramError: for a multivariate or discrete base, or a step that is not positive.

    Source: Ballé, Laparra, Simoncelli (2017), "End-to-end optimized image compression",
    equations 9-11; Ballé et al. (2018), "Variational image compression with a scale
    hyperprior", appendix 6.2.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real

    def __init__(
        self, base: Distribution, step: float = 1.0, *, validate_args: bool | None = None
    ) -> None:
        require_univariate(base, "Dithered")
        self.base, self.step = base, require_step(step)
        super().__init__(base.batch_shape, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return self.base.has_rsample

    def expand(self, batch_shape: Any, _instance: Any = None) -> Dithered:
        new = self._get_checked_instance(Dithered, _instance)
        new.base, new.step = self.base.expand(torch.Size(batch_shape)), self.step
        super(Dithered, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return log_bin_mass(self.base, value, self.step) - math.log(self.step)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        x = self.base.rsample(torch.Size(sample_shape))
        return x + self.step * (torch.rand_like(x) - 0.5)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            x = self.base.sample(torch.Size(sample_shape))
            return x + self.step * (torch.rand_like(x) - 0.5)

    @property
    def mean(self) -> Tensor:
        return self.base.mean

    @property
    def variance(self) -> Tensor:
        return self.base.variance + self.step**2 / 12
