"""What EM refuses before its first iteration, and words for what fails there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor
from torch.distributions import constraints

from lvppl.errors import ProgramError, ProgramFailure
from lvppl.inference.arguments import tensors_in
from lvppl.observations import require_number_each, require_tensor
from lvppl.tracing import Message, is_masked, sample_sites, support_of

__all__ = [
    "inside_constraints",
    "probing",
    "refuse_drawn_rows",
    "refuse_infinite",
    "refuse_observations",
    "refuse_unseen_columns",
]


def refuse_infinite(data: tuple[Any, ...]) -> None:
    """Infinite values have no density, and are not missing ones."""
    for place, value in enumerate(data):
        for tensor in tensors_in(value):
            if tensor.is_floating_point() and bool(tensor.isinf().any()):
                where = [int(i) for i in tensor.isinf().nonzero()[0]]
                raise ProgramError(
                    f"data argument {place} has {float(tensor[tuple(where)])} at index {where}. "
                    'Correct the data; a missing value is NaN, in a fit with missing="nan".'
                )


def refuse_unseen_columns(data: tuple[Any, ...]) -> None:
    """A feature of which nothing was seen has no parameters that the data speak of."""
    for place, value in enumerate(data):
        for tensor in tensors_in(value):
            if tensor.is_floating_point() and tensor.dim() == 2 and len(tensor) > 0:
                empty = tensor.isnan().all(0).nonzero().flatten().tolist()
                if empty:
                    raise ProgramError(
                        f"data argument {place} has no value at all in column {empty[0]}. Leave "
                        "the column out."
                    )


def refuse_drawn_rows(trace: poutine.Trace) -> None:
    """A plate that draws other rows at each run has no two evidences that could be compared."""
    nodes: dict[str, Any] = dict(trace.nodes)
    for name, site in nodes.items():
        fn = site.get("fn")
        if type(fn).__name__ != "_Subsample":
            continue
        drawn = len(site["value"])
        if drawn < fn.size:
            raise ProgramError(
                f"Plate '{name}' draws {drawn} of its {fn.size} rows anew at each run, but EM "
                "compares the evidence of the same data from iteration to iteration. Leave "
                "subsample_size out; fit(..., batch_size=...) holds few rows at once, and "
                "EM(..., online=True) learns from minibatches."
            )


def refuse_observations(trace: poutine.Trace) -> None:
    """Observed values that are no tensors, of another shape than their plate, or out of range."""
    for site in sample_sites(trace):
        if site["is_observed"] and not isinstance(site["fn"], Unit):
            _refuse_observation(site["name"], site["fn"], site["value"], site)


def _refuse_observation(name: str, fn: Any, value: Any, site: Message) -> None:
    require_tensor(site)
    require_number_each(site)
    if value.dtype in (torch.float16, torch.bfloat16):
        raise ProgramError(
            f"Site '{name}' observes {value.dtype}, in which sums over data have no digits left: "
            "EM needs float32 or float64. Write y.float()."
        )
    if _is_real(fn) and not is_masked(site):
        _refuse_distances(name, value, fn.event_shape.numel())


def _is_real(fn: Any) -> bool:
    """Whether values may be any number, so that distances between them are squared."""
    support: Any = support_of(fn)
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support is constraints.real


def _refuse_distances(name: str, value: Tensor, num_features: int) -> None:
    """Values whose squared distances a dtype does not hold: variances are infinite, or zero."""
    if not value.is_floating_point() or value.numel() == 0:
        return
    low, high = value.nan_to_num().aminmax()
    largest, holds = float(torch.maximum(-low, high)), torch.finfo(value.dtype)
    least = 1e4 * holds.tiny  # components are narrower than all data
    if num_features * (2 * largest) ** 2 > holds.max or 0 < largest**2 < least:
        raise ProgramError(
            f"Site '{name}' observes values up to {largest:.3g}, whose squared distances "
            f"{value.dtype} does not hold. Standardise the data, (y - y.mean(0)) / y.std(0), or "
            "fit in float64: y.double(), with torch.set_default_dtype(torch.float64)."
        )


@contextmanager
def inside_constraints() -> Iterator[None]:
    """Say so where a program fails because a parameter starts outside its constraint."""
    try:
        yield
    except ProgramError as error:
        store = pyro.get_param_store()
        for name in store.keys():  # noqa: SIM118
            free = store._params[name]
            if not bool(free.isfinite().all()):
                kind = type(store._constraints[name]).__name__.strip("_")
                raise ProgramError(
                    f"Parameter '{name}' starts outside its constraint ({kind}), so that its "
                    "unconstrained value is not finite. Give pyro.param an initial value inside."
                ) from error
        raise


@contextmanager
def probing(constraint_of: Mapping[str, Any]) -> Iterator[None]:
    """Say so where a program fails at other values of parameters that may take any."""
    try:
        yield
    except ProgramFailure as error:
        free = [n for n, c in constraint_of.items() if c is constraints.real]
        if not free:
            raise
        raise ProgramFailure(
            f"The program runs at the first values of its parameters, but not where EM moves them: "
            f"{str(error).splitlines()[0].rstrip(':')}. Without a constraint are "
            f"{', '.join(map(repr, free))}: say what they may be, as in pyro.param(name, value, "
            "constraint=constraints.simplex) for probabilities, positive for scales and rates."
        ) from error
