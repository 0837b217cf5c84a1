"""An amortized guide of layers of Gaussian latents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn

__all__ = ["AmortizedGaussianLayers"]


class AmortizedGaussianLayers(PyroModule):
    r"""Diagonal Normals, the lowest given the datum, each other given the one below.

    .. math::

        z_1 | y ∼ N(m_1(y), \operatorname{diag}(s_1(y)²)), \qquad
        z_l | z_{l-1} ∼ N(m_l(z_{l-1}), \operatorname{diag}(s_l(z_{l-1})²))

    The guide of :class:`lvppl.models.GaussianLayers`, with the same options. Every network has two
    hidden layers of tanh units, and ln s_l is linear in the second. Weights start as Glorot and
    Bengio's uniform draw, biases at 0.

    :param latent_dims: dimensions of the latents, z_1 first.
    :param hidden_dims: for each layer the width of the two hidden layers between it and what lies
        below it.
    :param y_shape: shape of one datum.
    :param site: name of the latent; with L > 1 layers they are ``site_1``, …, ``site_L``.
    :param plate: name of the data plate.
    :raises ValueError: for latents and hidden layers of different number, or none.

    Source: Burda, Grosse, Salakhutdinov (2016), "Importance weighted autoencoders", sections 3
    and 5.
    """

    def __init__(
        self,
        *,
        latent_dims: Sequence[int] = (50,),
        hidden_dims: Sequence[int] = (200,),
        y_shape: Sequence[int] = (784,),
        site: str = "z",
        plate: str = "data",
    ) -> None:
        super().__init__("amortized_gaussian_layers")
        if not 0 < len(latent_dims) == len(hidden_dims):
            raise ValueError(
                "Each layer of latents has one width of hidden layers, but there are latent_dims="
                f"{tuple(latent_dims)} and hidden_dims={tuple(hidden_dims)}."
            )
        L, self.plate, self.event_dim = len(latent_dims), plate, len(y_shape)
        self.sites = [site] if L == 1 else [f"{site}_{i}" for i in range(1, L + 1)]
        below = [math.prod(y_shape), *latent_dims]
        self.layers = nn.ModuleList(
            _Gaussian(*dims) for dims in zip(below[:-1], hidden_dims, latent_dims, strict=True)
        )

    def posterior(self, y: Tensor) -> dist.TorchDistribution:
        """q(z_1 | y), batch shape (data,)."""
        return self._lowest(self.layers[0], y)

    def _lowest(self, layer: _Gaussian, y: Tensor) -> dist.TorchDistribution:
        flat = y.flatten(-self.event_dim).to(layer.loc.weight.dtype)
        return dist.Normal(*layer(flat)).to_event(1)

    def forward(self, y: Tensor) -> Tensor:
        lowest, *above = self.layers  # once: each access tells Pyro of all parameters
        with pyro.plate(self.plate, len(y)):
            z = pyro.sample(self.sites[0], self._lowest(lowest, y))
            for site, layer in zip(self.sites[1:], above, strict=True):
                z = pyro.sample(site, dist.Normal(*layer(z)).to_event(1))
            return z


class _Gaussian(nn.Module):
    """Mean and standard deviation, each (…, dim_out)."""

    def __init__(self, dim_in: int, hidden_dim: int, dim_out: int) -> None:
        super().__init__()
        first, second = _linear(dim_in, hidden_dim), _linear(hidden_dim, hidden_dim)
        self.hidden = nn.Sequential(first, nn.Tanh(), second, nn.Tanh())
        self.loc, self.log_scale = _linear(hidden_dim, dim_out), _linear(hidden_dim, dim_out)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        units = self.hidden(x)
        return self.loc(units), self.log_scale(units).exp()


def _linear(dim_in: int, dim_out: int) -> nn.Linear:
    layer = nn.Linear(dim_in, dim_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
