r"""ln Σ_z exp f(z) over bits, where f is a quadratic less a sum of softplus functions.

A Bernoulli observation y of logits l(z) that are affine in the bits, as of a sigmoid belief net,
has

.. math:: \ln p(y | z) = y^T l(z) - A(z), \qquad A(z) = \sum_v \ln(1 + e^{l_v(z)}),

whose first part is affine in z, and whose second is the same for every datum. With z cut in two,
l(z) = l(a) + l(b), every e^{l_v(z)} is a product of two tabulated numbers. With m_v the largest
value of l_v over all states, α_v = e^{l_v(a) - max l_v(a)} and β_v the same of b, both at most one,

.. math:: A(z) = \sum_v \operatorname{softplus}(m_v) + \ln \prod_v (σ(-m_v) + σ(m_v) α_v β_v).

The product over a group of four visibles, multiplied out, is a sum over its 16 subsets of a number
of a times a number of b: for a block of states a matrix product. A visible of a state costs four
multiply-adds and a quarter of a multiplication; logarithms are as good as free.

Nothing overflows, as every factor lies in [σ(-m_v), 1]. What underflows does not matter: a run of
groups ends in a logarithm before Π σ(-m_v) = exp(-Σ softplus(m_v)) falls below e^{-600} > 1e-261,
a bound below on a sum of at most 16 terms, none negative, of which underflow loses 3e-308 each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lvppl.sweep.quadratic import Quadratic, all_bits, bits_from

__all__ = ["BernoulliSum", "softplus"]

_GROUP = 4  # visibles multiplied out together: 2^4 / 4 multiply-adds each, the best of 2 to 8
_INNER = {"cpu": 9}  # most bits of b, whose table is kept
_INNER_ACCELERATOR = 12
_BLOCK = {"cpu": 2**17}  # states of a block: what second-level caches hold
_BLOCK_ACCELERATOR = 2**24
_LARGEST = 600.0  # minus ln of the smallest product


@dataclass(frozen=True)
class BernoulliSum:
    """f(z) = quadratic(z) − Σ_v softplus(base_v + slope_v z).

    Attributes:
        quadratic: for each datum.
        base: (V,), float64.
        slope: (n, V).
    """

    quadratic: Quadratic
    base: Tensor
    slope: Tensor

    def log_sum_exp(self) -> Tensor:
        """ln of the sum over all 2^n states, (data,)."""
        n, device = self.quadratic.num_bits, self.base.device.type
        inner = min(n // 2, _INNER.get(device, _INNER_ACCELERATOR))
        outer, states = n - inner, 2 ** (n - inner)
        bits_b = all_bits(inner, self.base)
        softplus_sums = _Softplus(self.base, self.slope, bits_b)
        total = self.quadratic.constant.new_full(self.quadratic.constant.shape, -math.inf)
        rows = max(1, _BLOCK.get(device, _BLOCK_ACCELERATOR) // len(bits_b))
        for start in range(0, states, rows):
            bits_a = bits_from(start, min(rows, states - start), outer, self.base)
            sums = softplus_sums(bits_a)
            each = [
                (alone.over(bits_a, bits_b)[0] - sums).flatten().logsumexp(0)
                for alone in self.quadratic.split()
            ]
            total = torch.logaddexp(total, torch.stack(each))
        return total


def softplus(x: Tensor) -> Tensor:
    """ln(1 + eˣ) to the last digit: torch's own is x above 20."""
    return -torch.nn.functional.logsigmoid(-x)


class _Softplus:
    """Σ_v softplus(base_v + slope_v z) of blocks of states z = (a, b), for all b together."""

    def __init__(self, base: Tensor, slope: Tensor, bits_b: Tensor) -> None:
        outer = len(slope) - bits_b.shape[1]
        largest = base + slope.clamp(min=0).sum(0)
        at_most = softplus(largest)
        alone = at_most > _LARGEST / _GROUP  # a group of such could underflow
        self.base, self.slope = base, slope[:outer]
        self.others = alone.nonzero().flatten()
        self.others_b = bits_b @ slope[outer:, self.others]
        self.grouped = _in_groups((~alone).nonzero().flatten())
        self.constant = at_most[~alone].sum()
        each = _at(at_most, self.grouped, 0.0).sum(1)
        self.runs = list(_runs(each.tolist()))
        # of absent visibles in the last group the factor is 1 + 0
        self.off = _at(torch.sigmoid(-largest), self.grouped, 1.0)[..., None]
        self.on = _at(torch.sigmoid(largest), self.grouped, 0.0)[..., None]
        self.table_b = _subsets(None, self._scaled(bits_b, slope[outer:]))  # (G, 16, B)

    def _scaled(self, bits: Tensor, slope: Tensor) -> Tensor:
        """exp of bits @ slope less its largest value over all bits, (G, 4, states)."""
        scaled = (bits @ slope - slope.clamp(min=0).sum(0)).exp_()
        return _at(scaled.t(), self.grouped, 1.0)

    def __call__(self, bits_a: Tensor) -> Tensor:
        """(A, B)"""
        table_a = _subsets(self.off, self.on * self._scaled(bits_a, self.slope))
        table_a = table_a.transpose(1, 2).contiguous()  # (G, A, 16)
        total = self.constant.expand(len(bits_a), self.table_b.shape[-1]).clone()
        factor = torch.empty_like(total)
        for start, stop in self.runs:
            product = table_a[start] @ self.table_b[start]
            for group in range(start + 1, stop):
                product.mul_(torch.mm(table_a[group], self.table_b[group], out=factor))
            total += product.log_()
        others_a = self.base[self.others] + bits_a @ self.slope[:, self.others]
        for one, other in zip(others_a.t(), self.others_b.t(), strict=True):
            total += softplus(one[:, None] + other)
        return total


def _in_groups(visibles: Tensor) -> Tensor:
    """Visibles in rows of a group each, (G, 4), filled up with -1."""
    missing = -len(visibles) % _GROUP
    return torch.cat([visibles, visibles.new_full((missing,), -1)]).reshape(-1, _GROUP)


def _at(values: Tensor, groups: Tensor, absent: float) -> Tensor:
    """Rows of ``values`` (V, ...) by group, (G, 4, ...)."""
    found = values[groups.clamp(min=0)]
    gap = (groups < 0).reshape(groups.shape + (1,) * (values.dim() - 1))
    return found.masked_fill(gap, absent)


def _runs(each: list[float]) -> Iterator[tuple[int, int]]:
    """Ranges of groups whose products stay above e^-600; ``each`` is minus ln of the smallest."""
    start, held = 0, 0.0
    for group, size in enumerate(each):
        if held + size > _LARGEST and group > start:
            yield start, group
            start, held = group, 0.0
        held += size
    if each:
        yield start, len(each)


def _subsets(off: Tensor | None, on: Tensor) -> Tensor:
    """Products of ``on`` (G, 4, N) in each subset of four, and of ``off`` elsewhere, (G, 16, N)."""
    found = on.new_ones(len(on), 1, on.shape[-1])
    for v in range(on.shape[1]):
        without = found if off is None else found * off[:, v : v + 1]
        found = torch.cat([without, found * on[:, v : v + 1]], 1)
    return found
