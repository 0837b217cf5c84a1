"""The set over which an M-step maximises: no variance below its floor; see ``floors.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lvppl.inference.m_step.arguments import Bound, Key
from lvppl.inference.m_step.choice import Choice
from lvppl.inference.m_step.floors import floored, least_eigenvalues
from lvppl.inference.m_step.forms import Maximum

__all__ = ["AtFloor", "Bounds"]

_NEAR = 1e-3
"""What a parameter that was set to its floor may be above it, relative, for rounding."""


class AtFloor(NamedTuple):
    """A parameter that rests on its floor, or a row of it, and what that floor is."""

    parameter: str
    row: int | None
    floor: str


class Bounds(Choice):
    """The bounds of each parameter that has one; see :class:`Choice` for the arguments."""

    def smallest_scale(self, name: str) -> Tensor:
        """The smallest scale that each entry of a parameter may have, shaped as the parameter."""
        size = self.parameters.num_entries
        variance = self.floors.of_scales(self._keys(name), self.bindings, size)
        return (self.floor * self.parameters[name].part_of(variance)).sqrt()

    def largest_concentration(self, name: str) -> Tensor:
        """The largest that each entry may have, where a learned rate lets it grow for ever."""
        parameter, size = self.parameters[name], self.parameters.num_entries
        rates = (self.bindings.get((use.site, "rate")) for use in self._uses[name])
        if any(isinstance(rate, Bound) and rate.is_constant for rate in rates):
            return torch.full(parameter.shape, torch.inf, dtype=torch.float64)
        variation = self.floors.of_concentrations(self._keys(name), self.bindings, size)
        return 1 / (self.floor * parameter.part_of(variation))

    def width(self, name: str) -> Tensor:
        """A deviation of each feature, in units of which eigenvalues have their floor, (D,)."""
        variance = self.floors.of_covariance(self._keys(name), self.bindings)
        if variance is not None:
            return variance.sqrt()
        return torch.ones(self.parameters[name].shape[-1], dtype=torch.float64)

    def _keys(self, name: str) -> list[Key]:
        return [(use.site, use.argument) for use in self._uses[name]]

    # ------------------------------------------------------------------------------- present values

    def value_of(self, name: str) -> Tensor:
        """A parameter as distributions see it, float64 on the CPU."""
        return self.image(name).forward(self.parameters[name].value.double()).cpu()

    def set(self, name: str, found: Maximum) -> None:
        """Set the entries that have a maximum, as distributions see them; others keep their own."""
        parameter = self.parameters[name]
        present = parameter.value
        new = self.image(name).inverse(found.value).to(present)
        parameter.set(torch.where(found.exists.to(new.device), new, present))

    def set_factors(self, name: str, index: Tensor, covariances: Tensor) -> None:
        """Set some of a parameter's Cholesky factors to those of covariances, by their numbers."""
        seen = self.value_of(name)
        factors = seen.reshape(-1, *seen.shape[-2:]).clone()
        factors[index.cpu()] = torch.linalg.cholesky(covariances).cpu()
        self.parameters[name].set(self.image(name).inverse(factors.reshape(seen.shape)))

    def raise_to_floors(self) -> None:
        """Move what lies below its floor to it; anything else stays as it is."""
        for name in self.with_role("scale"):
            seen, least = self.value_of(name), self.smallest_scale(name)
            if bool((seen < least).any()):
                self.set(name, Maximum(least, seen < least))
        for name in self.with_role("concentration"):
            seen, most = self.value_of(name), self.largest_concentration(name)
            if bool((seen > most).any()):
                self.set(name, Maximum(most, seen > most))
        for name in self.with_role("cholesky"):
            covariances, width = self._covariances_of(name), self.width(name)
            (low,) = (least_eigenvalues(covariances, width) < self.floor).nonzero(as_tuple=True)
            if len(low):
                self.set_factors(name, low, floored(covariances[low], self.floor, width))

    def _covariances_of(self, name: str) -> Tensor:
        seen = self.value_of(name)
        factors = seen.reshape(-1, *seen.shape[-2:])
        return factors @ factors.mT

    def at_floors(self) -> Iterator[AtFloor]:
        """What rests on its floor, with the floor in words."""
        if self.floor == 0:
            return
        for name in self.with_role("scale"):
            least = self.smallest_scale(name)
            low = (self.value_of(name) <= least * (1 + _NEAR)) & (least > 0)
            yield from _by_row(name, low, least.square(), "a variance of {:.2g}".format)
        for name in self.with_role("concentration"):
            most = self.largest_concentration(name)
            low = self.value_of(name) >= most * (1 - _NEAR)
            yield from _by_row(name, low, most, "a concentration of {:.2g}".format)
        for name in self.with_role("cholesky"):
            parameter, covariances, width = (
                self.parameters[name],
                self._covariances_of(name),
                self.width(name),
            )
            size = covariances.diagonal(dim1=-2, dim2=-1).div(width.square()).sum(-1)
            rounding = 10 * torch.finfo(parameter.tensor.dtype).eps * size
            low = least_eigenvalues(covariances, width) <= self.floor * (1 + _NEAR) + rounding
            relative = torch.full(parameter.shape[:-2], self.floor)
            words = "a variance of {:g} of that of the data".format
            yield from _by_row(name, low.reshape(relative.shape), relative, words)


def _by_row(
    name: str, low: Tensor, floor: Tensor, words: Callable[[float], str]
) -> Iterator[AtFloor]:
    """Of a parameter with rows those that are low somewhere, with their smallest such floor."""
    if low.dim() == 0:
        low, floor = low[None], floor[None]
        rows: list[int | None] = [None]
    else:
        rows = list(range(len(low)))
    for row, here, least in zip(rows, low, floor, strict=True):
        if bool(here.any()):
            yield AtFloor(name, row, words(float(least[here].min())))
