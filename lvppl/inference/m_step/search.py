"""Arguments that are bound to single entries, found by how they move from point to point."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lvppl.inference.m_step.arguments import Bound
from lvppl.inference.m_step.entries import IMAGES, Image, Parameters

__all__ = ["Search"]

_NEIGHBOURS = 4
"""Entries on either side of the nearest that are looked at, since two may move nearly alike."""


class Search:
    """Finds entries by how they change from one random point to the next, whatever the factor c."""

    def __init__(self, parameters: Parameters, points: Sequence[Mapping[str, Tensor]]) -> None:
        self.parameters = parameters
        dtypes = {p.tensor.dtype for p in parameters.values()}
        self.tolerance = 1e-9 if dtypes <= {torch.float64} else 2e-5
        self.images: dict[str, Tensor] = {}
        for role in IMAGES.values():
            for image in role:
                self.images.setdefault(f"{id(image)}", self._at(image, points))

    def _at(self, image: Image, points: Sequence[Mapping[str, Tensor]]) -> Tensor:
        rows = []
        for point in points:
            for name, value in point.items():
                self.parameters[name].tensor.copy_(value)
            rows.append(self.parameters.image(image))
        return torch.stack(rows)

    def find(self, draws: Sequence[Tensor], role: str) -> Bound | None:
        if any(draw.shape != draws[0].shape for draw in draws):
            return None
        shape = draws[0].shape
        values = torch.stack([draw.double().cpu().flatten() for draw in draws])
        scale = values.abs().amax(0)
        constant = (values - values[0]).abs().amax(0) <= self.tolerance * scale
        if bool(constant.all()):
            return Bound(torch.full(shape, -1), torch.ones(shape, dtype=torch.float64), None)
        for image in IMAGES.get("rate" if role == "concentration" else role, ()):
            found = self._match(values[:, ~constant], self.images[f"{id(image)}"])
            if found is None:
                continue
            index = torch.full((values.shape[1],), -1)
            coefficient = torch.ones(values.shape[1], dtype=torch.float64)
            index[~constant], coefficient[~constant] = found
            if role in ("simplex", "probability", "concentration") and bool(
                (coefficient != 1).any()
            ):
                continue
            return Bound(index.reshape(shape), coefficient.reshape(shape), image)
        return None

    def _match(self, values: Tensor, entries: Tensor) -> tuple[Tensor, Tensor] | None:
        """For (draws, n) values the entries (draws, m) that move alike, and the factors."""
        usable = (entries.isfinite() & (entries != 0)).all(0).nonzero().squeeze(1)
        if len(usable) == 0 or bool((values == 0).any()):
            return None
        moves = entries[1:, usable] / entries[0, usable]
        wanted = values[1:] / values[0]
        order = moves[0].argsort()
        place = torch.searchsorted(moves[0, order], wanted[0].contiguous())
        best = torch.full(wanted.shape[1:], math.inf, dtype=torch.float64)
        chosen = torch.zeros(wanted.shape[1:], dtype=torch.long)
        for step in range(-_NEIGHBOURS, _NEIGHBOURS):
            candidate = order[(place + step).clamp(0, len(order) - 1)]
            defect = (moves[:, candidate] / wanted - 1).abs().amax(0)
            closer = defect < best
            best = torch.where(closer, defect, best)
            chosen = torch.where(closer, candidate, chosen)
        if bool((best > self.tolerance).any()):
            return None
        index = usable[chosen]
        coefficient = values[0] / entries[0, index]
        one = (coefficient - 1).abs() < 10 * self.tolerance
        return index, torch.where(one, torch.ones_like(coefficient), coefficient)
