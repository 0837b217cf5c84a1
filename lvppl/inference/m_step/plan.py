"""How each parameter is maximised: chosen once, printed as a table, applied at every M-step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.inference.m_step import forms
from lvppl.inference.m_step.bindings import Affine, Binding, Bound, Key, Unbound
from lvppl.inference.m_step.cells import Cells
from lvppl.inference.m_step.entries import IMAGES, Image, Parameter, Parameters
from lvppl.inference.m_step.families import family_of
from lvppl.inference.m_step.floors import Floors
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
        priors: terms of latents that are treated as parameters, by name; whoever runs the program
            keeps them at its present parameters.
        bindings: of their arguments.
        others: the bindings of every batch, where they depend on the data.
        floor: smallest variance, relative to ``floors``.
        floors: variances of the data.
    """

    def __init__(
        self,
        parameters: Parameters,
        terms: Sequence[Weighted],
        priors: Mapping[str, Weighted],
        bindings: Mapping[Key, Binding],
        *,
        others: Sequence[Mapping[Key, Binding]] = (),
        floor: float,
        floors: Floors,
    ) -> None:
        self.parameters = parameters
        self.bindings = dict(bindings)
        self.priors = priors
        self.floor = floor
        self.floors = floors
        self._owners = parameters.owners()
        self._names = list(parameters)
        self._roles = {
            (term.name, name): role
            for term in [*terms, *priors.values()]
            for name, role in getattr(family_of(peel(term).base), "roles", {}).items()
        }
        self._groups = groups_of(self.bindings, self._roles, parameters)
        self.bindings = self._in_groups(self.bindings)
        self._group_of = {n: i for i, group in enumerate(self._groups) for n in group.names}
        # where they depend on the data, what is chosen has to hold for every batch
        self._batches = [self._in_groups(b) for b in others] or [self.bindings]
        self._uses = self._all_uses()
        self._centres: dict[int, Tensor] = {}
        self._steps = {name: self._step(name) for name in parameters}
        self._steps.update(self._beside_gradients())
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
        for key, binding in self._every_binding():
            if not isinstance(binding, Bound) or binding.image is None:
                continue
            for owner in self._owners[binding.index[binding.index >= 0]].unique().tolist():
                use = _Use(*key, self._roles[key], binding.image)
                if use not in uses[self._names[owner]]:
                    uses[self._names[owner]].append(use)
        return uses

    def _every_binding(self) -> Iterator[tuple[Key, Binding]]:
        for bindings in self._batches:
            yield from bindings.items()

    def _of_use(self, use: _Use, name: str) -> list[Bound]:
        """An argument's bindings in the batches in which it takes a parameter."""
        number = self._names.index(name)
        found = [bindings.get((use.site, use.argument)) for bindings in self._batches]
        return [
            b
            for b in found
            if isinstance(b, Bound) and bool((self._owners[b.index[b.index >= 0]] == number).any())
        ]

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

    def _beside_gradients(self) -> dict[str, Step]:
        """Scales whose location only climbs are the maximum given it, and no more."""
        climbing = {
            use.site
            for name in self.by_gradient
            for use in self._uses[name]
            if use.role == "location"
        } | {key[0] for key, b in self.bindings.items() if self._climbs(b)}
        return {
            name: replace(step, how="conditional")
            for name, step in self._steps.items()
            if step.how == "closed form"
            and any(
                u.role in ("scale", "cholesky") and u.site in climbing for u in self._uses[name]
            )
        }

    def _climbs(self, binding: Binding) -> bool:
        names = self._groups[binding.group].names if isinstance(binding, Affine) else ()
        return any(self._steps[name].how == "gradient" for name in names)

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
            for binding in self._of_use(use, name):
                if not _whole_rows(use.role, binding.index, parameter):
                    return f"'{use.site}' takes parts of it"
                if use.role == "cholesky" and not _one_factor(binding):
                    return f"'{use.site}' multiplies its elements by different numbers"
        sites = [use.site for use in uses] + ([name] if prior is not None else [])
        if uses[0].role == "location" and len({self._family(site) for site in sites}) > 1:
            return "a Normal and a MultivariateNormal meet in it"
        if uses[0].role == "location" and self._family(sites[0]) == "MultivariateNormal":
            return self._why_not_vectors(name, uses)
        return ""

    def _why_not_vectors(self, name: str, uses: Sequence[_Use]) -> str:
        """The formula of a MultivariateNormal moves a vector as a whole, times one number."""
        rows = []
        for use, binding in ((u, b) for u in uses for b in self._of_use(u, name)):
            D = binding.index.shape[-1]
            index, c = binding.index.reshape(-1, D), binding.coefficient.reshape(-1, D)
            bound = (index >= 0).any(-1)
            if not bool((index[bound] >= 0).all()):
                return f"'{use.site}' has a location of which it is only a part"
            if not bool(_alike(c[bound], c[bound][:, :1]).all()):
                return f"'{use.site}' multiplies its elements by different numbers"
            rows.append(index[bound])
        if name in self.priors:
            parameter = self.parameters[name]
            own = torch.arange(parameter.size).reshape(parameter.value.shape) + parameter.offset
            rows.append(own.reshape(-1, own.shape[-1]))
        if len({row.shape[-1] for row in rows}) > 1:
            return "it is the location of vectors of different lengths"
        distinct = torch.cat(rows).unique(dim=0)
        if distinct.numel() != len(distinct.unique()):
            return "one of its elements stands in several places of a location"
        return ""

    def _family(self, site: str) -> str:
        return "MultivariateNormal" if (site, "scale_tril") in self._roles else "Normal"

    def _is_conditional(self, name: str, role: str, uses: Sequence[_Use]) -> bool:
        """Whether the maximum of Q moves with other parameters."""
        if role == "location":
            return not self._under_one_scale(name, uses)
        if role == "rate":
            return any((use.site, "concentration") in self._roles for use in uses)
        if role in ("scale", "cholesky"):
            return any(
                isinstance(self.bindings.get((use.site, "loc")), Unbound)
                or (use.site in self.priors and not self._under_one_scale(use.site))
                for use in uses
            )
        return role == "concentration"

    def _under_one_scale(self, name: str, uses: Sequence[_Use] | None = None) -> bool:
        """Whether each entry of a location meets one scale, times constants: it then cancels."""
        uses = self._uses[name] if uses is None else uses
        pairs = []
        for use in uses:
            loc = self.bindings[use.site, use.argument]
            if use.site in self.priors or not isinstance(loc, Bound):
                return False  # the mean of a latent that moves too
            pairs.append(self._met(use.site, loc.index))
        if name in self.priors:
            parameter = self.parameters[name]
            own = torch.arange(parameter.size).reshape(parameter.value.shape) + parameter.offset
            pairs.append(self._met(name, own))
        met = [pair for pair in pairs if pair is not None]
        if len(met) < len(pairs):
            return False
        together = torch.unique(torch.cat(met), dim=0)
        return len(together) == len(together[:, 0].unique())

    def _met(self, site: str, entries: Tensor) -> Tensor | None:
        """Pairs of the entries of a location and of its scale, (pairs, 2); -1 for constants."""
        matrix = self._family(site) == "MultivariateNormal"
        scale = self.bindings.get((site, "scale_tril" if matrix else "scale"))
        if not isinstance(scale, Bound):
            return None
        index = scale.index[..., 0, 0].unsqueeze(-1) if matrix else scale.index
        shape = torch.broadcast_shapes(index.shape, entries.shape)
        pairs = torch.stack([entries.expand(shape).flatten(), index.expand(shape).flatten()], 1)
        return torch.unique(pairs[pairs[:, 0] >= 0], dim=0)

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


def _one_factor(binding: Bound) -> bool:
    """Whether each matrix is one multiple of the parameter's."""
    lower = binding.index >= 0
    c = binding.coefficient
    return bool((_alike(c, c[..., :1, :1]) | ~lower).all())


def _alike(one: Tensor, other: Tensor) -> Tensor:
    """Whether factors are the same number, which probing found to rounding."""
    return torch.isclose(one, other, rtol=1e-5, atol=0.0)


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
