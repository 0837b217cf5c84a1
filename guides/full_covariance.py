"""An amortized Gaussian guide with correlations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
from pyro.distributions import constraints
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import transform_to

from .encoders import DenseEncoder

__all__ = ["AmortizedMultivariateNormal"]


class AmortizedMultivariateNormal(PyroModule):
    r"""A Normal with a full covariance, mean and Cholesky factor functions of the datum.

    .. math:: q(z | x) = N(z; m(x), L(x) L(x)ᵀ), \qquad L \text{ lower triangular}

    The encoder has d + d² outputs, of which the upper triangle is not used.

    :param latent_dim: d, the dimension of z. :param x_shape: shape of one datum.
    :param encoder: called as ``encoder(x_shape, output_dim)``; returns the network.
    :param site: name of the latent. :param plate: name of the data plate.

    Source: Kingma, Welling (2019), "An introduction to variational autoencoders", section 2.5.1.
    """

    def __init__(
        self,
        *,
        latent_dim: int = 10,
        x_shape: Sequence[int] = (64,),
        encoder: Callable[..., nn.Module] = DenseEncoder,
        site: str = "z",
        plate: str = "data",
    ) -> None:
        super().__init__("amortized_multivariate_normal")
        self.site, self.plate, self.latent_dim = site, plate, latent_dim
        self.encoder = encoder(x_shape, latent_dim + latent_dim**2)

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """q(z | x), batch shape (data,)."""
        d = self.latent_dim
        loc, square = self.encoder(x).split([d, d * d], -1)
        to_tril = transform_to(constraints.softplus_lower_cholesky)
        return dist.MultivariateNormal(loc, scale_tril=to_tril(square.unflatten(-1, (d, d))))

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate(self.plate, len(x)):
            return pyro.sample(self.site, self.posterior(x))
