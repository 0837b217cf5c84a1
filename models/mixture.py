"""Finite mixtures: the assignment of a datum is summed out exactly."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

__all__ = ["BernoulliMixture", "GaussianMixture"]


class _Mixture(PyroModule):
    r"""z ∼ Categorical(π), y | z = k ∼ component k."""

    weights: Tensor

    def component(self, k: Any) -> dist.TorchDistribution:
        """p(y | z = k); ``k`` indexes the components: an integer tensor, or ``...`` for all."""
        raise NotImplementedError

    def forward(self, y: Tensor) -> Tensor:
        with pyro.plate("data", len(y)):
            k = pyro.sample("z", dist.Categorical(self.weights), infer={"enumerate": "parallel"})
            return pyro.sample("y", self.component(k), obs=y)

    def _log_joint(self, y: Tensor) -> Tensor:
        """ln π_k + ln p(y_n | k), shape (data, components)."""
        return self.weights.log() + self.component(...).log_prob(y.unsqueeze(1))

    def log_evidence(self, y: Tensor) -> Tensor:
        """ln p(y_n) = ln Σ_k π_k p(y_n | k), shape (data,), in nats."""
        return self._log_joint(y).logsumexp(-1)

    def responsibilities(self, y: Tensor) -> Tensor:
        """p(z_n = k | y_n), shape (data, components)."""
        return self._log_joint(y).softmax(-1)


class GaussianMixture(_Mixture):
    r"""A mixture of K Gaussians in D dimensions.

    .. math:: z ∼ \operatorname{Categorical}(π), \qquad y | z = k ∼ N(μ_k, Σ_k)

    The covariances Σ_k are ``"full"`` (any; ``scale_tril``: (K, D, D) Cholesky factors),
    ``"tied"`` (any, common to all components; ``scale_tril``: (D, D)), ``"diag"`` (``scale``:
    (K, D) standard deviations) or ``"spherical"`` (``scale``: (K,)). They are unit at first. The
    likelihood is unbounded where a component of its own width shrinks onto one datum.

    :param num_components: K.
    :param num_features: D.
    :param covariance: one of the four names.
    :raises ValueError: for another name.

    Source: Bishop (2006), "Pattern Recognition and Machine Learning", section 9.2.
    """

    def __init__(self, num_components: int, num_features: int, *, covariance: str = "full") -> None:
        super().__init__("gaussian_mixture")
        K, D = num_components, num_features
        self.covariance = covariance
        self.weights = PyroParam(torch.full((K,), 1 / K), constraints.simplex)
        self.loc = PyroParam(torch.randn(K, D))
        if covariance in ("full", "tied"):
            shape = (K, D, D) if covariance == "full" else (D, D)
            unit = torch.eye(D).expand(shape).clone()
            self.scale_tril = PyroParam(unit, constraints.lower_cholesky)
        elif covariance in ("diag", "spherical"):
            shape = (K, D) if covariance == "diag" else (K,)
            self.scale = PyroParam(torch.ones(shape), constraints.positive)
        else:
            raise ValueError(
                f'covariance must be "full", "tied", "diag" or "spherical", but is {covariance!r}.'
            )

    def component(self, k: Any) -> dist.TorchDistribution:
        """N(μ_k, Σ_k); ``k`` indexes the components: an integer tensor, or ``...`` for all."""
        if self.covariance == "full":
            return dist.MultivariateNormal(self.loc[k], scale_tril=self.scale_tril[k])
        if self.covariance == "tied":
            return dist.MultivariateNormal(self.loc[k], scale_tril=self.scale_tril)
        scale = self.scale[k] if self.covariance == "diag" else self.scale[k].unsqueeze(-1)
        return dist.Normal(self.loc[k], scale).to_event(1)

    @classmethod
    def from_data(
        cls, y: Tensor, num_components: int, *, covariance: str = "full", seed: int = 0
    ) -> GaussianMixture:
        """A start: locations by k-means++, every width the standard deviation of the data.

        :param y: (data, D). The model takes its dtype and device.
        :param seed: of the choice of locations; the global generators are untouched.

        Source: Arthur, Vassilvitskii (2007), "k-means++: the advantages of careful seeding".
        """
        model = cls(num_components, y.shape[-1], covariance=covariance).to(y)
        model.loc = _k_means_plus_plus(y, num_components, seed)
        scale = y.std(0, correction=0).clamp(min=1e-3 * y.std(correction=0))
        if covariance in ("full", "tied"):
            model.scale_tril = scale.diag().expand_as(model.scale_tril).clone()
        elif covariance == "diag":
            model.scale = scale.expand_as(model.scale).clone()
        else:
            model.scale = scale.square().mean().sqrt().expand_as(model.scale).clone()
        return model


def _k_means_plus_plus(y: Tensor, num_components: int, seed: int) -> Tensor:
    """Data chosen one after another with probability ∝ squared distance to the nearest so far."""
    generator = torch.Generator(y.device).manual_seed(seed)
    chosen = torch.randint(len(y), (1,), generator=generator, device=y.device)
    for _ in range(num_components - 1):
        distance = (y[:, None] - y[chosen]).square().sum(-1).amin(-1)
        index = torch.multinomial(distance, 1, generator=generator)
        chosen = torch.cat([chosen, index])
    return y[chosen].clone()


class BernoulliMixture(_Mixture):
    r"""A mixture of K vectors of D independent bits (latent class analysis).

    .. math::

        z ∼ \operatorname{Categorical}(π), \qquad
        y_j | z = k ∼ \operatorname{Bernoulli}(p_{kj})

    :param num_components: K.
    :param num_features: D.

    Source: Bishop (2006), "Pattern Recognition and Machine Learning", section 9.3.3.
    """

    def __init__(self, num_components: int, num_features: int) -> None:
        super().__init__("bernoulli_mixture")
        K, D = num_components, num_features
        self.weights = PyroParam(torch.full((K,), 1 / K), constraints.simplex)
        # unequal from the start: equal components stay equal
        self.probs = PyroParam(0.25 + 0.5 * torch.rand(K, D), constraints.unit_interval)

    def component(self, k: Any) -> dist.TorchDistribution:
        """Bernoulli(p_k); ``k`` indexes the components: an integer tensor, or ``...`` for all."""
        return dist.Bernoulli(self.probs[k]).to_event(1)
