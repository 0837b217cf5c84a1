r"""Exact sums over enumerated latents by variable elimination; posteriors as their gradient.

With log-factors :math:`\ln f_i` of the enumerated variables z,

.. math:: \ln Z = \ln \sum_z \prod_i f_i(z), \qquad
          \frac{\partial \ln Z}{\partial \ln f_i(z_i)} = p(z_i),

so the gradient of the contraction with respect to a log-factor is the marginal of that factor's
variables (Darwiche 2003, "A differential approach to inference in Bayesian networks"). The same
code answers two more questions, by another way of taking one variable out:

=======================  ===================================================================
``log_sum_exp``          value ln Z; gradient: marginals
``log_max``              value max ln Π f; gradient: the maximising assignment, as indicators
``log_sum_exp_sampled``  value ln Z; gradient: an exact joint draw, as indicators
=======================  ===================================================================

Tensors are *packed* as in ``pyro.ops.packed``: the attribute ``_pyro_dims`` names each dimension by
one symbol. A symbol is summed over, is a plate (products are taken along it), or is an output.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence, Set
from types import MappingProxyType

import torch
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import LogRing
from torch import Tensor

from lvppl.chain_factors import scanned
from lvppl.errors import ProgramError
from lvppl.packed import Reduction, dims_of, log_sum_exp, named, product, sizes_of, sum_out

__all__ = [
    "PlatesOverlap",
    "cost",
    "log_sum_product",
    "marginals",
    "solve",
]


_NO_INTEGRALS: Mapping[str, Reduction] = MappingProxyType({})


class _LogSpace(LogRing):
    """Variable elimination that never leaves log space.

    Pyro's own ring multiplies exponentials that are shifted factor by factor, which underflows
    where two factors are peaked at different states.
    """

    def __init__(self, reduction: Reduction, integrals: Mapping[str, Reduction]) -> None:
        super().__init__()
        self.reduction = reduction
        self.integrals = integrals

    def sumproduct(self, terms: Sequence[Tensor], dims: Set[str]) -> Tensor:
        # integrals first: given every discrete variable, the log-density is one that is known
        inner = dims & self.integrals.keys()
        if inner:
            whole = [term for term in terms if inner & set(dims_of(term))]
            rest = [term for term in terms if not inner & set(dims_of(term))]
            terms, dims = [*rest, self._eliminated(whole, inner)], dims - inner
        terms = scanned(terms, dims, self.reduction, self._eliminated)
        return self._eliminated(terms, dims)

    def _eliminated(self, terms: Sequence[Tensor], dims: Set[str]) -> Tensor:
        held = dict(enumerate(terms))
        order = _order([dims_of(term) for term in terms], sizes_of(terms), dims)
        for number, (symbol, bucket, _) in enumerate(order, len(terms)):
            table = product([held.pop(i) for i in sorted(bucket)])
            names = dims_of(table)
            reduction = self.integrals.get(symbol, self.reduction)
            reduced = reduction(table, names.index(symbol))
            held[number] = named(reduced, names.replace(symbol, ""))
        return product(list(held.values()))


def _order(
    scopes: Sequence[str], sizes: Mapping[str, int], eliminate: Set[str]
) -> Iterator[tuple[str, set[int], int]]:
    """The order of elimination, smallest table first: (symbol, factors that hold it, table size).

    Factors are numbered as in ``scopes``; what an elimination leaves gets the next number.
    """
    live = {i: set(scope) for i, scope in enumerate(scopes)}
    holders: dict[str, set[int]] = {}
    for i, scope in live.items():
        for symbol in scope & set(eliminate):
            holders.setdefault(symbol, set()).add(i)

    def scope_of(symbol: str) -> set[str]:
        return set().union(*(live[i] for i in holders[symbol]))

    def size(symbol: str) -> int:
        return math.prod(sizes[s] for s in scope_of(symbol))

    known = {symbol: size(symbol) for symbol in holders}
    heap = [(n, symbol) for symbol, n in known.items()]
    heapq.heapify(heap)
    number = len(scopes)
    while heap:
        n, symbol = heapq.heappop(heap)
        if symbol not in holders or known[symbol] != n:
            continue  # an entry from before its neighbours changed
        scope, bucket = scope_of(symbol) - {symbol}, holders.pop(symbol)
        yield symbol, bucket, n
        for i in bucket:
            del live[i]
        live[number] = scope
        for neighbour in scope & holders.keys():
            holders[neighbour] = holders[neighbour] - bucket | {number}
        for neighbour in scope & holders.keys():
            known[neighbour] = size(neighbour)
            heapq.heappush(heap, (known[neighbour], neighbour))
        number += 1


def cost(log_factors: Sequence[Tensor], eliminate: Set[str]) -> tuple[int, int]:
    """Terms that elimination adds up in all, and the largest table; plates counted in full."""
    tables = [
        n for *_, n in _order(list(map(dims_of, log_factors)), sizes_of(log_factors), eliminate)
    ]
    return sum(tables), max(tables, default=0)


# --------------------------------------------------------------------------- the whole contraction


class PlatesOverlap(ProgramError):
    """Plates do not nest as a tree around sites that depend on each other."""


def log_sum_product(
    log_factors: Sequence[Tensor],
    *,
    eliminate: Set[str],
    plates: Set[str],
    reduction: Reduction = log_sum_exp,
    integrals: Mapping[str, Reduction] = _NO_INTEGRALS,
) -> list[Tensor]:
    """ln of the sum over ``eliminate`` of the product of factors and plates, as packed terms.

    The answer is the sum of the returned terms, one for each connected component, each over output
    symbols only. Cost and memory are those of variable elimination, not of the joint table.

    Args:
        log_factors: packed log-factors.
        eliminate: symbols of enumerated variables.
        plates: symbols along which independent copies are multiplied.
        reduction: how a variable is taken out.
        integrals: for symbols over the nodes of a continuous variable, how that one is.

    Raises:
        PlatesOverlap: the plates do not nest as a tree around the enumerated variables.
    """
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for factor in log_factors:
        tree.setdefault(frozenset(dims_of(factor)) & plates, []).append(factor)
    present = {symbol for factor in log_factors for symbol in dims_of(factor)}
    try:
        contracted = contract_tensor_tree(
            tree, set(eliminate) & present, ring=_LogSpace(reduction, integrals)
        )
    except NotImplementedError as error:
        raise PlatesOverlap(error) from error
    return [sum_out(term, plates) for terms in contracted.values() for term in terms]


def solve(
    log_factors: Sequence[Tensor],
    queries: Sequence[Tensor],
    *,
    eliminate: Set[str],
    plates: Set[str],
    reduction: Reduction = log_sum_exp,
    integrals: Mapping[str, Reduction] = _NO_INTEGRALS,
    differentiable: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """The contraction and, over the variables of each query, its gradient.

    Each query gets a factor exp(0) over its own dimensions; the gradient with respect to that zero
    is the marginal, the maximising assignment or a draw, as the reduction says.

    Args:
        log_factors: packed log-factors of the distribution over the ``eliminate`` symbols.
        queries: packed tensors; only their dimensions matter.
        eliminate: symbols of enumerated variables.
        plates: symbols along which independent copies are multiplied.
        reduction, integrals: as ``log_sum_product``.
        differentiable: keep the graph, so that the answers can be differentiated in the factors.

    Returns:
        The terms of ``log_sum_product``, and for each query a packed tensor of its dimensions.
    """
    with torch.enable_grad():
        zeros = [_zero_leaf(query) for query in queries]
        factors = log_factors if differentiable else [_detached(f) for f in log_factors]
        terms = log_sum_product(
            [*factors, *zeros],
            eliminate=eliminate,
            plates=plates,
            reduction=reduction,
            integrals=integrals,
        )
        total = torch.stack([term.sum() for term in terms]).sum()
        if not zeros:
            return terms, []
        grads = torch.autograd.grad(total, zeros, create_graph=differentiable, allow_unused=True)
    answers = [
        named(torch.zeros_like(zero) if grad is None else grad, dims_of(zero))
        for zero, grad in zip(zeros, grads, strict=True)
    ]
    if not differentiable:
        terms = [_detached(term) for term in terms]
    return terms, answers


def marginals(
    log_factors: Sequence[Tensor],
    queries: Sequence[Tensor],
    *,
    eliminate: Set[str],
    plates: Set[str],
    integrals: Mapping[str, Reduction] = _NO_INTEGRALS,
) -> list[Tensor]:
    """Marginal probabilities over the variables of each query, differentiable in the factors.

    Args: as ``solve``.

    Returns:
        For each query, a packed tensor of its dimensions that sums to one over its variables.
    """
    return solve(
        log_factors,
        queries,
        eliminate=eliminate,
        plates=plates,
        integrals=integrals,
        differentiable=True,
    )[1]


def _zero_leaf(query: Tensor) -> Tensor:
    leaf = torch.zeros_like(query).requires_grad_()
    leaf._pyro_dims = dims_of(query)  # type: ignore[attr-defined]
    return leaf


def _detached(tensor: Tensor) -> Tensor:
    return named(tensor.detach(), dims_of(tensor))
