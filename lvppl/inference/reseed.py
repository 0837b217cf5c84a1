"""Components that no datum belongs to any more, and where they start again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvppl.factor_graph import FactorGraph
from lvppl.inference.m_step import MStep
from lvppl.inference.m_step.statistics import Statistics
from lvppl.inference.starts import vectors_of

__all__ = ["Dead", "dead_components", "reseed"]

_LEAST_MASS = 1e-3
"""Data that a component needs to live on."""


@dataclass(frozen=True)
class Dead:
    """One row of a location without data."""

    parameter: str
    row: int

    def __str__(self) -> str:
        return f"component {self.row} of '{self.parameter}'"


def dead_components(m_step: MStep, statistics: Statistics) -> list[Dead]:
    """Rows of locations whose expected number of data is next to nothing."""
    mass, counted = _mass(statistics)
    dead = []
    for name in m_step.with_role("location"):
        parameter = m_step.parameters[name]
        if name in m_step.priors or len(parameter.shape) < 1 or parameter.shape[0] < 2:
            continue  # with a prior, an empty component belongs at its mode
        rows = (parameter.part_of(part).reshape(parameter.shape[0], -1) for part in (mass, counted))
        light, known = next(rows) < _LEAST_MASS, next(rows)
        dead += [Dead(name, int(row)) for row in (light & known).all(-1).nonzero()]
    return dead


def _mass(statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Σ r of each entry that is a location, and whether it is one of those counted here."""
    mass = torch.zeros(statistics.num_entries, dtype=torch.float64)
    counted = torch.zeros(statistics.num_entries, dtype=torch.bool)
    for form, cells in statistics.cells.items():
        if form.startswith("mvn"):
            dim = int(form.split()[1])
            index, n = cells.keys[:, :dim], cells.values["n"].unsqueeze(-1).expand(-1, dim)
        elif form == "normal":
            index, n = cells.keys[:, 0], cells.values["n"]
        else:
            continue
        index, n = index.reshape(-1).cpu(), n.reshape(-1).cpu()
        bound = index >= 0
        mass.index_add_(0, index[bound], n[bound])
        counted[index[bound]] = True
    return mass, counted


def reseed(problem: Any, dead: list[Dead]) -> None:
    """Put dead components on the data farthest from every living one, as wide as the data are.

    Only the first batch is looked at. What cannot be placed is left as it is.
    """
    batch, m_step = problem.batches[0], problem.m_step
    graph = FactorGraph(problem.program, batch, problem.kwargs, problem.layout(batch))
    vectors = list(vectors_of(graph).values())
    for name in {one.parameter for one in dead}:
        parameter, c = m_step.parameters[name], m_step.coefficients(name)
        value = parameter.value.clone()
        centres = (value * c.to(value)).reshape(len(value), -1).double()
        like = [v.reshape(-1, v.shape[-1]) for v in vectors if v.shape[-1] == centres.shape[1]]
        if not like:
            continue
        rows = torch.cat(like)
        rows = rows.log() if m_step.is_of_logarithms(name) else rows
        rows = rows[rows.isfinite().all(-1)]
        spread = rows.std(0, correction=0)
        varies = spread > 0
        gone = {one.row for one in dead if one.parameter == name}
        for row in sorted(gone):
            living = [k for k in range(len(value)) if k not in gone]
            if not living or not bool(varies.any()):
                return  # there is nothing to go by
            # a constant feature counts as one of the mean deviation of the others
            spread = torch.where(varies, spread, spread[varies].mean())
            distance = torch.cdist(rows / spread, centres[living] / spread).amin(-1)
            centres[row] = rows[distance.argmax()]
            gone = gone - {row}
            _widen(m_step, row, len(value), spread)
            _give_weight(m_step, row, len(value))
        parameter.set(centres.reshape(value.shape) / c.to(centres))


def _widen(m_step: MStep, row: int, count: int, spread: Tensor) -> None:
    for name in m_step.with_role("scale"):
        parameter, image = m_step.parameters[name], m_step.image(name)
        seen = image.forward(parameter.value.double()).clone()
        if seen.dim() > 0 and seen.shape[0] == count:
            width = spread if seen[row].numel() == len(spread) else spread.mean()
            seen[row] = width.reshape(seen[row].shape) if width.dim() else width
            parameter.set(image.inverse(seen))
    for name in m_step.with_role("cholesky"):
        parameter, image = m_step.parameters[name], m_step.image(name)
        seen = image.forward(parameter.value.double()).clone()
        if seen.dim() == 3 and seen.shape[0] == count and seen.shape[-1] == len(spread):
            seen[row] = torch.diag(spread.to(seen))
            parameter.set(image.inverse(seen))


def _give_weight(m_step: MStep, row: int, count: int) -> None:
    for name in m_step.with_role("simplex"):
        parameter, image = m_step.parameters[name], m_step.image(name)
        seen = image.forward(parameter.value.double()).clone()
        if seen.shape[-1] == count:
            low = seen[..., row] < 1 / count
            seen[..., row] = torch.where(low, 1 / count, seen[..., row])
            parameter.set(image.inverse(seen / seen.sum(-1, keepdim=True)))
