r"""Gaussian log-factors and what elimination does with them: multiply, shift, integrate.

A site whose law is Normal with a location that is affine in the latents x is, given every discrete
variable, a whitened residual

.. math:: w(x) = w_0 + J x, \qquad \ln p = -\tfrac12 |w(x)|^2 + c,

and, about any point m with x = m + v, a quadratic in information form,

.. math:: -\tfrac12 v^⊤ P v + h^⊤ v + c', \qquad
          P = J^⊤ J, \quad h = -J^⊤ w(m), \quad c' = c - \tfrac12 |w(m)|^2 .

Near the posterior mean the large terms of h and c' cancel before they are squared, which is why
residuals are kept and quadratics made of them when a point is known.

Batch dimensions are packed: ``dims`` names them by one symbol each, plates and discrete variables.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lvppl.errors import ProgramError

__all__ = [
    "Quadratic",
    "Residual",
    "aligned",
    "common_shape",
    "in_one_dtype",
    "integrated_out",
    "product",
    "without_plates",
]


_LEAST_KNOWN = {torch.float64: 1e-6, torch.float32: 1e-2}
"""Relative error of a conditional precision that is accepted."""


@dataclass(frozen=True)
class Residual:
    """A site: w_0 and J over the variables of its scope, side by side."""

    name: str
    """Of the site."""
    scope: tuple[str, ...]
    sizes: tuple[int, ...]
    """Of each variable of the scope."""
    offset: Tensor
    """w_0, (*dims, rows)."""
    jacobian: Tensor
    """J, (*dims, rows, Σ sizes)."""
    constant: Tensor
    """c, (*dims)."""
    dims: str

    def about(self, point: Mapping[str, tuple[Tensor, str]]) -> Quadratic:
        """The quadratic about a point: for each variable (*its dims, size) and those dims."""
        known = [name for name in self.scope if name in point]
        dims = _union([self.dims, *(point[name][1] for name in known)])
        w = aligned(self.offset, self.dims, dims, 1)
        for name, columns in _slices(dict(zip(self.scope, self.sizes, strict=True))).items():
            if name in known:
                block = self.jacobian[..., columns.start : columns.stop]
                moved = aligned(point[name][0], point[name][1], dims, 1)
                w = w + (aligned(block, self.dims, dims, 2) @ moved[..., None])[..., 0]
        J, P = (aligned(t, self.dims, dims, 2) for t in (self.jacobian, self.gram))
        h = -(J.mT @ w[..., None])[..., 0]
        c = aligned(self.constant, self.dims, dims, 0) - 0.5 * w.square().sum(-1)
        bound = P.detach().diagonal(dim1=-2, dim2=-1)
        return Quadratic(self.scope, self.sizes, P, h, c, bound, dims)

    @cached_property
    def gram(self) -> Tensor:
        """Jᵀ J, (*dims, d, d)."""
        return self.jacobian.mT @ self.jacobian

    def jiggled(self, count: int, symbol: str) -> Residual:
        """Standard normal noise in every residual, ``count`` times along a new dimension.

        The maximum of the perturbed product is then a draw from the product itself (Papandreou
        and Yuille 2010): its mean is the posterior's, and its covariance P⁻¹ Jᵀ J P⁻¹ = P⁻¹.
        """
        noise = torch.randn((count, *self.offset.shape), dtype=self.offset.dtype)
        return replace(
            self,
            offset=self.offset + noise.to(self.offset.device),
            jacobian=self.jacobian[None],  # the same for all draws, and so is what is made of it
            constant=self.constant[None],
            dims=symbol + self.dims,
        )


@dataclass(frozen=True)
class Quadratic:
    """−½ vᵀ P v + hᵀ v + c over the variables of a scope, side by side.

    Batch dimensions of the parts may be of size one where others' are not, but for plates.
    """

    scope: tuple[str, ...]
    sizes: tuple[int, ...]
    precision: Tensor
    """P, (*dims, d, d) with d = Σ sizes."""
    information: Tensor
    """h, (*dims, d)."""
    constant: Tensor
    """c, (*dims)."""
    bound: Tensor
    """(*dims, d): how large the terms were that the diagonal of P is the sum or difference of."""
    dims: str


def in_one_dtype(residuals: Sequence[Residual]) -> list[Residual]:
    """In the most precise dtype of all: float64 data under a prior of float32, say."""
    dtype = functools.reduce(
        torch.promote_types,
        (t.dtype for r in residuals for t in (r.offset, r.jacobian, r.constant)),
    )
    return [
        replace(
            r,
            offset=r.offset.to(dtype),
            jacobian=r.jacobian.to(dtype),
            constant=r.constant.to(dtype),
        )
        for r in residuals
    ]


def aligned(tensor: Tensor, dims: str, wanted: str, event_dim: int) -> Tensor:
    """A packed tensor with its batch dimensions as ``wanted``, of size one where it has none."""
    if dims == wanted:
        return tensor
    events = range(len(dims), len(dims) + event_dim)
    tensor = tensor.permute([*(dims.index(s) for s in wanted if s in dims), *events])
    for position, symbol in enumerate(wanted):
        if symbol not in dims:
            tensor = tensor.unsqueeze(position)
    return tensor


def common_shape(shapes: Sequence[Sequence[int]]) -> list[int]:
    """Of aligned tensors, which have as many dimensions; torch's own takes a tenth of a ms."""
    return [max(sizes) for sizes in zip(*shapes, strict=True)]


