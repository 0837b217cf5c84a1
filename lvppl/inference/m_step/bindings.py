"""Which entry of which parameter is each argument of each distribution? Found by probing.

The program is run at a few random points of its parameters. An argument that equals
c · image(entry) at all of them is *bound* to that entry, however the program got there: ``loc[z]``,
a shared scale, ``variance.sqrt()``, logits that Categorical normalises, one matrix at every step of
a chain. A location that is an affine function of the parameters is a regression, and is found by
moving one entry at a time. Anything else is left to gradient steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.inference.m_step.entries import IMAGES, Image, Parameter, Parameters
from lvppl.inference.m_step.families import Family, family_of
from lvppl.inference.m_step.weighted import Weighted, peel, unexpanded

__all__ = ["Affine", "Binding", "Bound", "Key", "Unbound", "arguments_of", "bind", "merged"]

Run = Callable[[], Sequence[Weighted]]
"""Runs the program at the present parameters."""

_DRAWS = 4
_NEIGHBOURS = 4
_MOST_JACOBIAN = 2**26


@dataclass(frozen=True)
class Bound:
    """An argument whose every element is c · image(entry), or a constant.

    Attributes:
        index: the entry of each element, -1 for a constant; shaped as the unexpanded argument.
        coefficient: c, float64.
        image: how the entries are seen; ``None`` where all elements are constant.
    """

    index: Tensor
    coefficient: Tensor
    image: Image | None

    @property
    def is_constant(self) -> bool:
        return self.image is None

    def equals(self, other: object) -> bool:
        """Whether two bindings are of the same entries with the same factors."""
        return (
            isinstance(other, Bound)
            and torch.equal(self.index, other.index)
            and torch.equal(self.coefficient, other.coefficient)
        )


@dataclass(frozen=True)
class Affine:
    """A location that is affine in some entries.

    Attributes:
        entries: which, (entries,).
        jacobian: (*argument, entries), float64.
        group: number of the regression that the entries belong to; -1 before it has one.
    """

    entries: Tensor
    jacobian: Tensor
    group: int = -1


@dataclass(frozen=True)
class Unbound:
    """An argument that depends on parameters in a way that is not known here."""

    parameters: frozenset[str]


Binding = Bound | Affine | Unbound
_RANK = {Bound: 0, Affine: 1, Unbound: 2}
Key = tuple[str, str]
"""Names of a site and of an argument of its distribution."""


def arguments_of(term: Weighted) -> tuple[Family | None, dict[str, Tensor]]:
    """The family of a site and its arguments, unexpanded."""
    base = peel(term).base
    family = family_of(base)
    if family is None:
        return None, {}
    read = family.read(base)
    return family, {name: unexpanded(read[name], family.event_dims[name]) for name in read}


def bind(run: Run, parameters: Parameters, *, seed: int = 0) -> dict[Key, Binding]:
    """Probe the program, and leave its parameters as they were.

    Returns:
        The binding of every argument of every site whose family is known.
    """
    generator = torch.Generator().manual_seed(seed)
    with _restored(parameters), torch.no_grad():
        probes: list[dict[Key, Tensor]] = []
        roles: dict[Key, str] = {}
        points: list[dict[str, Tensor]] = []
        for _ in range(_DRAWS):
            for parameter in parameters.values():
                parameter.randomise(generator)
            points.append({n: p.tensor.detach().clone() for n, p in parameters.items()})
            probes.append(dict(_arguments(run(), roles)))
        _require_same_sites(probes)
        search = _Search(parameters, points)
        bound = {key: search.find([p[key] for p in probes], roles[key]) for key in roles}
        found: dict[Key, Binding] = {key: b for key, b in bound.items() if b is not None}
        loose = [key for key in roles if key not in found]
        return found | _loose(loose, run, parameters, roles, points) if loose else found


def _require_same_sites(probes: Sequence[Mapping[Key, Tensor]]) -> None:
    for probe in probes[1:]:
        other = probe.keys() ^ probes[0].keys()
        if other:
            raise ProgramError(
                f"Site '{sorted(other)[0][0]}' is there at some values of the parameters and not "
                "at others. EM needs a program whose sites do not depend on its parameters."
            )


def merged(found: Sequence[Mapping[Key, Binding]]) -> dict[Key, Binding]:
    """One binding a key that says of several batches what kind it is: the least special one."""
    result: dict[Key, Binding] = {}
    for bindings in found:
        for key, binding in bindings.items():
            known = result.get(key)
            if isinstance(known, Unbound) and isinstance(binding, Unbound):
                result[key] = Unbound(known.parameters | binding.parameters)
            elif known is None or _RANK[type(binding)] > _RANK[type(known)]:
                result[key] = binding
            elif isinstance(known, Bound) and isinstance(binding, Bound):
                larger = binding.index.numel() > known.index.numel()
                result[key] = binding if larger else known
            elif isinstance(known, Affine) and isinstance(binding, Affine):
                entries = torch.cat([known.entries, binding.entries]).unique()
                result[key] = (
                    known if len(entries) == len(known.entries) else _widened(known, entries)
                )
    return result


def _widened(affine: Affine, entries: Tensor) -> Affine:
    wide = torch.zeros((*affine.jacobian.shape[:-1], len(entries)), dtype=torch.float64)
    wide[..., torch.searchsorted(entries, affine.entries)] = affine.jacobian.cpu()
    return Affine(entries, wide.to(affine.jacobian.device))


def _arguments(terms: Sequence[Weighted], roles: dict[Key, str]) -> Iterator[tuple[Key, Tensor]]:
    for term in terms:
        if not term.is_prior:  # data that parameters move, as in obs=y - b
            value = term.value.detach().double()
            roles[term.name, "value"] = "unknown"
            yield (term.name, "value"), torch.stack([value.sum(), value.square().sum()])
        family, arguments = arguments_of(term)
        given = _hyperparameters(term) if family is None and term.is_prior else {}
        for name, value in given.items():
            roles[term.name, name] = "hyperparameter"
            yield (term.name, name), value.detach().clone()
        if given:
            continue
        if family is None:  # all that can be said is which parameters it depends on
            roles[term.name, "log_prob"] = "unknown"
            yield (term.name, "log_prob"), term.fn.log_prob(term.value).detach()
            continue
        for name, value in arguments.items():
            roles[term.name, name] = family.roles[name]
            yield (term.name, name), value.detach().clone()


def _hyperparameters(term: Weighted) -> dict[str, Tensor]:
    """All arguments of a prior: its log-density moves with the latent, which they need not."""
    base = peel(term).base
    given = {name: getattr(base, name, None) for name in getattr(base, "arg_constraints", {})}
    known = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    return known if len(known) == len(given) else {}


@contextmanager
def _restored(parameters: Parameters) -> Iterator[None]:
    before = {name: p.tensor.detach().clone() for name, p in parameters.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                parameters[name].tensor.copy_(value)


# ------------------------------------------------------------------------------ bound to one entry


class _Search:
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


# ---------------------------------------------------------------------- regressions, and the rest


def _loose(
    keys: Sequence[Key],
    run: Run,
    parameters: Parameters,
    roles: Mapping[Key, str],
    points: Sequence[Mapping[str, Tensor]],
) -> dict[Key, Binding]:
    """For arguments bound to no single entry: the parameters they depend on, and how."""

    def at(point: Mapping[str, Tensor]) -> dict[Key, Tensor]:
        for name, value in point.items():
            parameters[name].tensor.copy_(value)
        return {k: v for k, v in _arguments(run(), {}) if k in keys}

    base = at(points[0])
    depends: dict[Key, set[str]] = {key: set() for key in keys}
    for name in parameters:
        moved = at({**points[0], name: points[1][name]})
        for key in keys:
            if moved[key].shape != base[key].shape or not torch.equal(moved[key], base[key]):
                depends[key].add(name)
    found: dict[Key, Binding] = {key: Unbound(frozenset(depends[key])) for key in keys}
    for key in keys:
        owners = [parameters[name] for name in parameters if name in depends[key]]
        if roles[key] == "location" and _small(owners, base[key]):
            affine = _affine(key, at, owners, points)
            found[key] = affine or found[key]
    return found


def _small(owners: Sequence[Parameter], argument: Tensor) -> bool:
    """Whether a Jacobian can be held, of parameters that take any real value."""
    size = sum(parameter.size for parameter in owners)
    real = all(torch.equal(parameter.value, parameter.tensor.detach()) for parameter in owners)
    return real and size <= 512 and size * argument.numel() <= _MOST_JACOBIAN


def _affine(
    key: Key,
    at: Callable[[Mapping[str, Tensor]], dict[Key, Tensor]],
    owners: Sequence[Parameter],
    points: Sequence[Mapping[str, Tensor]],
) -> Affine | None:
    """The Jacobian by moving one entry at a time; ``None`` where the argument is not affine."""
    zero = {p.name: torch.zeros_like(p.tensor) for p in owners}
    others = {n: v for n, v in points[0].items() if n not in zero}
    base = at({**others, **zero})[key]
    columns, entries = [], []
    for parameter in owners:
        for i in range(parameter.size):
            unit = torch.zeros_like(parameter.tensor)
            unit.view(-1)[i] = 1.0
            columns.append(at({**others, **zero, parameter.name: unit})[key] - base)
            entries.append(parameter.offset + i)
    if any(column.shape != base.shape for column in columns):
        return None
    jacobian = torch.stack(columns, -1).double()
    tolerance = 1e-8 if base.dtype == torch.float64 else 1e-3
    for point in points[:2]:
        value = torch.cat([point[p.name].flatten() for p in owners]).double()
        predicted = base.double() + jacobian @ value.to(jacobian)
        actual = at({**others, **{p.name: point[p.name] for p in owners}})[key].double()
        size = float(actual.abs().max()) + 1.0
        if float((predicted - actual).abs().max()) > tolerance * size:
            return None
    return Affine(torch.tensor(entries), jacobian)
