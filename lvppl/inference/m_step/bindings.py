"""Which entry of which parameter is each argument of each distribution? Found by probing.

The program is run at a few random points of its parameters. An argument that equals
c · image(entry) at all of them is *bound* to that entry, however the program got there: ``loc[z]``,
a shared scale, ``variance.sqrt()``, logits that Categorical normalises, one matrix at every step of
a chain. A location that is an affine function of the parameters is a regression, and is found by
moving one entry at a time. Anything else is left to gradient steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.inference.m_step.affine import loose_bindings
from lvppl.inference.m_step.arguments import (
    Affine,
    Binding,
    Bound,
    Key,
    Unbound,
    arguments_of,
)
from lvppl.inference.m_step.entries import Parameters
from lvppl.inference.m_step.search import Search
from lvppl.inference.m_step.weighted import Weighted, peel

__all__ = ["Affine", "Binding", "Bound", "Key", "Unbound", "bind", "merged"]

Run = Callable[[], Sequence[Weighted]]
"""Runs the program at the present parameters."""

_DRAWS = 4
_RANK = {Bound: 0, Affine: 1, Unbound: 2}


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
        search = Search(parameters, points)
        bound = {key: search.find([p[key] for p in probes], roles[key]) for key in roles}
        found: dict[Key, Binding] = {key: b for key, b in bound.items() if b is not None}
        loose = [key for key in roles if key not in found]

        def at(point: Mapping[str, Tensor]) -> dict[Key, Tensor]:
            for name, value in point.items():
                parameters[name].tensor.copy_(value)
            return {k: v for k, v in _arguments(run(), {}) if k in loose}

        return found | loose_bindings(loose, roles, at, parameters, points) if loose else found


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
