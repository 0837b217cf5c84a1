"""Chains among factors: found by their structure and summed by one scan.

Elimination takes one variable out at a time, which for a chain of T steps is T small operations and
their T gradients. Where the variables of a contraction form a path x_1 - x_2 - ... of equal sizes,
as ``pyro.markov`` makes them, its factors are stacked as (T - 1, K, K) and (T, K) and go to
:mod:`lvppl.chains`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from lvppl.chains import chain_log_sum, sample_chain, viterbi
from lvppl.packed import (
    Reduction,
    dims_of,
    log_max,
    log_sum_exp,
    log_sum_exp_sampled,
    named,
    product,
    sizes_of,
)

__all__ = ["scanned"]

_SHORTEST = 12
"""Steps from which a scan is faster than elimination."""

Eliminate = Callable[[Sequence[Tensor], Set[str]], Tensor]


def scanned(
    terms: Sequence[Tensor], dims: Set[str], reduction: Reduction, eliminate: Eliminate
) -> list[Tensor]:
    """The factors with every long path of variables summed out; what is no path is left alone.

    Args:
        terms: packed log-factors.
        dims: symbols that are to be eliminated.
        reduction: one of ``log_sum_exp``, ``log_max``, ``log_sum_exp_sampled``.
        eliminate: sums small sets of symbols out of a product.
    """
    terms = list(terms)
    if len(dims) < _SHORTEST or reduction not in (log_sum_exp, log_max, log_sum_exp_sampled):
        return terms
    terms = _without_twigs(terms, dims, eliminate)
    for path in _paths(terms, dims):
        inside = [term for term in terms if set(path) & set(dims_of(term))]
        terms = [term for term in terms if not set(path) & set(dims_of(term))]
        terms.append(_scan(inside, path, reduction))
    return terms


def _neighbours(terms: Sequence[Tensor], dims: Set[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for term in terms:
        scope = set(dims_of(term)) & set(dims)
        for symbol in scope:
            found.setdefault(symbol, set()).update(scope - {symbol})
    return found


def _without_twigs(terms: list[Tensor], dims: Set[str], eliminate: Eliminate) -> list[Tensor]:
    """Sum out variables that hang on a single inner one, as a mixture component at each step."""
    around = _neighbours(terms, dims)
    twigs = {s for s, others in around.items() if len(others) == 1}
    twigs = {s for s in twigs if len(around[next(iter(around[s]))]) > 2}
    for symbol in sorted(twigs):
        bucket = [term for term in terms if symbol in dims_of(term)]
        terms = [term for term in terms if symbol not in dims_of(term)]
        terms.append(eliminate(bucket, {symbol}))
    return terms


def _paths(terms: Sequence[Tensor], dims: Set[str]) -> list[list[str]]:
    """Components of the graph of variables that are long paths of equal sizes."""
    around, sizes = _neighbours(terms, dims), sizes_of(terms)
    seen: set[str] = set()
    paths = []
    for start in sorted(around):
        if start in seen or len(around[start]) != 1:
            continue
        path, last = [start], start
        seen.add(start)
        while True:
            following = [s for s in around[last] if s not in seen]
            if len(following) != 1 or len(around[following[0]]) > 2:
                break
            last = following[0]
            seen.add(last)
            path.append(last)
        closed = len(around[last]) == 1 or len(path) == 1
        if closed and len(path) >= _SHORTEST and len({sizes[s] for s in path}) == 1:
            paths.append(path)
    return paths


def _scan(terms: Sequence[Tensor], path: Sequence[str], reduction: Reduction) -> Tensor:
    """The sum over a path: factors stacked over steps, everything else a batch dimension."""
    place = {symbol: t for t, symbol in enumerate(path)}
    unary: list[list[Tensor]] = [[] for _ in path]
    pairs: list[list[Tensor]] = [[] for _ in path[1:]]
    for term in terms:
        steps = sorted(place[s] for s in dims_of(term) if s in place)
        (unary if len(steps) == 1 else pairs)[steps[0]].append(term)
    sizes = sizes_of(terms)
    batch = "".join(sorted({s for term in terms for s in dims_of(term)} - set(path)))
    paired = "".join(
        sorted({s for group in pairs for term in group for s in dims_of(term)} - set(path))
    )
    shape = [sizes[s] for s in batch]
    like = terms[0]
    zero = like.new_zeros([*shape, sizes[path[0]]])
    emission = torch.stack(
        [
            _aligned(group, batch + path[t], sizes) if group else zero
            for t, group in enumerate(unary)
        ],
        -2,
    )
    pair_batch = batch if paired else ""
    transition = torch.stack(
        [
            _aligned(group, pair_batch + path[t] + path[t + 1], sizes)
            for t, group in enumerate(pairs)
        ],
        -3,
    )
    initial = zero.new_zeros(zero.shape[-1])
    if reduction is log_sum_exp:
        value = chain_log_sum(initial, transition, emission)
    else:
        value = _Indicated.apply(transition, emission, reduction)
    return named(value, batch)


def _aligned(group: Sequence[Tensor], dims: str, sizes: dict[str, int]) -> Tensor:
    """The product of factors as a tensor of exactly ``dims``."""
    whole = product(group)
    names = dims_of(whole)
    order = [names.index(s) for s in dims if s in names]
    view = [sizes[s] if s in names else 1 for s in dims]
    return whole.permute(order).reshape(view).expand([sizes[s] for s in dims])


class _Indicated(torch.autograd.Function):
    """A path's best assignment, or a draw, whose gradient is its indicator."""

    @staticmethod
    def forward(ctx: Any, transition: Tensor, emission: Tensor, reduction: Reduction) -> Tensor:
        initial = emission.new_zeros(emission.shape[-1])
        if reduction is log_max:
            states, value = viterbi(initial, transition, emission)
        else:
            value = chain_log_sum(initial, transition, emission)
            possible = (value > -torch.inf)[..., None, None]
            states = sample_chain(initial, transition, torch.where(possible, emission, 0.0))[0]
        ctx.save_for_backward(states)
        ctx.shapes = transition.shape, emission.shape
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (states,) = ctx.saved_tensors
        transition, emission = ctx.shapes
        K = emission[-1]
        grad = grads[0][..., None, None]
        at = torch.nn.functional.one_hot(states, K).to(grad) * grad
        before = torch.nn.functional.one_hot(states[..., :-1], K).to(grad)
        pairs = before.unsqueeze(-1) * at[..., 1:, :].unsqueeze(-2)
        extra = list(range(pairs.dim() - len(transition)))
        return pairs.sum(extra) if extra else pairs, at, None
