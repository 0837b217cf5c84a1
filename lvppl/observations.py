"""Why the data of a program do not go with it, in words; asked only after it has failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor

from lvppl import remedies
from lvppl.errors import ProgramError
from lvppl.tracing import kind_of, plates_of, sample_sites, support_of, trace_pair, undisturbed

__all__ = [
    "explain_observations",
    "require_number_each",
    "require_own_values",
    "require_plates",
    "require_tensor",
]

Program = Callable[..., Any]


def explain_observations(model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise if a plain run of the model, without enumeration, shows what is wrong with its data.

    Raises:
        ProgramError: no rows; no tensor; NaN; a shape or a value that a site cannot take.
    """
    for place, value in enumerate(args):
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == 0:
            raise ProgramError(
                f"data argument {place} has no rows: its shape is {tuple(value.shape)}"
            )
    try:
        with undisturbed(), poutine.block():
            trace, _ = trace_pair(model, None, args, kwargs)
    except ProgramError:
        return  # the program fails by itself, which says enough
    for site in sample_sites(trace):
        if site["is_observed"]:
            _explain(site)


def require_plates(site: Any) -> None:
    """Refuse data whose batch dimensions are not the plates: they would meet states of latents.

    Raises:
        ProgramError: by dimension, size and plate.
    """
    value = site["value"]
    if not site["is_observed"] or not isinstance(value, Tensor) or value.numel() == 0:
        return  # pyro.factor observes nothing
    plates = {plate.dim: plate for plate in plates_of(site)}
    shape = value.shape[: max(value.dim() - site["fn"].event_dim, 0)]
    for dim in range(-len(shape), 0):
        size, plate = int(shape[dim]), plates.get(dim)
        if size != 1 and (plate is None or size != plate.size):
            where = "no plate" if plate is None else f"plate '{plate.name}' of size {plate.size}"
            raise ProgramError(
                f"Site '{site['name']}' of the model observes values of shape "
                f"{tuple(value.shape)}, whose size {size} at batch dimension {dim} belongs to "
                f"{where}. Put independent data into pyro.plate(..., {size}, dim={dim}), and "
                "declare what belongs to one datum by .to_event(n)."
            )


def require_tensor(site: Any) -> None:
    """Refuse arrays and tables.

    Raises:
        ProgramError: with the code that makes a tensor of one.
    """
    if not isinstance(site["value"], Tensor):
        what, code = remedies.as_tensor(site["value"])
        raise ProgramError(f"Site '{site['name']}' observes a {what}, not a tensor: write {code}.")


def require_number_each(site: Any) -> None:
    """Refuse rows where the plate takes a number for each datum.

    Raises:
        ProgramError: by shape, with what to write.
    """
    value, fn = site["value"], site["fn"]
    sizes = {plate.dim: plate.size for plate in plates_of(site)}
    if remedy := remedies.of_shape(value, fn.event_dim, sizes):
        raise ProgramError(
            f"Site '{site['name']}' observes values of shape {tuple(value.shape)}, whose last "
            f"dimension belongs to no plate and to no event of its {kind_of(fn)}. {remedy}"
        )


def require_own_values(site: Any) -> None:
    """Refuse one value that a plate would repeat: it would count as so many data.

    Raises:
        ProgramError: by shape and plate.
    """
    value, event_dim = site["value"], site["fn"].event_dim
    require_tensor(site)
    shape = tuple(value.shape[: max(value.dim() - event_dim, 0)])
    for plate in plates_of(site):
        size = shape[plate.dim] if len(shape) >= -plate.dim else 1
        if size == 1 < plate.size and not isinstance(site["fn"], Unit):
            raise ProgramError(
                f"Observed site '{site['name']}' has batch shape {shape}, but plate "
                f"'{plate.name}' has size {plate.size} at dimension {plate.dim}: one value would "
                f"be counted {plate.size} times. Give it the plate's size (vectors of length one "
                "are y[:, None]), or expand it yourself."
            )


def _explain(site: Any) -> None:
    name, fn, value = site["name"], site["fn"], site["value"]
    kind = kind_of(fn)
    require_tensor(site)
    try:
        fn.log_prob(value)
        return
    except (AttributeError, RuntimeError, TypeError, ValueError) as failure:
        error = failure
    nan = value.isnan()
    if bool(nan.any()):
        raise ProgramError(
            f"Site '{name}' observes nan at index {_first(nan)}: a missing value has no density. "
            "Fill it and mask it, as in dist.Normal(...).mask(observed); "
            'missing="nan" does so, here and in fit(...).'
        ) from error
    wanted = tuple(fn.batch_shape) + tuple(fn.event_shape)
    try:
        torch.broadcast_shapes(wanted, value.shape)
    except RuntimeError:
        raise ProgramError(
            f"Site '{name}' observes values of shape {tuple(value.shape)}, but its {kind} is of "
            f"shape {wanted}, events of {tuple(fn.event_shape)}. Give data of as many columns as "
            "the program has parameters for, or correct the program."
        ) from error
    outside = _outside(fn, value)
    if outside is not None and bool(outside.any()):
        index = _first(outside)
        found = value[tuple(index)]
        raise ProgramError(
            f"Site '{name}' observes {found.tolist()} at index {index}, which is outside the "
            f"support of its {kind}. Correct the data, or choose another distribution."
        ) from error


def _outside(fn: Any, value: Tensor) -> Tensor | None:
    support = support_of(fn)
    if support is None:
        return None
    try:
        inside: Tensor = support.check(value)
        return ~inside
    except (RuntimeError, ValueError):
        return None


def _first(bad: Tensor) -> list[int]:
    return [int(i) for i in bad.nonzero()[0]]
