"""One whole M-step: from statistics to parameters, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.inference.m_step import forms
from lvppl.inference.m_step.bindings import Binding, Key
from lvppl.inference.m_step.cells import Cells
from lvppl.inference.m_step.choice import Choice
from lvppl.inference.m_step.entries import IMAGES, Image
from lvppl.inference.m_step.priors import add_prior, add_regression_prior
from lvppl.inference.m_step.statistics import Statistics, gather
from lvppl.inference.m_step.weighted import Weighted, peel

__all__ = ["MStep"]


class MStep(Choice):
    """The M-step of one program at data of given shapes; see :class:`Choice` for its arguments."""

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

    def recentred(self, statistics: Statistics) -> Statistics:
        """The same statistics about the present parameters, as those of the next batch will be.

        Between calls it remembers where regressions were: call it at each step of online EM.
        """
        cells = {form: self._recentred(form, c) for form, c in statistics.cells.items()}
        return Statistics(statistics.num_entries, statistics.device, statistics.by_entry, cells)

    def _recentred(self, form: str, cells: Cells) -> Cells:
        kind, *number = form.split()
        if kind == "normal":
            index, c = cells.keys[:, 0], cells.reference["loc_coefficient"]
            present = self._seen("location", cells.keys.device)
            step = torch.zeros_like(present)
            gap = present[index.clamp(min=0)] - cells.reference["loc"] / c
            step[index[index >= 0]] = gap[index >= 0]
            scale = self._at("scale", cells.keys[:, 1], cells, "scale")
            return forms.moved(cells, step).replaced({"scale": scale})
        if kind == "mvn":
            dim = int(number[0])
            rows = cells.keys[:, :dim]
            present = self._seen("location", cells.keys.device)[rows.clamp(min=0)]
            gap = present - cells.reference["loc"] / cells.reference["loc_coefficient"]
            tril = self._at("cholesky", cells.keys[:, dim:], cells, "tril")
            return forms.mvn_moved(cells, rows, gap, dim).replaced({"tril": tril})
        if kind == "gamma":
            alpha = self._at("concentration", cells.keys[:, 0], cells, "concentration")
            rate = self._at("rate", cells.keys[:, 1], cells, "rate")
            return cells.replaced({"concentration": alpha, "rate": rate})
        return self._recentred_regression(int(number[0]), cells)

    def _recentred_regression(self, number: int, cells: Cells) -> Cells:
        entries = self._groups[number].entries.to(cells.keys.device)
        present = self._seen("location", cells.keys.device)[entries]
        step = present - self._centres.get(number, present)
        self._centres[number] = present
        scale = self._at("scale", cells.keys[:, 0], cells, "scale")
        return forms.regression_moved(cells, step).replaced({"scale": scale})

    def _seen(self, role: str, device: torch.device) -> Tensor:
        """The present entries as distributions see them in a role, (entries,)."""
        if role == "location":
            return self.parameters.image(IMAGES["location"][0]).nan_to_num(0.0).to(device)
        seen = torch.zeros(self.parameters.num_entries, dtype=torch.float64)
        for name in self.with_role(role):
            parameter = self.parameters[name]
            value = self.image(name).forward(parameter.value.double()).flatten().cpu()
            seen[parameter.offset : parameter.offset + parameter.size] = value
        return seen.to(device)

    def _at(self, role: str, index: Tensor, cells: Cells, name: str) -> Tensor:
        """A reference at the present parameters; constants stay."""
        old = cells.reference[name]
        factor = {"scale": "scale_coefficient", "tril": "tril_coefficient", "rate": "coefficient"}
        one = torch.ones(len(cells), dtype=torch.float64, device=old.device)
        c = cells.reference.get(factor.get(name, ""), one)
        seen = self._seen(role, old.device)[index.clamp(min=0)]
        present = (c.reshape(-1, *(1,) * (seen.dim() - 1)) * seen).reshape(old.shape)
        return torch.where(index.reshape(old.shape) >= 0, present, old)

    def maximise(self, statistics: Statistics) -> None:
        """Set every parameter that has a formula to its maximum, in place."""
        total = Statistics.joined([statistics, self._of_priors(statistics.device)])
        for name, step in self._steps.items():
            if step.how in ("closed form", "conditional") and self._uses[name]:
                use = self._uses[name][0]
                if use.role == "simplex":
                    counts = self._mine(name, total, "count")
                    self._set(name, use.image, forms.simplexes(counts))
                elif use.role == "probability":
                    a, b = (self._mine(name, total, key) for key in ("success", "failure"))
                    self._set(name, use.image, forms.probabilities(a, b))
        self._gammas(total)
        for name in self.with_role("rate"):
            power, slope = (self._mine(name, total, key) for key in ("power", "slope"))
            self._refuse_no_maximum(name, power < 0)
            self._set(name, self._uses[name][0].image, forms.rates(power, slope))
        self._gaussians(total)

    def image(self, name: str) -> Image:
        """How distributions see a parameter."""
        return self._uses[name][0].image

    def with_role(self, role: str) -> list[str]:
        """Parameters that have a formula in this role."""
        return [
            name
            for name, step in self._steps.items()
            if step.how in ("closed form", "conditional")
            and self._uses[name]
            and self._uses[name][0].role == role
        ]

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
        parameter = self.parameters[name]
        if key not in total.by_entry:
            return torch.zeros(parameter.value.shape, dtype=torch.float64, device=total.device)
        start = parameter.offset
        part = total.by_entry[key][start : start + parameter.size]
        return part.reshape(parameter.value.shape)

    def _set(self, name: str, image: Image, value: Tensor) -> None:
        """Set entries to an image value; those that came out NaN keep their own."""
        parameter = self.parameters[name]
        present = parameter.value
        new = image.inverse(value).to(present)
        parameter.set(torch.where(new.isnan() | value.isnan().to(new.device), present, new))

    def _gammas(self, total: Statistics) -> None:
        cells = total.cells.get("gamma")
        if cells is None:
            return
        names = self.with_role("concentration")
        free = torch.zeros(self.parameters.num_entries, dtype=torch.bool, device=total.device)
        rates = {
            self.parameters[n].offset + i
            for n in self.with_role("rate")
            if n not in self.priors
            and all((use.site, "concentration") in self._roles for use in self._uses[n])
            for i in range(self.parameters[n].size)
        }
        for index in cells.keys[:, 0].unique().tolist():
            met = cells.keys[cells.keys[:, 0] == index, 1].unique()
            mates = cells.keys[cells.keys[:, 1] == met[0], 0].unique() if len(met) == 1 else met
            if index >= 0 and len(met) == 1 and len(mates) == 1 and int(met[0]) in rates:
                free[index] = True
        alpha = forms.concentrations(cells, self.parameters.num_entries, free)
        for name in names:
            start, size = self.parameters[name].offset, self.parameters[name].size
            value = alpha[start : start + size].reshape(self.parameters[name].value.shape)
            self._set(name, self._uses[name][0].image, value)
        index = cells.keys[:, 0]
        new = torch.where(index >= 0, alpha[index.clamp(min=0)], cells.reference["concentration"])
        new = torch.where(new.isnan(), cells.reference["concentration"], new)
        total.add("power", cells.keys[:, 1], cells.values["n"] * new)
        total.add("slope", cells.keys[:, 1], cells.values["sum"] * cells.reference["coefficient"])

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
            self._refuse_no_maximum(name, n < 0)
            value = forms.scales(n, second)
            value = torch.where(value.isnan(), value, value.clamp(min=self._smallest(name)))
            self._set(name, self._uses[name][0].image, value)

    def _refuse_no_maximum(self, name: str, negative: Tensor) -> None:
        """A Gamma prior with a concentration below 1 has its mode at 0 until data move it."""
        if name in self.priors and bool(negative.any()):
            prior = type(peel(self.priors[name]).base).__name__
            raise ProgramError(
                f"The {prior} prior of '{name}' has a concentration below 1, whose density is "
                "unbounded at 0, and there are too few data for a maximum elsewhere "
                f"(element {[int(i) for i in negative.nonzero()[0]]}). Use a concentration of at "
                "least 1, or a guide (lvppl.SVI)."
            )

    def _smallest(self, name: str) -> Tensor:
        """The smallest scale that each entry of a parameter may have, shaped as the parameter."""
        parameter = self.parameters[name]
        keys = [(use.site, use.argument) for use in self._uses[name]]
        variance = self.floors.of_scales(keys, self.bindings, self.parameters.num_entries)
        mine = variance[parameter.offset : parameter.offset + parameter.size]
        value = parameter.value
        return (self.floor * mine).sqrt().reshape(value.shape).to(value.device)

    def _normals(self, cells: Cells, total: Statistics) -> None:
        step = forms.locations(cells, self.parameters.num_entries)
        for name in self.with_role("location"):
            if self._family(self._uses[name][0].site) == "Normal":
                self._moved_by(name, step)
        forms.scale_totals(forms.moved(cells, step), total)

    def _regression(self, number: int, cells: Cells, total: Statistics) -> None:
        group = self._groups[number]
        step, cells = forms.regression(cells)
        by_entry = torch.zeros(self.parameters.num_entries, dtype=torch.float64, device=step.device)
        by_entry[group.entries.to(step.device)] = step
        for name in group.names:
            self._moved_by(name, by_entry)
        forms.scale_totals(cells, total)

    def _moved_by(self, name: str, step: Tensor) -> None:
        """Add to a location its part of a step; NaN where nothing is known."""
        parameter = self.parameters[name]
        mine = step[parameter.offset : parameter.offset + parameter.size].nan_to_num(0.0)
        value = parameter.value
        parameter.set(value.double() + mine.reshape(value.shape).to(value.device))

    def _mvns(self, cells: Cells, dim: int) -> None:
        rows, steps = forms.mvn_locations(cells, dim)
        by_entry = torch.full(
            (self.parameters.num_entries,), torch.nan, dtype=torch.float64, device=steps.device
        )
        keep = rows >= 0
        by_entry[rows[keep]] = steps[keep]
        for name in self.with_role("location"):
            if self._family(self._uses[name][0].site) == "MultivariateNormal":
                self._moved_by(name, by_entry)
        cells = forms.mvn_moved(cells, rows, steps, dim)
        patterns, n, second = forms.mvn_covariances(cells, dim)
        for name in self.with_role("cholesky"):
            self._covariance(name, patterns, n, second, dim)

    def _covariance(self, name: str, patterns: Tensor, n: Tensor, second: Tensor, dim: int) -> None:
        parameter, image = self.parameters[name], self._uses[name][0].image
        start = parameter.offset
        value = parameter.value.double()
        matrices = image.forward(value).reshape(-1, dim, dim).clone()
        first = patterns[:, 0]  # the corner is always bound
        keys = [(use.site, use.argument) for use in self._uses[name]]
        variance = self.floors.of_covariance(keys, self.bindings)
        width = second.new_ones(dim) if variance is None else variance.sqrt().to(second)
        for i in range(len(patterns)):
            if start <= int(first[i]) < start + parameter.size and float(n[i]) > 0:
                covariance = _floored(second[i] / n[i], self.floor, width)
                place = (int(first[i]) - start) // (dim * dim)
                matrices[place] = torch.linalg.cholesky(covariance).to(matrices)
        parameter.set(image.inverse(matrices.reshape(value.shape)))


def _floored(covariance: Tensor, floor: float, width: Tensor) -> Tensor:
    """The maximiser Σ whose eigenvalues, in units of ``width``, are at least ``floor``.

    Where ln |Σ| + tr(Σ⁻¹ S) has no smaller value among those Σ.
    """
    units = width.unsqueeze(-1) * width
    covariance = (covariance + covariance.mT) / 2 / units
    values, vectors = torch.linalg.eigh(covariance)
    if bool((values >= floor).all()) and bool((values > 0).all()):
        return covariance * units
    tiny = torch.finfo(covariance.dtype).tiny
    return (vectors * values.clamp(min=max(floor, tiny))) @ vectors.mT * units
