"""The structure of a (model, guide) pair: its sample sites, its plates, and which tensor
dimension means what.

A program is run once without particles, at unchanged random state, to learn how deeply its plates
nest, which plates hold the data, which guide sites need a score function, and whether the program
keeps its meaning when all particles run in one batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from lvppl.errors import ProgramError
from lvppl.matching import check_same_space, check_site
from lvppl.particles import why_looped
from lvppl.tracing import (
    Message,
    Plate,
    Program,
    is_enumerated,
    plates_of,
    sample_sites,
    subsampled_plates,
    trace_pair,
    undisturbed,
)

__all__ = ["Layout", "describe", "layout_of", "signature_of"]


@dataclass(frozen=True)
class Layout:
    """What one run of the pair tells about its structure, for given argument shapes."""

    nesting: int
    """Number of batch dimensions that plates occupy, the particle plate left out."""
    data_plates: tuple[Plate, ...]
    """Plates common to every sample site of model and guide, left to right."""
    subsampled_inside: tuple[str, ...]
    """Subsampled plates that are not data plates: their scale is inside every datum's term."""
    enumerated: tuple[str, ...]
    """Sites marked ``infer={"enumerate": "parallel"}`` in model or guide."""
    score_sites: tuple[str, ...]
    """Guide sites that are neither reparameterised nor enumerated."""
    analytic_sites: frozenset[str]
    """Latents none of whose possible model parents can be its descendant in the guide."""
    signature: tuple[tuple[Any, ...], ...]
    """Names and kinds of the sites in their order: a run that differs has another layout."""
    loop_reason: str = ""
    """Why particles run one by one; empty when they run in one batch."""


class _Entry(NamedTuple):
    layout: Layout
    modes: tuple[tuple[weakref.ref[torch.nn.Module], bool], ...]
    """The modules that ran, and whether each was training: batch statistics depend on it."""

    def holds(self) -> bool:
        return all(
            module is not None and module.training == training
            for module, training in ((reference(), training) for reference, training in self.modes)
        )


_MOST_ENTRIES = 64
_Known = dict[Any, _Entry]
_LAYOUTS: MutableMapping[Any, MutableMapping[Any, _Known]] = WeakIdKeyDictionary()


def _no_guide() -> None:
    """Stands for the prior where layouts are remembered."""


def layout_of(
    model: Program,
    guide: Program | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    with_particles: bool = False,
    data_plate: str | Sequence[str] | None = None,
    strict: bool = True,
    refresh: bool = False,
) -> Layout:
    """The layout of the pair for arguments of these shapes (remembered while the model lives).

    Args:
        with_particles: also learn whether all particles can run in one batch.
        data_plate: names of the plates to keep as data plates; default every common one.
        strict: refuse latents whose plates differ between model and guide.
        refresh: forget what is remembered: the structure has changed.

    Raises:
        ProgramError: plates or shapes that contradict each other, by site and plate.
    """
    wanted = data_plate if isinstance(data_plate, str | None) else tuple(data_plate)
    cache, key = _remembered(model, guide, args, kwargs, (wanted, strict))
    if not refresh:
        for known in (True,) if with_particles else (True, False):
            entry = cache.get((key, known))
            if entry is not None and entry.holds():
                return entry.layout
    with undisturbed() as modules:
        layout = _probe(model, guide, args, kwargs, data_plate, strict)
        if with_particles:
            reason = why_looped(model, guide, args, kwargs, layout.nesting)
            layout = replace(layout, loop_reason=reason)
    modes = {id(module): (weakref.ref(module), module.training) for module in modules}
    if len(cache) >= _MOST_ENTRIES:
        cache.clear()
    cache[key, with_particles] = _Entry(layout, tuple(modes.values()))
    return layout


def _remembered(
    model: Program, guide: Program | None, args: Any, kwargs: Any, options: Any
) -> tuple[_Known, Any]:
    # Bound methods are made anew at each access: remember by the object that they belong to.
    programs = [model, guide or _no_guide]
    owners = [getattr(program, "__self__", program) for program in programs]
    key = (
        tuple(getattr(program, "__func__", None) for program in programs),
        _signature((args, dict(kwargs))),
        options,
    )
    try:
        by_guide = _LAYOUTS.setdefault(owners[0], WeakIdKeyDictionary())
        return by_guide.setdefault(owners[1], {}), key
    except TypeError:  # no weak references, as for a built-in function: probe at each call
        return {}, key


