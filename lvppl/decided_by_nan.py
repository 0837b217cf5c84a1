"""Programs that decide by a missing value: NaN > 0 is false, and false is a datum like any other.

What is computed with NaN is NaN, and is noticed in the end. What is decided by it is not: a
comparison, or a whole number made of it, is a plain value in which nothing shows what is missing.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lvppl.errors import ProgramError

__all__ = ["DecidedByNaN"]

_ASKING = {"isnan", "isfinite", "isinf", "isposinf", "isneginf", "isreal"} | {
    "expand_as",
    "view_as",
    "reshape_as",
    "broadcast_tensors",
}
"""Functions that say what is NaN rather than take it for a number, or that want its shape alone."""
_ROUNDING = {"sign", "sign_", "sgn", "sgn_", "heaviside", "heaviside_"}
"""Functions whose value at NaN is 0."""
_SCALAR = {"__bool__", "__int__", "__index__", "__contains__", "is_nonzero", "equal", "allclose"}
"""Functions of tensors that give a truth value or a whole number of Python."""
_IN_PLACE = {"gt_", "ge_", "lt_", "le_", "eq_", "ne_", "greater_", "greater_equal_", "less_"} | {
    "less_equal_",
    "not_equal_",
    "logical_not_",
    "logical_and_",
    "logical_or_",
    "logical_xor_",
}
"""Comparisons that write over what they compare."""
_LIBRARY = ("torch.distributions.", "pyro.", "lvppl.")
_PROGRAMS = ("lvppl.models.", "lvppl.guides.")


class DecidedByNaN(TorchFunctionMode):
    """Refuses a truth value or a whole number that a program makes of a tensor with NaN in it.

    Comparisons, casts, indices of extremes and orders, and signs, by function, method or operator.
    Checks of validity inside distributions are left alone, and so are questions after NaN itself:
    ``isnan``, ``isfinite``, ``y != y``. What leaves torch (``.item()``, ``.numpy()``) is not
    seen, nor what is compiled or inside ``vmap``.

    Raises:
        ProgramError: at the statement.
    """

    def __init__(self, remedy: str) -> None:
        super().__init__()
        self.remedy = remedy

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if torch.compiler.is_compiling() or _asks_of_no_number(name, args):
            return func(*args, **kwargs)
        before = name in _IN_PLACE and _any_nan(args)  # afterwards it is gone
        found = func(*args, **kwargs)
        if not (before or name in _ROUNDING or name in _SCALAR or _is_discrete(found)):
            return found
        if (before or _any_nan((*args, *kwargs.values()))) and not _inside_library():
            raise ProgramError(
                f"The model takes a missing value for a number: '{name}' makes a truth value or a "
                f"whole number of NaN, as if it had been observed. {self.remedy}"
            )
        return found


def _asks_of_no_number(name: str, args: tuple[Any, ...]) -> bool:
    """Whether the answer is about what is NaN, or about shapes: ``y != y`` is such a question."""
    if name.strip("_") in ("eq", "ne"):
        return len(args) == 2 and args[0] is args[1]
    return name in _ASKING or name.startswith(("nan", "new_")) or name.endswith("_like")


def _is_discrete(found: Any) -> bool:
    if isinstance(found, Tensor):
        return not (found.is_floating_point() or found.is_complex())
    # values and indices, of max, sort and the like; no shapes
    return isinstance(found, tuple) and any(
        isinstance(f, Tensor) and _is_discrete(f) for f in found
    )


def _any_nan(values: Any) -> bool:
    for value in values:
        if isinstance(value, Tensor):
            if value.is_floating_point() and _has_nan(value):
                return True
        elif type(value) in (tuple, list) and _any_nan(value):
            return True
    return False


def _has_nan(value: Tensor) -> bool:
    try:
        return bool(value.isnan().any())
    except RuntimeError:  # inside vmap, or of a tensor without values, there is nothing to look at
        return False


def _inside_library() -> bool:
    """Whether the statement is one of a distribution or a handler, not of a program."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        module = f"{frame.f_globals.get('__name__', '')}."
        if module.startswith(_PROGRAMS):
            return False
        if module.startswith(_LIBRARY):
            return True
        if not module.startswith("torch."):
            return False
        frame = frame.f_back
    return False
