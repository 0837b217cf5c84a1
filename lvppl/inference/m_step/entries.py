"""Every parameter as a row of entries, and the images in which distributions see them.

A distribution rarely takes a parameter as it is: a Categorical normalises logits, a scale may be
``variance.sqrt()``. An *image* is such a map, entry by entry or row by row, with its inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.distributions import constraints, transform_to

__all__ = ["IMAGES", "Image", "Parameter", "Parameters"]


@dataclass(frozen=True)
class Image:
    """A map of a constrained parameter to what a distribution is given, and its inverse."""

    name: str
    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    applies: Callable[[Parameter], bool]


@dataclass(frozen=True)
class Parameter:
    """One parameter: its unconstrained tensor, its constraint, and where its entries begin."""

    name: str
    tensor: Tensor
    constraint: constraints.Constraint
    offset: int

    @property
    def value(self) -> Tensor:
        """The constrained value, detached."""
        with torch.no_grad():
            result: Tensor = transform_to(self.constraint)(self.tensor.detach())
            return result

    @cached_property
    def shape(self) -> torch.Size:
        """Of the constrained value."""
        return self.value.shape

    @property
    def size(self) -> int:
        return self.shape.numel()

    def part_of(self, entries: Tensor) -> Tensor:
        """Of something that every entry has, (entries,), a view of the parameter's own, shaped."""
        return entries[self.offset : self.offset + self.size].view(self.shape)

    def set(self, value: Tensor) -> None:
        """Write a constrained value, in place."""
        with torch.no_grad():
            free = transform_to(self.constraint).inv(value.to(self.tensor))
            self.tensor.copy_(free.reshape(self.tensor.shape))

    def randomise(self, generator: torch.Generator) -> None:
        """A random point, of moderate size, inside the constraint."""
        noise = torch.randn(self.tensor.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            self.tensor.copy_(0.7 * noise.to(self.tensor))


def _kind(parameter: Parameter) -> str:
    c = parameter.constraint
    while isinstance(c, constraints.independent):
        c = c.base_constraint
    # by type: a copied or unpickled model has constraints of its own
    for kind, same in (
        ("real", constraints.real),
        ("simplex", constraints.simplex),
        ("cholesky", constraints.lower_cholesky),
        ("positive_definite", constraints.positive_definite),
    ):
        if type(c) is type(same):
            return kind
    if isinstance(c, constraints.interval):
        return "unit" if _all(c.lower_bound, 0) and _all(c.upper_bound, 1) else "other"
    positive = constraints.greater_than | constraints.greater_than_eq
    if isinstance(c, positive) and _all(c.lower_bound, 0):
        return "positive"
    if type(c).__name__ in ("_SoftplusPositive", "_SoftplusLowerCholesky"):
        return "positive" if "Cholesky" not in type(c).__name__ else "cholesky"
    return "other"


def _all(bound: Tensor | float, value: float) -> bool:
    return bool((torch.as_tensor(bound) == value).all())


def _is(*kinds: str) -> Callable[[Parameter], bool]:
    return lambda parameter: _kind(parameter) in kinds


def _identity(x: Tensor) -> Tensor:
    return x


def _cholesky_of_inverse(precision: Tensor) -> Tensor:
    return torch.linalg.cholesky(torch.linalg.inv(precision.double()))


def _inverse_of_gram(tril: Tensor) -> Tensor:
    return torch.cholesky_inverse(tril.double())


IMAGES: dict[str, tuple[Image, ...]] = {
    "location": (Image("θ", _identity, _identity, _is("real")),),
    "scale": (
        Image("θ", _identity, _identity, _is("positive")),
        Image("√θ", torch.sqrt, torch.square, _is("positive")),
        Image("1/√θ", torch.rsqrt, lambda x: x.square().reciprocal(), _is("positive")),
        Image("1/θ", torch.reciprocal, torch.reciprocal, _is("positive")),
        Image("exp θ", torch.exp, torch.log, _is("real")),
        Image("exp θ/2", lambda x: (x / 2).exp(), lambda x: 2 * x.log(), _is("real")),
    ),
    "rate": (
        Image("θ", _identity, _identity, _is("positive")),
        Image("1/θ", torch.reciprocal, torch.reciprocal, _is("positive")),
        Image("exp θ", torch.exp, torch.log, _is("real")),
    ),
    "probability": (
        Image("θ", _identity, _identity, _is("unit")),
        Image("sigmoid θ", torch.sigmoid, torch.logit, _is("real")),
    ),
    "simplex": (
        Image("θ", _identity, _identity, _is("simplex")),
        Image("softmax θ", lambda x: x.softmax(-1), torch.log, _is("real")),
    ),
    "cholesky": (
        Image("θ", _identity, _identity, _is("cholesky")),
        Image("chol θ", torch.linalg.cholesky, lambda x: x @ x.mT, _is("positive_definite")),
        Image("chol θ⁻¹", _cholesky_of_inverse, _inverse_of_gram, _is("positive_definite")),
    ),
}
"""By the role of a distribution's argument: the images of parameters that may stand there."""


class Parameters(Mapping[str, Parameter]):
    """All parameters of a program, as one long row of entries."""

    def __init__(
        self, tensors: Mapping[str, Tensor], constraint_of: Mapping[str, constraints.Constraint]
    ) -> None:
        self._by_name: dict[str, Parameter] = {}
        offset = 0
        for name, tensor in tensors.items():
            self._by_name[name] = Parameter(name, tensor, constraint_of[name], offset)
            offset += self._by_name[name].size
        self.num_entries = offset

    def __getitem__(self, name: str) -> Parameter:
        return self._by_name[name]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def image(self, image: Image, *, elsewhere: float = torch.nan) -> Tensor:
        """Every entry under an image, float64 on the CPU, (num_entries,).

        Args:
            elsewhere: the value of entries that the image does not apply to.
        """
        parts = [torch.zeros(0, dtype=torch.float64)]
        for parameter in self.values():
            value = parameter.value.double()
            applies = image.applies(parameter) and value.numel() > 0
            mapped = image.forward(value) if applies else torch.full_like(value, elsewhere)
            parts.append(mapped.flatten().to("cpu", torch.float64))
        return torch.cat(parts)

    def owners(self) -> Tensor:
        """For each entry the number of its parameter, (num_entries,)."""
        sizes = torch.tensor([parameter.size for parameter in self.values()], dtype=torch.long)
        return torch.repeat_interleave(torch.arange(len(self)), sizes)