def product(factors: Sequence[Quadratic]) -> Quadratic:
    """Over the variables and the batch dimensions of all of them."""
    if len(factors) == 1:
        return factors[0]
    sizes = {n: size for f in factors for n, size in zip(f.scope, f.sizes, strict=True)}
    dims, where = _union([f.dims for f in factors]), _slices(sizes)
    total = sum(sizes.values())
    events = {"precision": 2, "information": 1, "constant": 0, "bound": 1}
    sums = {}
    for part, event_dim in events.items():
        tensors = [aligned(getattr(f, part), f.dims, dims, event_dim) for f in factors]
        batch = common_shape([t.shape[: len(dims)] for t in tensors])
        whole = tensors[0].new_zeros([*batch, *[total] * event_dim])
        for f, tensor in zip(factors, tensors, strict=True):
            own = torch.tensor([i for name in f.scope for i in where[name]], device=whole.device)
            if event_dim == 2:
                whole[..., own[:, None], own] += tensor
            elif event_dim == 1:
                whole[..., own] += tensor
            else:
                whole = whole + tensor
        sums[part] = whole
    return Quadratic(tuple(sizes), tuple(sizes.values()), **sums, dims=dims)


def integrated_out(factor: Quadratic, name: str) -> Quadratic:
    r"""∫ exp(factor) over one variable, by Cholesky factors of its block of the precision.

    Raises:
        ProgramError: that block is not positive definite, or rounding has taken its digits.
    """
    own = _slices(dict(zip(factor.scope, factor.sizes, strict=True)))
    b = torch.tensor(own[name], device=factor.precision.device)
    rest = [n for n in factor.scope if n != name]
    kept = [i for n in rest for i in own[n]]
    L = _cholesky(
        factor.precision.index_select(-2, b).index_select(-1, b),
        factor.bound.index_select(-1, b),
        name,
    )
    h_b = _solved(L, factor.information.index_select(-1, b)[..., None])
    c = factor.constant + 0.5 * h_b.square().sum((-2, -1))
    c = c - L.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * len(b) * math.log(2 * math.pi)
    a = torch.tensor(kept, device=b.device, dtype=b.dtype)
    cross = _solved(L, factor.precision.index_select(-2, b).index_select(-1, a))
    P = factor.precision.index_select(-2, a).index_select(-1, a) - cross.mT @ cross
    h = factor.information.index_select(-1, a) - (cross.mT @ h_b)[..., 0]
    sizes = tuple(s for n, s in zip(factor.scope, factor.sizes, strict=True) if n != name)
    bound = factor.bound.index_select(-1, a)
    return Quadratic(tuple(rest), sizes, P, h, c, bound, factor.dims)


def without_plates(factor: Quadratic, plates: Iterable[str]) -> Quadratic:
    """The product along plates: sums of all three parts."""
    where = [i for i, symbol in enumerate(factor.dims) if symbol in set(plates)]
    if not where:
        return factor
    return Quadratic(
        factor.scope,
        factor.sizes,
        factor.precision.sum(where),
        factor.information.sum(where),
        factor.constant.sum(where),
        factor.bound.sum(where),
        "".join(s for i, s in enumerate(factor.dims) if i not in where),
    )


def _union(dims: Iterable[str]) -> str:
    return "".join(dict.fromkeys(symbol for names in dims for symbol in names))


def _slices(sizes: Mapping[str, int]) -> dict[str, range]:
    found, start = {}, 0
    for name, size in sizes.items():
        found[name] = range(start, start + size)
        start += size
    return found


def _cholesky(precision: Tensor, bound: Tensor, name: str) -> Tensor:
    L, failed = torch.linalg.cholesky_ex(precision)
    with torch.no_grad():
        pivots = L.diagonal(dim1=-2, dim2=-1).square()
        lost = torch.finfo(L.dtype).eps * bound > _LEAST_KNOWN[L.dtype] * pivots
    if bool(failed.any()) or bool(lost.any()):
        raise ProgramError(
            f"The precision of the Gaussian latent '{name}' given the data is lost in rounding, or "
            "is not positive definite: the scales around it differ by too much, or one is zero, "
            "infinite or NaN. Use float64, write latents that nearly determine each other as one, "
            "and take scales that are nearer to each other."
        )
    return L


def _solved(L: Tensor, right: Tensor) -> Tensor:
    batch = common_shape([L.shape[:-2], right.shape[:-2]])
    found: Tensor = torch.linalg.solve_triangular(
        L.expand(*batch, *L.shape[-2:]), right.expand(*batch, *right.shape[-2:]), upper=False
    )
    return found
