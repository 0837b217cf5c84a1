"""The log-probability of an interval, stable in both tails."""

from __future__ import annotations

import math
from functools import singledispatch

import torch
from pyro.distributions import Logistic
from torch import Tensor
from torch.distributions import Distribution, Laplace, MixtureSameFamily, Normal
from torch.nn.functional import logsigmoid

from lvppl.errors import ProgramError

__all__ = ["log1mexp", "log_bin_mass"]

_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(-x))`` for x > 0, without cancellation.

    Source: Mächler (2012), "Accurately computing log(1 - exp(-|a|))", equation 7.
    """
    is_small = x < math.log(2)
    small = (-torch.expm1(-torch.where(is_small, x, math.log(2)))).log()
    large = torch.log1p(-torch.exp(-torch.where(is_small, math.log(2), x)))
    return torch.where(is_small, small, large)


@singledispatch
def log_bin_mass(base: Distribution, centre: Tensor, width: float) -> Tensor:
    """ln [ F(centre + width/2) - F(centre - width/2) ] in nats, F the cdf of ``base``.

    Normal, Laplace and Logistic bases, and mixtures of them (``MixtureSameFamily``), are exact to
    rounding arbitrarily far in both tails, in value and gradient, with respect to ``centre`` and
    the parameters. Any other base needs a differentiable ``cdf`` on the whole real line, and is
    good as far as that cdf resolves the difference: where it does not, -inf (gradient 0). Register
    a better rule by ``log_bin_mass.register(YourDistribution)``.

    :param base: a univariate continuous distribution.
    :param centre: the middle of the interval; broadcasts against ``base.batch_shape``.
    :param width: the width of the interval, a positive number.
    :raises ProgramError: if ``base`` has no cdf.
    """
    try:
        mass = base.cdf(centre + width / 2) - base.cdf(centre - width / 2)
    except NotImplementedError as error:
        raise ProgramError(
            f"The probability of an interval needs the cdf of the distribution, which "
            f"{type(base).__name__} does not have: use a base with a cdf (such as Normal, "
            "Laplace, Logistic), or register a rule with log_bin_mass.register."
        ) from error
    resolved = mass > 0
    return torch.where(resolved, torch.where(resolved, mass, 1.0).log(), -math.inf)


@log_bin_mass.register
def _logistic(base: Logistic, centre: Tensor, width: float) -> Tensor:
    # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)): no difference of like terms
    middle = (centre - base.loc) / base.scale
    half = 0.5 * width / base.scale
    return logsigmoid(middle + half) + logsigmoid(half - middle) + log1mexp(2 * half)


@log_bin_mass.register
def _laplace(base: Laplace, centre: Tensor, width: float) -> Tensor:
    middle = -((centre - base.loc) / base.scale).abs()  # by symmetry, to the left of the mode
    half = (0.5 * width / base.scale).expand_as(middle)
    lower, upper = middle - half, middle + half
    in_tail = upper <= 0
    tail = upper - math.log(2) + log1mexp(2 * half)
    lower, upper = torch.where(in_tail, -1.0, lower), torch.where(in_tail, 1.0, upper)
    straddling = (-0.5 * (torch.expm1(lower) + torch.expm1(-upper))).log()
    return torch.where(in_tail, tail, straddling)


@log_bin_mass.register
def _normal(base: Normal, centre: Tensor, width: float) -> Tensor:
    middle = -((centre - base.loc) / base.scale).abs()  # by symmetry, to the left of the mode
    half = (0.5 * width / base.scale).expand_as(middle)
    is_narrow = half * middle.abs().clamp(min=1.0) < _narrow(middle.dtype)
    straddles = ~is_narrow & (middle + half > 1.0)
    in_tail = ~is_narrow & ~straddles
    # each formula sees harmless arguments where another one is used, to keep gradients finite
    narrow = _narrow_normal(*_only(is_narrow, middle, half, -1.0, 1e-2))
    centred = _central_normal(*_only(straddles, middle, half, 0.0, 2.0))
    tail = _tail_normal(*_only(in_tail, middle, half, -1.0, 1.0))
    return torch.where(is_narrow, narrow, torch.where(straddles, centred, tail))


def _only(
    where: Tensor, middle: Tensor, half: Tensor, middle_else: float, half_else: float
) -> tuple[Tensor, Tensor]:
    return torch.where(where, middle, middle_else), torch.where(where, half, half_else)


def _narrow(dtype: torch.dtype) -> float:
    """Half-width where the series and the difference of tails are equally accurate."""
    return 2 * torch.finfo(dtype).eps ** (1 / 7)


def _narrow_normal(middle: Tensor, half: Tensor) -> Tensor:
    """Taylor series of the mass about the middle: 2h phi(m) (1 + He2(m) h²/3! + He4(m) h⁴/5!)."""
    m2, h2 = middle.square(), half.square()
    # with t = (mh)² first, since m² alone may overflow where h is tiny
    t = (middle * half).square()
    series = (t - h2) / 6 + (t * t - 6 * t * h2 + 3 * h2 * h2) / 120
    return torch.log(2 * half) - 0.5 * m2 - _LOG_SQRT_2PI + torch.log1p(series)


def _central_normal(middle: Tensor, half: Tensor) -> Tensor:
    """One minus both tails, for an interval that holds most of the mass."""
    upper_tail = torch.special.erfc((middle + half) * math.sqrt(0.5))
    lower_tail = torch.special.erfc((half - middle) * math.sqrt(0.5))
    return torch.log1p(-0.5 * (lower_tail + upper_tail))


def _tail_normal(middle: Tensor, half: Tensor) -> Tensor:
    """Phi(b) - Phi(a) with Phi(z) = exp(-z²/2) erfcx(-z/√2) / 2 and exp(-b²/2) taken out."""
    lower, upper = middle - half, middle + half
    below = torch.exp(2 * middle * half) * torch.special.erfcx(-lower * math.sqrt(0.5))
    scaled = torch.special.erfcx(-upper * math.sqrt(0.5)) - below
    return torch.log(0.5 * scaled) - 0.5 * upper.square()


@log_bin_mass.register
def _mixture(base: MixtureSameFamily, centre: Tensor, width: float) -> Tensor:
    log_weights = base.mixture_distribution.logits.log_softmax(-1)
    log_masses = log_bin_mass(base.component_distribution, centre.unsqueeze(-1), width)
    return torch.logsumexp(log_weights + log_masses, -1)
