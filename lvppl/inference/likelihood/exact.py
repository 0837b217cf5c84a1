"""ln p(y) by exact sums: by structure where the program has it, else over every state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.evidence import log_evidence
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


def exact_sum(
    model: Callable[..., Any],
    data: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    data_plate: Any = None,
    progress: bool = False,
) -> ExactSum:
    """Variable elimination, or a sweep where its tables would be too large.

    Raises:
        ProgramError: a latent is continuous and has no conjugate form, or there are too many
            states (how many).
    """
    try:
        per_datum = log_evidence(model, *data, **kwargs).per_datum.double()
        kept = _summed_over_others(per_datum, model, data, kwargs, data_plate)
        return ExactSum(kept, "summed by variable elimination")
    except ProgramError as error:
        structural = error
    if finite_states(model, data, kwargs, data_plate) is None:
        raise structural
    swept = swept_evidence(model, data, kwargs, data_plate=data_plate, progress=progress)
    return ExactSum(swept.log_prob, f"{swept.num_states:,} states; {_WORDS[swept.form]}")


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
