"""Sufficient statistics by cell: a cell is one combination of entries that meet in a density."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Cells"]


@dataclass(frozen=True)
class Cells:
    """Rows of statistics, each about one combination of parameter entries.

    Attributes:
        keys: which entries, (cells, k) integers; -1 where an argument is a constant.
        reference: numbers that belong to the combination: coefficients, constants, the centre that
            the statistics are taken about. By name, (cells, ...), float64.
        values: the statistics, which add up. By name, (cells, ...), float64.
    """

    keys: Tensor
    reference: dict[str, Tensor]
    values: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.keys)

    def scaled(self, factor: float) -> Cells:
        """Every statistic times ``factor``."""
        return Cells(self.keys, self.reference, {n: v * factor for n, v in self.values.items()})

    @staticmethod
    def joined(parts: Sequence[Cells]) -> Cells:
        """All rows of the parts; rows of the same combination are added up."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        return Cells(
            torch.cat([part.keys for part in parts]),
            {n: torch.cat([part.reference[n] for part in parts]) for n in first.reference},
            {n: torch.cat([part.values[n] for part in parts]) for n in first.values},
        ).compressed()

    def compressed(self) -> Cells:
        """One row a combination: those with equal keys and equal references are added up."""
        rows = [self.keys] + [
            r.reshape(len(self), -1).double().contiguous().view(torch.int64)
            for r in self.reference.values()
        ]
        _, inverse = torch.unique(torch.cat(rows, 1), dim=0, return_inverse=True)
        count = int(inverse.max()) + 1 if len(inverse) else 0
        if count == len(self):
            return self
        first = torch.full((count,), len(self), device=inverse.device).scatter_reduce(
            0, inverse, torch.arange(len(self), device=inverse.device), "amin"
        )

        def added(value: Tensor) -> Tensor:
            zeros = value.new_zeros((count, *value.shape[1:]))
            return zeros.index_add_(0, inverse, value)

        return Cells(
            self.keys[first],
            {n: r[first] for n, r in self.reference.items()},
            {n: added(v) for n, v in self.values.items()},
        )

    def replaced(self, reference: dict[str, Tensor]) -> Cells:
        """The same statistics with other references; rows that become alike are added up."""
        return Cells(self.keys, {**self.reference, **reference}, self.values).compressed()

    def updated(
        self, change: Callable[[Cells], tuple[dict[str, Tensor], dict[str, Tensor]]]
    ) -> Cells:
        """The same rows with some references and values replaced."""
        reference, values = change(self)
        return Cells(self.keys, {**self.reference, **reference}, {**self.values, **values})
