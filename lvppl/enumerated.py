"""Enumerated sites summed out of a trace: their evidence and the expectations they need."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import opt_einsum
import torch
from torch import Tensor

from lvppl.conjugate import Nodes
from lvppl.elimination import PlatesOverlap, cost, log_sum_product, marginals, solve
from lvppl.errors import ProgramError
from lvppl.layout import Layout
from lvppl.packed import Reduction, dims_of, log_sum_exp, named, sum_out
from lvppl.packing import Packing, own_symbol
from lvppl.tracing import PARTICLES, plate_scale, plates_of

__all__ = ["DRAWS", "Enumerated", "num_states", "user_scale"]


class Enumerated:
    """The distribution over the enumerated sites of one run, given everything that was sampled.

    Its factors are the model's (then it is the exact posterior, and ``log_evidence`` the sum over
    all values) or the guide's (then it is q, which is normalised).

    Args:
        factors: the sites whose log-probability has enumerated dimensions, with that
            log-probability: masked, unscaled, expanded over its plates.
        layout: the structure of the pair.
        queries: further sites whose tensors are to be averaged.
        averaged: only averages are wanted, not ``log_evidence``. They are linear in what is
            averaged, so that plates may be subsampled anywhere.
        temperature: T of the distribution ∝ (Π factors)^(1/T), whose ``log_evidence`` is
            T ln Σ (Π factors)^(1/T) = max over q of E_q ln Π factors + T·H(q).
        packing: what dimensions are called; one of its own by default.
        tables: packed log-factors that belong to no site, at the temperature.
    """

    def __init__(
        self,
        factors: Mapping[str, tuple[Any, Tensor]],
        layout: Layout,
        *,
        queries: Mapping[str, tuple[Any, Tensor]] | None = None,
        averaged: bool = False,
        temperature: float = 1.0,
        packing: Packing | None = None,
        tables: Sequence[Tensor] = (),
    ) -> None:
        self.layout = layout
        self.factors = dict(factors)
        self.temperature = temperature
        self._packing = Packing() if packing is None else packing
        packed = [self._pack(site, log_prob) for site, log_prob in self.factors.values()]
        if temperature != 1.0:
            packed = [named(factor / temperature, dims_of(factor)) for factor in packed]
        self._own = len(packed)
        packed = [*packed, *tables]
        self._packed = packed
        self.queries = {**self.factors, **(queries or {})}
        self._asked = [self._pack(site, tensor) for site, tensor in self.queries.values()]
        symbols = self._packing.names
        plates = set(symbols.values())
        self.eliminate = {s for factor in packed for s in dims_of(factor)} - plates
        if not averaged:
            self._check_subsampled(packed)
        data = {plate.name for plate in layout.data_plates}
        local = set() if averaged else set(layout.subsampled_inside)
        self._outputs = {PARTICLES} | data | local
        self.integrals: dict[str, Reduction] = {
            own_symbol(site): site["fn"].integral
            for site, _ in self.factors.values()
            if isinstance(site["fn"], Nodes)
        }
        self.plates = {s for name, s in symbols.items() if name not in self._outputs}

    # ------------------------------------------------------------------------------ ln Z and E[.]

    @property
    def scale(self) -> Any:
        """The user's own scale around all enumerated factors, which must share one."""
        scales = [user_scale(site) for site, _ in self.factors.values()]
        first = scales[0] if scales else 1.0
        if isinstance(first, Tensor):
            raise ProgramError(
                "A poutine.scale around enumerated sites must be one number; a tensor of scales "
                "came. Move per-datum weights to sites of the data plate that are not enumerated."
            )
        for (name, _), scale in zip(self.factors.items(), scales, strict=True):
            same = scale is first or (
                not isinstance(scale, Tensor)
                and not isinstance(first, Tensor)
                and math.isclose(scale, first, rel_tol=1e-9)
            )
            if not same:
                raise ProgramError(
                    f"Site '{name}' has another poutine.scale than the sites that are enumerated "
                    "together with it, so that their sum has no common scale. Put one scale around "
                    "the whole enumerated part of the model."
                )
        if len(self._packed) > self._own and not is_one(first):
            raise ProgramError(
                "A poutine.scale around enumerated sites would stand inside the integral over the "
                "Gaussian latents of the program. Leave the scale out."
            )
        return first

    def log_evidence(self, shape: tuple[int, int]) -> Tensor:
        """ln of the sum over all enumerated values, (particles, data), scales applied."""
        with self._plates_named():
            terms = log_sum_product(
                self._packed,
                eliminate=self.eliminate,
                plates=self.plates,
                integrals=self.integrals,
            )
        return self._gathered(terms, shape)

    @contextmanager
    def _plates_named(self) -> Iterator[None]:
        try:
            yield
        except PlatesOverlap as error:
            names = ", ".join(f"'{n}'" for n, s in self._packing.names.items() if s in self.plates)
            raise ProgramError(
                "The enumerated sites cannot be summed out at polynomial cost: among the plates "
                f"{names} two overlap without one lying inside the other, around sites that depend "
                "on each other. Nest the plates, make one of them a sequential loop, or give one "
                "of the sites a guide."
            ) from error

    def _gathered(self, terms: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
        total = torch.zeros(shape, dtype=terms[0].dtype, device=terms[0].device)
        for term in terms:
            total = total + self._per_datum(term, shape)
        return total * self.temperature * self.scale

    def solve(
        self,
        queries: Sequence[Tensor],
        shape: tuple[int, int],
        *,
        reduction: Reduction = log_sum_exp,
        differentiable: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """``log_evidence`` under a reduction, and its gradient over the dimensions of queries."""
        with self._plates_named():
            terms, answers = solve(
                self._packed,
                queries,
                eliminate=self.eliminate,
                plates=self.plates,
                reduction=reduction,
                integrals=self.integrals,
                differentiable=differentiable,
            )
        return self._gathered(terms, shape), answers

    def over_factors(self) -> list[Tensor]:
        """Queries for the posterior of the variables of each factor, as tensors of its shape."""
        return self._packed[: self._own]

    def factor_of(self, name: str) -> Tensor:
        """The packed log-factor of a site."""
        return self._packed[list(self.factors).index(name)]

    def defect(self, name: str) -> Tensor:
        """How far the factors of an integrated site are from what has a known integral.

        One by one: beside a precise factor what another lacks would be lost in rounding.
        """
        site = self.factors[name][0]
        symbol = own_symbol(site)
        factors = [factor for factor in self._packed if symbol in dims_of(factor)]
        found = [site["fn"].defect(f.detach(), dims_of(f).index(symbol)) for f in factors]
        return torch.stack(found).amax()

    def over_sites(self, sites: Sequence[Any], num_draws: int | None = None) -> Tensor:
        """A query for the joint posterior of enumerated sites: draws, sites, then their plates."""
        plates = {plate.name: plate for site in sites for plate in plates_of(site)}
        dims = [own_symbol(site) for site in sites]
        sizes = [num_states(site) for site in sites]
        for plate in sorted(plates.values(), key=lambda plate: plate.dim):
            dims.append(self._packing.names[plate.name])
            sizes.append(plate.size)
        if num_draws is not None:
            dims, sizes = [DRAWS, *dims], [num_draws, *sizes]
        like = self._packed[0]
        return named(torch.zeros(sizes, dtype=like.dtype, device=like.device), "".join(dims))

    def cost(self) -> tuple[int, int]:
        """Terms that the exact sum adds up over the whole batch, and its largest table."""
        return cost(self._packed, self.eliminate)

    def average(self, name: str, cost: Tensor) -> Tensor:
        """E[cost] over the enumerated dimensions of a factor or query, those dimensions gone.

        Args:
            name: of the factor or query.
            cost: shaped as its tensor, possibly with event dimensions after it.
        """
        marginal = self._marginals[name]
        event_dim = cost.dim() - marginal.dim()
        marginal = marginal.reshape(marginal.shape + (1,) * event_dim)
        # 0 x inf: what is impossible costs nothing
        weighted = torch.where(marginal != 0, marginal * cost, torch.zeros_like(cost))
        extra = cost.dim() - event_dim - self.width
        return weighted.sum(list(range(extra))) if extra > 0 else weighted

    @cached_property
    def _marginals(self) -> dict[str, Tensor]:
        with self._plates_named():
            found = marginals(
                self._packed,
                self._asked,
                eliminate=self.eliminate,
                plates=self.plates,
                integrals=self.integrals,
            )
        return {
            name: marginal.reshape(tensor.shape)
            for (name, (_, tensor)), marginal in zip(self.queries.items(), found, strict=True)
        }

    @property
    def width(self) -> int:
        """Batch dimensions that are plates or particles; enumerated ones lie to their left."""
        return self.layout.nesting + (PARTICLES in self._packing.names)

    def _pack(self, site: Any, tensor: Tensor) -> Tensor:
        return named(*self._packing.pack(site, tensor))

    def _per_datum(self, term: Tensor, shape: tuple[int, int]) -> Tensor:
        """A packed term over outputs, scaled and summed to (particles, data)."""
        keep = [PARTICLES, *(plate.name for plate in self.layout.data_plates)]
        sizes = [shape[0], *(plate.size for plate in self.layout.data_plates)]
        for name, ratio in self._subsample_ratios().items():
            if self._packing.names[name] in dims_of(term):
                term = named(term * ratio, dims_of(term))
        symbols = [self._packing.names.get(name, "") for name in keep]
        term = sum_out(term, set(dims_of(term)) - set(symbols))
        present = [symbol for symbol in symbols if symbol and symbol in dims_of(term)]
        term = term.permute([dims_of(term).index(symbol) for symbol in present])
        view = [
            size if symbol in present else 1 for symbol, size in zip(symbols, sizes, strict=True)
        ]
        return term.reshape(view).expand(sizes).reshape(shape)

    # ------------------------------------------------------------------------------------- checks

    def _subsample_ratios(self) -> dict[str, float]:
        plates = {plate.name: plate for plate in self._packing.plates.values()}
        return {
            name: plates[name].full_size / plates[name].size
            for name in self.layout.subsampled_inside
            if name in plates
        }

    def _check_subsampled(self, packed: Sequence[Tensor]) -> None:
        """A plate may be subsampled only if the enumerated variables inside it are all local."""
        for name in self.layout.subsampled_inside:
            symbol = self._packing.names.get(name)
            if symbol is None:
                continue
            inside = {s for f in packed if symbol in dims_of(f) for s in dims_of(f)}
            outside = {s for f in packed if symbol not in dims_of(f) for s in dims_of(f)}
            if inside & outside & self.eliminate:
                raise ProgramError(
                    f"Plate '{name}' is subsampled, and a site outside it is enumerated: the scale "
                    "of the subsample would stand inside the sum over that site's values, and the "
                    "result would be biased. Use the full data, or draw that site in the guide."
                )


DRAWS = opt_einsum.get_symbol(10**5)
"""The dimension of posterior draws, beyond the symbols of any program."""


def num_states(site: Any) -> int:
    return int(site["fn"].enumerate_support(expand=False).shape[0])


def is_one(scale: Any) -> bool:
    """Whether a scale is the number 1; a tensor of scales is taken not to be."""
    return not isinstance(scale, Tensor) and math.isclose(scale, 1.0, rel_tol=1e-9)


def user_scale(site: Any) -> Any:
    """The user's ``poutine.scale`` around a site, the subsampling scale of its plates left out."""
    return site["scale"] / plate_scale(site)
