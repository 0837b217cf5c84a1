"""Point guides: one z for each datum; and their relaxation by uniform noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn

from lvppl.distributions import UniformNoise, straight_through_round

from .encoders import DenseEncoder

__all__ = ["AmortizedPoint", "AmortizedUniformNoise"]


class AmortizedPoint(PyroModule):
    r"""One point for each datum, q(z | x) = δ(z − f(x)): hard inference.

    With ``step``, z is rounded to multiples of it and the gradient passes straight through; put a
    ``Quantized(base, step)`` prior on z, and −ln p(z) is the length of a code for z. Without, z is
    continuous, and −ln p(z) is a density at a point, which is no code length: it has no lower
    bound, and falls without end when z is rescaled.

    :param latent_dim: dimension of z. :param x_shape: shape of one datum.
    :param step: spacing of the grid of z, or ``None``.
    :param encoder: called as ``encoder(x_shape, output_dim)``; returns the network.
    :param site: name of the latent. :param plate: name of the data plate.

    Source: Theis et al. (2017), "Lossy image compression with compressive autoencoders", section 2.
    """

    def __init__(
        self,
        *,
        latent_dim: int = 10,
        x_shape: Sequence[int] = (64,),
        step: float | None = None,
        encoder: Callable[..., nn.Module] = DenseEncoder,
        site: str = "z",
        plate: str = "data",
    ) -> None:
        super().__init__("amortized_point")
        self.site, self.plate, self.step = site, plate, step
        self.encoder = encoder(x_shape, latent_dim)

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """q(z | x), batch shape (data,)."""
        z = self.encoder(x)
        if self.step is not None:
            z = straight_through_round(z, self.step)
        return dist.Delta(z).to_event(1)

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate(self.plate, len(x)):
            return pyro.sample(self.site, self.posterior(x))


class AmortizedUniformNoise(PyroModule):
    r"""A point blurred by the width of a quantiser's bin.

    .. math:: q(z | x) = \prod_i U(z_i; f_i(x) - step/2, f_i(x) + step/2)

    Noise stands in for rounding, so that gradients exist. With a ``Dithered(base, step)`` prior,
    ln q − ln p is the code length −ln P(bin about z).

    :param latent_dim: dimension of z. :param x_shape: shape of one datum.
    :param step: width of the noise, the spacing of the quantiser that it stands in for.
    :param encoder: called as ``encoder(x_shape, output_dim)``; returns the network.
    :param site: name of the latent. :param plate: name of the data plate.

    Source: Ballé, Laparra, Simoncelli (2017), "End-to-end optimized image compression", section 3.
    """

    def __init__(
        self,
        *,
        latent_dim: int = 10,
        x_shape: Sequence[int] = (64,),
        step: float = 1.0,
        encoder: Callable[..., nn.Module] = DenseEncoder,
        site: str = "z",
        plate: str = "data",
    ) -> None:
        super().__init__("amortized_uniform_noise")
        self.site, self.plate, self.step = site, plate, step
        self.encoder = encoder(x_shape, latent_dim)

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """q(z | x), batch shape (data,)."""
        return UniformNoise(self.encoder(x), self.step).to_event(1)

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate(self.plate, len(x)):
            return pyro.sample(self.site, self.posterior(x))
