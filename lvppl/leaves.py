"""The leaves of an autograd graph: which parameters a tensor depends on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

__all__ = ["leaves_of"]


def leaves_of(*tensors: Tensor, without: Iterable[Tensor] = ()) -> dict[int, Tensor]:
    """The leaves that ``tensors`` have a gradient for, by identity, in the order they are met.

    Args:
        without: leaves to pass over.
    """
    found: dict[int, Tensor] = {}
    pending: list[Any] = []
    for tensor in tensors:
        if tensor.grad_fn is not None:
            pending.append(tensor.grad_fn)
        elif tensor.requires_grad:
            found[id(tensor)] = tensor
    seen: set[Any] = set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # an AccumulateGrad
        if leaf is not None:
            found[id(leaf)] = leaf
        pending += [before for before, _ in node.next_functions if before is not None]
    passed = {id(tensor) for tensor in without}
    return {key: leaf for key, leaf in found.items() if key not in passed}
