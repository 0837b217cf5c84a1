"""An amortized guide of layers of bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn

from .encoders import DenseEncoder

__all__ = ["AmortizedBernoulliLayers"]


class AmortizedBernoulliLayers(PyroModule):
    r"""Layers of independent bits, the lowest given the datum, each other given the one below.

    .. math::

        z_1 | y ∼ \operatorname{Bernoulli}(σ(f(y))), \qquad
        z_l | z_{l-1} ∼ \operatorname{Bernoulli}(σ(A_l z_{l-1} + c_l))

    The guide of :class:`lvppl.models.SigmoidBeliefNet`. Bits have no gradients of their own: the
    objectives take the score function's.

    :param latent_dims: numbers of bits, z_1 first. :param y_shape: shape of one datum.
    :param encoder: f, called as ``encoder(y_shape, output_dim)``; returns the network.
    :param site: name of the latent; with L > 1 layers they are ``site_1``, …, ``site_L``.
    :param plate: name of the data plate.
    :raises ValueError: without a layer.

    Source: Mnih, Gregor (2014), "Neural variational inference and learning in belief networks",
    section 2.
    """

    def __init__(
        self,
        *,
        latent_dims: Sequence[int] = (30,),
        y_shape: Sequence[int] = (64,),
        encoder: Callable[..., nn.Module] = DenseEncoder,
        site: str = "z",
        plate: str = "data",
    ) -> None:
        super().__init__("amortized_bernoulli_layers")
        if not latent_dims:
            raise ValueError("This guide needs at least one layer, but latent_dims is ().")
        L, self.plate = len(latent_dims), plate
        self.sites = [site] if L == 1 else [f"{site}_{i}" for i in range(1, L + 1)]
        self.encoder = encoder(y_shape, latent_dims[0])
        self.layers = nn.ModuleList(
            nn.Linear(below, above) for below, above in pairwise(latent_dims)
        )

    def posterior(self, y: Tensor) -> dist.TorchDistribution:
        """q(z_1 | y), batch shape (data,)."""
        return dist.Bernoulli(logits=self.encoder(y)).to_event(1)

    def forward(self, y: Tensor) -> Tensor:
        with pyro.plate(self.plate, len(y)):
            z = pyro.sample(self.sites[0], self.posterior(y))
            for site, layer in zip(self.sites[1:], self.layers, strict=True):
                z = pyro.sample(site, dist.Bernoulli(logits=layer(z)).to_event(1))
            return z
