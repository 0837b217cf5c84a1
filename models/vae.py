"""Variational autoencoders: a decoder network from a Gaussian latent to the data.

The parts combine by their shapes alone: a *decoder* maps z to ``num_parameters`` numbers for each
element of x, and a *likelihood* reads them as a distribution over x.

>>> digits = VAE(likelihood=BetaBinomialLikelihood)                  # 8 x 8, 17 grey levels
>>> mnist = VAE(latent_dim=20, x_shape=(28, 28), decoder=ConvDecoder)  # 28 x 28, binary
>>> wide = VAE(x_shape=(784,), decoder=partial(DenseDecoder, hidden_dims=(500, 500)))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from lvppl.distributions import DiscretizedLogistic

__all__ = [
    "VAE",
    "BernoulliLikelihood",
    "BetaBinomialLikelihood",
    "ConvDecoder",
    "DenseDecoder",
    "DiscretizedLogisticLikelihood",
    "GaussianLikelihood",
    "StudentTLikelihood",
    "shallow_gaussian",
]


class VAE(PyroModule):
    r"""A variational autoencoder's generative program.

    .. math:: z ∼ N(0, I_d), \qquad x | z ∼ p(x; f(z)), \quad f \text{ the decoder}

    :param latent_dim: d, the dimension of z.
    :param x_shape: shape of one datum: ``(64,)``, ``(8, 8)``, ``(1, 28, 28)``, …
    :param likelihood: called as ``likelihood(x_shape)``: one of the likelihoods of this file, a
        ``functools.partial`` of one with its options, or your own.
    :param decoder: called as ``decoder(latent_dim, (num_parameters, *x_shape))``; returns the
        network (…, latent_dim) → (…, num_parameters, \*x_shape), for any leading dimensions.
    :param learned_prior: learn z ∼ N(m, L Lᵀ) instead of N(0, I).

    Source: Kingma, Welling (2014), "Auto-encoding variational Bayes", section 3.
    """

    def __init__(
        self,
        *,
        latent_dim: int = 10,
        x_shape: Sequence[int] = (64,),
        likelihood: Callable[..., nn.Module] | None = None,
        decoder: Callable[..., nn.Module] | None = None,
        learned_prior: bool = False,
    ) -> None:
        super().__init__("vae")
        self.learned_prior = learned_prior
        self.likelihood = (likelihood or BernoulliLikelihood)(x_shape)
        output_shape = (self.likelihood.num_parameters, *x_shape)
        self.decoder = (decoder or DenseDecoder)(latent_dim, output_shape)
        if learned_prior:
            self.prior_loc = PyroParam(torch.zeros(latent_dim))
            self.prior_scale_tril = PyroParam(torch.eye(latent_dim), constraints.lower_cholesky)
        else:
            self.register_buffer("prior_loc", torch.zeros(latent_dim))

    def prior(self) -> dist.TorchDistribution:
        """p(z)."""
        if self.learned_prior:
            return dist.MultivariateNormal(self.prior_loc, scale_tril=self.prior_scale_tril)
        return dist.Normal(self.prior_loc, torch.ones_like(self.prior_loc)).to_event(1)

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) for z of shape (…, latent_dim)."""
        return self.likelihood(self.decoder(z))

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.decode(z), obs=x)


def shallow_gaussian(x: Tensor, *, latent_dim: int = 2) -> Tensor:
    r"""A Gaussian autoencoder without hidden layers, mean and variance both functions of z.

    .. math::

        z ∼ N(0, I), \qquad x | z ∼ N(μ(z), Σ(z)), \qquad
        μ(z) = σ(A z + c), \quad Σ(z) = \operatorname{diag}(e^{σ(B z + d)})

    with σ the sigmoid: means lie in (0, 1) and variances in (1, e), so the density is bounded.

    :param x: (data, pixels). :param latent_dim: dimension of z.
    """
    pixels = x.shape[-1]
    A = pyro.param("A", lambda: torch.randn(pixels, latent_dim).to(x) / math.sqrt(latent_dim))
    B = pyro.param("B", lambda: torch.randn(pixels, latent_dim).to(x) / math.sqrt(latent_dim))
    c = pyro.param("c", lambda: x.new_zeros(pixels))
    d = pyro.param("d", lambda: x.new_zeros(pixels))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(latent_dim), 1.0).to_event(1))
        mean = torch.sigmoid(z @ A.T + c)
        variance = torch.exp(torch.sigmoid(z @ B.T + d))
        return pyro.sample("x", dist.Normal(mean, variance.sqrt()).to_event(1), obs=x)


