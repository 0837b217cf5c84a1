r"""Gaussian latents integrated out of a program, given every discrete one.

Latents that meet in a site belong together. Of each such group the integral is a table over the
discrete variables and plates around it,

.. math:: t(k) = \ln \int \prod_s p_s(x, k) \, dx ,

taken variable by variable, those of the innermost plates first. What is asked of the latents are
derivatives of such a table: with h and P zeros added to information and precision of a latent x,

.. math:: \frac{\partial t}{\partial h} = E[x | k], \qquad
          \frac{\partial t}{\partial P} = -\tfrac12 E[x x^⊤ | k] .
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.linear_gaussian.factors import (
    Quadratic,
    Residual,
    aligned,
    integrated_out,
    product,
    without_plates,
)
from lvppl.linear_gaussian.variables import Variable
from lvppl.packed import dims_of, named
from lvppl.packing import Packing

__all__ = ["Group", "groups_of"]

Point = Mapping[str, tuple[Tensor, str]]
"""For each latent its x, (*dims, size), and the dims."""

MOST_ELEMENTS = 2**28
"""Of a product of factors: 2 GiB in float64."""


@dataclass(frozen=True)
class Group:
    """Gaussian latents that depend on each other given everything else.

    Args:
        variables: by name.
        residuals: of the sites that depend on them.
        packing: what dimensions are called.
        enumerated: by symbol of a discrete variable, its name and the symbols of its plates.
    """

    variables: Mapping[str, Variable]
    residuals: Sequence[Residual]
    packing: Packing
    enumerated: Mapping[str, tuple[str, frozenset[str]]]

    @cached_property
    def table(self) -> Tensor:
        """t, packed; differentiable in the parameters of the program."""
        self._require_affordable()
        return self._table(self._quadratics(self.residuals, self.point))

    @cached_property
    def point(self) -> Point:
        """Near where the posterior is: what the quadratics are made about.

        Any point gives the same table but for rounding.
        """
        with torch.no_grad():
            still = [_detached(residual) for residual in self.residuals]
            means, _ = self._derivatives(still, {}, self._by_softmax)
        return means

    # ------------------------------------------------------------------------------- questions

    def query(self, num_draws: int | None, draws: str) -> Tensor | None:
        """A query for the posterior of the discrete variables of the table; ``None`` for none."""
        dims = dims_of(self.table)
        if not any(symbol in self.enumerated for symbol in dims):
            return None
        if num_draws is None:
            return self.table
        return named(self.table.expand(num_draws, *self.table.shape), draws + dims)

    def moments(self, answer: Tensor | None) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each latent the mean, (*kept, size), and the covariance, (*kept, size, size), of x."""
        with torch.no_grad():
            still = [_detached(residual) for residual in self.residuals]
            weights = _answered(answer)
            means, _ = self._derivatives(still, self.point, weights)
            # about the mean itself, so that the covariance is no difference of large numbers
            means, covariances = self._derivatives(still, means, weights)
        return {
            name: (self._by_kept(name, mean, 1), self._by_kept(name, covariances[name], 2))
            for name, (mean, _) in means.items()
        }

    def drawn(self, answer: Tensor | None, num_draws: int, draws: str) -> dict[str, Tensor]:
        """Joint draws of all latents, x: (draws, *kept, size).

        Args:
            answer: indicators of drawn discrete states, the dimension of draws first.
        """
        with torch.no_grad():
            still = [_detached(residual).jiggled(num_draws, draws) for residual in self.residuals]
            means, _ = self._derivatives(still, self.point, _answered(answer), (draws, num_draws))
        return {name: self._by_kept(name, mean, 1, num_draws) for name, (mean, _) in means.items()}

    def _by_kept(self, name: str, value: Tensor, events: int, *before: int) -> Tensor:
        """Plates of size one have no symbol; here they have their dimension."""
        event = value.shape[value.dim() - events :]
        return value.reshape(*before, *self.variables[name].kept_shape, *event)

    # ------------------------------------------------------------------------------- one table

    def _quadratics(self, residuals: Sequence[Residual], point: Point) -> list[Quadratic]:
        return [self._reduced(residual.about(point)) for residual in residuals]

    def _table(self, quadratics: Sequence[Quadratic]) -> Tensor:
        live = dict(enumerate(quadratics))
        for number, (name, bucket) in enumerate(self._order, len(live)):
            factors = [live.pop(i) for i in bucket]
            live[number] = self._reduced(integrated_out(product(factors), name))
        (last,) = live.values()
        return named(last.constant, last.dims)

    @cached_property
    def _order(self) -> list[tuple[str, list[int]]]:
        """Latents with the factors that hold them: innermost plates first, then the smallest.

        Factors are numbered as the residuals; what an elimination leaves gets the next number.
        """
        scopes = {i: frozenset(r.scope) for i, r in enumerate(self.residuals)}
        holders = {n: {i for i, scope in scopes.items() if n in scope} for n in self.variables}

        def rank(name: str) -> tuple[int, int, str]:
            met = frozenset().union(*(scopes[i] for i in holders[name]))
            return -len(self.variables[name].kept), sum(self.variables[n].size for n in met), name

        ranks = {name: rank(name) for name in holders}
        heap, order, number = sorted(ranks.values()), list[tuple[str, list[int]]](), len(scopes)
        while heap:
            found = heapq.heappop(heap)
            name = found[-1]
            if name not in holders or ranks[name] != found:
                continue  # an entry from before its neighbours changed
            bucket = holders.pop(name)
            left = frozenset().union(*(scopes.pop(i) for i in sorted(bucket))) - {name}
            order.append((name, sorted(bucket)))
            scopes[number] = left
            for other in left:
                holders[other] = holders[other] - bucket | {number}
            for other in left:
                ranks[other] = rank(other)
                heapq.heappush(heap, ranks[other])
            number += 1
        return order

    def _reduced(self, factor: Quadratic) -> Quadratic:
        """Plates that no latent of the scope keeps, multiplied along.

        Raises:
            ProgramError: a discrete variable lies in such a plate: all of them are coupled.
        """
        if not factor.scope:
            return factor  # a table: its plates are multiplied along when its states are summed
        plates = {symbol for symbol in factor.dims if symbol in self.packing.plates}
        kept = {self.packing.symbol(p) for n in factor.scope for p in self.variables[n].kept}
        others = plates - kept
        for symbol in factor.dims:
            name, around = self.enumerated.get(symbol, ("", frozenset()))
            if around & others:
                plate = self.packing.plates[min(around & others)].name
                raise ProgramError(_coupled(factor.scope[0], name, plate))
        return without_plates(factor, others)

    def _require_affordable(self) -> None:
        """Raise before the work where a product of factors would not fit."""
        sizes = {
            symbol: size
            for r in self.residuals
            for symbol, size in zip(r.dims, r.constant.shape, strict=True)
        }
        live = {i: (set(r.scope), set(r.dims)) for i, r in enumerate(self.residuals)}
        for number, (name, bucket) in enumerate(self._order, len(live)):
            held = [live.pop(i) for i in bucket]
            scope, dims = (set().union(*sets) for sets in zip(*held, strict=True))
            width = sum(self.variables[n].size for n in scope)
            elements = math.prod(sizes[symbol] for symbol in dims) * width**2
            if elements > MOST_ELEMENTS:
                states = [self.enumerated[s][0] for s in sorted(dims) if s in self.enumerated]
                raise ProgramError(_too_large(name, elements, width, states))
            scope.discard(name)
            kept = {self.packing.symbol(p) for n in scope for p in self.variables[n].kept}
            live[number] = scope, {s for s in dims if s in kept or s in self.enumerated}

    # ----------------------------------------------------------------------------- derivatives

    def _derivatives(
        self,
        residuals: Sequence[Residual],
        point: Point,
        weights: Callable[[Tensor], Tensor],
        draws: tuple[str, int] = ("", 1),
    ) -> tuple[dict[str, tuple[Tensor, str]], dict[str, Tensor]]:
        """E[x] with its dims, and Cov[x], under weights of the table's states."""
        quadratics = self._quadratics(residuals, point)
        like = quadratics[0].constant
        leaves: list[Quadratic] = []
        for name, variable in self.variables.items():
            dims, shape = self._own(variable)
            if draws[0]:
                dims, shape = draws[0] + dims, (draws[1], *shape)
            h = like.new_zeros(*shape, variable.size).requires_grad_()
            P = like.new_zeros(*shape, variable.size, variable.size).requires_grad_()
            zero = like.new_zeros(shape)
            leaves.append(Quadratic((name,), (variable.size,), P, h, zero, dims))
        with torch.enable_grad():
            table = self._table(self._merged(quadratics, leaves))
            still = named(table.detach(), dims_of(table))
            total = (weights(still) * table).sum()
            asked = [t for leaf in leaves for t in (leaf.information, leaf.precision)]
            found = torch.autograd.grad(total, asked)
        means, covariances = {}, {}
        for leaf, first, second in zip(leaves, found[::2], found[1::2], strict=True):
            (name,) = leaf.scope
            origin = aligned(*point[name], leaf.dims, 1) if name in point else 0.0
            means[name] = (origin + first, leaf.dims)
            covariances[name] = -2 * second - first[..., :, None] * first[..., None, :]
        return means, covariances

    def _own(self, variable: Variable) -> tuple[str, tuple[int, ...]]:
        """Symbols and sizes of the plates that a latent keeps."""
        plates = [
            (self.packing.symbol(p), n)
            for p, n in zip(variable.kept, variable.kept_shape, strict=True)
            if n > 1
        ]
        return "".join(s for s, _ in plates), tuple(n for _, n in plates)

    def _merged(
        self, quadratics: Sequence[Quadratic], leaves: Sequence[Quadratic]
    ) -> list[Quadratic]:
        """Each leaf joined to the first factor that holds its latent: the order stays."""
        merged = list(quadratics)
        for leaf in leaves:
            first = next(i for i, f in enumerate(merged) if leaf.scope[0] in f.scope)
            merged[first] = product([merged[first], leaf])
        return merged

    def _by_softmax(self, table: Tensor) -> Tensor:
        """Probabilities of the discrete states if nothing but this table counted."""
        over = [i for i, symbol in enumerate(dims_of(table)) if symbol in self.enumerated]
        if not over:
            return torch.ones_like(table)
        front = list(range(len(over)))
        moved = table.movedim(over, front)
        soft = torch.softmax(moved.flatten(0, len(over) - 1), 0).reshape(moved.shape)
        return soft.movedim(front, over)


