"""The options of EM: which go together, and how they print."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from typing import Any

from pyro.poutine.messenger import Messenger

from lvppl.errors import ProgramError
from lvppl.inference.arguments import check_counts
from lvppl.inference.starts import INITS

__all__ = ["check_non_negative", "check_options", "check_program", "shown"]

ENGINES = ("auto", "eager")


def check_program(role: str, program: Any) -> None:
    if isinstance(program, type):
        raise ProgramError(
            f"{role} must be a Pyro program (a callable), not {program!r}: make one of the class, "
            f"as in {program.__name__}(...)."
        )
    if not callable(program):
        raise ProgramError(f"{role} must be a Pyro program (a callable), not {program!r}")


def check_options(
    has_guide: bool,
    *,
    objective: Any,
    hard: bool,
    temperature: Any,
    online: bool,
    restarts: int,
    init: str,
    floor: float,
    num_gradient_steps: int,
    engine: str,
) -> None:
    """Refuse values that an option cannot have, and options that do not go together."""
    check_counts(restarts=restarts, num_gradient_steps=num_gradient_steps)
    _check_flags(hard=hard, online=online)
    check_non_negative(floor=floor)
    exact = hard or online or temperature is not None or restarts > 1 or init != "model"
    if has_guide and exact:
        raise ProgramError(
            "hard, temperature, online, restarts and init belong to EM with an exact E-step: "
            "leave them out with a guide."
        )
    if not has_guide and objective is not None:
        raise ProgramError("objective is the bound of a fit with a guide: give a guide too.")
    _check_start(init, restarts)
    _check_engine(engine)
    if hard and temperature is not None:
        raise ProgramError(
            "hard=True is the limit of temperature 0: give one of the two. A schedule such as "
            "temperature=lambda i: max(0.1, 0.9**i) comes near it."
        )


def _check_flags(**flags: Any) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ProgramError(f"{name} must be True or False, but is {flag!r}")


def check_non_negative(**numbers: Any) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int | float) or not 0 <= number < math.inf:
            raise ProgramError(f"{name} must be a number of at least 0, but is {number!r}")


def _check_engine(engine: Any) -> None:
    if engine not in ENGINES:
        raise ProgramError(f"engine must be 'auto' or 'eager', not {engine!r}")


def _check_start(init: Any, restarts: int) -> None:
    if init not in INITS:
        close = difflib.get_close_matches(str(init), INITS, 1)
        meant = f". Did you mean {close[0]!r}?" if close else ""
        raise ProgramError(
            f"init must be one of {', '.join(map(repr, INITS))}, not {init!r}{meant}"
        )
    if restarts > 1 and init == "model":
        raise ProgramError(
            f"restarts={restarts} from init='model' would be the same start {restarts} times. "
            "Use init='kmeans++' or init='random'."
        )


def shown(front_door: Any) -> str:
    """``EM(mixture, init='kmeans++')``: programs by name, options that differ from the default."""
    parts = [_name_of(front_door.model)]
    if front_door.guide is not None:
        parts.append(_name_of(front_door.guide))
    for name, parameter in inspect.signature(type(front_door)).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        value = getattr(front_door, name)
        if value is not parameter.default and value != parameter.default:
            parts.append(f"{name}={_name_of(value) if inspect.isroutine(value) else repr(value)}")
    return f"{type(front_door).__name__}({', '.join(parts)})"


def _name_of(program: Any) -> str:
    """A function's own name, else that of the class."""
    inner = _inside(program)
    name = getattr(inner, "__name__", None)
    return name if isinstance(name, str) else type(inner).__name__


def _inside(program: Any) -> Any:
    """What partial arguments and Pyro's handlers were put around."""
    program = inspect.unwrap(program)
    if not isinstance(program, functools.partial):
        return program
    handled = [a for a in program.args if callable(a) and not isinstance(a, Messenger)]
    is_handler = str(getattr(program.func, "__module__", "")).startswith("pyro.poutine")
    return _inside(handled[-1] if is_handler and handled else program.func)
