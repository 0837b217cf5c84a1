"""Sigmoid belief networks: layers of bits, each the causes of the one below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

__all__ = ["SigmoidBeliefNet"]


class SigmoidBeliefNet(PyroModule):
    r"""Bits y caused by L layers of hidden bits, the top one z_L, the lowest z_1.

    .. math::

        z_L ∼ \operatorname{Bernoulli}(σ(b)), \qquad
        z_{l-1} | z_l ∼ \operatorname{Bernoulli}(σ(W_l z_l + b_l)), \qquad z_0 = y

    The latents are ``"z"`` with one layer, and ``"z_1"``, …, ``"z_L"`` with several, each a vector
    in the plate ``"data"``. With one layer ln p(y) is found exactly up to about 30 bits, by
    ``lvppl.log_likelihood(model, y, estimator="exact")``.

    :param latent_dims: numbers of bits, z_1 first.
    :param y_shape: shape of one datum, of zeros and ones.
    :raises ValueError: without a layer.

    Source: Neal (1992), "Connectionist learning of belief networks", section 2; Saul, Jaakkola,
    Jordan (1996), "Mean field theory for sigmoid belief networks", section 2.
    """

    def __init__(
        self, *, latent_dims: Sequence[int] = (30,), y_shape: Sequence[int] = (64,)
    ) -> None:
        super().__init__("sigmoid_belief_net")
        if not latent_dims:
            raise ValueError(
                "A sigmoid belief net needs at least one layer, but latent_dims is ()."
            )
        L, self.y_shape = len(latent_dims), tuple(y_shape)
        self.sites = ["z"] if L == 1 else [f"z_{i}" for i in range(1, L + 1)]
        self.prior_logits = PyroParam(torch.zeros(latent_dims[-1]))
        widths = [math.prod(y_shape), *latent_dims]
        self.layers = nn.ModuleList(nn.Linear(above, below) for below, above in pairwise(widths))

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """p(y | z_1) for z_1 of shape (…, latent_dims[0])."""
        logits = self.layers[0](z).unflatten(-1, self.y_shape)
        return dist.Bernoulli(logits=logits).to_event(len(self.y_shape))

    def forward(self, y: Tensor) -> Tensor:
        with pyro.plate("data", len(y)):
            z = pyro.sample(self.sites[-1], dist.Bernoulli(logits=self.prior_logits).to_event(1))
            for site, layer in zip(self.sites[-2::-1], reversed(self.layers[1:]), strict=True):
                z = pyro.sample(site, dist.Bernoulli(logits=layer(z)).to_event(1))
            return pyro.sample("y", self.decode(z), obs=y)