def _answered(answer: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Weights that were answered to a query for a table."""

    def weights(table: Tensor) -> Tensor:
        if answer is None:
            return torch.ones_like(table)
        return aligned(answer, dims_of(answer), dims_of(table), 0)

    return weights


def _detached(residual: Residual) -> Residual:
    return replace(
        residual,
        offset=residual.offset.detach(),
        jacobian=residual.jacobian.detach(),
        constant=residual.constant.detach(),
    )


def _too_large(gaussian: str, elements: int, width: int, states: Sequence[str]) -> str:
    reason = f"{width:,} dimensions meet there"
    if states:
        names = ", ".join(map(repr, states[:6])) + (", ..." if len(states) > 6 else "")
        reason += f", for all states of {names} together"
    return (
        f"Integrating out the Gaussian latent '{gaussian}' needs a table of {elements:,} elements "
        f"(at most {MOST_ELEMENTS:,} are allowed): {reason}. Shorten the sequence, put independent "
        "elements into a pyro.plate, or give some of the sites a guide."
    )


def _coupled(gaussian: str, discrete: str, plate: str) -> str:
    return (
        f"The Gaussian latent '{gaussian}' and the discrete latent '{discrete}' depend on each "
        f"other given the data, and '{discrete}' has an element for each of plate '{plate}', which "
        f"'{gaussian}' lies outside of: all their states together would have to be enumerated. "
        f"Give one of them a guide, or make '{gaussian}' a parameter (pyro.param)."
    )


def groups_of(
    variables: Mapping[str, Variable],
    residuals: Sequence[Residual],
    packing: Packing,
    enumerated: Mapping[str, tuple[str, frozenset[str]]],
) -> list[Group]:
    """The latents that meet in sites, together."""
    group = {name: {name} for name in variables}
    for residual in residuals:
        joined = set().union(*(group[name] for name in residual.scope))
        for name in joined:
            group[name] = joined
    found = []
    for names in {id(members): members for members in group.values()}.values():
        inside = {n: v for n, v in variables.items() if n in names}
        own = [r for r in residuals if r.scope[0] in names]
        found.append(Group(inside, own, packing, enumerated))
    return found
