"""The structure of a (model, guide) pair: its sample sites, its plates, and which tensor
dimension means what.

A program is run once without particles, at unchanged random state, to learn how deeply its plates
nest, which plates hold the data, which guide sites need a score function, and whether the program
keeps its meaning when all particles run in one batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.particles import why_looped
from lvppl.tracing import (
    Message,
    Plate,
    Program,
    is_enumerated,
    kind_of,
    plates_of,
    sample_sites,
    subsampled_plates,
    trace_pair,
    undisturbed,
)

__all__ = ["Layout", "check_same_space", "layout_of"]


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


_Known = dict[Any, Layout]
_LAYOUTS: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, _Known]]
_LAYOUTS = weakref.WeakKeyDictionary()


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
    cache, key = _remembered(model, guide, args, kwargs, (data_plate, strict))
    layout = None if refresh else cache.get((key, True))
    if layout is None and not (refresh or with_particles):
        layout = cache.get((key, False))
    if layout is None:
        with undisturbed():
            layout = _probe(model, guide, args, kwargs, data_plate, strict)
            if with_particles:
                reason = why_looped(model, guide, args, kwargs, layout.nesting)
                layout = replace(layout, loop_reason=reason)
        cache[key, with_particles] = layout
    return layout


def _remembered(
    model: Program, guide: Program | None, args: Any, kwargs: Any, options: Any
) -> tuple[_Known, Any]:
    # Bound methods are made anew at each access: remember by the object that they belong to.
    programs = [model, guide or _no_guide]
    owners = [getattr(program, "__self__", program) for program in programs]
    key = (
        tuple(getattr(program, "__func__", None) for program in programs),
        tuple(getattr(owner, "training", None) for owner in owners),
        _signature((args, dict(kwargs))),
        _signature(options),
    )
    try:
        by_guide = _LAYOUTS.setdefault(owners[0], weakref.WeakKeyDictionary())
        return by_guide.setdefault(owners[1], {}), key
    except TypeError:  # not hashable, or no weak references: probe at each call
        return {}, key


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    if isinstance(value, Mapping):
        return tuple((name, _signature(item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(_signature(item) for item in value)
    return value if isinstance(value, int | float | str | bool | None) else id(value)


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
    for program, sites in (("model", model_sites), ("guide", guide_sites)):
        for site in sites:
            _check_shape(program, site)
    for site in guide_sites:
        other = model_trace.nodes.get(site["name"])
        if other is not None and not site["is_observed"] and not other["is_observed"]:
            check_same_space(site, other, strict)
    sites = model_sites + guide_sites
    data_plates = _data_plates(sites, data_plate)
    names = {plate.name for plate in data_plates}
    model_order = [site["name"] for site in model_sites if not site["is_observed"]]
    guide_order = [site["name"] for site in guide_sites if not site["is_observed"]]
    # a latent without a guide is drawn from its prior
    drawn = guide_sites + [
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


def _check_shape(program: str, site: Message) -> None:
    if site["infer"].get("enumerate") == "sequential":
        raise ProgramError(
            f"Site '{site['name']}' of the {program} is marked for sequential enumeration, which "
            'lvppl does not use: write infer={"enumerate": "parallel"}.'
        )
    plates = {plate.dim: plate for plate in plates_of(site)}
    shape = tuple(site["fn"].batch_shape)
    for dim in range(-len(shape), 0):
        size, plate = shape[dim], plates.get(dim)
        if size != 1 and plate is None:
            raise ProgramError(
                f"Site '{site['name']}' of the {program} has batch shape {shape}, whose size "
                f"{size} at dimension {dim} belongs to no plate. Declare it independent with "
                f"pyro.plate(..., {size}, dim={dim}), or make it part of one draw with "
                f".to_event({-dim})."
            )
        if plate is not None and size not in (1, plate.size):
            raise ProgramError(
                f"Site '{site['name']}' of the {program} has batch shape {shape}, but plate "
                f"'{plate.name}' has size {plate.size} at dimension {dim}. Give the distribution "
                f"that size there, or correct the plate."
            )


def check_same_space(guide_site: Message, model_site: Message, strict: bool) -> None:
    name, q, p = guide_site["name"], guide_site["fn"], model_site["fn"]
    if tuple(q.event_shape) != tuple(p.event_shape):
        raise ProgramError(
            f"Site '{name}' has event shape {tuple(p.event_shape)} in the model and "
            f"{tuple(q.event_shape)} in the guide. Give both the same shape; .to_event(n) moves "
            "the n rightmost batch dimensions into the event."
        )
    in_model, in_guide = ({p.name for p in plates_of(s)} for s in (model_site, guide_site))
    if strict and in_model != in_guide:
        raise ProgramError(
            f"Site '{name}' lies in plates {sorted(in_model) or 'none'} in the model and in "
            f"{sorted(in_guide) or 'none'} in the guide. Use plates of the same names in both, or "
            "pass strict=False if the difference is intended."
        )
    inside = p.support.check(guide_site["value"])
    if not bool(torch.as_tensor(inside).all()):
        raise ProgramError(
            f"Site '{name}' is drawn by the guide from {kind_of(q)} outside the support of the "
            f"model's {kind_of(p)} ({p.support}): ln p is not defined there. Use a guide "
            "distribution of the same support, for instance a transformed one."
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
