"""An amortized Gaussian guide: a network reads the datum and names its posterior."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import softplus

from .encoders import DenseEncoder

__all__ = ["AmortizedNormal"]


class AmortizedNormal(PyroModule):
    r"""A diagonal Normal whose parameters are functions of the datum.

    .. math:: q(z | x) = N(z; m(x), \operatorname{diag}(s(x)²))

    :param latent_dim: dimension of z. :param x_shape: shape of one datum.
    :param encoder: called as ``encoder(x_shape, output_dim)``; returns the network.
    :param site: name of the latent. :param plate: name of the data plate.

    Source: Kingma, Welling (2014), "Auto-encoding variational Bayes", section 3.
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
        super().__init__("amortized_normal")
        self.site, self.plate = site, plate
        self.encoder = encoder(x_shape, 2 * latent_dim)

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """q(z | x), batch shape (data,)."""
        loc, raw_scale = self.encoder(x).chunk(2, -1)
        return dist.Normal(loc, 1e-6 + softplus(raw_scale)).to_event(1)

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate(self.plate, len(x)):
            return pyro.sample(self.site, self.posterior(x))
