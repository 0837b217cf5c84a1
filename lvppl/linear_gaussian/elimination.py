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
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        """Where the posterior is, given the states around each latent: what quadratics are about.

        Any point gives the same table but for rounding.
        """
        with torch.no_grad():
            still = self._quadratics([_detached(residual) for residual in self.residuals], {})
            leaves = []
            for name, variable in self.variables.items():
                states, (dims, shape) = self._states_around(name), self._own(variable)
                sizes = [self._sizes[symbol] for symbol in states]
                leaves.append(self._leaf(name, states + dims, (*sizes, *shape), still[0]))
        with torch.enable_grad():
            asked = [leaf.information.requires_grad_() for leaf in leaves]
            asked += [leaf.constant.requires_grad_() for leaf in leaves]
            table = self._table(still, leaves)
            over = [i for i, symbol in enumerate(dims_of(table)) if symbol in self.enumerated]
            total = table.logsumexp(over) if over else table
            found = torch.autograd.grad(total.sum(), asked)
        means, weights = found[: len(leaves)], found[len(leaves) :]
        return {
            leaf.scope[0]: ((mean / weight[..., None]).nan_to_num(0.0, 0.0, 0.0), leaf.dims)
            for leaf, mean, weight in zip(leaves, means, weights, strict=True)
        }

    @cached_property
    def _middle(self) -> Point:
        """The point averaged over the states around each latent: one for each kept element."""
        found = {}
        for name, (value, dims) in self.point.items():
            over = [i for i, symbol in enumerate(dims) if symbol in self.enumerated]
            kept = "".join(symbol for symbol in dims if symbol not in self.enumerated)
            found[name] = (value.mean(over) if over else value, kept)
        return found

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
            means, _ = self._derivatives(still, self._middle, weights)
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
            means, _ = self._derivatives(still, self._middle, _answered(answer), (draws, num_draws))
        return {name: self._by_kept(name, mean, 1, num_draws) for name, (mean, _) in means.items()}

    def _by_kept(self, name: str, value: Tensor, events: int, *before: int) -> Tensor:
        """Plates of size one have no symbol; here they have their dimension."""
        event = value.shape[value.dim() - events :]
        return value.reshape(*before, *self.variables[name].kept_shape, *event)

    # ------------------------------------------------------------------------------- one table

    def _quadratics(self, residuals: Sequence[Residual], point: Point) -> list[Quadratic]:
        return [self._reduced(residual.about(point)) for residual in residuals]

    def _table(self, quadratics: Sequence[Quadratic], leaves: Sequence[Quadratic] = ()) -> Tensor:
        """The integral; leaves are further factors, of one latent each."""
        live, own = dict(enumerate(quadratics)), {leaf.scope[0]: [leaf] for leaf in leaves}
        for number, step in enumerate(self._steps, len(live)):
            factors = [live.pop(i) for i in step.bucket] + own.get(step.name, [])
            live[number] = self._reduced(integrated_out(product(factors), step.name))
        (last,) = live.values()
        return named(last.constant, last.dims)

    @cached_property
    def _steps(self) -> list[_Step]:
        """The order of elimination: innermost plates first, then the smallest product.

        Factors are numbered as the residuals; what an elimination leaves gets the next number.
        """
        scopes = {i: frozenset(r.scope) for i, r in enumerate(self.residuals)}
        dims = {
            i: frozenset(r.dims).union(*(self._states_around(n) for n in r.scope))
            for i, r in enumerate(self.residuals)
        }
        holders = {n: {i for i, scope in scopes.items() if n in scope} for n in self.variables}

        def rank(name: str) -> tuple[int, int, str]:
            met = frozenset().union(*(scopes[i] for i in holders[name]))
            return -len(self.variables[name].kept), self._width(met), name

        ranks = {name: rank(name) for name in holders}
        heap, steps, number = sorted(ranks.values()), list[_Step](), len(scopes)
        while heap:
            found = heapq.heappop(heap)
            name = found[-1]
            if name not in holders or ranks[name] != found:
                continue  # an entry from before its neighbours changed
            bucket = holders.pop(name)
            scope, around = (
                frozenset().union(*(table.pop(i) for i in bucket)) for table in (scopes, dims)
            )
            steps.append(_Step(name, sorted(bucket), scope, around))
            scopes[number], dims[number] = scope - {name}, around - self._outside(scope - {name})
            for other in scopes[number]:
                holders[other] = holders[other] - bucket | {number}
            for other in scopes[number]:
                ranks[other] = rank(other)
                heapq.heappush(heap, ranks[other])
            number += 1
        return steps

    def _width(self, scope: Iterable[str]) -> int:
        return sum(self.variables[name].size for name in scope)

    def _states_around(self, name: str) -> str:
        """Symbols of the discrete variables in the sites that a latent meets."""
        met = (s for r in self.residuals if name in r.scope for s in r.dims)
        return "".join(dict.fromkeys(symbol for symbol in met if symbol in self.enumerated))

    def _outside(self, scope: Iterable[str]) -> set[str]:
        """Symbols of the plates that no latent of a scope keeps."""
        kept = {self.packing.symbol(p) for name in scope for p in self.variables[name].kept}
        return set(self.packing.plates) - kept if scope else set()

    def _reduced(self, factor: Quadratic) -> Quadratic:
        """Plates that no latent of the scope keeps, multiplied along; those of a table stay.

        Raises:
            ProgramError: a discrete variable lies in such a plate: all of them are coupled.
        """
        others = self._outside(factor.scope) & set(factor.dims)
        for symbol in factor.dims:
            name, around = self.enumerated.get(symbol, ("", frozenset()))
            if around & others:
                plate = self.packing.plates[min(around & others)].name
                raise ProgramError(_coupled(factor.scope[0], name, plate))
        return without_plates(factor, others)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {
            symbol: size
            for residual in self.residuals
            for symbol, size in zip(residual.dims, residual.offset.shape, strict=False)
        }

    def _require_affordable(self) -> None:
        """Raise before the work where a product of factors would not fit."""
        for step in self._steps:
            width = self._width(step.scope)
            elements = math.prod(self._sizes[symbol] for symbol in step.dims) * width**2
            if elements > MOST_ELEMENTS:
                states = [self.enumerated[s][0] for s in sorted(step.dims) if s in self.enumerated]
                raise ProgramError(_too_large(step.name, elements, width, states))

    @property
    def elements(self) -> int:
        """Numbers that one draw needs."""
        return sum(residual.offset.numel() for residual in self.residuals) + self.table.numel()

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
        leaves = []
        for name, variable in self.variables.items():
            dims, shape = self._own(variable)
            sizes = (draws[1], *shape) if draws[0] else shape
            leaves.append(self._leaf(name, draws[0] + dims, sizes, quadratics[0]))
        with torch.enable_grad():
            asked = [leaf.information.requires_grad_() for leaf in leaves]
            asked += [leaf.precision.requires_grad_() for leaf in leaves]
            table = self._table(quadratics, leaves)
            still = named(table.detach(), dims_of(table))
            total = (weights(still) * table).sum()
            found = torch.autograd.grad(total, asked)
        means, covariances = {}, {}
        for leaf, first, second in zip(leaves, found, found[len(leaves) :], strict=False):
            (name,) = leaf.scope
            means[name] = (aligned(*point[name], leaf.dims, 1) + first, leaf.dims)
            covariances[name] = -2 * second - first[..., :, None] * first[..., None, :]
        return means, covariances

    def _leaf(self, name: str, dims: str, shape: Sequence[int], like: Quadratic) -> Quadratic:
        """Zeros, to take derivatives in."""
        size, zeros = self.variables[name].size, like.constant.new_zeros
        parts = zeros(*shape, size, size), zeros(*shape, size), zeros(shape), zeros(*shape, size)
        return Quadratic((name,), (size,), *parts, dims)

    def _own(self, variable: Variable) -> tuple[str, tuple[int, ...]]:
        """Symbols and sizes of the plates that a latent keeps."""
        plates = [
            (self.packing.symbol(plate), plate.size)
            for plate in variable.kept
            if self.packing.holds(plate)
        ]
        return "".join(s for s, _ in plates), tuple(n for _, n in plates)


@dataclass(frozen=True)
class _Step:
    """One latent integrated out of the factors that hold it.

    Attributes:
        bucket: numbers of those factors.
        scope: the latents of their product, itself among them.
        dims: the symbols of their product.
    """

    name: str
    bucket: Sequence[int]
    scope: frozenset[str]
    dims: frozenset[str]


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
    reason = f"{width:,} {'dimension meets' if width == 1 else 'dimensions meet'} there"
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