def _signature(value: Any) -> Any:
    """What of an argument can change the structure; a run that differs all the same is noticed."""
    if isinstance(value, Mapping):
        return tuple((name, _signature(item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return len(value), *(_signature(item) for item in value[:64])
    if isinstance(value, bool | None):
        return value
    return type(value), *(getattr(value, name, None) for name in ("shape", "dtype", "device"))


def _probe(
    model: Program,
    guide: Program | None,
    args: Any,
    kwargs: Any,
    data_plate: Any,
    strict: bool,
) -> Layout:
    model_trace, guide_trace = trace_pair(model, guide, args, kwargs)
    model_sites, guide_sites = sample_sites(model_trace), sample_sites(guide_trace)
    if not model_sites:
        raise ProgramError(
            "The model has no sample site: there is nothing to compute. Write pyro.sample(..., "
            "obs=data) for what is observed, and pyro.sample for what is latent."
        )
    for program, sites in (("model", model_sites), ("guide", guide_sites)):
        for site in sites:
            check_site(program, site)
    for site in guide_sites:
        other = model_trace.nodes.get(site["name"])
        if other is not None and not site["is_observed"] and not other["is_observed"]:
            check_same_space(site, other, strict)
    return describe(model_sites, guide_sites, data_plate)


def describe(
    model_sites: Sequence[Message], guide_sites: Sequence[Message], data_plate: Any = None
) -> Layout:
    """The layout that the sites of one run, without particles and enumeration, have."""
    sites = [*model_sites, *guide_sites]
    data_plates = _data_plates(sites, data_plate)
    names = {plate.name for plate in data_plates}
    model_order = [site["name"] for site in model_sites if not site["is_observed"]]
    guide_order = [site["name"] for site in guide_sites if not site["is_observed"]]
    # a latent without a guide is drawn from its prior
    drawn = [*guide_sites] + [
        site for site in model_sites if not site["is_observed"] and site["name"] not in guide_order
    ]
    return Layout(
        nesting=max((-plate.dim for site in sites for plate in plates_of(site)), default=0),
        data_plates=data_plates,
        subsampled_inside=tuple(sorted(subsampled_plates(sites) - names)),
        enumerated=tuple(dict.fromkeys(site["name"] for site in sites if is_enumerated(site))),
        score_sites=tuple(
            site["name"]
            for site in drawn
            if not is_enumerated(site) and not getattr(site["fn"], "has_rsample", False)
        ),
        analytic_sites=_analytic_sites(model_order, guide_order),
        signature=signature_of(model_sites, guide_sites),
    )


def signature_of(
    model_sites: Sequence[Message], guide_sites: Sequence[Message]
) -> tuple[tuple[Any, ...], ...]:
    """What a layout rests on: each site's program, name, role and reparameterisation, in order."""
    return tuple(
        (i, s["name"], s["is_observed"], is_enumerated(s), getattr(s["fn"], "has_rsample", False))
        for i, sites in enumerate((model_sites, guide_sites))
        for s in sites
    )


def _data_plates(sites: Sequence[Message], wanted: Any) -> tuple[Plate, ...]:
    plates = {plate.name: plate for site in sites for plate in plates_of(site)}
    common = set(plates).intersection(*({p.name for p in plates_of(site)} for site in sites))
    if wanted is not None:
        wanted = (wanted,) if isinstance(wanted, str) else tuple(wanted)
        for name in wanted:
            if name not in common:
                outside = [
                    site["name"] for site in sites if name not in {p.name for p in plates_of(site)}
                ]
                raise ProgramError(
                    f"data_plate '{name}' must be a plate around every sample site of model and "
                    f"guide; outside it: {', '.join(repr(s) for s in dict.fromkeys(outside))}. "
                    f"Plates common to every site: {sorted(common) or 'none'}."
                )
        common = set(wanted)
    return tuple(sorted((plates[name] for name in common), key=lambda plate: plate.dim))


def _analytic_sites(model_order: Sequence[str], guide_order: Sequence[str]) -> frozenset[str]:
    """Latents whose KL may be taken in closed form.

    KL(q(z_i | a), p(z_i | b)) averages over z_i with b held fixed, which is right only if b does
    not depend on z_i under the guide. What is sampled before z_i in the guide cannot depend on it;
    so every latent that the model samples before z_i must come before it in the guide as well.
    """
    position = {name: i for i, name in enumerate(guide_order)}
    allowed = set()
    for i, name in enumerate(model_order):
        before = [position[n] for n in model_order[:i] if n in position]
        if name in position and max(before, default=-1) < position[name]:
            allowed.add(name)
    return frozenset(allowed)
