"""Checks of what a user passes to a fit: data, counts, device; and words for what fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lvppl import remedies
from lvppl.errors import ProgramError, ProgramFailure
from lvppl.inference.minibatch import num_rows
from lvppl.inference.options import advice

__all__ = [
    "as_tuple",
    "check_callables",
    "check_counts",
    "check_data",
    "explained",
    "named_device",
    "place_of",
    "shapes_of",
    "tensors_in",
]


_FILL = (
    'fit(..., missing="nan") takes NaN as a missing value. Otherwise fill or mask missing values '
    "before the fit, or pass strict=False where the program handles them."
)


def check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
            raise ProgramError(f"{name} must be an integer, but is {count!r}")
        if count is not None and count < 1:
            raise ProgramError(f"{name} must be at least 1, but is {count}")


def check_callables(callbacks: Any, transform: Any = None) -> None:
    if transform is not None and not callable(transform):
        raise ProgramError(
            "transform must be a callable from the tuple of a minibatch's arguments to another, "
            f"but is {transform!r}"
        )
    if isinstance(callbacks, (list, tuple)) and all(map(callable, callbacks)):
        return
    name = getattr(callbacks, "__name__", "callback")
    hint = f": write callbacks=[{name}]" if callable(callbacks) else ""
    raise ProgramError(f"callbacks must be a list of callables, but is {callbacks!r}{hint}")


def as_tuple(validation: Any) -> tuple[Any, ...]:
    return tuple(validation) if isinstance(validation, (tuple, list)) else (validation,)


def named_device(device: str | torch.device) -> torch.device:
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ProgramError(
            f"device {device!r} cannot be used here ({str(error).splitlines()[0]}); "
            'use "auto" or "cpu"'
        ) from error
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    return where


def place_of(
    modules: list[nn.Module], device: str | torch.device, data: tuple[Any, ...]
) -> tuple[torch.device, bool]:
    """The device of a fit, and whether the user named it, which moves the modules there."""
    if device != "auto":
        where = named_device(device)
        for module in modules:
            module.to(where)
        return where, True
    tensors = [t for module in modules for t in module.parameters()] + tensors_in(data)
    return (tensors[0].device if tensors else torch.tensor(0.0).device), False


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if type(value) in (tuple, list):
        return [tensor for item in value for tensor in tensors_in(item)]
    if type(value) is dict:
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    return []


def check_data(
    data: tuple[Any, ...],
    batch_size: int | None,
    validation: tuple[Any, ...] | None,
    strict: bool,
    *,
    missing: str | None = None,
    remedy: str = _FILL,
) -> int | None:
    """Refuse data that cannot be right; the batch size that is needed, None for all rows."""
    rows = num_rows(data)
    for what, args in (("data", data), ("validation", validation or ())):
        for place, value in enumerate(args):
            for tensor in tensors_in(value):
                _check_tensor(f"{what} argument {place}", tensor, strict, missing, remedy)
    if validation is not None and len(validation) != len(data):
        raise ProgramError(
            f"validation has {len(validation)} arguments but the training data have {len(data)}; "
            "give a tuple of as many"
        )
    if batch_size is None:
        return None
    if rows is None:
        what, code = remedies.as_tensor(data[0]) if data else ("", "")
        came = f"a {what}. Write {code}," if data else "nothing. Give it,"
        raise ProgramError(
            f"batch_size={batch_size} needs a tensor of rows as the first argument, but got "
            f"{came} or leave batch_size out."
        )
    return batch_size if batch_size < rows else None


def _check_tensor(
    name: str, tensor: Tensor, strict: bool, missing: str | None, remedy: str
) -> None:
    if tensor.dim() > 0 and tensor.shape[0] == 0:
        raise ProgramError(f"{name} has no rows: its shape is {tuple(tensor.shape)}")
    if not strict or not tensor.is_floating_point():
        return
    bad = tensor.isinf() if missing else ~tensor.isfinite()
    if bool(bad.any()):
        where = [int(i) for i in bad.nonzero()[0]]
        remedy = "Correct the data: a missing value is NaN." if missing else remedy
        raise ProgramError(f"{name} has {float(tensor[tuple(where)])} at index {where}. {remedy}")


def shapes_of(args: tuple[Any, ...]) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(args))


@contextmanager
def explained(
    data: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    modules: list[nn.Module],
    options: Callable[..., Any],
    constructor: Callable[..., Any] | None = None,
) -> Iterator[None]:
    """Say why a program fails: an option does not exist, or tensors do not go together.

    Args:
        data, kwargs: of the program.
        modules: of the program.
        options: the method that was called, which takes its own options out of ``kwargs``.
        constructor: of what the method belongs to, for options that are given to the wrong one.
    """
    try:
        yield
    except (RuntimeError, ProgramFailure) as error:
        _explain_option(error, kwargs, options, constructor)
        _explain_arrays(error, data)
        _explain_tensors(error, data, modules)
        raise


def _explain_option(
    error: Exception,
    kwargs: Mapping[str, Any],
    options: Callable[..., Any],
    constructor: Callable[..., Any] | None,
) -> None:
    for name in kwargs:
        if f"unexpected keyword argument '{name}'" in str(error):
            meant = advice(name, options, constructor)
            raise ProgramError(
                f"{error}: fit({name}=...) is not an option of fit, and the program does not take "
                f"it. {meant}".rstrip()
            ) from error


def _explain_arrays(error: Exception, data: tuple[Any, ...]) -> None:
    for place, value in enumerate(data):
        if not isinstance(value, Tensor) and hasattr(value, "__array__"):
            what, code = remedies.as_tensor(value)
            raise ProgramError(
                f"{str(error).rstrip('.')}. Data argument {place} is a {what}, not a tensor: for "
                f"it write {code}."
            ) from error


def _explain_tensors(error: Exception, data: tuple[Any, ...], modules: list[nn.Module]) -> None:
    floats = {str(t.dtype) for t in tensors_in(data) if t.is_floating_point()}
    own = [t for module in modules for t in module.parameters() if t.is_floating_point()]
    kinds = {str(tensor.dtype) for tensor in own}
    if floats and kinds and floats != kinds:
        raise ProgramError(
            f"the data are {', '.join(sorted(floats))} but the modules of the program are "
            f"{', '.join(sorted(kinds))}: {error}. Convert one, with data.float() or "
            "module.double()."
        ) from error
    places = {str(t.device) for t in [*tensors_in(data), *own]}
    if len(places) > 1:
        raise ProgramError(
            f"tensors are on different devices, {', '.join(sorted(places))}: {error}. Name one "
            "in fit(..., device=...)."
        ) from error
