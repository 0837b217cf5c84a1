"""A continuous distribution rounded to a grid."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints

from lvppl.distributions.bin_mass import log_bin_mass
from lvppl.distributions.grid import Lattice, require_on_grid
from lvppl.distributions.rounding import require_step, round_to_step
from lvppl.errors import ProgramError

__all__ = ["Quantized", "require_univariate"]


def require_univariate(base: Distribution, name: str) -> None:
    """Raise :class:`ProgramError` unless ``base`` is continuous with an empty event shape."""
    if base.event_shape:
        raise ProgramError(
            f"{name} needs a univariate base, but {type(base).__name__} has event shape "
            f"{tuple(base.event_shape)}: write {name}(base, step).to_event(...) instead of "
            f"{name}(base.to_event(...), step)."
        )
    if base.support is not None and base.support.is_discrete:
        raise ProgramError(
            f"{name} needs a continuous base, but {type(base).__name__} is discrete."
        )


class Quantized(TorchDistribution):
    r"""The discrete distribution of ``base`` rounded to the grid { k · step }.

    .. math:: P(z) = F(z + \tfrac{step}{2}) - F(z - \tfrac{step}{2}), \qquad z \in step · ℤ

    with F the cdf of ``base``. Then −log2 P(z) is the length in bits of an ideal code for z.
    ``log_prob`` is differentiable in the parameters and in z: with
    :func:`~lvppl.distributions.straight_through_round` a point guide over it trains by gradients.

    :param base: a univariate continuous distribution with a ``cdf``. Normal, Laplace, Logistic and
        mixtures of them are stable in both tails (see :func:`~lvppl.distributions.log_bin_mass`).
    :param step: distance between two grid points, a positive number, in the units of ``base``.
    :raises ProgramError: for a multivariate or discrete base, a step that is not positive, or a
        value off the grid (under validation).

    Source: Ballé, Laparra, Simoncelli (2017), "End-to-end optimized image compression",
    equation 8.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(
        self, base: Distribution, step: float = 1.0, *, validate_args: bool | None = None
    ) -> None:
        require_univariate(base, "Quantized")
        self.base, self.step = base, require_step(step)
        super().__init__(base.batch_shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Lattice:
        return Lattice(self.step)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Quantized:
        new = self._get_checked_instance(Quantized, _instance)
        new.base, new.step = self.base.expand(torch.Size(batch_shape)), self.step
        super(Quantized, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            require_on_grid(self, value, self.support)
        return log_bin_mass(self.base, value, self.step)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return round_to_step(self.base.sample(torch.Size(sample_shape)), self.step)
