"""Latents that the distribution of an observed site sums out by itself.

A :class:`~lvppl.distributions.HiddenMarkov` holds a path of states, a ``MixtureSameFamily`` the
component that a datum is from. ``log_prob`` is their sum; the rest is here: their posterior, the
most probable values and draws, given everything outside the distribution. What a wrapper
(``.to_event``, ``.mask``) or ``poutine.mask`` does to the distribution, it does to them.

Components of a mixture inside a chain are summed out whatever is asked of the path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor
from torch import distributions as td

from lvppl.chains import (
    ChainPosterior,
    chain_log_sum,
    forward_backward,
    sample_chain,
    viterbi,
)
from lvppl.distributions import HiddenMarkov
from lvppl.errors import ProgramError

__all__ = [
    "Component",
    "Inside",
    "Path",
    "has_inner_latents",
    "inside_of",
    "mixture_terms",
    "tracked",
]


def has_inner_latents(fn: Any) -> bool:
    """Whether a distribution, its wrappers taken off, sums latents out by itself."""
    while isinstance(fn, td.Independent | MaskedDistribution):
        fn = fn.base_dist
    return isinstance(fn, HiddenMarkov | td.MixtureSameFamily)


def tracked(fn: Any, value: Tensor, *, hard: bool, temperature: float) -> Tensor:
    """What a posterior of this kind makes of a site, batch-shaped, in place of ln p(y).

    For hard assignments the largest term of the sum over the latents inside; at a temperature
    T ln Σ exp(./T). Components of a mixture inside a chain are summed softly all the same.
    """
    if isinstance(fn, td.Independent):
        inner = tracked(fn.base_dist, value, hard=hard, temperature=temperature)
        return inner.sum(list(range(-fn.reinterpreted_batch_ndims, 0)))
    if isinstance(fn, MaskedDistribution):
        inner = tracked(fn.base_dist, value, hard=hard, temperature=temperature)
        return torch.where(torch.as_tensor(fn._mask), inner, torch.zeros_like(inner))
    if isinstance(fn, HiddenMarkov):
        if hard:
            return viterbi(*fn.log_factors(value), lengths=fn.lengths)[1]
        factors = [factor / temperature for factor in fn.log_factors(value)]
        return temperature * chain_log_sum(*factors, lengths=fn.lengths)
    logs = mixture_terms(fn, value)
    return logs.amax(-1) if hard else temperature * (logs / temperature).logsumexp(-1)


def mixture_terms(fn: td.MixtureSameFamily, value: Tensor) -> Tensor:
    """ln p(component) + ln p(y | component), (..., components)."""
    inner = value.unsqueeze(-1 - len(fn.event_shape))
    logs: Tensor = fn.mixture_distribution.logits + fn.component_distribution.log_prob(inner)
    return logs


# ------------------------------------------------------------------------------- the two kinds


class Path:
    """The states of a chain: (*batch, T), the batch that of the distribution.

    Everything is evaluated when it is made, so that parameters may change afterwards.
    """

    suffix = "states"
    own_dims = 1

    def __init__(self, fn: HiddenMarkov, value: Tensor, mask: Tensor | None, T: float) -> None:
        initial, transition, emission = fn.log_factors(value)
        if mask is not None:
            emission = torch.where(mask[..., None, None], emission, torch.zeros_like(emission))
        self.factors = initial, transition, emission
        self.tempered = self.factors if T == 1 else self._tempered(mask, T)
        self.lengths = fn.lengths
        if mask is None and T == 1:
            self._posterior = fn.posterior(value)  # which ln p(y) has found on its way

    def _tempered(self, mask: Tensor | None, T: float) -> tuple[Tensor, Tensor, Tensor]:
        """What is hidden keeps its probabilities at every temperature."""
        initial, transition, emission = (factor / T for factor in self.factors)
        if mask is not None:
            initial = torch.where(mask[..., None], initial, self.factors[0])
            transition = torch.where(mask[..., None, None, None], transition, self.factors[1])
        return initial, transition, emission

    def marginals(self) -> Tensor:
        """p(z_t = k | y), (*batch, T, K); zero beyond a sequence's length."""
        return self._posterior.marginals

    @cached_property
    def _posterior(self) -> ChainPosterior:
        return forward_backward(*self.tempered, lengths=self.lengths)

    def neighbours(self) -> Tensor:
        """p(z_t = i, z_{t+1} = j | y), (*batch, T - 1, K, K)."""
        return forward_backward(*self.tempered, lengths=self.lengths, pairwise=True).transitions

    def best(self) -> tuple[Tensor, Tensor]:
        """Viterbi's path, and its ln p with y, (*batch,)."""
        return viterbi(*self.factors, lengths=self.lengths)

    def drawn(self, count: int) -> Tensor:
        """(count, *batch, T); anything where no path is possible."""
        initial, transition, emission = self.tempered
        possible = self._posterior.log_evidence > -math.inf
        emission = torch.where(possible[..., None, None], emission, torch.zeros_like(emission))
        return sample_chain(initial, transition, emission, lengths=self.lengths, num_samples=count)

    @property
    def elements(self) -> int:
        return self.factors[2].numel()


