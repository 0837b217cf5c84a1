"""A logistic distribution on a finite grid of levels."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid

from lvppl.distributions.bin_mass import log1mexp
from lvppl.distributions.grid import FiniteGrid, require_on_grid
from lvppl.errors import ProgramError

__all__ = ["DiscretizedLogistic"]


class DiscretizedLogistic(TorchDistribution):
    r"""A logistic variable rounded to a grid of levels, the two edge levels taking the tails.

    .. math::

        P(x) = σ\Big(\frac{x + Δ/2 - loc}{scale}\Big) - σ\Big(\frac{x - Δ/2 - loc}{scale}\Big),
        \qquad x \in \{low, low + Δ, \dots, high\}

    with σ(∞) = 1 in the first term at x = high and σ(−∞) = 0 in the second at x = low. The
    spacing is Δ = (high − low)/(num_levels − 1). Computed in log space without cancellation.

    :param loc: location, in the units of the data; any shape.
    :param scale: positive scale, in the units of the data; broadcasts against ``loc``.
    :param low: lowest level. :param high: highest level.
    :param num_levels: number of levels, both ends included: 256 for 8-bit pixels.
    :raises ProgramError: for fewer than two levels, ``high <= low``, or a value off the grid
        (under validation).

    Source: Kingma et al. (2016), "Improving variational inference with inverse autoregressive
    flow", appendix; Salimans et al. (2017), "PixelCNN++", equation 2.
    """

    arg_constraints: ClassVar = {"loc": constraints.real, "scale": constraints.positive}
    has_rsample = False
    has_enumerate_support = True

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        *,
        low: float = 0.0,
        high: float = 1.0,
        num_levels: int = 256,
        validate_args: bool | None = None,
    ) -> None:
        if num_levels < 2 or not high > low:
            raise ProgramError(
                "DiscretizedLogistic needs at least two levels and high > low, but got "
                f"low={low!r}, high={high!r}, num_levels={num_levels!r}."
            )
        self.low, self.high, self.num_levels = float(low), float(high), int(num_levels)
        self.loc, self.scale = broadcast_all(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> FiniteGrid:
        return FiniteGrid(self.low, self.high, self.num_levels)

    @property
    def step(self) -> float:
        """The spacing Δ of the levels."""
        return self.support.step

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiscretizedLogistic:
        new = self._get_checked_instance(DiscretizedLogistic, _instance)
        new.low, new.high, new.num_levels = self.low, self.high, self.num_levels
        new.loc = self.loc.expand(torch.Size(batch_shape))
        new.scale = self.scale.expand(torch.Size(batch_shape))
        super(DiscretizedLogistic, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            require_on_grid(self, value, self.support)
        half = 0.5 * self.step / self.scale
        middle = (value - self.loc) / self.scale
        # σ(b) − σ(a) = σ(b) σ(−a) (1 − exp(a − b)); an edge level lacks its outer bound
        log_below_upper = logsigmoid(middle + half)
        log_above_lower = logsigmoid(half - middle)
        inner = log_below_upper + log_above_lower + log1mexp(2 * half)
        is_lowest = value < self.low + 0.5 * self.step
        is_highest = value > self.high - 0.5 * self.step
        return torch.where(
            is_lowest, log_below_upper, torch.where(is_highest, log_above_lower, inner)
        )

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            loc = self.loc.expand(self._extended_shape(torch.Size(sample_shape)))
            x = loc + self.scale * torch.rand_like(loc).logit()
            level = ((x - self.low) / self.step).round().clamp(0, self.num_levels - 1)
            return self.low + self.step * level

    def enumerate_support(self, expand: bool = True) -> Tensor:
        levels = torch.arange(self.num_levels, dtype=self.loc.dtype, device=self.loc.device)
        values = (self.low + self.step * levels).reshape((-1,) + (1,) * len(self.batch_shape))
        return values.expand((-1, *self.batch_shape)) if expand else values

    def _moment_sums(self) -> tuple[Tensor, Tensor]:
        """E[k] = Σ_k P(level ≥ k) and E[k²] = Σ_k (2k − 1) P(level ≥ k) of the level index k."""
        first, second = torch.zeros_like(self.loc), torch.zeros_like(self.loc)
        for k in range(1, self.num_levels):
            edge = self.low + self.step * (k - 0.5)
            at_least_k = torch.sigmoid((self.loc - edge) / self.scale)
            first, second = first + at_least_k, second + (2 * k - 1) * at_least_k
        return first, second

    @property
    def mean(self) -> Tensor:
        return self.low + self.step * self._moment_sums()[0]

    @property
    def variance(self) -> Tensor:
        first, second = self._moment_sums()
        return self.step**2 * (second - first.square())
