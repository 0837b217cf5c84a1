"""How each parameter is to be maximised: chosen once, from what its arguments are bound to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch import distributions as td

from lvppl.inference.m_step.arguments import Affine, Binding, Bound, Key, Unbound, Use
from lvppl.inference.m_step.entries import IMAGES, Image, Parameter, Parameters
from lvppl.inference.m_step.families import family_of
from lvppl.inference.m_step.floors import Floors
from lvppl.inference.m_step.priors import is_conjugate, refuse_learned_concentration
from lvppl.inference.m_step.regressions import groups_of, regrouped
from lvppl.inference.m_step.separation import Separation
from lvppl.inference.m_step.table import FORMULA, MStepTable, Step
from lvppl.inference.m_step.weighted import Weighted, peel

__all__ = ["Choice"]


class Choice:
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
        self._log_sites = {t.name for t in terms if isinstance(peel(t).base, td.LogNormal)}
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
        for name, term in priors.items():
            refuse_learned_concentration(term, self._hyperparameters(name))
        self._uses = self._all_uses()
        self._steps = self._all_steps()
        self.bindings = self._without_loose(self.bindings)

    # ----------------------------------------------------------------------------------- choosing

    @property
    def table(self) -> MStepTable:
        return MStepTable(list(self._steps.values()))

    @property
    def by_gradient(self) -> list[str]:
        return [name for name, step in self._steps.items() if step.how == "gradient"]

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

    def coefficients(self, name: str) -> Tensor:
        """c of each entry of a location, where a site has c times it; shaped as the parameter."""
        by_entry = torch.ones(self.parameters.num_entries, dtype=torch.float64)
        for use in self._uses[name]:
            for binding in self._of_use(use, name):
                bound = binding.index >= 0
                by_entry[binding.index[bound]] = binding.coefficient[bound]
        return self.parameters[name].part_of(by_entry)

    def is_of_logarithms(self, name: str) -> bool:
        """Whether a location is that of the logarithm of data."""
        return all(use.site in self._log_sites for use in self._uses[name])

    @property
    def found(self) -> Mapping[Key, Binding]:
        """What the arguments are bound to, those of parameters that go by gradient too."""
        return self._batches[0]

    def names_of(self, entries: Tensor) -> list[str]:
        """The parameters that entries belong to, in their order; -1 belongs to none."""
        return [self._names[i] for i in self._owners[entries[entries >= 0]].unique().tolist()]

    def _all_uses(self) -> dict[str, list[Use]]:
        uses: dict[str, list[Use]] = {name: [] for name in self.parameters}
        for key, binding in self._every_binding():
            if not isinstance(binding, Bound) or binding.image is None:
                continue
            for name in self.names_of(binding.index):
                use = Use(*key, self._roles[key], binding.image)
                if use not in uses[name]:
                    uses[name].append(use)
        return uses

    def _every_binding(self) -> Iterator[tuple[Key, Binding]]:
        for bindings in self._batches:
            yield from bindings.items()

    def _of_use(self, use: Use, name: str) -> list[Bound]:
        """An argument's bindings in the batches in which it takes a parameter."""
        number = self._names.index(name)
        found = [bindings.get((use.site, use.argument)) for bindings in self._batches]
        return [
            b
            for b in found
            if isinstance(b, Bound) and bool((self._owners[b.index[b.index >= 0]] == number).any())
        ]

    def _hyperparameters(self, name: str) -> set[str]:
        """The parameters without a prior that the prior of a latent depends on."""
        found: set[str] = set()
        for (site, argument), binding in self._every_binding():
            if site != name or argument in ("value", "log_prob"):
                continue
            if isinstance(binding, Unbound):
                found |= binding.parameters
            elif isinstance(binding, Bound):
                found |= set(self.names_of(binding.index))
        return found - self.priors.keys()

    def _all_steps(self) -> dict[str, Step]:
        steps = {name: self._step(name) for name in self.parameters}
        by_formula = {name for name, step in steps.items() if step.how == "closed form"}
        latents = frozenset(self.priors)
        separation = Separation(
            self.parameters, self._batches, self._roles, self._uses, self._groups, latents
        )
        for name in separation.conditional(by_formula):
            steps[name] = replace(steps[name], how="conditional")
        self._own_rate = separation.with_own_rate(by_formula)
        for name in by_formula:
            role = self._uses[name][0].role if self._uses[name] else ""
            together = bool(self.parameters[name].part_of(self._own_rate).all())
            if together:
                steps[name] = replace(steps[name], how="closed form")
            elif role == "concentration":
                steps[name] = replace(steps[name], form=FORMULA["concentration at a rate"])
        return steps

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
        formula = FORMULA[role] if image.name == "θ" else f"{image.name} = {FORMULA[role]}"
        if name in self.priors:
            formula += f", with its {type(peel(self.priors[name]).base).__name__} prior"
        return Step(name, "closed form", formula, sites)

    def _in_groups(self, bindings: Mapping[Key, Binding]) -> dict[Key, Binding]:
        return regrouped(bindings, self._roles, self._groups, self.parameters)

    def _regression_step(self, name: str, uses: Sequence[Use], loose: Sequence[Key]) -> Step:
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
        return Step(name, "closed form", FORMULA["regression"], sites)

    def _normal_prior(self, prior: Weighted) -> bool:
        image = IMAGES["location"][0]
        return is_conjugate(prior, "location", image, self.bindings) and not isinstance(
            self.bindings.get((prior.name, "scale_tril")), Bound
        )

    def _why_not(self, name: str, uses: Sequence[Use], loose: Sequence[Key]) -> str:
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

    def _why_not_vectors(self, name: str, uses: Sequence[Use]) -> str:
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
