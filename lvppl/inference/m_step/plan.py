"""How each parameter is maximised: chosen once, printed as a table, applied at every M-step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lvppl.inference.m_step import forms
from lvppl.inference.m_step.bindings import Affine, Binding, Bound, Key, Unbound
from lvppl.inference.m_step.cells import Cells
from lvppl.inference.m_step.entries import IMAGES, Image, Parameter, Parameters
from lvppl.inference.m_step.families import family_of
from lvppl.inference.m_step.priors import add_prior, add_regression_prior, is_conjugate
from lvppl.inference.m_step.regressions import groups_of, regrouped
from lvppl.inference.m_step.statistics import Statistics, gather
from lvppl.inference.m_step.weighted import Weighted, peel

__all__ = ["MStep", "MStepTable", "Step"]


@dataclass(frozen=True)
class Step:
    """How one parameter is maximised.

    Attributes:
        parameter: its name.
        how: ``"closed form"`` (the maximum of Q); ``"conditional"`` (the maximum given the other
            parameters: expectation conditional maximisation); ``"gradient"`` (Q is raised by
            L-BFGS); ``"fixed"`` (Q does not depend on it).
        form: what the formula is, in words.
        sites: the sites whose terms of Q it stands in.
        why: for a gradient step, why there is no closed form.
    """

    parameter: str
    how: str
    form: str
    sites: tuple[str, ...]
    why: str = ""


class MStepTable(Mapping[str, Step]):
    """The steps by parameter; prints as a table."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = {step.parameter: step for step in steps}

    def __getitem__(self, name: str) -> Step:
        return self._steps[name]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def __repr__(self) -> str:
        rows = [("parameter", "M-step", "formula", "sites")]
        for step in self.values():
            sites = ", ".join(step.sites[:3]) + (
                f", … ({len(step.sites)})" if len(step.sites) > 3 else ""
            )
            rows.append((step.parameter, step.how, step.why or step.form, sites))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows
        ]
        return "\n".join([lines[0], "  ".join("─" * w for w in widths), *lines[1:]])


_FORMULA = {
    "simplex": "expected counts / their sum",
    "probability": "expected successes / trials",
    "rate": "Σ r y / Σ r, as a rate",
    "concentration": "ln α − ψ(α) = ln ȳ − mean of ln y, by Newton",
    "location": "Σ r y / Σ r",
    "regression": "weighted least squares",
    "scale": "√(Σ r (y − μ)² / Σ r)",
    "cholesky": "Σ r (y − μ)(y − μ)ᵀ / Σ r",
}


@dataclass(frozen=True)
class _Use:
    """One argument of one site in which a parameter stands."""

    site: str
    argument: str
    role: str
    image: Image


