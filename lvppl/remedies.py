"""What to write instead, where the words of a failure do not say it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["as_tensor", "of_failure", "of_shape"]

_OF_MESSAGES = (
    (
        r"tensors used as indices must be|one_hot is only applicable to index"
        r"|Expected dtype int32/int64 for index|argument #1 'indices' to have one of",
        "Draws of Bernoulli and Binomial are floats, which are no index: write loc[z.long()].",
    ),
    (
        r"Shape mismatch inside plate\('(?P<plate>.*)'\) at site (?P<site>\S+) dim -1",
        "The last batch dimension of site '{site}' is that of plate '{plate}'. Where it holds the "
        "features of one datum, they are one event: dist.Normal(...).to_event(1).",
    ),
)
"""What torch and Pyro say of common slips, and what to do about them."""


def of_failure(error: Exception) -> str:
    """A sentence for what raised; empty where its own words have to do."""
    for pattern, remedy in _OF_MESSAGES:
        if found := re.search(pattern, str(error)):
            return remedy.format(**found.groupdict())
    return ""


def as_tensor(value: Any) -> tuple[str, str]:
    """What a value is that is no tensor, and the code that makes a tensor of it."""
    kind, shape = type(value), getattr(value, "shape", None)
    package = "" if kind.__module__ == "builtins" else f"{kind.__module__.partition('.')[0]}."
    what = f"{package}{kind.__name__}" + (f" of shape {tuple(shape)}" if shape else "")
    floats = "dtype=torch.get_default_dtype()"
    if hasattr(value, "to_numpy"):  # a table, or a column of one
        return what, f"torch.tensor(y.to_numpy(), {floats})"
    return what, f"torch.as_tensor(y, {floats})"


def of_shape(value: Any, event_dim: int, plates: Mapping[int, int]) -> str:
    """What to do about data of one dimension more than their plate; empty for others.

    Args:
        value: of a site.
        event_dim: of the site's distribution.
        plates: sizes of the site's plates, by dimension.
    """
    if not isinstance(value, Tensor) or list(plates) != [-1]:
        return ""
    shape = value.shape[: max(value.dim() - event_dim, 0)]
    if len(shape) != 2 or shape[0] != plates[-1] or shape[0] == 1:
        return ""
    event = "make the last dimension the event of a datum, dist.Normal(...).to_event(1)"
    if shape[1] == 1:
        return f"Write y.squeeze(-1) for numbers; for vectors of length one, {event}."
    return f"Where a row of {shape[1]} columns is one datum, {event}."
