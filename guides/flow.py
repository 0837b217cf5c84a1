"""An amortized normalising flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import transforms as T
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import softplus

from .encoders import DenseEncoder

__all__ = ["AmortizedFlow"]


class AmortizedFlow(PyroModule):
    r"""A diagonal Normal pushed through invertible maps that see the datum.

    .. math::

        ε ∼ N(m(x), \operatorname{diag}(s(x)²)), \quad z = g_K(\dots g_1(ε; h(x)) \dots; h(x)),
        \quad \ln q(z | x) = \ln N(ε) - \sum_k \ln |\det ∂g_k|

    Each g is an affine coupling: half of the coordinates are scaled and shifted by functions of
    the other half and of features h(x); then the order of the coordinates is reversed. Both
    directions cost one pass, so q(z | x) is known at any z, not only at its own draws. With no
    coupling it is :class:`AmortizedNormal`.

    :param latent_dim: dimension of z, at least 2. :param x_shape: shape of one datum.
    :param encoder: called as ``encoder(x_shape, output_dim)``; returns the network.
    :param num_couplings: K. :param context_dim: dimension of h(x).
    :param hidden_dims: widths of the hidden layers in each coupling.
    :param site: name of the latent. :param plate: name of the data plate.
    :raises ValueError: if latent_dim < 2, where there is no other half.

    Source: Rezende, Mohamed (2015), "Variational inference with normalizing flows"; Dinh,
    Sohl-Dickstein, Bengio (2017), "Density estimation using Real NVP", section 3.
    """

    def __init__(
        self,
        *,
        latent_dim: int = 10,
        x_shape: Sequence[int] = (64,),
        encoder: Callable[..., nn.Module] = DenseEncoder,
        num_couplings: int = 4,
        context_dim: int = 32,
        hidden_dims: Sequence[int] = (64,),
        site: str = "z",
        plate: str = "data",
    ) -> None:
        if latent_dim < 2:
            raise ValueError(f"A coupling flow needs latent_dim >= 2, but it is {latent_dim}.")
        super().__init__("amortized_flow")
        self.site, self.plate = site, plate
        self.sizes = [latent_dim, latent_dim, context_dim]
        self.encoder = encoder(x_shape, sum(self.sizes))
        self.couplings = nn.ModuleList(
            T.conditional_affine_coupling(
                latent_dim, context_dim, hidden_dims=list(hidden_dims), split_dim=latent_dim // 2
            )
            for _ in range(num_couplings)
        )
        for coupling in self.couplings:  # start near the identity
            nn.init.normal_(coupling.nn.layers[-1].weight, std=1e-3)
            nn.init.zeros_(coupling.nn.layers[-1].bias)
        self.register_buffer("reversal", torch.arange(latent_dim - 1, -1, -1))

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """q(z | x), batch shape (data,)."""
        loc, raw_scale, context = self.encoder(x).split(self.sizes, -1)
        base = dist.Normal(loc, 1e-6 + softplus(raw_scale)).to_event(1)
        maps = []
        for coupling in self.couplings:
            maps += [coupling.condition(context), T.Permute(self.reversal)]
        return dist.TransformedDistribution(base, maps)

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate(self.plate, len(x)):
            return pyro.sample(self.site, self.posterior(x))
