"""Do model and guide speak of the same latents, and of the same data?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import (
    Delta,
    Independent,
    MaskedDistribution,
    TransformedDistribution,
    VonMises,
)
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import AffineTransform, ComposeTransform

from lvppl.errors import ProgramError
from lvppl.observations import require_number_each
from lvppl.tracing import Message, is_enumerated, is_point, kind_of, plates_of, support_of

__all__ = ["check_same_space", "check_same_subsamples", "check_site", "refuse_mismatch"]


def refuse_mismatch(
    missing: Sequence[str],
    extra: Sequence[str],
    observed: Sequence[str],
    model_sites: Mapping[str, Any],
) -> None:
    """Refuse latents without a guide, guide sites without a model, and a guide that observes."""
    if observed:
        raise ProgramError(
            f"Site {_quoted(observed)} is observed in the guide, so that its ln p would be counted "
            "in ln q. Take the site out of the guide (are model and guide swapped?); the guide "
            "reads the data from its arguments."
        )
    if missing:
        raise ProgramError(
            f"The guide has no site for the model's latent {_quoted(missing)}: the bound would "
            f"count ln p there but no ln q. Add pyro.sample({missing[0]!r}, ...) to the guide, "
            'mark a discrete site with infer={"enumerate": "parallel"} to sum it out, or pass '
            "strict=False to draw it from its prior."
        )
    if extra:
        known = [name for name in extra if name in model_sites]
        if known:
            raise ProgramError(
                f"The guide samples {_quoted(known)}, which the model observes. Take the site out "
                "of the guide; the guide reads the data from its arguments."
            )
        raise ProgramError(
            f"The guide samples {_quoted(extra)}, which the model does not have. Rename it to a "
            'latent of the model, mark it infer={"is_auxiliary": True} if its density belongs to '
            "q, or pass strict=False if it is noise that only feeds other sites."
        )


def check_same_subsamples(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    """Refuse a model that draws its own minibatch where its guide drew another.

    A replay hands the guide's indices to the model's plate of the same name. A plate that only the
    model subsamples, around a latent that the guide samples elsewhere, would pair different data.
    """

    def subsampled(trace: poutine.Trace) -> set[str]:
        nodes: dict[str, Any] = dict(trace.nodes)
        return {
            name
            for name, site in nodes.items()
            if site["type"] == "sample"
            and type(site["fn"]).__name__ == "_Subsample"
            and 0 < (site["fn"].subsample_size or 0) < site["fn"].size
        }

    only_model = subsampled(model_trace) - subsampled(guide_trace)
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample" or site["is_observed"] or name not in guide_trace.nodes:
            continue
        around = {frame.name for frame in site["cond_indep_stack"]} & only_model
        if around:
            plate = min(around)
            raise ProgramError(
                f"The model subsamples plate '{plate}' around the latent '{name}', but the guide "
                f"does not draw that plate's indices: the two would use different minibatches. Put "
                f"the guide's site in pyro.plate('{plate}', ...) of the same name and size."
            )


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def check_site(program: str, site: Message) -> None:
    """Refuse a site whose batch dimensions are not its plates, or that cannot be enumerated."""
    if site["infer"].get("enumerate") == "sequential":
        raise ProgramError(
            f"Site '{site['name']}' of the {program} is marked for sequential enumeration, which "
            'lvppl does not use: write infer={"enumerate": "parallel"}.'
        )
    if is_enumerated(site) and not site["fn"].has_enumerate_support:
        raise ProgramError(
            f"Site '{site['name']}' of the {program} is marked for enumeration, but its "
            f"{kind_of(site['fn'])} cannot be enumerated: its support is not finite. Take the mark "
            "away, and draw the site in a guide."
        )
    if site["is_observed"]:
        require_number_each(site)
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
    _check_support(name, guide_site, p, strict)


def _check_support(name: str, guide_site: Message, p: Any, strict: bool) -> None:
    q, value = guide_site["fn"], guide_site["value"]
    bad = ~torch.isfinite(value)
    if bool(bad.any()):
        raise ProgramError(
            f"Site '{name}' of the guide draws {float(value[bad][0])} at index {first_index(bad)}: "
            f"look at the parameters of its {kind_of(q)}."
        )
    wanted, found = support_of(p), support_of(q)
    if wanted is None or found is None:
        return
    fits = bool(torch.as_tensor(wanted.check(value)).all())
    if strict and not is_point(guide_site):
        ends = _bounds(wanted, p), _bounds(found, q)
        fits &= wanted.is_discrete == found.is_discrete
        fits &= None in ends or ends[0] == ends[1]
    if not fits:
        raise ProgramError(
            f"Site '{name}' is drawn by the guide from {kind_of(q)}, whose support "
            f"({found}) is not that of the model's {kind_of(p)} ({wanted}): ln p or "
            "ln q is not defined everywhere. Use a guide distribution of the same support, for "
            "instance a transformed one."
        )


def _bounds(support: Any, fn: Any) -> tuple[float, float] | None:
    """The ends of a support that does not depend on parameters, ``None`` where it may."""
    while type(fn) in (Independent, MaskedDistribution):
        fn = fn.base_dist
    if isinstance(fn, VonMises):  # whose density on the line would repeat for ever
        return -math.pi, math.pi
    if isinstance(fn, TransformedDistribution) and support.is_discrete is False:
        transforms = fn.transforms
        if any(isinstance(part, AffineTransform | ComposeTransform) for part in transforms):
            return None  # torch calls the image of an affine map real, whatever it maps
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if support is constraints.real:
        return -math.inf, math.inf
    ends = getattr(support, "lower_bound", -math.inf), getattr(support, "upper_bound", math.inf)
    if not all(isinstance(end, int | float) for end in ends) or ends == (-math.inf, math.inf):
        return None
    return float(ends[0]), float(ends[1])


def first_index(bad: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in bad.nonzero()[0])


def has_no_density(site: Message) -> bool:
    """Whether a site observes a deterministic value on a continuous space."""
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        if getattr(fn, "_mask", None) is False:  # a record of a value, not an observation
            return False
        fn = fn.base_dist
    if not (site["is_observed"] and isinstance(fn, Delta) and fn.v.is_floating_point()):
        return False
    # a reparameterised latent is recorded as a point at its own value: that is no observation
    return bool(fn.v.data_ptr() != site["value"].data_ptr())


def no_density(name: str) -> str:
    return (
        f"'{name}' is a deterministic observation on a continuous space: it has no density, so "
        "ln P(y | z) and ln P(y) cannot be computed (a GAN's generator). Add observation noise, or "
        "use an objective that needs samples only."
    )
