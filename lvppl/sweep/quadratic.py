r"""ln Σ_z exp f(z) over z ∈ {0, 1}^n, for f of degree two: every one of 2^n terms, as products.

.. math:: f(z) = c + h^T z + z^T Q z, \qquad Q \text{ strictly upper triangular}

Cut the bits in three, z = (a, b, c). Where a is given, f is linear in a's share, so that

.. math:: \sum_{b,c} e^{f(a,b,c)} = e^{f(a)} \sum_b e^{u_a^T b} \sum_c e^{f(b,c)} e^{v_a^T c}

with u_a, v_a linear in a: a bilinear form of one table e^{f(b, c)} of 2^(|b| + |c|) numbers, for a
block of values of a one matrix product. Each of 2^n terms costs one multiplication and one
addition, and no exponential.

Numbers are scaled by their own maxima. Where these are not reached together the sum may underflow;
such values of a are summed again in log space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Quadratic", "all_bits", "bits_from", "probes", "quadratic_of"]

_BLOCK = 2**22  # numbers of a block: (values of b) x (values of a)
_TABLE = 20  # most bits of the table, unless half of them are more
_CHECKS = 64  # random states at which a quadratic must hold
_SAFE = 1e-200  # of sums of terms of at most one: far above what underflow loses, 2^n 1e-308


@dataclass(frozen=True)
class Quadratic:
    """A function of n bits for each datum, float64.

    Attributes:
        constant: (data,).
        linear: (data, n).
        pairs: strictly upper triangular, (data, n, n).
    """

    constant: Tensor
    linear: Tensor
    pairs: Tensor

    @property
    def num_bits(self) -> int:
        return self.linear.shape[-1]

    def __call__(self, bits: Tensor) -> Tensor:
        """f of states (S, n), (S, data)."""
        z = bits.to(self.linear)
        pairs = torch.einsum("si,dij,sj->sd", z, self.pairs, z)
        return self.constant + z @ self.linear.t() + pairs

    def split(self) -> list[Quadratic]:
        """One for each datum, each of data dimension 1."""
        parts = zip(self.constant, self.linear, self.pairs, strict=True)
        return [Quadratic(c[None], h[None], q[None]) for c, h, q in parts]

    def over(self, first: Tensor, second: Tensor) -> Tensor:
        """f of all (a, b), (data, A, B): a the first bits of a state, b the rest."""
        cut = first.shape[1]
        linear, pairs = self.linear, self.pairs
        alone = [
            bits @ linear[:, part].t()
            + torch.einsum("si,dij,sj->sd", bits, pairs[:, part, part], bits)
            for bits, part in ((first, slice(0, cut)), (second, slice(cut, None)))
        ]
        cross = first @ pairs[:, :cut, cut:] @ second.t()
        return (
            self.constant[:, None, None] + alone[0].t()[:, :, None] + alone[1].t()[:, None] + cross
        )

    def log_sum_exp(self) -> Tensor:
        """ln of the sum over all 2^n states, (data,)."""
        each = zip(self.linear, self.pairs, strict=True)
        return self.constant + torch.stack([_log_sum(*one) for one in each])


def bits_from(start: int, count: int, n: int, like: Tensor) -> Tensor:
    """States number ``start``, ... of n bits, (count, n), the first bit the most significant."""
    shifts = torch.arange(n - 1, -1, -1, device=like.device)
    index = torch.arange(start, start + count, device=like.device)
    return ((index[:, None] >> shifts) & 1).to(like)


def all_bits(n: int, like: Tensor) -> Tensor:
    """The 2^n states of n bits, (2^n, n)."""
    return bits_from(0, 2**n, n, like)


def _values(bits: Tensor, linear: Tensor, pairs: Tensor) -> Tensor:
    return bits @ linear + ((bits @ pairs) * bits).sum(-1)


def _log_sum(linear: Tensor, pairs: Tensor) -> Tensor:
    """ln sum over z of exp(linear z + z pairs z), 0-dim."""
    n = len(linear)
    inner = max(n // 2, min(2 * n // 3, _TABLE))  # fewest exponentials beside the products
    first = n - inner  # bits of a
    at_c = first + inner // 2
    a, b, c = slice(0, first), slice(first, at_c), slice(at_c, n)
    bits_b, bits_c = all_bits(at_c - first, linear), all_bits(n - at_c, linear)
    table = _values(bits_b, linear[b], pairs[b, b])[:, None]
    table = table + _values(bits_c, linear[c], pairs[c, c]) + bits_b @ pairs[b, c] @ bits_c.t()
    highest = table.max()
    weights = (table - highest).exp()
    block = max(1, _BLOCK // len(bits_b))
    total = linear.new_tensor(-math.inf)
    every = 2**first
    for start in range(0, every, block):
        bits_a = bits_from(start, min(block, every - start), first, linear)
        alone = _values(bits_a, linear[a], pairs[a, a]) + highest
        u = bits_a @ pairs[a, b] @ bits_b.t()  # (A, 2^b)
        v = bits_a @ pairs[a, c] @ bits_c.t()
        top_u, top_v = u.amax(1), v.amax(1)
        products = (v - top_v[:, None]).exp() @ weights.t()
        sums = ((u - top_u[:, None]).exp() * products).sum(1)
        logs = alone + top_u + top_v + sums.log()
        for i in (sums < _SAFE).nonzero().flatten().tolist():
            logs[i] = alone[i] + (table - highest + u[i, :, None] + v[i]).flatten().logsumexp(0)
        total = torch.logaddexp(total, logs.logsumexp(0))
    return total


def probes(n: int) -> Tensor:
    """States with at most two bits set, then random ones, int64: what a quadratic is known by."""
    one = torch.eye(n, dtype=torch.int64)
    i, j = torch.triu_indices(n, n, 1)
    generator = torch.Generator().manual_seed(0)
    others = torch.randint(2, (_CHECKS, n), generator=generator)
    return torch.cat([torch.zeros(1, n, dtype=torch.int64), one, one[i] + one[j], others])


def quadratic_of(values: Tensor, n: int, error: Tensor) -> Quadratic | None:
    """The quadratic with these values at ``probes(n)``; ``None`` where there is none.

    Args:
        values: (S, data), float64.
        error: rounding error of a value, (data,).
    """
    if not bool(values.isfinite().all()):
        return None
    constant, single = values[0], values[1 : n + 1] - values[0]
    i, j = torch.triu_indices(n, n, 1, device=values.device)
    pairs = values.new_zeros(values.shape[1], n, n)
    both = values[n + 1 : n + 1 + len(i)] - constant - single[i] - single[j]
    pairs[:, i, j] = both.t()
    found = Quadratic(constant, single.t(), pairs)
    others, known = probes(n)[-_CHECKS:], values[-_CHECKS:]
    slack = n * error  # of at most n^2 sums of four values, of random sign
    return found if bool(((found(others.to(values)) - known).abs() <= slack).all()) else None
