"""The arguments of distributions, and what an argument may be bound to.

=======  ==========================================================================
Bound    every element is c · image(entry) of a parameter, or a constant
Affine   a location that is an affine function of entries
Unbound  depends on parameters in a way that is not known here
=======  ==========================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lvppl.inference.m_step.entries import Image
from lvppl.inference.m_step.families import Family, family_of
from lvppl.inference.m_step.weighted import Weighted, peel, unexpanded

__all__ = ["Affine", "Binding", "Bound", "Key", "Unbound", "Use", "arguments_of"]

Key = tuple[str, str]
"""Names of a site and of an argument of its distribution."""


@dataclass(frozen=True)
class Bound:
    """An argument whose every element is c · image(entry), or a constant.

    Attributes:
        index: the entry of each element, -1 for a constant; shaped as the unexpanded argument.
        coefficient: c, float64.
        image: how the entries are seen; ``None`` where all elements are constant.
    """

    index: Tensor
    coefficient: Tensor
    image: Image | None

    @property
    def is_constant(self) -> bool:
        return self.image is None

    def equals(self, other: object) -> bool:
        """Whether two bindings are of the same entries with the same factors."""
        return (
            isinstance(other, Bound)
            and torch.equal(self.index, other.index)
            and torch.equal(self.coefficient, other.coefficient)
        )


@dataclass(frozen=True)
class Affine:
    """A location that is affine in some entries.

    Attributes:
        entries: which, (entries,).
        jacobian: (*argument, entries), float64.
        group: number of the regression that the entries belong to; -1 before it has one.
    """

    entries: Tensor
    jacobian: Tensor
    group: int = -1


@dataclass(frozen=True)
class Unbound:
    """An argument that depends on parameters in a way that is not known here."""

    parameters: frozenset[str]


Binding = Bound | Affine | Unbound


@dataclass(frozen=True)
class Use:
    """One argument of one site in which a parameter stands."""

    site: str
    argument: str
    role: str
    image: Image


def arguments_of(term: Weighted) -> tuple[Family | None, dict[str, Tensor]]:
    """The family of a site and its arguments, unexpanded."""
    base = peel(term).base
    family = family_of(base)
    if family is None:
        return None, {}
    read = family.read(base)
    return family, {name: unexpanded(read[name], family.event_dims[name]) for name in read}
