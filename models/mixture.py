"""Finite mixtures: the assignment of a datum is summed out exactly."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

from .components import (
    BernoulliComponents,
    Components,
    GaussianComponents,
    PoissonComponents,
    k_means_plus_plus,
)

__all__ = [
    "BernoulliMixture",
    "GaussianMixture",
    "MixtureOfExperts",
    "PoissonMixture",
    "StudentTMixture",
]


class _Mixture(Components):
    r"""z ∼ Categorical(π), y | z = k ∼ component k."""

    weights: Tensor

    def _add_weights(self, *, equal: bool = False) -> None:
        """π = 1/K: at first, or for ever."""
        uniform = torch.full((self.num_components,), 1 / self.num_components)
        if equal:
            self.register_buffer("weights", uniform)
        else:
            self.weights = PyroParam(uniform, constraints.simplex)

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


class GaussianMixture(_Mixture, GaussianComponents):
    r"""A mixture of K Gaussians in D dimensions.

    .. math:: z ∼ \operatorname{Categorical}(π), \qquad y | z = k ∼ N(μ_k, Σ_k)

    The covariances Σ_k are ``"full"`` (any; ``scale_tril``: (K, D, D) Cholesky factors),
    ``"tied"`` (any, common to all components; ``scale_tril``: (D, D)), ``"diag"`` (``scale``:
    (K, D) standard deviations), ``"spherical"`` (``scale``: (K,)) or ``"unit"`` (fixed at the
    identity). They are unit at first. The likelihood is unbounded where a component of its own
    width shrinks onto one datum.

    With ``covariance="unit", equal_weights=True`` only the locations are learned, and hard EM is
    k-means.

    :param num_components: K.
    :param num_features: D.
    :param covariance: one of the five names.
    :param equal_weights: π = 1/K, fixed.
    :raises ValueError: for another name.

    Source: Bishop (2006), "Pattern Recognition and Machine Learning", sections 9.2 and 9.3.2.
    """

    program = "gaussian_mixture"

    def __init__(
        self,
        num_components: int,
        num_features: int,
        *,
        covariance: str = "full",
        equal_weights: bool = False,
    ) -> None:
        super().__init__(num_components, num_features, covariance=covariance)
        self._add_weights(equal=equal_weights)


class BernoulliMixture(_Mixture, BernoulliComponents):
    r"""A mixture of K vectors of D independent bits (latent class analysis).

    .. math::

        z ∼ \operatorname{Categorical}(π), \qquad
        y_j | z = k ∼ \operatorname{Bernoulli}(p_{kj})

    :param num_components: K.
    :param num_features: D.

    Source: Bishop (2006), "Pattern Recognition and Machine Learning", section 9.3.3.
    """

    program = "bernoulli_mixture"

    def __init__(self, num_components: int, num_features: int) -> None:
        super().__init__(num_components, num_features)
        self._add_weights()


class PoissonMixture(_Mixture, PoissonComponents):
    r"""A mixture of K vectors of D independent counts.

    .. math::

        z ∼ \operatorname{Categorical}(π), \qquad y_j | z = k ∼ \operatorname{Poisson}(λ_{kj})

    :param num_components: K.
    :param num_features: D.

    Source: McLachlan, Peel (2000), "Finite Mixture Models", section 5.2.
    """

    program = "poisson_mixture"

    def __init__(self, num_components: int, num_features: int) -> None:
        super().__init__(num_components, num_features)
        self._add_weights()


class StudentTMixture(_Mixture):
    r"""A mixture of K Student-t distributions in D dimensions, as a scale mixture of Gaussians.

    .. math::

        z ∼ \operatorname{Categorical}(π), \qquad
        u | z = k ∼ \operatorname{Gamma}(ν_k / 2, ν_k / 2), \qquad
        y | u, z = k ∼ N(μ_k, \operatorname{diag}(σ_k²) / u)

    A datum far from every location gets a small precision ``"u"``, and so pulls at none of them.
    Given z = k, y is Student-t with ν_k degrees of freedom: ln p(y) and p(z | y) are exact.

    :param num_components: K.
    :param num_features: D.
    :param df: ν > 0, of every component at first.
    :param learn_df: learn ν, a number for each component; otherwise it is fixed.
    :raises ValueError: unless ν > 0.

    Source: Peel, McLachlan (2000), "Robust mixture modelling using the t distribution".
    """

    program = "student_t_mixture"

    def __init__(
        self, num_components: int, num_features: int, *, df: float = 4.0, learn_df: bool = False
    ) -> None:
        K, D = num_components, num_features
        if not df > 0:
            raise ValueError(f"df must be positive, but is {df!r}.")
        super().__init__(K, (D,))
        self._add_weights()
        self.loc = PyroParam(torch.randn(K, D))
        self.scale = PyroParam(torch.ones(K, D), constraints.positive)
        if learn_df:
            self.df = PyroParam(torch.full((K,), float(df)), constraints.positive)
        else:
            self.register_buffer("df", torch.full((K,), float(df)))

    def forward(self, y: Tensor) -> Tensor:
        with pyro.plate("data", len(y)):
            k = pyro.sample("z", dist.Categorical(self.weights), infer={"enumerate": "parallel"})
            half = self.df[k] / 2
            u = pyro.sample("u", dist.Gamma(half, half)).unsqueeze(-1)
            scale = self.scale[k] / u.sqrt()
            return pyro.sample("y", dist.Normal(self.loc[k], scale).to_event(1), obs=y)

    def component(self, k: Any) -> dist.TorchDistribution:
        """Student-t(ν_k, μ_k, σ_k), u integrated out; ``k`` is a tensor, or ``...`` for all."""
        return dist.MultivariateStudentT(self.df[k], self.loc[k], self.scale[k].diag_embed())

    def precision_posterior(self, y: Tensor) -> dist.Gamma:
        """p(u_n | z_n = k, y_n) = Gamma((ν_k + D)/2, (ν_k + δ_nk)/2), batch shape (data, K).

        δ is the squared distance of y_n from μ_k in units of σ_k.
        """
        distance = ((y.unsqueeze(1) - self.loc) / self.scale).square().sum(-1)
        concentration = (self.df + y.shape[-1]) / 2
        return dist.Gamma(concentration.expand_as(distance), (self.df + distance) / 2)

    @classmethod
    def from_data(
        cls, y: Tensor, num_components: int, *, seed: int = 0, **options: Any
    ) -> StudentTMixture:
        """A start: locations by k-means++, every width the standard deviation of the data.

        :param y: (data, D). The model takes its dtype and device.
        :param seed: of the choice of locations; the global generators are untouched.
        :param options: of the class, such as ``df``.
        """
        model = cls(num_components, y.shape[-1], **options).to(y)
        model.loc = k_means_plus_plus(y, num_components, seed)
        scale = y.std(0, correction=0).clamp(min=1e-3 * y.std(correction=0))
        model.scale = scale.expand_as(model.scale).clone()
        return model


class MixtureOfExperts(PyroModule):
    r"""Mixture of experts: K linear regressions, and a gate that chooses among them by the input.

    .. math::

        z | x ∼ \operatorname{Categorical}(\operatorname{softmax}(x V + c)), \qquad
        y | x, z = k ∼ N(x W_k + b_k, \operatorname{diag}(σ_k²))

    Called as ``model(x, y)``: it is a model of y given x, and P(x) is no part of it.

    :param num_experts: K.
    :param num_inputs: D_x, the dimension of x.
    :param num_outputs: D_y, the dimension of y.

    Source: Jordan, Jacobs (1994), "Hierarchical mixtures of experts and the EM algorithm".
    """

    def __init__(self, num_experts: int, num_inputs: int, num_outputs: int) -> None:
        super().__init__("mixture_of_experts")
        K = num_experts
        self.gate_weight = PyroParam(torch.zeros(num_inputs, K))
        self.gate_bias = PyroParam(torch.zeros(K))
        self.weight = PyroParam(torch.randn(K, num_inputs, num_outputs) / num_inputs**0.5)
        self.bias = PyroParam(torch.randn(K, num_outputs))
        self.scale = PyroParam(torch.ones(K, num_outputs), constraints.positive)

    def gate(self, x: Tensor) -> dist.Categorical:
        """p(z | x), batch shape (…) for x of shape (…, D_x)."""
        return dist.Categorical(logits=x @ self.gate_weight + self.gate_bias)

    def expert(self, x: Tensor, k: Any) -> dist.TorchDistribution:
        """p(y | x, z = k); ``k`` indexes the experts: an integer tensor, or ``...`` for all."""
        loc = (x.unsqueeze(-2) @ self.weight[k]).squeeze(-2) + self.bias[k]
        return dist.Normal(loc, self.scale[k]).to_event(1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        with pyro.plate("data", len(x)):
            k = pyro.sample("z", self.gate(x), infer={"enumerate": "parallel"})
            return pyro.sample("y", self.expert(x, k), obs=y)

    def _log_joint(self, x: Tensor, y: Tensor) -> Tensor:
        """ln p(z = k | x_n) + ln p(y_n | x_n, k), shape (data, experts)."""
        return self.gate(x).logits + self.expert(x.unsqueeze(1), ...).log_prob(y.unsqueeze(1))

    def log_evidence(self, x: Tensor, y: Tensor) -> Tensor:
        """ln p(y_n | x_n), shape (data,), in nats."""
        return self._log_joint(x, y).logsumexp(-1)

    def responsibilities(self, x: Tensor, y: Tensor) -> Tensor:
        """p(z_n = k | x_n, y_n), shape (data, experts)."""
        return self._log_joint(x, y).softmax(-1)

    def mean(self, x: Tensor) -> Tensor:
        """E[y | x_n] = Σ_k p(k | x_n) (x_n W_k + b_k), shape (data, D_y)."""
        means = self.expert(x.unsqueeze(1), ...).mean
        return (self.gate(x).probs.unsqueeze(-1) * means).sum(1)

    @classmethod
    def from_data(
        cls, x: Tensor, y: Tensor, num_experts: int, *, seed: int = 0
    ) -> MixtureOfExperts:
        """A start: constant experts at outputs chosen by k-means++, as wide as all outputs.

        :param x: (data, D_x). :param y: (data, D_y). The model takes the dtype and device of y.
        :param seed: of the choice; the global generators are untouched.
        """
        model = cls(num_experts, x.shape[-1], y.shape[-1]).to(y)
        model.weight = torch.zeros_like(model.weight)
        model.bias = k_means_plus_plus(y, num_experts, seed)
        model.scale = y.std(0, correction=0).expand_as(model.scale).clone()
        return model
