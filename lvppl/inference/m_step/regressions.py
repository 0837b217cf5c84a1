"""Regressions: locations that are affine in parameters, gathered into joint least squares.

Coefficients that meet in one location are solved for together. A group holds every parameter that
is linked through such locations; a location that takes one of them directly joins the group, as a
row with a single coefficient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lvppl.inference.m_step.arguments import Affine, Binding, Bound, Key
from lvppl.inference.m_step.entries import Parameters

__all__ = ["Group", "groups_of", "regrouped"]


@dataclass(frozen=True)
class Group:
    """Parameters that are solved for together, and all of their entries in order."""

    names: tuple[str, ...]
    entries: torch.Tensor


def groups_of(
    bindings: Mapping[Key, Binding], roles: Mapping[Key, str], parameters: Parameters
) -> list[Group]:
    """The groups that the affine locations make, each location's parameters in one of them."""
    owners, names = parameters.owners(), list(parameters)
    linked: list[set[int]] = []
    direct: list[set[int]] = []
    for key, binding in bindings.items():
        if isinstance(binding, Affine):
            linked.append(set(owners[binding.entries].tolist()))
        elif isinstance(binding, Bound) and roles.get(key) == "location":
            direct.append(set(owners[binding.index[binding.index >= 0]].tolist()))
    merged = _merged(linked)
    merged = _merged([*merged, *(d for d in direct if any(d & group for group in merged))])
    return [
        Group(
            tuple(names[i] for i in sorted(group)),
            torch.cat([(owners == i).nonzero().squeeze(1) for i in sorted(group)]),
        )
        for group in merged
    ]


def _merged(sets: list[set[int]]) -> list[set[int]]:
    """Unions of the sets that overlap."""
    merged: list[set[int]] = []
    for new in sets:
        new = set(new)
        for old in [m for m in merged if m & new]:
            new |= old
            merged.remove(old)
        merged.append(new)
    return merged


def regrouped(
    bindings: Mapping[Key, Binding],
    roles: Mapping[Key, str],
    groups: list[Group],
    parameters: Parameters,
) -> dict[Key, Binding]:
    """The bindings with every location of a group as an affine function of all its entries."""
    owner_of = {name: i for i, group in enumerate(groups) for name in group.names}
    owners, names = parameters.owners(), list(parameters)
    result = dict(bindings)
    for key, binding in bindings.items():
        if isinstance(binding, Affine):
            entries, jacobian = binding.entries, binding.jacobian
        elif isinstance(binding, Bound) and binding.image and roles.get(key) == "location":
            entries = binding.index[binding.index >= 0].unique()
            hits = binding.index.unsqueeze(-1) == entries
            jacobian = hits.double() * binding.coefficient.unsqueeze(-1)
        else:
            continue
        number = owner_of.get(names[int(owners[entries[0]])], -1)
        if number < 0:
            continue
        group = groups[number]
        column = torch.searchsorted(group.entries, entries)
        wide = torch.zeros((*jacobian.shape[:-1], len(group.entries)), dtype=torch.float64)
        wide[..., column] = jacobian.to("cpu")
        result[key] = Affine(group.entries, wide.to(jacobian.device), number)
    return result