class MStep:
    """The M-step of one program at data of given shapes.

    Args:
        parameters: of the program.
        terms: the sites of one run, for their families.
        priors: terms of latents that are treated as parameters.
        bindings: of their arguments.
        floor: smallest variance, relative to the variance of the data at the same site.
    """

    def __init__(
        self,
        parameters: Parameters,
        terms: Sequence[Weighted],
        priors: Sequence[Weighted],
        bindings: Mapping[Key, Binding],
        *,
        floor: float,
    ) -> None:
        self.parameters = parameters
        self.bindings = dict(bindings)
        self.priors = {term.name: term for term in priors}
        self.floor = floor
        self._owners = parameters.owners()
        self._names = list(parameters)
        self._roles = {
            (term.name, name): role
            for term in [*terms, *priors]
            for name, role in getattr(family_of(peel(term).base), "roles", {}).items()
        }
        self._groups = groups_of(self.bindings, self._roles, parameters)
        self.bindings = self._in_groups(self.bindings)
        self._group_of = {n: i for i, group in enumerate(self._groups) for n in group.names}
        self._uses = self._all_uses()
        self._steps = {name: self._step(name) for name in parameters}
        self._spread = self._data_spread(terms)
        self.bindings = self._without_loose(self.bindings)

    # ----------------------------------------------------------------------------------- choosing

    @property
    def table(self) -> MStepTable:
        return MStepTable(list(self._steps.values()))

    @property
    def by_gradient(self) -> list[str]:
        return [name for name, step in self._steps.items() if step.how == "gradient"]

    def _all_uses(self) -> dict[str, list[_Use]]:
        uses: dict[str, list[_Use]] = {name: [] for name in self.parameters}
        for (site, argument), binding in self.bindings.items():
            if not isinstance(binding, Bound) or binding.image is None:
                continue
            for owner in self._owners[binding.index[binding.index >= 0]].unique().tolist():
                role = self._roles[site, argument]
                uses[self._names[owner]].append(_Use(site, argument, role, binding.image))
        return uses

    def _step(self, name: str) -> Step:
        uses = self._uses[name]
        loose = [
            key
            for key, b in self.bindings.items()
            if isinstance(b, Unbound) and name in b.parameters
        ]
        loose = [key for key in loose if key[0] != name]
        sites = tuple(dict.fromkeys([use.site for use in uses] + [key[0] for key in loose]))
        if name in self._group_of:
            return self._regression_step(name, uses, loose)
        why = self._why_not(name, uses, loose)
        if not uses and not loose and name not in self.priors:
            return Step(name, "fixed", "no site depends on it", ())
        if why:
            return Step(name, "gradient", "L-BFGS on Q", sites, why)
        role, image = uses[0].role, uses[0].image
        how = "conditional" if self._is_conditional(name, role, uses) else "closed form"
        formula = _FORMULA[role] if image.name == "θ" else f"{image.name} = {_FORMULA[role]}"
        if name in self.priors:
            formula += f", with its {type(peel(self.priors[name]).base).__name__} prior"
        return Step(name, how, formula, sites)

    def _in_groups(self, bindings: Mapping[Key, Binding]) -> dict[Key, Binding]:
        return regrouped(bindings, self._roles, self._groups, self.parameters)

    def _regression_step(self, name: str, uses: Sequence[_Use], loose: Sequence[Key]) -> Step:
        number = self._group_of[name]
        keys = [
            key for key, b in self.bindings.items() if isinstance(b, Affine) and b.group == number
        ]
        sites = tuple(dict.fromkeys([key[0] for key in keys] + [use.site for use in uses]))
        why = ""
        for other in self._groups[number].names:
            prior = self.priors.get(other)
            if self._uses[other] or any(
                isinstance(b, Unbound) and other in b.parameters and key[0] != other
                for key, b in self.bindings.items()
            ):
                why = f"'{other}' does not stand in regressions alone"
            elif prior is not None and not self._normal_prior(prior):
                why = f"the prior of '{other}' is not a Normal"
        if any((key[0], "scale_tril") in self._roles for key in keys):
            why = "a regression of a MultivariateNormal"
        if why:
            return Step(name, "gradient", "L-BFGS on Q", sites, why)
        how = "closed form" if self._separates(keys) else "conditional"
        return Step(name, how, _FORMULA["regression"], sites)

    def _normal_prior(self, prior: Weighted) -> bool:
        image = IMAGES["location"][0]
        return is_conjugate(prior, "location", image, self.bindings) and not isinstance(
            self.bindings.get((prior.name, "scale_tril")), Bound
        )

    def _separates(self, keys: Sequence[Key]) -> bool:
        """Whether each coefficient stands under one scale alone, which then cancels."""
        met: dict[int, set[int]] = {}
        for key in keys:
            binding, scale = self.bindings[key], self.bindings.get((key[0], "scale"))
            if not isinstance(binding, Affine) or not isinstance(scale, Bound):
                return False
            used = binding.jacobian != 0
            full = torch.broadcast_shapes(scale.index.shape, used.shape[:-1])
            index = scale.index.expand(full)
            used = used.expand((*full, used.shape[-1]))
            for column in range(used.shape[-1]):
                met.setdefault(column, set()).update(index[used[..., column]].unique().tolist())
        return all(len(scales) <= 1 for scales in met.values())

    def _why_not(self, name: str, uses: Sequence[_Use], loose: Sequence[Key]) -> str:
        if loose:
            site, argument = loose[0]
            return f"'{site}' depends on it in a way without a closed form ({argument})"
        if not uses:
            return "no site but its prior depends on it"
        roles = {use.role for use in uses}
        images = {use.image.name for use in uses}
        if len(roles) > 1 or len(images) > 1:
            return f"it stands as {' and as '.join(sorted(roles))}"
        prior = self.priors.get(name)
        if prior is not None and not is_conjugate(
            prior, uses[0].role, uses[0].image, self.bindings
        ):
            return f"its prior {type(peel(prior).base).__name__} is not conjugate to its sites"
        parameter = self.parameters[name]
        for use in uses:
            binding = self.bindings[use.site, use.argument]
            assert isinstance(binding, Bound)
            if not _whole_rows(use.role, binding.index, parameter):
                return f"'{use.site}' takes parts of it"
        families = {self._family(use.site) for use in uses}
        if (
            uses[0].role == "location"
            and len(families & {"MultivariateNormal"}) < len(families) > 1
        ):
            return "it is the location of a Normal and of a MultivariateNormal"
        return ""

    def _family(self, site: str) -> str:
        return "MultivariateNormal" if (site, "scale_tril") in self._roles else "Normal"

    def _is_conditional(self, name: str, role: str, uses: Sequence[_Use]) -> bool:
        """Whether the maximum of Q moves with other parameters."""
        if role == "location":
            return not all(self._one_scale(name, use) for use in uses) or (
                len({self._scale_of(use) for use in uses}) > 1
            )
        if role == "rate":
            return any((use.site, "concentration") in self._roles for use in uses)
        if role in ("scale", "cholesky"):
            return any(isinstance(self.bindings.get((use.site, "loc")), Unbound) for use in uses)
        return role == "concentration"

    def _scale_of(self, use: _Use) -> str:
        binding = self._scale_binding(use)
        if not isinstance(binding, Bound):
            return use.site
        return ",".join(map(str, binding.index.flatten().tolist()[:64]))

    def _scale_binding(self, use: _Use) -> Binding | None:
        other = "scale_tril" if self._family(use.site) == "MultivariateNormal" else "scale"
        return self.bindings.get((use.site, other))

    def _one_scale(self, name: str, use: _Use) -> bool:
        """Whether each entry of a location meets one scale, times constants: it then cancels."""
        scale, loc = self._scale_binding(use), self.bindings[use.site, use.argument]
        if not isinstance(scale, Bound) or not isinstance(loc, Bound):
            return False
        matrix = self._family(use.site) == "MultivariateNormal"
        index = scale.index[..., 0, 0].unsqueeze(-1) if matrix else scale.index
        shape = torch.broadcast_shapes(index.shape, loc.index.shape)
        entry = loc.index.expand(shape).flatten()
        met = torch.stack([entry, index.expand(shape).flatten()], 1)
        pairs = torch.unique(met[entry >= 0], dim=0)
        return len(pairs) == len(pairs[:, 0].unique())

    def _without_loose(self, bindings: Mapping[Key, Binding]) -> dict[Key, Binding]:
        """Arguments of parameters that go by gradient are constants to the others."""
        loose = frozenset(self.by_gradient)
        numbers = torch.tensor([self._names.index(n) for n in loose], dtype=torch.long)
        result = dict(bindings)
        for key, binding in bindings.items():
            if isinstance(binding, Affine):
                if loose & set(self._groups[binding.group].names):
                    result[key] = Unbound(loose)
            elif isinstance(binding, Bound) and binding.image is not None:
                owner = self._owners[binding.index.clamp(min=0)]
                free = torch.isin(owner, numbers) & (binding.index >= 0)
                if bool((free | (binding.index < 0)).all()):
                    result[key] = Unbound(loose)
                elif bool(free.any()):
                    index = torch.where(free, -1, binding.index)
                    result[key] = Bound(index, binding.coefficient, binding.image)
        return result

    def _data_spread(self, terms: Sequence[Weighted]) -> dict[str, float]:
        """Variance of the observed values, by site: what the floor is relative to."""
        spread = {}
        for term in terms:
            if self._roles.keys() & {(term.name, "scale"), (term.name, "scale_tril")}:
                value = term.value.detach().double()
                if type(peel(term).base).__name__ == "LogNormal":
                    value = value.log()
                value = value[value.isfinite()]
                spread[term.name] = float(value.var(correction=0)) if value.numel() else 1.0
        return spread

    # ----------------------------------------------------------------------------------- applying

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
        """The same statistics about the present locations (moments are kept about a centre)."""
        cells = {form: self._recentred(form, c) for form, c in statistics.cells.items()}
        return Statistics(statistics.num_entries, statistics.device, statistics.by_entry, cells)

    def _recentred(self, form: str, cells: Cells) -> Cells:
        entries = self.parameters.image(IMAGES["location"][0]).to(cells.keys.device)
        if form == "normal":
            index = cells.keys[:, 0]
            c = cells.reference["loc_coefficient"]
            gap = entries[index.clamp(min=0)] - cells.reference["loc"] / c
            step = torch.zeros_like(entries).nan_to_num(0.0)
            step[index[index >= 0]] = gap[index >= 0]
            return forms.moved(cells, step)
        if form.startswith("mvn"):
            dim = int(form.split()[1])
            rows = cells.keys[:, :dim]
            present = entries[rows.clamp(min=0)]
            gap = present - cells.reference["loc"] / cells.reference["loc_coefficient"]
            return forms.mvn_moved(cells, rows, gap, dim)
        return cells

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
            value = forms.scales(n, second)
            floor = self._floor(name)
            value = torch.where(value.isnan(), value, value.clamp(min=floor**0.5))
            self._set(name, self._uses[name][0].image, value)

    def _floor(self, name: str) -> float:
        spreads = [self._spread[use.site] for use in self._uses[name] if use.site in self._spread]
        return self.floor * max(spreads, default=1.0)

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
        floor = self._floor(name)
        for i in range(len(patterns)):
            if start <= int(first[i]) < start + parameter.size and float(n[i]) > 0:
                covariance = _floored(second[i] / n[i], floor)
                place = (int(first[i]) - start) // (dim * dim)
                matrices[place] = torch.linalg.cholesky(covariance).to(matrices)
        parameter.set(image.inverse(matrices.reshape(value.shape)))


