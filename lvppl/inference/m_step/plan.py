"""One whole M-step: from statistics to parameters, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.inference.m_step import forms
from lvppl.inference.m_step.arguments import Binding, Key
from lvppl.inference.m_step.bounds import Bounds
from lvppl.inference.m_step.cells import Cells
from lvppl.inference.m_step.entries import IMAGES
from lvppl.inference.m_step.floors import floored
from lvppl.inference.m_step.forms import Maximum
from lvppl.inference.m_step.gathering import gather
from lvppl.inference.m_step.priors import add_prior, add_regression_prior
from lvppl.inference.m_step.statistics import Statistics
from lvppl.inference.m_step.weighted import Weighted, peel

__all__ = ["MStep"]


class MStep(Bounds):
    """The M-step of one program at data of given shapes; see its parents for its arguments."""

    def statistics(self, device: torch.device) -> Statistics:
        return Statistics(self.parameters.num_entries, device)

    def gather(
        self,
        terms: Sequence[Weighted],
        into: Statistics,
        bindings: Mapping[Key, Binding] | None = None,
    ) -> Statistics:
        """Add the statistics of weighted sites.

        Args:
            bindings: those of this batch, where they depend on the data.
        """
        return gather(terms, self.bindings if bindings is None else self.settled(bindings), into)

    def settled(self, bindings: Mapping[Key, Binding]) -> dict[Key, Binding]:
        """Bindings of another batch, as this plan uses them."""
        return self._without_loose(self._in_groups(bindings))

    def seen(self, role: str) -> Tensor:
        """The present entries as distributions see them in a role, (entries,) float64 on the CPU.

        Zero where an entry is not seen so.
        """
        if role == "location":  # those of regressions too, which have no use of their own
            return self.parameters.image(IMAGES["location"][0], elsewhere=0.0)
        seen = torch.zeros(self.parameters.num_entries, dtype=torch.float64)
        for name in self.with_role(role):
            parameter = self.parameters[name]
            parameter.part_of(seen).copy_(self.image(name).forward(parameter.value.double()))
        return seen

    def entries_of_group(self, number: int) -> Tensor:
        """The coefficients of a regression, all of them, in order."""
        return self._groups[number].entries

    # ---------------------------------------------------------------------------------- one M-step

    def maximise(self, statistics: Statistics) -> None:
        """Set every parameter that has a formula to its maximum, in place."""
        total = Statistics.joined([statistics, self._of_priors(statistics.device)])
        for name in self.with_role("simplex"):
            self.set(name, forms.simplexes(self._mine(name, total, "count")))
        for name in self.with_role("probability"):
            a, b = (self._mine(name, total, key) for key in ("success", "failure"))
            self.set(name, forms.probabilities(a, b))
        self._gammas(total)
        for name in self.with_role("rate"):
            power, slope = (self._mine(name, total, key) for key in ("power", "slope"))
            # a rate of 0 is a maximum, too
            self._refuse_no_maximum(name, power, torch.zeros_like(slope))
            self.set(name, forms.rates(power, slope))
        self._gaussians(total)

    def _of_priors(self, device: torch.device) -> Statistics:
        total = self.statistics(device)
        for name, term in self.priors.items():
            if self._steps[name].how not in ("closed form", "conditional"):
                # its hyperparameters see the latent where it is
                seen = Weighted(term.name, term.fn, term.value.detach(), term.weight)
                gather([seen], self.bindings, total)
                continue
            parameter = self.parameters[name]
            if name in self._group_of:
                number = self._group_of[name]
                entries = self._groups[number].entries
                add_regression_prior(term, number, entries, parameter, self.bindings, total)
            else:
                use = self._uses[name][0]
                add_prior(term, use.role, use.image, parameter, self.bindings, total)
        return total

    def _mine(self, name: str, total: Statistics, key: str) -> Tensor:
        return self.parameters[name].part_of(total.of_entries(key))

    def _refuse_no_maximum(self, name: str, power: Tensor, weight: Tensor) -> None:
        """Raise where Q, N ln x − S x in a rate or a precision x, is largest at x = 0.

        So it is where a prior is, until data move it.

        Args:
            power, weight: N and S.
        """
        nowhere = (power < 0) | ((power == 0) & (weight > 0))
        if name not in self.priors or not bool(nowhere.any()):
            return
        prior = type(peel(self.priors[name]).base).__name__
        if prior == "Wishart":
            weak, remedy = "too few degrees of freedom, its density is largest at 0", "more"
        elif bool((power < 0).any()):
            weak = "a concentration below 1, whose density is unbounded at 0"
            remedy = "a concentration of at least 1"
        else:
            weak, remedy = "a concentration of 1, whose density is largest at 0", "a larger one"
        raise ProgramError(
            f"The {prior} prior of '{name}' has {weak}, and there are too few data for a maximum "
            f"elsewhere (element {[int(i) for i in nowhere.nonzero()[0]]}). Use {remedy}, or a "
            "guide (lvppl.SVI)."
        )

    # ---------------------------------------------------------------------------------- Gamma sites

    def _gammas(self, total: Statistics) -> None:
        cells = total.cells.get("gamma")
        if cells is None:
            return
        names = self.with_role("concentration")
        largest = torch.full(
            (total.num_entries,), torch.inf, dtype=torch.float64, device=total.device
        )
        for name in names:
            self.parameters[name].part_of(largest).copy_(self.largest_concentration(name))
        found = forms.concentrations(cells, self._own_rate.to(total.device), largest)
        for name in names:
            self.set(name, Maximum(*(self.parameters[name].part_of(part) for part in found)))
        index = cells.keys[:, 0].clamp(min=0)
        learned = (cells.keys[:, 0] >= 0) & found.exists[index]
        alpha = torch.where(learned, found.value[index], cells.reference["concentration"])
        total.add("power", cells.keys[:, 1], cells.values["n"] * alpha)
        total.add("slope", cells.keys[:, 1], cells.values["sum"] * cells.reference["coefficient"])

    # -------------------------------------------------------------------------------- normal sites

    def _gaussians(self, total: Statistics) -> None:
        for form in list(total.cells):
            cells = total.cells[form]
            if form == "normal":
                self._normals(cells, total)
            elif form.startswith("regression"):
                self._regression(int(form.split()[1]), cells, total)
            elif form.startswith("mvn"):
                self._mvns(cells, int(form.split()[1]))
        for name in self.with_role("scale"):
            n, second = (self._mine(name, total, key) for key in ("scale n", "scale second"))
            self._refuse_no_maximum(name, n, second)
            self.set(name, forms.scales(n, second, self.smallest_scale(name).to(n.device)))

    def _normals(self, cells: Cells, total: Statistics) -> None:
        step = forms.locations(cells, self.parameters.num_entries)
        for name in self.with_role("location"):
            if self._family(self._uses[name][0].site) == "Normal":
                self._moved_by(name, step)
        forms.scale_totals(forms.moved(cells, step), total)

    def _regression(self, number: int, cells: Cells, total: Statistics) -> None:
        group = self._groups[number]
        step, cells = forms.regression(cells)
        by_entry = torch.zeros(total.num_entries, dtype=torch.float64, device=step.device)
        by_entry[group.entries.to(step.device)] = step
        for name in group.names:
            self._moved_by(name, by_entry)
        forms.scale_totals(cells, total)

    def _moved_by(self, name: str, step: Tensor) -> None:
        """Add to a location its part of a step."""
        parameter = self.parameters[name]
        value = parameter.value
        parameter.set(value.double() + parameter.part_of(step).to(value.device))

    def _mvns(self, cells: Cells, dim: int) -> None:
        rows, steps = forms.mvn_locations(cells, dim)
        by_entry = torch.zeros(
            self.parameters.num_entries, dtype=torch.float64, device=steps.device
        )
        keep = rows >= 0
        by_entry[rows[keep]] = steps[keep]
        for name in self.with_role("location"):
            if self._family(self._uses[name][0].site) == "MultivariateNormal":
                self._moved_by(name, by_entry)
        patterns, n, second = forms.mvn_covariances(forms.mvn_moved(cells, by_entry, dim), dim)
        for name in self.with_role("cholesky"):
            self._covariances(name, patterns[:, 0], n, second)

    def _covariances(self, name: str, corner: Tensor, n: Tensor, second: Tensor) -> None:
        """Set the matrices of a parameter.

        Args:
            corner: the first entry of the matrix that each statistic is of, which is always bound.
        """
        parameter, dim = self.parameters[name], second.shape[-1]
        mine = (corner >= parameter.offset) & (corner < parameter.offset + parameter.size)
        if not bool(mine.any()):  # of vectors of another length
            return
        place = (corner[mine] - parameter.offset) // (dim * dim)
        n, second = n[mine], second[mine]
        self._refuse_no_maximum(name, n, second.diagonal(dim1=-2, dim2=-1).sum(-1))
        exists = n != 0
        best = second[exists] / n[exists, None, None]
        self.set_factors(name, place[exists], floored(best, self.floor, self.width(name).to(best)))

    def run_off_with_latents(self) -> list[str]:
        """Widths of priors that are learned of nothing but the latents under those priors.

        As both shrink together, their joint density grows without bound: no data, and no floor.
        """
        return [
            name
            for role in ("scale", "cholesky", "concentration")
            for name in self.with_role(role)
            if name not in self.priors and all(use.site in self.priors for use in self._uses[name])
        ]
