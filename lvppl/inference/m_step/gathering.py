"""From weighted sites to sufficient statistics: which family is gathered how."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lvppl.inference.m_step import counts, moments
from lvppl.inference.m_step.arguments import Affine, Binding, Bound, Key
from lvppl.inference.m_step.families import family_of
from lvppl.inference.m_step.least_squares import regression
from lvppl.inference.m_step.statistics import Statistics
from lvppl.inference.m_step.weighted import Peeled, Weighted, peel

__all__ = ["gather"]

Collect = Callable[[Peeled, Mapping[str, Any], Statistics], None]


def gather(
    terms: Sequence[Weighted], bindings: Mapping[Key, Binding], into: Statistics
) -> Statistics:
    """Add the statistics of every site whose arguments are bound."""
    for term in terms:
        peeled = peel(term)
        family = family_of(peeled.base)
        if family is None:
            continue
        bound = {name: bindings.get((term.name, name)) for name in family.roles}
        if any(_is_learned(binding) for binding in bound.values()):
            _COLLECT[family.name](peeled, bound, into)
    return into


def _is_learned(binding: Binding | None) -> bool:
    return isinstance(binding, Affine) or (isinstance(binding, Bound) and not binding.is_constant)


def _normal(peeled: Peeled, bound: Mapping[str, Any], into: Statistics) -> None:
    collect = regression if isinstance(bound["loc"], Affine) else moments.normal
    collect(peeled, bound, into)


_COLLECT: dict[str, Collect] = {
    "Categorical": counts.categorical,
    "OneHotCategorical": counts.multinomial,
    "Multinomial": counts.multinomial,
    "Bernoulli": counts.bernoulli,
    "Binomial": counts.bernoulli,
    "Geometric": counts.geometric,
    "Poisson": counts.poisson,
    "Exponential": counts.exponential,
    "Gamma": moments.gamma,
    "Normal": _normal,
    "LogNormal": _normal,
    "MultivariateNormal": moments.mvn,
}
