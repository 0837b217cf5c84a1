r"""Exact sums over enumerated latents by variable elimination, and marginals as their gradient.

With log-factors :math:`\ln f_i` of the enumerated variables z,

.. math:: \ln Z = \ln \sum_z \prod_i f_i(z), \qquad
          \frac{\partial \ln Z}{\partial \ln f_i(z_i)} = p(z_i),

so the gradient of the contraction with respect to a log-factor is the marginal of that factor's
variables (Darwiche 2003, "A differential approach to inference in Bayesian networks").

Tensors are *packed* as in ``pyro.ops.packed``: the attribute ``_pyro_dims`` names each dimension by
one symbol. A symbol is summed over, is a plate (products are taken along it), or is an output.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence, Set

import torch
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.packed import broadcast_all
from pyro.ops.rings import LogRing
from pyro.ops.special import safe_log
from torch import Tensor

from lvppl.errors import ProgramError

__all__ = ["log_sum_product", "marginals", "named", "number_of_terms"]


def named(tensor: Tensor, dims: str) -> Tensor:
    """``tensor`` as a packed tensor whose dimensions are called ``dims``."""
    tensor = tensor[...]  # a view of its own to carry the attribute
    tensor._pyro_dims = dims  # type: ignore[attr-defined]
    return tensor


def dims_of(tensor: Tensor) -> str:
    dims: str = tensor._pyro_dims  # type: ignore[attr-defined]
    return dims


def sum_out(tensor: Tensor, symbols: Set[str]) -> Tensor:
    """Sum a packed tensor over the ``symbols`` it has."""
    dims = dims_of(tensor)
    positions = [i for i, symbol in enumerate(dims) if symbol in symbols]
    if not positions:
        return tensor
    return named(tensor.sum(positions), "".join(s for s in dims if s not in symbols))


def log_sum_exp(tensor: Tensor, symbol: str) -> Tensor:
    """ln of the sum of exp over one symbol, with zero gradient where everything is impossible."""
    dims = dims_of(tensor)
    position = dims.index(symbol)
    top = tensor.detach().amax(position, keepdim=True).clamp(min=torch.finfo(tensor.dtype).min)
    total = safe_log((tensor - top).exp().sum(position)) + top.squeeze(position)
    return named(total, dims.replace(symbol, ""))


class _LogSpace(LogRing):
    """Variable elimination that never leaves log space.

    Pyro's own ring multiplies exponentials that are shifted factor by factor, which underflows
    where two factors are peaked at different states.
    """

    def sumproduct(self, terms: Sequence[Tensor], dims: Set[str]) -> Tensor:
        terms = list(terms)
        pending = set(dims) & {symbol for term in terms for symbol in dims_of(term)}
        while pending:
            symbol = min(sorted(pending), key=lambda s: _size_of_product(terms, s))
            pending.remove(symbol)
            bucket = [term for term in terms if symbol in dims_of(term)]
            terms = [term for term in terms if symbol not in dims_of(term)]
            terms.append(log_sum_exp(_product(bucket), symbol))
        return _product(terms)


def _product(terms: Sequence[Tensor]) -> Tensor:
    if len(terms) == 1:
        return terms[0]
    aligned = broadcast_all(*terms)
    return named(torch.stack(aligned).sum(0), dims_of(aligned[0]))


def _size_of_product(terms: Sequence[Tensor], symbol: str) -> int:
    sizes = {
        name: size
        for term in terms
        if symbol in dims_of(term)
        for name, size in zip(dims_of(term), term.shape, strict=True)
    }
    return math.prod(sizes.values())


def number_of_terms(log_factors: Sequence[Tensor], eliminate: Set[str]) -> int:
    """Terms that variable elimination adds up, plates counted in full: its cost."""
    sizes = {s: n for f in log_factors for s, n in zip(dims_of(f), f.shape, strict=True)}
    scopes = [set(dims_of(factor)) for factor in log_factors]
    pending = {symbol for scope in scopes for symbol in scope} & set(eliminate)
    total = 0
    while pending:
        buckets = {s: set().union(*(c for c in scopes if s in c)) for s in pending}
        symbol = min(sorted(pending), key=lambda s: math.prod(sizes[i] for i in buckets[s]))
        pending.remove(symbol)
        total += math.prod(sizes[i] for i in buckets[symbol])
        scopes = [c for c in scopes if symbol not in c] + [buckets[symbol] - {symbol}]
    return total


def log_sum_product(
    log_factors: Sequence[Tensor], *, eliminate: Set[str], plates: Set[str]
) -> list[Tensor]:
    """ln of the sum over ``eliminate`` of the product of factors and plates, as packed terms.

    The answer is the sum of the returned terms, one for each connected component, each over output
    symbols only. Cost and memory are those of variable elimination, not of the joint table.

    Args:
        log_factors: packed log-factors.
        eliminate: symbols of enumerated variables.
        plates: symbols along which independent copies are multiplied.

    Raises:
        ProgramError: the plates do not nest as a tree around the enumerated variables.
    """
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for factor in log_factors:
        tree.setdefault(frozenset(dims_of(factor)) & plates, []).append(factor)
    present = {symbol for factor in log_factors for symbol in dims_of(factor)}
    try:
        contracted = contract_tensor_tree(tree, set(eliminate) & present, ring=_LogSpace())
    except NotImplementedError as error:
        raise ProgramError(
            "The enumerated sites cannot be summed out at polynomial cost: two plates overlap "
            "without one lying inside the other around sites that depend on each other. Nest the "
            f"plates, or give one of the sites a guide. ({error})"
        ) from error
    return [sum_out(term, plates) for terms in contracted.values() for term in terms]


def marginals(
    log_factors: Sequence[Tensor],
    queries: Sequence[Tensor],
    *,
    eliminate: Set[str],
    plates: Set[str],
) -> list[Tensor]:
    """Marginal probabilities over the variables of each query, by the gradient of ln Z.

    Each query gets a factor exp(0) over its own dimensions; the gradient of ln Z with respect to
    that zero is the marginal. Differentiable in the factors.

    Args:
        log_factors: packed log-factors of the distribution over the ``eliminate`` symbols.
        queries: packed tensors; only their dimensions matter.
        eliminate: symbols of enumerated variables.
        plates: symbols along which independent copies are multiplied.

    Returns:
        For each query, a packed tensor of its dimensions that sums to one over its variables.
    """
    with torch.enable_grad():
        zeros = [_zero_leaf(query) for query in queries]
        terms = log_sum_product([*log_factors, *zeros], eliminate=eliminate, plates=plates)
        total = torch.stack([term.sum() for term in terms]).sum()
        return list(torch.autograd.grad(total, zeros, create_graph=True))


def _zero_leaf(query: Tensor) -> Tensor:
    leaf = torch.zeros_like(query).requires_grad_()
    leaf._pyro_dims = dims_of(query)  # type: ignore[attr-defined]
    return leaf
