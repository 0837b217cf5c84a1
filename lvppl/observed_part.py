r"""What is left of a distribution when some elements of its events are missing.

.. math:: \ln p(y_o) = \ln \int p(y_o, y_m)\, dy_m

exactly, for every datum with a mask of its own:

===============================  =====================================================
independent elements             the factors of the missing ones are left out
MixtureSameFamily                of each component what is left of it
HiddenMarkov                     steps are left out, or parts of their observations
(LowRank)MultivariateNormal      the rows and columns of what was observed
Autoregressive                   see :class:`ObservedElements`
any other                        an event can be missing as a whole
===============================  =====================================================

Draws, means and supports stay those of the whole distribution.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, ClassVar

import torch
from pyro.distributions import (
    Independent,
    LowRankMultivariateNormal,
    MaskedDistribution,
    MixtureSameFamily,
    MultivariateNormal,
    TorchDistribution,
)
from torch import Tensor
from torch import distributions as td
from torch.distributions import constraints

from lvppl.distributions import Autoregressive, HiddenMarkov
from lvppl.errors import ProgramError
from lvppl.tracing import kind_of

__all__ = [
    "GaussianPart",
    "MissingElements",
    "ObservedElements",
    "ObservedPart",
    "completed",
    "needs_draws",
    "observed_part",
]


def observed_part(name: str, fn: Any, missing: Tensor, *, parts: bool = True) -> Any:
    """``fn`` without its missing elements: whatever stands in them changes no log-probability.

    Args:
        name: of the site, for words.
        fn: its distribution.
        missing: true where an element is missing, of the shape of a value.
        parts: let events be missing in part where that has an exact form; otherwise as a whole.

    Raises:
        ProgramError: an event misses a part that has no exact form.
    """
    if isinstance(fn, td.Independent):
        base = observed_part(name, fn.base_dist, missing, parts=parts)
        return Independent(base, fn.reinterpreted_batch_ndims)
    if isinstance(fn, MaskedDistribution):
        return MaskedDistribution(observed_part(name, fn.base_dist, missing, parts=parts), fn._mask)
    dims = len(fn.event_shape)
    if dims == 0:
        return MaskedDistribution(fn, ~missing)
    if not bool(missing.any()):
        return fn
    if isinstance(fn, HiddenMarkov):
        return _steps(name, fn, missing, parts)
    flat = missing.flatten(-dims)
    whole = flat.all(-1)
    if not bool((flat.any(-1) & ~whole).any()):
        return MaskedDistribution(fn, ~whole)
    if parts and isinstance(fn, td.MixtureSameFamily):
        each = observed_part(name, fn.component_distribution, missing.unsqueeze(-1 - dims))
        return MixtureSameFamily(fn.mixture_distribution, each)
    if parts and isinstance(fn, td.MultivariateNormal | td.LowRankMultivariateNormal):
        return GaussianPart(fn, missing)
    if parts and isinstance(fn, Autoregressive):
        return ObservedElements(fn, missing)
    raise ProgramError(_coupled(name, fn, parts))


def _coupled(name: str, fn: Any, parts: bool) -> str:
    text = (
        f"some values of site '{name}' miss a part of an event of {kind_of(fn)}, whose elements "
        "depend on each other. Use independent elements, as in dist.Normal(...).to_event(1)"
    )
    if not parts:
        return f"{text}, or let the whole event be NaN."
    return (
        f"{text}, a distribution whose margins are known (MultivariateNormal, or mixtures of it), "
        "or let the whole event be NaN."
    )


def _steps(name: str, fn: HiddenMarkov, missing: Tensor, parts: bool) -> HiddenMarkov:
    """A chain without the missing steps, and without the missing parts of the others."""
    dims = len(fn.observation_dist.event_shape)
    flat = missing.flatten(-dims) if dims else missing.unsqueeze(-1)
    whole = flat.all(-1)
    if not bool((flat.any(-1) & ~whole).any()):
        return fn.observing(~whole)
    if not parts:
        raise ProgramError(
            f"some steps of site '{name}' miss a part of their observation: a HiddenMarkov can "
            "miss whole steps only. Let the whole step be NaN, or write the chain with pyro.markov."
        )
    emission = fn.observation_dist
    if not fn.differs_by_step and len(emission.batch_shape) > 1:
        raise ProgramError(
            f"some steps of site '{name}' miss a part of their observation, and each sequence has "
            f"an observation_dist of its own, of batch shape {tuple(emission.batch_shape)}. Give "
            "the chain an observation_dist of batch shape (K,) or (..., T, K), or let the whole "
            "step be NaN."
        )
    return fn.observing(~whole, observed_part(name, emission, missing.unsqueeze(-1 - dims)))


class ObservedPart(TorchDistribution):
    """The margin of the observed elements of ``whole``; its draws are those of ``whole``."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, whole: Any, missing: Tensor) -> None:
        dims = len(whole.event_shape)
        batch = torch.broadcast_shapes(whole.batch_shape, missing.shape[: missing.dim() - dims])
        self.whole = whole if whole.batch_shape == batch else whole.expand(batch)
        self.missing = missing.expand(batch + whole.event_shape)
        super().__init__(torch.Size(batch), whole.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return bool(self.whole.has_rsample)

    @constraints.dependent_property
    def support(self) -> Any:
        return self.whole.support

    @property
    def mean(self) -> Tensor:
        result: Tensor = self.whole.mean
        return result

    @property
    def variance(self) -> Tensor:
        result: Tensor = self.whole.variance
        return result

    def expand(self, batch_shape: Any, _instance: Any = None) -> ObservedPart:
        batch = torch.Size(batch_shape)
        return type(self)(self.whole.expand(batch), self.missing.expand(batch + self.event_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        result: Tensor = self.whole.sample(torch.Size(sample_shape))
        return result

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        result: Tensor = self.whole.rsample(torch.Size(sample_shape))
        return result


class GaussianPart(ObservedPart):
    r"""The observed rows and columns of a Gaussian.

    Every datum keeps all D dimensions: a missing one becomes independent of the others, with mean
    and value 0 and the variance 1 / (2π), at which the density of its value is one,

    .. math:: N(y_o; μ_o, Σ_{oo}) = N\Big((y_o, 0); (μ_o, 0),
        \begin{pmatrix} Σ_{oo} & 0 \\ 0 & \tfrac{1}{2π} I \end{pmatrix}\Big).
    """

    @cached_property
    def part(self) -> Any:
        """The Gaussian at the right, whose missing elements are 0."""
        fn, missing = self.whole, self.missing
        loc = fn.loc.masked_fill(missing, 0.0)
        if isinstance(fn, td.LowRankMultivariateNormal):
            factor = fn.cov_factor.masked_fill(missing.unsqueeze(-1), 0.0)
            diagonal = fn.cov_diag.masked_fill(missing, 0.5 / math.pi)
            return LowRankMultivariateNormal(loc, factor, diagonal, validate_args=False)
        apart = missing.unsqueeze(-1) | missing.unsqueeze(-2)
        own = torch.diag_embed(missing.to(loc) * (0.5 / math.pi))
        covariance = fn.covariance_matrix.masked_fill(apart, 0.0) + own
        return MultivariateNormal(loc, covariance, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """ln p(y_o), sample and batch shape, in nats."""
        result: Tensor = self.part.log_prob(value.masked_fill(self.missing, 0.0))
        return result


class ObservedElements(ObservedPart):
    r"""The conditionals of the observed elements, at a completed value.

    .. math:: \ln \prod_{i \text{ observed}} p(y_{o(i)} | y_{o(1)}, …, y_{o(i-1)})

    Where all that is observed comes first in the order this is ln p(y_o): no conditional that is
    left depends on a missing element. Otherwise it is the weight of one completion whose missing
    elements are drawn in order (:class:`MissingElements`): its mean over them is p(y_o).
    """

    has_rsample = False  # type: ignore[assignment]

    def log_prob(self, value: Tensor) -> Tensor:
        """Sample and batch shape, in nats."""
        return _of_elements(self.whole, value, self.missing).expand(
            torch.broadcast_shapes(value.shape[: value.dim() - self.event_dim], self.batch_shape)
        )


def _of_elements(fn: Autoregressive, value: Tensor, left_out: Tensor) -> Tensor:
    """The sum of the conditionals of the elements that are not left out."""
    each = fn.element_log_prob(value)
    return torch.where(left_out, torch.zeros_like(each), each).flatten(-fn.event_dim).sum(-1)


def completed(fn: Autoregressive, missing: Tensor, value: Tensor, sample_shape: Any = ()) -> Tensor:
    """Missing elements drawn in the order, each given those before it, the others in their places.

    An element's random numbers do not depend on what other data of the batch miss, where they have
    addresses: draws of those at the start that no datum misses are used up.
    """
    start = torch.where(missing, fn.blank, value.to(fn.blank))
    in_order = missing.flatten(-fn.event_dim)[..., list(fn.order)].reshape(-1, len(fn.order))
    first = int((~in_order).all(0).long().cumprod(0).sum())
    given = fn.conditionals(start)
    for _ in range(first):
        given.sample()
    return fn.completed(start, ~missing, fn.order[first:], torch.Size(sample_shape))


def needs_draws(fn: Any) -> ObservedElements | None:
    """What of ``fn`` needs completions: an autoregression with a gap before something observed."""
    while isinstance(fn, td.Independent | MaskedDistribution):
        fn = fn.base_dist
    if not isinstance(fn, ObservedElements):
        return None
    in_order = fn.missing.flatten(-fn.event_dim)[..., list(fn.whole.order)]
    return fn if bool((in_order[..., :-1] & ~in_order[..., 1:]).any()) else None


class MissingElements(ObservedPart):
    """The missing elements of an autoregression, drawn in its order, each given those before it.

    A value is a whole event: the draws, and in the other places what was observed.
    """

    has_rsample = False  # type: ignore[assignment]

    def __init__(self, whole: Autoregressive, missing: Tensor, value: Tensor) -> None:
        super().__init__(whole, missing)
        self.value = value

    def expand(self, batch_shape: Any, _instance: Any = None) -> MissingElements:
        batch = torch.Size(batch_shape)
        missing = self.missing.expand(batch + self.event_shape)
        return MissingElements(self.whole.expand(batch), missing, self.value)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Completions, (\\*sample, \\*batch, \\*event)."""
        return completed(self.whole, self.missing, self.value, sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """The conditionals of the missing elements, sample and batch shape, in nats."""
        return _of_elements(self.whole, value, ~self.missing).expand(
            torch.broadcast_shapes(value.shape[: value.dim() - self.event_dim], self.batch_shape)
        )
