"""What each state of a latent gives the sites that depend on it: their arguments, state by state.

A latent is a site that is enumerated, or the states inside a
:class:`~lvppl.distributions.HiddenMarkov` or the components of a ``MixtureSameFamily``, which go by
the name of that site.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor
from torch import distributions as td
from torch.distributions import constraints

from lvppl.conjugate import Nodes
from lvppl.distributions import HiddenMarkov
from lvppl.inference.m_step.arguments import Affine, Binding, Bound, Key
from lvppl.inference.m_step.families import family_of
from lvppl.inference.m_step.weighted import unexpanded
from lvppl.tracing import is_enumerated

__all__ = ["ByState", "by_state"]

_OF_STATES = (".initial", ".transition", ".mixture")

Places = dict[str, int]
"""The dimension of a distribution's batch that the states of each latent lie along, negative."""


@dataclass(frozen=True)
class ByState:
    """An argument of one site by the states of one latent.

    Attributes:
        latent, site: their names.
        observed: whether the site is, and not the states inside it.
        value: the argument as a number without units, (K, elements): states whose values differ by
            much less than 1 are the same to any datum.
        entries: of parameters that it is made of, (K, some number), -1 for none; ``None`` where
            they are not known.
    """

    latent: str
    site: str
    observed: bool
    value: Tensor
    entries: Tensor | None


def by_state(sites: Sequence[Any], bindings: Mapping[Key, Binding]) -> list[ByState]:
    """Every argument that differs by state of some latent, of the sites of one enumerated run."""
    latents = {}
    for site in sites:
        if is_enumerated(site) and not isinstance(site["fn"], Nodes):
            infer = site["infer"]
            latents[infer["_dim_to_id"][infer["_enumerate_dim"]]] = site["name"]
    found: list[ByState] = []
    for site in sites:
        dims = site["infer"].get("_dim_to_id", {}).items()
        places = {latents[key]: dim for dim, key in dims if key in latents}
        places.pop(site["name"], None)
        for name, base, inside in _leaves(site["name"], site["fn"], places):
            observed = site["is_observed"] and not name.endswith(_OF_STATES)
            found += _arguments(name, base, inside, observed, bindings)
    return found


def _leaves(name: str, fn: Any, places: Places) -> Iterator[tuple[str, Any, Places]]:
    """What a distribution is made of, named as the sites of Q are."""
    if isinstance(fn, MaskedDistribution):
        yield from _leaves(name, fn.base_dist, places)
    elif isinstance(fn, td.Independent):
        yield from _leaves(name, fn.base_dist, _left(places, fn.reinterpreted_batch_ndims))
    elif isinstance(fn, HiddenMarkov):
        yield f"{name}.initial", _categorical(unexpanded(fn.initial_logits, 1)), places
        outer = _left(places, 2 if fn.differs_by_step else 1)
        states = {name.split(".")[0]: -1}
        rows = _categorical(unexpanded(fn.transition_logits, 2))
        yield f"{name}.transition", rows, outer | states
        yield from _leaves(f"{name}.emission", fn.observation_dist, outer | states)
    elif isinstance(fn, td.MixtureSameFamily):
        yield f"{name}.mixture", _categorical(unexpanded(fn.mixture_distribution.logits, 1)), places
        outer, states = _left(places, 1), {name: -1}
        yield from _leaves(f"{name}.component", fn.component_distribution, outer | states)
    else:
        yield name, fn, places


def _left(places: Places, count: int) -> Places:
    return {latent: dim - count for latent, dim in places.items()}


def _categorical(logits: Tensor) -> td.Categorical:
    return td.Categorical(logits=logits, validate_args=False)


def _arguments(
    name: str, base: Any, places: Places, observed: bool, bindings: Mapping[Key, Binding]
) -> Iterator[ByState]:
    for argument, (value, event_dim) in _without_units(base, places).items():
        for latent, dim in places.items():
            at = dim - event_dim
            if value.dim() < -at or value.shape[at] == 1:
                continue  # the same for all states
            entries = _entries(bindings.get((name, argument)), value.shape, at)
            yield ByState(latent, name, observed, _by_row(value, at), entries)


def _entries(binding: Binding | None, shape: torch.Size, at: int) -> Tensor | None:
    if isinstance(binding, Bound) and binding.index.shape == shape:
        return _by_row(binding.index, at)
    if isinstance(binding, Affine) and binding.jacobian.shape[:-1] == shape:
        used = (binding.jacobian != 0).movedim(at - 1, 0).flatten(1, -2).any(1).cpu()
        return torch.where(used, binding.entries, -1)
    return None


def _by_row(value: Tensor, at: int) -> Tensor:
    return value.movedim(at, 0).reshape(value.shape[at], -1)


def _without_units(base: Any, places: Places) -> dict[str, tuple[Tensor, int]]:
    """The arguments as numbers without units, and their numbers of event dimensions.

    Locations are in units of the narrowest state's deviation, what is positive is a logarithm.
    """
    family = family_of(base)
    if family is None:
        return _of_any_kind(base)
    given = {n: unexpanded(v, family.event_dims[n]) for n, v in family.read(base).items()}
    given = {n: v.detach().double() for n, v in given.items()}
    if "scale_tril" in given:
        width = given["scale_tril"].square().sum(-1).sqrt()
    else:
        width = given.get("scale", torch.ones(()))
    for dim in places.values():
        at = dim - family.event_dims.get("loc", 0)
        width = width.amin(at, keepdim=True) if width.dim() >= -at else width
    found = {}
    for name, value in given.items():
        match family.roles[name]:
            case "location":
                value = value / width
            case "cholesky":
                value = value / width.unsqueeze(-1)
            case "scale" | "rate" | "concentration":
                value = value.clamp(min=torch.finfo(value.dtype).tiny).log()
        found[name] = (value, family.event_dims[name])
    return found


def _of_any_kind(base: Any) -> dict[str, tuple[Tensor, int]]:
    """The arguments of a distribution of no known family, relative to their largest."""
    found = {}
    for name, constraint in getattr(base, "arg_constraints", {}).items():
        value = base.__dict__.get(name)
        if isinstance(value, Tensor) and not constraints.is_dependent(constraint):
            event_dim = constraint.event_dim
            value = unexpanded(value.detach().double(), event_dim)
            top = value.abs().max() if value.numel() else value.new_ones(())
            found[name] = (value / torch.where(top > 0, top, 1.0), event_dim)
    return found