# Likelihoods: (…, num_parameters, *x_shape) -> distribution with event shape x_shape.


class _Likelihood(nn.Module):
    num_parameters: ClassVar[int] = 1

    def __init__(self, x_shape: Sequence[int]) -> None:
        super().__init__()
        self.event_dim = len(x_shape)

    def split(self, parameters: Tensor) -> tuple[Tensor, ...]:
        """One tensor (…, \\*x_shape) for each parameter."""
        return parameters.unbind(-1 - self.event_dim)


class BernoulliLikelihood(_Likelihood):
    """x ∈ {0, 1}, each element Bernoulli with its own logit."""

    def forward(self, parameters: Tensor) -> dist.TorchDistribution:
        (logits,) = self.split(parameters)
        return dist.Bernoulli(logits=logits).to_event(self.event_dim)


class GaussianLikelihood(_Likelihood):
    r"""x | z ∼ N(f(z), diag(γ²)), γ learned for each element of x, independent of z.

    On an element that is constant over the data (a pixel that is always black) the density grows
    without bound as γ → 0, and with it the "likelihood", which then measures nothing: hence
    ``floor``, the least γ. Choose it no smaller than the resolution of the data, or use a
    likelihood on a grid.

    :param init: initial γ > floor. :param floor: least γ; both in the units of x.

    Source: Dai, Wipf (2019), "Diagnosing and enhancing VAE models", section 4 (learned γ).
    """

    def __init__(self, x_shape: Sequence[int], *, init: float = 0.5, floor: float = 0.01) -> None:
        super().__init__(x_shape)
        if not 0 < floor < init:
            raise ValueError(f"needs 0 < floor < init, but floor={floor!r} and init={init!r}.")
        self.floor = floor
        self.log_gamma = nn.Parameter(torch.full(tuple(x_shape), math.log(init - floor)))

    def forward(self, parameters: Tensor) -> dist.TorchDistribution:
        (mean,) = self.split(parameters)
        return dist.Normal(mean, self.floor + self.log_gamma.exp()).to_event(self.event_dim)


class StudentTLikelihood(_Likelihood):
    r"""x | z ∼ t_ν(μ, σ), location, scale and degrees of freedom all functions of z.

    .. math:: σ = σ_0 + \operatorname{softplus}(·), \qquad ν = 3 + \operatorname{softplus}(·),

    so that the variance is finite. Heavy tails let the model be wrong about a few elements, as a
    model of data with many missing values often is.

    :param floor: σ₀, the least scale, in the units of x.

    Source: Takahashi et al. (2018), "Student-t variational autoencoder for robust density
    estimation", IJCAI; Mattei, Frellsen (2019), "MIWAE", ICML, section 4.
    """

    num_parameters = 3

    def __init__(self, x_shape: Sequence[int], *, floor: float = 1e-3) -> None:
        super().__init__(x_shape)
        if not floor > 0:
            raise ValueError(f"floor must be above 0, but is {floor!r}.")
        self.floor = floor

    def forward(self, parameters: Tensor) -> dist.TorchDistribution:
        loc, raw_scale, raw_df = self.split(parameters)
        scale, df = self.floor + softplus(raw_scale), 3 + softplus(raw_df)
        return dist.StudentT(df, loc, scale).to_event(self.event_dim)


class DiscretizedLogisticLikelihood(_Likelihood):
    """x on a grid of levels: a logistic, its location and scale functions of z, rounded to it.

    :param low: lowest level. :param high: highest level. :param num_levels: how many; by default
        8-bit pixels divided by 255.
    """

    num_parameters = 2

    def __init__(
        self,
        x_shape: Sequence[int],
        *,
        low: float = 0.0,
        high: float = 1.0,
        num_levels: int = 256,
    ) -> None:
        super().__init__(x_shape)
        self.low, self.high, self.num_levels = low, high, num_levels

    def forward(self, parameters: Tensor) -> dist.TorchDistribution:
        loc, log_scale = self.split(parameters)
        half_range = 0.5 * (self.high - self.low)
        # a scale far below the spacing puts all mass on one level: no gradient is left there
        floor = 0.1 * 2 * half_range / (self.num_levels - 1)
        return DiscretizedLogistic(
            self.low + half_range * (1 + loc),
            floor + half_range * softplus(log_scale - 1),
            low=self.low,
            high=self.high,
            num_levels=self.num_levels,
        ).to_event(self.event_dim)