class Component:
    """The component of a mixture: (*batch,), the batch that of the distribution."""

    suffix = "component"
    own_dims = 0

    def __init__(
        self, fn: td.MixtureSameFamily, value: Tensor, mask: Tensor | None, T: float
    ) -> None:
        self.logs = mixture_terms(fn, value)
        self.tempered = self.logs / T
        if mask is not None:  # what is hidden keeps its probabilities at every temperature
            hidden, prior = ~mask[..., None], fn.mixture_distribution.logits
            self.logs = torch.where(hidden, prior, self.logs)
            self.tempered = torch.where(hidden, prior, self.tempered)

    def marginals(self) -> Tensor:
        """p(z = k | y), (*batch, K); zero where y is impossible."""
        found = self.tempered.softmax(-1)
        return torch.where(self._possible, found, torch.zeros_like(found))

    def neighbours(self) -> Tensor:
        raise ProgramError(
            "joint needs two or more different sites: the component of a mixture has no neighbour "
            "of its own. Its probabilities are marginals(site)."
        )

    def best(self) -> tuple[Tensor, Tensor]:
        """The most probable component and its ln p with y, (*batch,) both."""
        value, component = self.logs.max(-1)
        return component, value

    def drawn(self, count: int) -> Tensor:
        """(count, *batch); anything where y is impossible."""
        logits = torch.where(self._possible, self.tempered, torch.zeros_like(self.tempered))
        drawn: Tensor = td.Categorical(logits=logits, validate_args=False).sample((count,))
        return drawn

    @property
    def _possible(self) -> Tensor:
        return (self.logs > -math.inf).any(-1, keepdim=True)

    @property
    def elements(self) -> int:
        return self.logs.numel()


# ------------------------------------------------------------------------------ inside a site


@dataclass(frozen=True)
class Inside:
    """The latents inside an observed site, given every latent outside it.

    Attributes:
        latents: the states or components; their batch is that of the site, then ``depth`` more.
        depth: dimensions that ``.to_event`` declared independent, each with latents of its own.
        mask: what counts, of the shape of the batch of ``latents``; ``None``: everything. Hidden
            elements have their prior.
    """

    latents: Path | Component
    depth: int
    mask: Tensor | None

    @property
    def event_dim(self) -> int:
        """Dimensions of a value to the right of the site's batch."""
        return self.depth + self.latents.own_dims

    def log_max(self) -> Tensor:
        """max over the latents of ln p(latents, y), batch-shaped; what is hidden counts nothing."""
        _, value = self.latents.best()
        if self.mask is not None:
            value = torch.where(self.mask, value, torch.zeros_like(value))
        return value.sum(list(range(-self.depth, 0))) if self.depth else value


def inside_of(site: Any, temperature: float = 1.0) -> Inside | None:
    """The latents inside a site's distribution, ``None`` where it has none.

    Args:
        site: an observed sample site of a trace.
        temperature: T of their posterior ∝ p(z, y)^(1/T).
    """
    fn, depth = site["fn"], 0
    if not has_inner_latents(fn):
        return None
    mask = None if site["mask"] is None else _on(site["mask"], site["value"])
    while isinstance(fn, td.Independent | MaskedDistribution):
        if isinstance(fn, MaskedDistribution):
            own = _on(fn._mask, site["value"])
            mask = own if mask is None else mask & own
        else:
            depth += fn.reinterpreted_batch_ndims
            if mask is not None:
                mask = mask.reshape(mask.shape + (1,) * fn.reinterpreted_batch_ndims)
        fn = fn.base_dist
    kind = Path if isinstance(fn, HiddenMarkov) else Component
    return Inside(kind(fn, site["value"], mask, temperature), depth, mask)


def _on(mask: Any, value: Tensor) -> Tensor:
    return torch.as_tensor(mask, device=value.device)
