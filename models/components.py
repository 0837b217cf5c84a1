r"""Families of K distributions, indexed by a discrete latent.

Mixtures, hidden Markov models and naive Bayes classifiers are made of them.

``component(k)`` is the k-th of them; ``k`` is a tensor of integers, enumerated or not, or ``...``
for all K at once. Every family starts with unequal members, since equal ones stay equal under EM.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

__all__ = [
    "BernoulliComponents",
    "CategoricalComponents",
    "Components",
    "GaussianComponents",
    "GaussianMixtureComponents",
    "PoissonComponents",
]


class Components(PyroModule):
    """K distributions over data of ``event_shape``."""

    program = "components"  # how the parameters are called where the family stands alone

    def __init__(self, num_components: int, event_shape: tuple[int, ...]) -> None:
        super().__init__(self.program)
        if not isinstance(num_components, int) or num_components < 1:
            raise ValueError(
                f"num_components must be a whole number of at least 1, not {num_components!r}."
            )
        self.num_components, self.event_shape = num_components, torch.Size(event_shape)

    def component(self, k: Any) -> dist.TorchDistribution:
        """p(y | k); ``k`` indexes the components: an integer tensor, or ``...`` for all."""
        raise NotImplementedError


class GaussianComponents(Components):
    r"""N(μ_k, Σ_k) in D dimensions.

    The covariances Σ_k are ``"full"`` (any; ``scale_tril``: (K, D, D) Cholesky factors),
    ``"tied"`` (any, common to all components; ``scale_tril``: (D, D)), ``"diag"`` (``scale``:
    (K, D) standard deviations), ``"spherical"`` (``scale``: (K,)) or ``"unit"`` (fixed at the
    identity). They are unit at first. The likelihood is unbounded where a component of its own
    width shrinks onto one datum.

    :param num_components: K.
    :param num_features: D.
    :param covariance: one of the five names.
    :raises ValueError: for another name.
    """

    program = "gaussian_components"

    def __init__(self, num_components: int, num_features: int, *, covariance: str = "full") -> None:
        K, D = num_components, num_features
        super().__init__(K, (D,))
        self.covariance = covariance
        self.loc = PyroParam(torch.randn(K, D))
        if covariance in ("full", "tied"):
            shape = (K, D, D) if covariance == "full" else (D, D)
            unit = torch.eye(D).expand(shape).clone()
            self.scale_tril = PyroParam(unit, constraints.lower_cholesky)
        elif covariance in ("diag", "spherical"):
            shape = (K, D) if covariance == "diag" else (K,)
            self.scale = PyroParam(torch.ones(shape), constraints.positive)
        elif covariance == "unit":
            self.register_buffer("scale", torch.ones(()))
        else:
            raise ValueError(
                'covariance must be "full", "tied", "diag", "spherical" or "unit", '
                f"but is {covariance!r}."
            )

    def component(self, k: Any) -> dist.TorchDistribution:
        """N(μ_k, Σ_k); ``k`` indexes the components: an integer tensor, or ``...`` for all."""
        if self.covariance == "full":
            return dist.MultivariateNormal(self.loc[k], scale_tril=self.scale_tril[k])
        if self.covariance == "tied":
            return dist.MultivariateNormal(self.loc[k], scale_tril=self.scale_tril)
        if self.covariance == "diag":
            return dist.Normal(self.loc[k], self.scale[k]).to_event(1)
        if self.covariance == "spherical":
            return dist.Normal(self.loc[k], self.scale[k].unsqueeze(-1)).to_event(1)
        return dist.Normal(self.loc[k], self.scale).to_event(1)

    @classmethod
    def from_data(
        cls, y: Tensor, num_components: int, *, seed: int = 0, **options: Any
    ) -> GaussianComponents:
        """A start: locations by k-means++, every width the standard deviation of the data.

        :param y: (…, D). The model takes its dtype and device.
        :param seed: of the choice of locations; the global generators are untouched.
        :param options: of the class, such as ``covariance``.

        Source: Arthur, Vassilvitskii (2007), "k-means++: the advantages of careful seeding".
        """
        y = y.reshape(-1, y.shape[-1])
        model = cls(num_components, y.shape[-1], **options).to(y)
        model.loc = k_means_plus_plus(y, num_components, seed)
        scale = y.std(0, correction=0).clamp(min=1e-3 * y.std(correction=0))
        if model.covariance in ("full", "tied"):
            model.scale_tril = scale.diag().expand_as(model.scale_tril).clone()
        elif model.covariance == "diag":
            model.scale = scale.expand_as(model.scale).clone()
        elif model.covariance == "spherical":
            model.scale = scale.square().mean().sqrt().expand_as(model.scale).clone()
        return model


class BernoulliComponents(Components):
    r"""D independent bits, y_j ∼ Bernoulli(p_{kj}); ``probs``: (K, D).

    :param num_components: K.
    :param num_features: D.
    """

    program = "bernoulli_components"

    def __init__(self, num_components: int, num_features: int) -> None:
        super().__init__(num_components, (num_features,))
        probs = 0.25 + 0.5 * torch.rand(num_components, num_features)
        self.probs = PyroParam(probs, constraints.unit_interval)

    def component(self, k: Any) -> dist.TorchDistribution:
        """Bernoulli(p_k); ``k`` indexes the components: an integer tensor, or ``...`` for all."""
        return dist.Bernoulli(self.probs[k]).to_event(1)

    @classmethod
    def from_data(cls, y: Tensor, num_components: int, *, seed: int = 0) -> BernoulliComponents:
        """A start: data chosen by k-means++, each bit half way to its mean over the data.

        :param y: (…, D) zeros and ones. The model takes its dtype and device.
        :param seed: of the choice; the global generators are untouched.
        """
        y = y.reshape(-1, y.shape[-1])
        model = cls(num_components, y.shape[-1]).to(y)
        chosen = k_means_plus_plus(y, num_components, seed)
        model.probs = (0.5 * (chosen + y.mean(0))).clamp(0.01, 0.99)
        return model


class CategoricalComponents(Components):
    r"""One symbol of V, or D independent ones, y_j ∼ Categorical(p_{kj}).

    ``probs``: (K, V) for one symbol, (K, D, V) for D.

    :param num_components: K.
    :param num_levels: V; a symbol is a number 0 … V − 1.
    :param num_features: D, or ``None`` where a datum is one symbol, without a dimension of its own.
    """

    program = "categorical_components"

    def __init__(
        self, num_components: int, num_levels: int, num_features: int | None = None
    ) -> None:
        event_shape = () if num_features is None else (num_features,)
        super().__init__(num_components, event_shape)
        probs = 1 + torch.rand(num_components, *event_shape, num_levels)
        self.probs = PyroParam(probs / probs.sum(-1, keepdim=True), constraints.simplex)

    def component(self, k: Any) -> dist.TorchDistribution:
        """Categorical(p_k); ``k`` indexes the components: an integer tensor, or ``...`` for all."""
        return dist.Categorical(self.probs[k]).to_event(len(self.event_shape))


class PoissonComponents(Components):
    r"""D independent counts, y_j ∼ Poisson(λ_{kj}); ``rate``: (K, D).

    :param num_components: K.
    :param num_features: D.
    """

    program = "poisson_components"

    def __init__(self, num_components: int, num_features: int) -> None:
        super().__init__(num_components, (num_features,))
        rate = 0.5 + torch.rand(num_components, num_features)
        self.rate = PyroParam(rate, constraints.positive)

    def component(self, k: Any) -> dist.TorchDistribution:
        """Poisson(λ_k); ``k`` indexes the components: an integer tensor, or ``...`` for all."""
        return dist.Poisson(self.rate[k]).to_event(1)

    @classmethod
    def from_data(cls, y: Tensor, num_components: int, *, seed: int = 0) -> PoissonComponents:
        """A start: data chosen by k-means++, each rate half way to its mean over the data.

        :param y: (…, D) counts, of a floating dtype. The model takes its dtype and device.
        :param seed: of the choice; the global generators are untouched.
        """
        y = y.reshape(-1, y.shape[-1])
        model = cls(num_components, y.shape[-1]).to(y)
        chosen = k_means_plus_plus(y, num_components, seed)
        model.rate = (0.5 * (chosen + y.mean(0))).clamp(min=1e-2)
        return model


class GaussianMixtureComponents(Components):
    r"""Each of the K is itself a mixture of M Gaussians with diagonal covariances.

    .. math:: p(y | k) = \sum_m π_{km} N(y; μ_{km}, \operatorname{diag}(σ²_{km}))

    ``mixing``: (K, M); ``loc``, ``scale``: (K, M, D).

    :param num_components: K.
    :param num_parts: M.
    :param num_features: D.
    """

    program = "gaussian_mixture_components"

    def __init__(self, num_components: int, num_parts: int, num_features: int) -> None:
        K, M, D = num_components, num_parts, num_features
        super().__init__(K, (D,))
        self.mixing = PyroParam(torch.full((K, M), 1 / M), constraints.simplex)
        self.loc = PyroParam(torch.randn(K, M, D))
        self.scale = PyroParam(torch.ones(K, M, D), constraints.positive)

    def component(self, k: Any) -> dist.TorchDistribution:
        """The k-th mixture; ``k`` is an integer tensor, or ``...`` for all."""
        return dist.MixtureSameFamily(
            dist.Categorical(self.mixing[k]), dist.Normal(self.loc[k], self.scale[k]).to_event(1)
        )

    @classmethod
    def from_data(
        cls, y: Tensor, num_components: int, num_parts: int, *, seed: int = 0
    ) -> GaussianMixtureComponents:
        """A start: all K × M locations by k-means++, every width that of the data.

        :param y: (…, D). The model takes its dtype and device.
        :param seed: of the choice of locations; the global generators are untouched.
        """
        y = y.reshape(-1, y.shape[-1])
        model = cls(num_components, num_parts, y.shape[-1]).to(y)
        model.loc = k_means_plus_plus(y, num_components * num_parts, seed).view_as(model.loc)
        scale = y.std(0, correction=0).clamp(min=1e-3 * y.std(correction=0))
        model.scale = scale.expand_as(model.scale).clone()
        return model


def k_means_plus_plus(y: Tensor, num_components: int, seed: int) -> Tensor:
    """Data chosen one after another with probability ∝ squared distance to the nearest so far.

    :param y: (data, D).
    :raises ValueError: if there are fewer different data than components.
    """
    generator = torch.Generator(y.device).manual_seed(seed)
    index = torch.randint(len(y), (1,), generator=generator, device=y.device)
    chosen = [index]
    distance = (y - y[index]).square().sum(-1)
    for _ in range(num_components - 1):
        if not bool((distance > 0).any()):
            raise ValueError(
                f"{num_components} components need as many different data to start from, "
                f"but there are only {len(chosen)}: lower the number of components."
            )
        index = torch.multinomial(distance, 1, generator=generator)
        distance = torch.minimum(distance, (y - y[index]).square().sum(-1))
        chosen.append(index)
    return y[torch.cat(chosen)].clone()