class BetaBinomialLikelihood(_Likelihood):
    """x ∈ {0, …, total_count}: a binomial whose success probability is Beta(α(z), β(z)).

    :param total_count: the highest level: 16 for the 17 grey levels of the 8 x 8 digits.
    :param ceiling: α and β stay below it (within about 100, differences of log-gamma functions
        keep 1e-4 in float32).
    """

    num_parameters = 2

    def __init__(
        self, x_shape: Sequence[int], *, total_count: int = 16, ceiling: float = 100.0
    ) -> None:
        super().__init__(x_shape)
        self.total_count, self.ceiling = total_count, ceiling

    def forward(self, parameters: Tensor) -> dist.TorchDistribution:
        # exp(parameter) while far below the ceiling
        shift = math.log(self.ceiling)
        α, β = (1e-4 + self.ceiling * torch.sigmoid(p - shift) for p in self.split(parameters))
        return dist.BetaBinomial(α, β, self.total_count).to_event(self.event_dim)


# Decoders: (…, latent_dim) -> (…, *output_shape).


class DenseDecoder(nn.Module):
    """A multilayer perceptron, its output reshaped.

    :param latent_dim: dimension of z.
    :param output_shape: shape of the output for one z.
    :param hidden_dims: widths of the hidden layers.
    :param activation: called without arguments; returns what follows a hidden layer.
    """

    def __init__(
        self,
        latent_dim: int,
        output_shape: Sequence[int],
        *,
        hidden_dims: Sequence[int] = (200, 200),
        activation: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        widths = [latent_dim, *hidden_dims]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), activation()]
        output = nn.Linear(widths[-1], math.prod(output_shape))
        self.network = nn.Sequential(*layers, output, nn.Unflatten(-1, tuple(output_shape)))

    def forward(self, z: Tensor) -> Tensor:
        return self.network(z)


class Upsample(nn.Sequential):
    """Twice as large: a stride-1 convolution to four times the channels, reshaped onto the grid.

    Unlike a transposed convolution it covers every pixel equally, so it leaves no checkerboard.

    Source: Shi et al. (2016), "Real-time single image and video super-resolution using an
    efficient sub-pixel convolutional neural network", section 3.2.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        convolution = nn.Conv2d(channels_in, 4 * channels_out, 3, padding=1)
        super().__init__(convolution, nn.PixelShuffle(2), nn.SiLU())


class ConvDecoder(nn.Module):
    """A dense layer onto a small grid, two up-samplings, a convolution to the output.

    :param latent_dim: dimension of z.
    :param output_shape: (parameters, height, width) or (parameters, colours, height, width); height
        and width divisible by four.
    :param channels: of the grids of a quarter, a half, and the full size.
    :raises ValueError: for another shape.
    """

    def __init__(
        self,
        latent_dim: int,
        output_shape: Sequence[int],
        *,
        channels: tuple[int, int, int] = (64, 32, 32),
    ) -> None:
        super().__init__()
        if len(output_shape) not in (3, 4) or output_shape[-2] % 4 or output_shape[-1] % 4:
            raise ValueError(
                "ConvDecoder makes images, (height, width) or (colours, height, width), with "
                f"height and width divisible by four, but x_shape is {tuple(output_shape[1:])}."
            )
        *planes, height, width = output_shape
        quarter, half, full = channels
        small = (quarter, height // 4, width // 4)
        self.output_shape = tuple(output_shape)
        self.network = nn.Sequential(
            nn.Linear(latent_dim, math.prod(small)),
            nn.Unflatten(-1, small),
            nn.SiLU(),
            Upsample(quarter, half),
            Upsample(half, full),
            nn.Conv2d(full, math.prod(planes), 3, padding=1),
        )

    def forward(self, z: Tensor) -> Tensor:
        # convolutions take one leading dimension: flatten any others, and restore them
        images = self.network(z.reshape(-1, z.shape[-1]))
        return images.reshape(*z.shape[:-1], *self.output_shape)
