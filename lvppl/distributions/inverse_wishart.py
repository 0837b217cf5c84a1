"""The inverse Wishart distribution over covariance matrices."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Chi2, constraints

__all__ = ["InverseWishart"]


class InverseWishart(TorchDistribution):
    r"""The conjugate prior of a Gaussian's covariance matrix.

    .. math::

        \ln p(Σ) = \frac{ν}{2} \ln |Ψ| - \frac{ν + D + 1}{2} \ln |Σ|
                 - \frac{1}{2} \operatorname{tr}(Ψ Σ^{-1})
                 - \frac{ν D}{2} \ln 2 - \ln Γ_D(ν / 2)

    so that Σ⁻¹ ∼ Wishart(ν, Ψ⁻¹).

    :param df: ν > D − 1, degrees of freedom, any batch shape.
    :param scale_matrix: Ψ, symmetric positive definite, (…, D, D), in units of Σ.

    Source: Gelman et al. (2013), "Bayesian Data Analysis", appendix A.
    """

    support = constraints.positive_definite
    has_rsample = True

    def __init__(
        self, df: Tensor | float, scale_matrix: Tensor, *, validate_args: bool | None = None
    ) -> None:
        D = scale_matrix.shape[-1]
        df = torch.as_tensor(df, dtype=scale_matrix.dtype, device=scale_matrix.device)
        batch_shape = torch.broadcast_shapes(df.shape, scale_matrix.shape[:-2])
        self.df = df.expand(batch_shape)
        self.scale_matrix = scale_matrix.expand(*batch_shape, D, D)
        super().__init__(batch_shape, scale_matrix.shape[-2:], validate_args=validate_args)
        self._scale_tril = torch.linalg.cholesky(self.scale_matrix)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:  # type: ignore[override]
        return {
            "df": constraints.greater_than(self.event_shape[-1] - 1),
            "scale_matrix": constraints.positive_definite,
        }

    def expand(self, batch_shape: Any, _instance: Any = None) -> InverseWishart:
        new = self._get_checked_instance(InverseWishart, _instance)
        batch_shape = torch.Size(batch_shape)
        new.df = self.df.expand(batch_shape)
        new.scale_matrix = self.scale_matrix.expand(batch_shape + self.event_shape)
        new._scale_tril = self._scale_tril.expand(batch_shape + self.event_shape)
        super(InverseWishart, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """ln p(Σ), batch shape, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        ν, D = self.df, self.event_shape[-1]
        tril = torch.linalg.cholesky(value)
        # tr(Ψ Σ⁻¹) = |Σ^(-1/2) Ψ^(1/2)|²
        whitened = torch.linalg.solve_triangular(tril, self._scale_tril, upper=False)
        return (
            0.5 * ν * _log_det(self._scale_tril)
            - 0.5 * (ν + D + 1) * _log_det(tril)
            - 0.5 * whitened.square().sum((-2, -1))
            - 0.5 * ν * D * math.log(2)
            - torch.mvlgamma(0.5 * ν, D)
        )

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """The inverse of a Wishart draw, whose Cholesky factor is L A: L Lᵀ = Ψ⁻¹, A Bartlett's.

        A is lower triangular, A_ij ∼ N(0, 1) below the diagonal and A_ii² ∼ χ²(ν − i), i = 0 … .
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        below = self._scale_tril.new_empty(shape).normal_().tril(-1)
        df = self.df[..., None] - torch.arange(self.event_shape[-1], device=self.df.device)
        A = below + Chi2(df, validate_args=False).rsample(sample_shape).sqrt().diag_embed()
        L = torch.linalg.cholesky(torch.cholesky_inverse(self._scale_tril))
        return torch.cholesky_inverse(L @ A)

    @property
    def mean(self) -> Tensor:
        """Ψ / (ν − D − 1); NaN unless ν > D + 1, where it exists."""
        excess = self.df - self.event_shape[-1] - 1
        excess = torch.where(excess > 0, excess, math.nan)
        return self.scale_matrix / excess[..., None, None]

    @property
    def mode(self) -> Tensor:
        """Ψ / (ν + D + 1)."""
        return self.scale_matrix / (self.df + self.event_shape[-1] + 1)[..., None, None]


def _log_det(tril: Tensor) -> Tensor:
    """ln |L Lᵀ|."""
    return 2 * tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
