"""Linear-Gaussian models: the evidence and the posterior are algebra.

Each program has, beside itself, its exact ``log_evidence(y)`` = ln p(y) and ``posterior(y)``
= p(z | y), against which every approximation can be held.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

__all__ = ["FactorAnalysis", "HierarchicalNormal", "NormalNormal", "ProbabilisticPCA"]


class NormalNormal(PyroModule):
    r"""A Normal mean with a Normal prior; every variance is known.

    .. math:: μ ∼ N(m, s²), \qquad y_n | μ ∼ N(μ, σ²), \quad n = 1 … N

    The one latent, ``"mean"``, is global: ln p(y) belongs to the data set as a whole.

    :param prior_loc: m. :param prior_scale: s > 0. :param noise_scale: σ > 0; in units of y.

    Source: Gelman et al. (2013), "Bayesian Data Analysis", section 2.5.
    """

    def __init__(
        self, *, prior_loc: float = 0.0, prior_scale: float = 1.0, noise_scale: float = 1.0
    ) -> None:
        super().__init__("normal_normal")
        self.register_buffer("prior_loc", torch.tensor(float(prior_loc)))
        self.register_buffer("prior_scale", torch.tensor(float(prior_scale)))
        self.register_buffer("noise_scale", torch.tensor(float(noise_scale)))

    def forward(self, y: Tensor) -> Tensor:
        mean = pyro.sample("mean", dist.Normal(self.prior_loc, self.prior_scale))
        with pyro.plate("data", len(y)):
            return pyro.sample("y", dist.Normal(mean, self.noise_scale), obs=y)

    def log_evidence(self, y: Tensor) -> Tensor:
        """ln p(y), 0-dim, in nats: y ~ N(m 1, σ² I + s² 1 1ᵀ) over all data at once."""
        ones = torch.ones_like(y)
        return dist.LowRankMultivariateNormal(
            self.prior_loc * ones, self.prior_scale * ones[:, None], self.noise_scale**2 * ones
        ).log_prob(y)

    def posterior(self, y: Tensor) -> dist.Normal:
        """p(μ | y): precisions add, and the mean is weighted by precision."""
        prior_precision, precision = self.prior_scale**-2, self.noise_scale**-2
        total = prior_precision + len(y) * precision
        return dist.Normal(
            (prior_precision * self.prior_loc + precision * y.sum()) / total, total**-0.5
        )


class HierarchicalNormal(PyroModule):
    r"""A Normal population of locations, each measured once with known noise.

    .. math:: z_n ∼ N(m, s²), \qquad y_n | z_n ∼ N(z_n, σ²)

    The population (m, s) is learned; the noise σ of the measurement is known, since y determines
    only s² + σ².

    :param loc: initial m. :param scale: initial s > 0. :param noise_scale: σ > 0; in units of y.

    Source: Efron, Morris (1973), "Stein's estimation rule and its competitors", section 2.
    """

    def __init__(self, *, loc: float = 0.0, scale: float = 1.0, noise_scale: float = 1.0) -> None:
        super().__init__("hierarchical_normal")
        self.loc = PyroParam(torch.tensor(float(loc)))
        self.scale = PyroParam(torch.tensor(float(scale)), constraints.positive)
        self.register_buffer("noise_scale", torch.tensor(float(noise_scale)))

    def forward(self, y: Tensor) -> Tensor:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(self.loc, self.scale))
            return pyro.sample("y", dist.Normal(z, self.noise_scale), obs=y)

    def log_evidence(self, y: Tensor) -> Tensor:
        """ln p(y_n), shape (data,), in nats: y_n ~ N(m, s² + σ²)."""
        return dist.Normal(self.loc, torch.hypot(self.scale, self.noise_scale)).log_prob(y)

    def posterior(self, y: Tensor) -> dist.Normal:
        """p(z_n | y_n), batch shape (data,): y_n shrunk towards m by s² / (s² + σ²)."""
        variance = self.scale**2 + self.noise_scale**2
        loc = self.loc + self.scale**2 / variance * (y - self.loc)
        return dist.Normal(loc, (self.scale * self.noise_scale / variance.sqrt()).expand_as(loc))


class FactorAnalysis(PyroModule):
    r"""Factor analysis: few independent factors, one noise scale for each coordinate.

    .. math:: z ∼ N(0, I_d), \qquad y | z ∼ N(W z + μ, \operatorname{diag}(σ²))

    so that y ∼ N(μ, W Wᵀ + diag(σ²)).

    :param num_features: D, the dimension of y.
    :param latent_dim: d, the dimension of z.

    Source: Bishop (2006), "Pattern Recognition and Machine Learning", section 12.2.4.
    """

    def __init__(self, num_features: int, latent_dim: int) -> None:
        super().__init__("factor_analysis")
        W = torch.randn(num_features, latent_dim) / math.sqrt(latent_dim)
        self.weight = PyroParam(W)
        self.loc = PyroParam(torch.zeros(num_features))
        self.noise_scale = PyroParam(torch.ones(self._noise_shape(W)), constraints.positive)

    @staticmethod
    def _noise_shape(W: Tensor) -> torch.Size:
        return W.shape[:1]

    def forward(self, y: Tensor) -> Tensor:
        W, μ, σ = self.weight, self.loc, self.noise_scale
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(W.new_zeros(W.shape[1]), 1.0).to_event(1))
            return pyro.sample("y", dist.Normal(z @ W.T + μ, σ).to_event(1), obs=y)

    def log_evidence(self, y: Tensor) -> Tensor:
        """ln p(y_n), shape (data,), in nats, for y of shape (data, D)."""
        W, μ, σ = self.weight, self.loc, self.noise_scale
        return dist.LowRankMultivariateNormal(μ, W, (σ**2).expand_as(μ)).log_prob(y)

    def posterior(self, y: Tensor) -> dist.MultivariateNormal:
        """p(z_n | y_n) = N(P⁻¹ Wᵀ σ⁻² (y_n − μ), P⁻¹), P = I + Wᵀ σ⁻² W; batch shape (data,)."""
        W, μ, σ = self.weight, self.loc, self.noise_scale
        scaled = W / σ.expand_as(μ)[:, None] ** 2
        P = torch.eye(W.shape[1], dtype=W.dtype, device=W.device) + W.T @ scaled
        mean = torch.linalg.solve(P, ((y - μ) @ scaled).T).T
        return dist.MultivariateNormal(mean, precision_matrix=P)


class ProbabilisticPCA(FactorAnalysis):
    r"""Probabilistic PCA: factor analysis with one noise scale σ for every coordinate.

    .. math:: z ∼ N(0, I_d), \qquad y | z ∼ N(W z + μ, σ² I_D)

    :param num_features: D, the dimension of y.
    :param latent_dim: d, the dimension of z.

    Source: Tipping, Bishop (1999), "Probabilistic principal component analysis", section 3.
    """

    @staticmethod
    def _noise_shape(W: Tensor) -> torch.Size:
        return torch.Size([])

    @classmethod
    def from_data(cls, y: Tensor, latent_dim: int) -> ProbabilisticPCA:
        r"""The global maximum of the likelihood of y, in closed form.

        With λ₁ ≥ … ≥ λ_D and U the eigenvalues and eigenvectors of the sample covariance (over N),

        .. math:: σ² = \frac{1}{D - d} \sum_{j > d} λ_j, \qquad W = U_d (Λ_d - σ² I)^{1/2}

        up to a rotation of z. Source: Tipping and Bishop (1999), equations 7 and 8.

        :param y: (data, D). The model takes its dtype and device.
        :param latent_dim: d < D.
        :raises ValueError: if d ≥ D, or if y lies in a d-dimensional plane: then σ = 0 and the
            likelihood is unbounded.
        """
        D = y.shape[-1]
        if not 0 < latent_dim < D:
            raise ValueError(
                f"latent_dim must be between 1 and {D - 1} for data with {D} features, "
                f"but is {latent_dim}: with as many factors as features no noise is left."
            )
        μ = y.mean(0)
        λ, U = torch.linalg.eigh((y - μ).T @ (y - μ) / len(y))  # ascending
        noise_variance = λ[:-latent_dim].mean()
        if noise_variance <= D * torch.finfo(y.dtype).eps * λ[-1]:
            raise ValueError(
                f"The {len(y)} data lie in a plane of {latent_dim} dimensions or fewer, where the "
                "likelihood is unbounded (noise variance 0): lower latent_dim or add data."
            )
        model = cls(D, latent_dim).to(y)
        model.weight = U[:, -latent_dim:] * (λ[-latent_dim:] - noise_variance).sqrt()
        model.loc, model.noise_scale = μ, noise_variance.sqrt()
        return model
