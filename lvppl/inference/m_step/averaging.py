"""Statistics of online EM: averages over the batches so far, the last ones counting most.

.. math:: \\bar S_t = (1 - ρ_t) \\, \\bar S_{t-1} + ρ_t \\, S_t, \\qquad ρ_t = (t + 2)^{-0.6}

with S_t of batch t scaled to the whole data. Moments are about the parameters of their E-step, and
are moved to the present ones before they are averaged.

Source: Cappé and Moulines 2009, "On-line expectation-maximization algorithm for latent data
models", section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lvppl.inference.m_step import forms
from lvppl.inference.m_step.cells import Cells
from lvppl.inference.m_step.plan import MStep
from lvppl.inference.m_step.statistics import Statistics

__all__ = ["AveragedStatistics"]

_DECAY = 0.6


class AveragedStatistics:
    """The running average of one run."""

    def __init__(self, m_step: MStep) -> None:
        self.m_step = m_step
        self._average: Statistics | None = None
        self._num_steps = 0
        self._centres: dict[str, Tensor] = {}

    def with_batch(self, new: Statistics) -> Statistics:
        """The average after one more batch, whose E-step was at the present parameters."""
        rate = (self._num_steps + 2.0) ** -_DECAY
        self._num_steps += 1
        if self._average is None:
            self._average = self._recentred(new)
        else:
            old = self._recentred(self._average)
            # new ones are about the present parameters already, but to rounding: it is the same
            # numbers that tell which cells are the same
            new = self._recentred(new)
            self._average = Statistics.joined([old.scaled(1 - rate), new.scaled(rate)])
        return self._average

    def _recentred(self, statistics: Statistics) -> Statistics:
        """The same statistics about the present parameters."""
        cells = {form: self._moved(form, part) for form, part in statistics.cells.items()}
        return Statistics(statistics.num_entries, statistics.device, statistics.by_entry, cells)

    def _moved(self, form: str, cells: Cells) -> Cells:
        kind, *number = form.split()
        if kind == "normal":
            return self._moved_normals(cells)
        if kind == "mvn":
            return self._moved_vectors(cells, int(number[0]))
        if kind == "regression":
            return self._moved_regression(form, int(number[0]), cells)
        alpha = self._at("concentration", cells.keys[:, 0], cells, "concentration")
        rate = self._at("rate", cells.keys[:, 1], cells, "rate")
        return cells.replaced({"concentration": alpha, "rate": rate})

    def _moved_normals(self, cells: Cells) -> Cells:
        index, c, loc = cells.keys[:, 0], *_location(cells)
        present = self._seen("location", cells)
        bound = index >= 0
        step = torch.zeros_like(present)
        step[index[bound]] = present[index[bound]] - loc[bound] / c[bound]
        there = torch.where(bound, c * present[index.clamp(min=0)], loc)
        scale = self._at("scale", cells.keys[:, 1], cells, "scale")
        return forms.moved(cells, step).replaced({"loc": there, "scale": scale})

    def _moved_vectors(self, cells: Cells, dim: int) -> Cells:
        index, c, loc = cells.keys[:, :dim], *_location(cells)
        present = self._seen("location", cells)
        bound = index >= 0
        step = torch.zeros_like(present)
        step[index[bound]] = present[index[bound]] - (loc / c)[bound]
        there = torch.where(bound, c * present[index.clamp(min=0)], loc)
        tril = self._at("cholesky", cells.keys[:, dim:], cells, "tril")
        return forms.mvn_moved(cells, step, dim).replaced({"loc": there, "tril": tril})

    def _moved_regression(self, form: str, number: int, cells: Cells) -> Cells:
        entries = self.m_step.entries_of_group(number).to(cells.keys.device)
        present = self._seen("location", cells)[entries]
        step = present - self._centres.get(form, present)
        self._centres[form] = present
        scale = self._at("scale", cells.keys[:, 0], cells, "scale")
        return forms.regression_moved(cells, step).replaced({"scale": scale})

    def _seen(self, role: str, cells: Cells) -> Tensor:
        return self.m_step.seen(role).to(cells.keys.device)

    def _at(self, role: str, index: Tensor, cells: Cells, name: str) -> Tensor:
        """A reference at the present parameters; constants stay."""
        old = cells.reference[name]
        factor = {"scale": "scale_coefficient", "tril": "tril_coefficient", "rate": "coefficient"}
        one = torch.ones(len(cells), dtype=torch.float64, device=old.device)
        c = cells.reference.get(factor.get(name, ""), one)
        seen = self._seen(role, cells)[index.clamp(min=0)]
        present = (c.reshape(-1, *(1,) * (seen.dim() - 1)) * seen).reshape(old.shape)
        return torch.where(index.reshape(old.shape) >= 0, present, old)


def _location(cells: Cells) -> tuple[Tensor, Tensor]:
    return cells.reference["loc_coefficient"], cells.reference["loc"]
