"""ln p(y) exactly: by structure where a program has it, else over all states or by quadrature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.evidence import log_evidence
from lvppl.inference.likelihood.quadrature import Unsettled, integrated
from lvppl.layout import layout_of
from lvppl.sweep import StateSpace, swept_evidence
from lvppl.sweep.joint import states_of

__all__ = ["ExactSum", "exact_sum", "finite_states"]

_WORDS = {
    "quadratic": "ln p(z, y) is quadratic in the bits: swept as matrix products",
    "bernoulli": "a Bernoulli observation with logits affine in the bits: swept from two tables",
    "program": "the program ran at every state",
}


@dataclass(frozen=True)
class ExactSum:
    """ln p(y), (data,), nats, and a sentence that says how it was summed."""

    log_prob: Tensor
    how: str

    def to(self, device: str) -> ExactSum:
        """The same on another device."""
        return ExactSum(self.log_prob.to(device), self.how)


def exact_sum(
    model: Callable[..., Any],
    data: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    data_plate: Any = None,
    progress: bool = False,
) -> ExactSum:
    """Variable elimination, or a sweep where its tables would be too large, or quadrature.

    Raises:
        ProgramError: a datum has more than two continuous latents that are not linear-Gaussian,
            or there are too many states (how many).
    """
    try:
        per_datum = log_evidence(model, *data, **kwargs).per_datum.double()
        kept = _summed_over_others(per_datum, model, data, kwargs, data_plate)
        return ExactSum(kept, "summed by variable elimination")
    except ProgramError as error:
        structural = error
    if finite_states(model, data, kwargs, data_plate) is None:
        return _by_quadrature(structural, model, data, kwargs, data_plate)
    swept = swept_evidence(model, data, kwargs, data_plate=data_plate, progress=progress)
    return ExactSum(swept.log_prob, f"{swept.num_states:,} states; {_WORDS[swept.form]}")


def _by_quadrature(
    structural: ProgramError,
    model: Callable[..., Any],
    data: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    data_plate: Any,
) -> ExactSum:
    """Where each datum has one or two continuous latents; else what has no structure is said."""
    try:
        found = integrated(model, data, kwargs, data_plate=data_plate)
    except Unsettled:
        raise
    except ProgramError as error:
        raise structural from error
    if found is None:
        raise structural
    return ExactSum(
        found.log_prob,
        f"by quadrature, {found.num_points:,} points a datum; the last doubling of the points "
        f"moved it by {max(found.error, 1e-16):.1g} of itself at most",
    )


def finite_states(
    model: Callable[..., Any], data: tuple[Any, ...], kwargs: Mapping[str, Any], data_plate: Any
) -> StateSpace | None:
    """The joint states of a datum; ``None`` where a latent is not finite, or there is none."""
    layout = layout_of(model, None, data, kwargs, data_plate=data_plate)
    try:
        space = states_of(model, data, kwargs, layout)
    except ProgramError:
        return None
    return space if space.num_elements else None


def _summed_over_others(
    per_datum: Tensor, model: Callable[..., Any], data: Any, kwargs: Any, data_plate: Any
) -> Tensor:
    """ln p(y) by the plates that ``data_plate`` keeps, from that by every data plate."""
    every = layout_of(model, None, data, kwargs).data_plates
    kept = layout_of(model, None, data, kwargs, data_plate=data_plate).data_plates
    others = [i for i, plate in enumerate(every) if plate not in kept]
    if not others:
        return per_datum
    return per_datum.reshape([plate.size for plate in every]).sum(others).flatten()