def _floored(covariance: Tensor, floor: float) -> Tensor:
    """The nearest maximiser whose eigenvalues are at least ``floor``."""
    covariance = (covariance + covariance.mT) / 2
    values, vectors = torch.linalg.eigh(covariance)
    if bool((values >= floor).all()) and bool((values > 0).all()):
        return covariance
    tiny = torch.finfo(covariance.dtype).tiny
    return (vectors * values.clamp(min=max(floor, tiny))) @ vectors.mT


def _whole_rows(role: str, index: Tensor, parameter: Parameter) -> bool:
    """Whether an argument takes whole rows (matrices) of a parameter, in their order."""
    if role not in ("simplex", "cholesky"):
        return True
    shape = parameter.value.shape
    length = shape[-1] if role == "simplex" else shape[-2] * shape[-1]
    if role == "simplex":
        rows = index.reshape(-1, index.shape[-1])
        expected = rows[:, :1] + torch.arange(rows.shape[1])
        aligned = (rows[:, 0] - parameter.offset) % length == 0
        return rows.shape[1] == length and bool((rows == expected).all()) and bool(aligned.all())
    rows = index.reshape(-1, index.shape[-2] * index.shape[-1])
    if rows.shape[1] != length:
        return False
    lower = torch.ones(index.shape[-2:], dtype=torch.bool).tril().flatten()
    expected = rows[:, :1] + torch.arange(length)
    return bool((rows[:, lower] == expected[:, lower]).all())
