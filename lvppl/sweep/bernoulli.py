r"""ln Σ_z exp f(z) over bits, where f is a quadratic less a sum of softplus functions.

A Bernoulli observation y of logits l(z) that are affine in the bits, as of a sigmoid belief net,
has

.. math:: \ln p(y | z) = y^T l(z) - A(z), \qquad A(z) = \sum_v \ln(1 + e^{l_v(z)}),

whose first part is affine in z, and whose second is the same for every datum. With z cut in two,
l(z) = l(a) + l(b), so that e^{l_v(z)} is a product of two tabulated numbers, and A(z) the logarithm
of a product of (1 + e^{l_v(z)}): two multiplications and an addition for each visible of a state,
and a logarithm for each dozen or more of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lvppl.sweep.quadratic import Quadratic, all_bits, bits_from

__all__ = ["BernoulliSum"]

_BLOCK = 2**15  # states of a block: what a second-level cache holds
_LARGEST = 600.0  # ln of the largest product, below ln of the largest double


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
        n = self.quadratic.num_bits
        inner = n // 2
        outer_bits, states = n - inner, 2 ** (n - inner)
        bits_b = all_bits(inner, self.base)
        table_b = bits_b @ self.slope[outer_bits:]
        total = self.quadratic.constant.new_full(self.quadratic.constant.shape, -math.inf)
        rows = max(1, _BLOCK // len(bits_b))
        for start in range(0, states, rows):
            bits_a = bits_from(start, min(rows, states - start), outer_bits, self.base)
            softplus = self._softplus(self.base + bits_a @ self.slope[:outer_bits], table_b)
            values = self.quadratic.over(bits_a, bits_b) - softplus
            total = torch.logaddexp(total, values.flatten(1).logsumexp(1))
        return total

    def _softplus(self, one: Tensor, other: Tensor) -> Tensor:
        """Sum over v of softplus(one_v + other_v), (A, B), of (A, V) and (B, V)."""
        total = one.new_zeros(len(one), len(other))
        if float(one.abs().amax() + other.abs().amax()) > _LARGEST:  # products would overflow
            for a, b in zip(one.t(), other.t(), strict=True):
                total += torch.nn.functional.softplus(a[:, None] + b)
            return total
        largest = max(float(one.amax() + other.amax()), 0.0) + math.log(2.0)
        together = max(1, int(_LARGEST / largest))
        product, odds = torch.ones_like(total), torch.empty_like(total)
        for v, (a, b) in enumerate(
            zip(one.exp().t().contiguous(), other.exp().t().contiguous(), strict=True)
        ):
            torch.mul(a[:, None], b, out=odds)
            product.addcmul_(product, odds)
            if (v + 1) % together == 0:
                total += product.log()
                product.fill_(1.0)
        return total.add_(product.log_())
