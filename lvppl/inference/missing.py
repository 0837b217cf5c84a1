"""NaN as a missing value: the element leaves the likelihood."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Independent, MaskedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch import distributions as td
from torch.distributions import constraints

from lvppl.distributions import HiddenMarkov
from lvppl.errors import ProgramError
from lvppl.tracing import kind_of

__all__ = ["MissingValues", "inside_support"]


class MissingValues(Messenger):
    """Masks the NaN of observed sites, and puts a valid value in their place.

    Elements that ``.to_event`` declared independent are masked one by one. A distribution that
    couples the elements of its event (MultivariateNormal) can miss an event as a whole.
    """

    def _pyro_sample(self, msg: Any) -> None:
        value = msg["value"]
        if not msg["is_observed"] or not isinstance(value, Tensor) or not value.is_floating_point():
            return
        missing = value.isnan()
        if not bool(missing.any()):
            return
        fn, depth = msg["fn"], 0
        while isinstance(fn, td.Independent):
            depth += fn.reinterpreted_batch_ndims
            fn = fn.base_dist
        if isinstance(fn, HiddenMarkov):
            msg["fn"] = _steps_masked(msg["name"], fn, missing)
            fill = 0.0
        else:
            masked = MaskedDistribution(fn, ~_by_event(msg["name"], fn, missing))
            msg["fn"] = Independent(masked, depth) if depth else masked
            fill = inside_support(fn)
        msg["value"] = torch.where(missing, torch.full_like(value, fill), value)


def _by_event(name: str, fn: Any, missing: Tensor) -> Tensor:
    """Which events are missing; refuses those that are in part."""
    dims = len(fn.event_shape)
    if dims == 0:
        return missing
    flat = missing.flatten(-dims)
    if bool((flat.any(-1) != flat.all(-1)).any()):
        raise ProgramError(
            f"some values of site '{name}' miss a part of an event of {kind_of(fn)}, whose "
            "elements depend on each other. Use independent elements, as in "
            "dist.Normal(...).to_event(1), or let the whole event be NaN."
        )
    return flat.all(-1)


def _steps_masked(name: str, fn: HiddenMarkov, missing: Tensor) -> HiddenMarkov:
    dims = len(fn.observation_dist.event_shape)
    flat = missing.flatten(-dims) if dims else missing.unsqueeze(-1)
    if bool((flat.any(-1) != flat.all(-1)).any()):
        raise ProgramError(
            f"some steps of site '{name}' miss a part of their observation: a HiddenMarkov can "
            "miss whole steps only. Let the whole step be NaN, or write the chain with pyro.markov."
        )
    observed = ~flat.all(-1)
    if fn.step_mask is not None:
        observed = observed & fn.step_mask
    return HiddenMarkov(
        fn.initial_logits,
        fn.transition_logits,
        fn.observation_dist,
        num_steps=fn.num_steps,
        lengths=fn.lengths,
        mask=observed,
    )


def inside_support(fn: Any) -> float:
    """A number inside the support."""
    support: Any = fn.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if isinstance(support, constraints.interval):
        return float(torch.as_tensor(support.lower_bound + support.upper_bound).mean()) / 2
    positive = constraints.greater_than | constraints.greater_than_eq
    return 1.0 if isinstance(support, positive) else 0.0
