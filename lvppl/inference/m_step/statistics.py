"""Sufficient statistics, by entry or by cell: what an M-step needs to know of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lvppl.inference.m_step.cells import Cells

__all__ = ["Statistics"]


@dataclass
class Statistics:
    """What an M-step needs of the data; it adds up over batches.

    Attributes:
        by_entry: statistics of one entry each, (entries,) float64, by name: ``count`` (simplex),
            ``success`` and ``failure`` (probability), ``power`` N and ``slope`` S of N ln θ − S θ
            (rate).
        cells: of combinations, by form: ``normal``, ``mvn D``, ``gamma``, ``regression G``.
    """

    num_entries: int
    device: torch.device
    by_entry: dict[str, Tensor] = field(default_factory=dict)
    cells: dict[str, Cells] = field(default_factory=dict)

    def add(self, name: str, index: Tensor, value: Tensor) -> None:
        """Add values to their entries; those of constants (index -1) are left out."""
        self.by_entry[name] = self.of_entries(name)
        index, value = index.flatten(), value.double().expand(index.shape).flatten()
        bound = index >= 0
        self.by_entry[name].index_add_(0, index[bound], value[bound])

    def of_entries(self, name: str) -> Tensor:
        """One statistic of every entry, (entries,) float64; zero where nothing was added."""
        if name in self.by_entry:
            return self.by_entry[name]
        return torch.zeros(self.num_entries, dtype=torch.float64, device=self.device)

    def add_cells(self, form: str, cells: Cells) -> None:
        cells = cells.compressed()
        known = self.cells.get(form)
        self.cells[form] = cells if known is None else Cells.joined([known, cells])

    def scaled(self, factor: float) -> Statistics:
        return Statistics(
            self.num_entries,
            self.device,
            {name: value * factor for name, value in self.by_entry.items()},
            {form: cells.scaled(factor) for form, cells in self.cells.items()},
        )

    @staticmethod
    def joined(parts: Sequence[Statistics]) -> Statistics:
        total = Statistics(parts[0].num_entries, parts[0].device)
        for part in parts:
            for name, value in part.by_entry.items():
                known = total.by_entry.get(name)
                total.by_entry[name] = value if known is None else known + value
        for form in {form for part in parts for form in part.cells}:
            total.cells[form] = Cells.joined([p.cells[form] for p in parts if form in p.cells])
        return total
