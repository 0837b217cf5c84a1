"""Options by their names: what one that does not exist is called here, or where it belongs."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from lvppl.errors import ProgramError

__all__ = ["advice", "refuse_unknown"]

_CALLED_HERE = {
    "covariance_floor": ("floor",),
    "epochs": ("num_epochs", "max_iter"),
    "eps": ("tol", "tolerance"),
    "init_params": ("init",),
    "iterations": ("max_iter", "num_steps"),
    "loss": ("objective",),
    "lr": ("learning_rate",),
    "max_iter": ("num_steps",),
    "max_steps": ("max_iter", "num_steps"),
    "min_covar": ("floor",),
    "n_epochs": ("num_epochs", "max_iter"),
    "n_init": ("restarts",),
    "n_iter": ("max_iter", "num_steps"),
    "num_epochs": ("max_iter",),
    "num_iterations": ("max_iter", "num_steps"),
    "num_restarts": ("restarts",),
    "num_steps": ("max_iter",),
    "random_state": ("seed",),
    "reg_covar": ("floor",),
    "threshold": ("tol", "tolerance"),
    "tol": ("tolerance",),
    "verbose": ("progress",),
}
"""Names of other libraries, and ours; the first that a call has."""

_COUNT = (
    "How many components there are is said by the program, as in "
    "lvppl.models.GaussianMixture(num_components, num_features)."
)
_COVARIANCE = (
    "The kind of covariance is said by the program, as in "
    'lvppl.models.GaussianMixture(2, 3, covariance="diag").'
)
_FIRST_VALUES = "A fit with init='model' starts from the values that the program's parameters have."
_LENGTHS = (
    "Lengths of padded sequences are arguments of the program, as of "
    "lvppl.models.HiddenMarkovModel: fit(y, lengths)."
)
_WEIGHTS = "Data have no weights: repeat rows, as in y.repeat_interleave(counts, 0)."

_SAID_BY_THE_PROGRAM = {
    "covariance": _COVARIANCE,
    "covariance_type": _COVARIANCE,
    "K": _COUNT,
    "k": _COUNT,
    "lengths": _LENGTHS,
    "means_init": _FIRST_VALUES,
    "n_clusters": _COUNT,
    "n_components": _COUNT,
    "n_states": _COUNT,
    "num_clusters": _COUNT,
    "num_components": _COUNT,
    "num_states": _COUNT,
    "precisions_init": _FIRST_VALUES,
    "sample_weight": _WEIGHTS,
    "warm_start": _FIRST_VALUES,
    "weights_init": _FIRST_VALUES,
}


def advice(name: str, here: Callable[..., Any], elsewhere: Callable[..., Any] | None = None) -> str:
    """What to write for an option that a call does not have; empty where nothing is like it.

    Args:
        name: of the option.
        here: the call.
        elsewhere: the constructor of ``here``, or the method beside the constructor.
    """
    if name in _SAID_BY_THE_PROGRAM:
        return _SAID_BY_THE_PROGRAM[name]
    calls = [call for call in (here, elsewhere) if call is not None]
    for call in calls:
        if name in _options(call):
            return f"It is an option of {_written(call)}."
    for ours in _CALLED_HERE.get(name, ()):
        for call in calls:
            if ours in _options(call):
                return f"Here it is {ours}={_whose(call, here)}."
    for call in calls:
        if close := difflib.get_close_matches(name, _options(call), 1):
            return f"Did you mean {close[0]}={_whose(call, here)}?"
    return ""


def refuse_unknown(
    names: Mapping[str, Any], constructor: Callable[..., Any], method: Callable[..., Any]
) -> None:
    """Options that a constructor does not have, with what they are called here.

    Raises:
        ProgramError: by name.
    """
    for name in names:
        call = constructor.__qualname__
        meant = advice(name, constructor, method)
        raise ProgramError(f"{call}({name}=...) is not an option of {call}. {meant}".rstrip())


def _options(call: Callable[..., Any]) -> list[str]:
    """Names that are given by keyword alone."""
    parameters = inspect.signature(call).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


def _whose(call: Callable[..., Any], here: Callable[..., Any]) -> str:
    """Whose option it is, where it is not of the call itself."""
    return "" if call is here else f", an option of {_written(call)}"


def _written(call: Callable[..., Any]) -> str:
    owner, _, method = call.__qualname__.partition(".")
    return f"{owner}(...).{method}(...)" if method else f"{owner}(...)"
