r"""Continuous latents that are integrated out exactly, found by what their log-density looks like.

Given everything else, let the terms of ln p that hold a latent u be f(u). If f lies in the span of
a few functions, its values at as many *nodes* say all of it, the integral has a closed form, and

.. math::

    \ln Z = \ln \int e^{f(u)} du, \qquad
    w_i = \frac{\partial \ln Z}{\partial f(u_i)}, \qquad
    E[g(u)] = \sum_i w_i\, g(u_i)

for every g in the span: the gradient is a quadrature that is exact where it is needed. A latent at
its nodes is therefore one more enumerated variable, which elimination takes out by this integral
instead of a sum. The weights may be negative.

==========  ==================================  ==========================================
gamma       f = a ln u − b u + c                scale of a Student-t, rate of a Poisson
gaussian    f = −½ uᵀ A u + bᵀ u + c            factor of a factor analyser
==========  ==================================  ==========================================
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch import distributions as td

from lvppl.errors import ProgramError

__all__ = ["ConjugateLatents", "Nodes", "conjugate_kind"]

_CHECKS = 2
"""Nodes beyond those that are needed: they tell whether the span is right."""


def conjugate_kind(fn: Any) -> str | None:
    """``"gamma"`` or ``"gaussian"`` where a prior belongs to one of the spans, else ``None``."""
    while isinstance(fn, td.Independent):
        fn = fn.base_dist
    if isinstance(fn, td.Gamma | td.Exponential):
        return "gamma"
    return "gaussian" if isinstance(fn, td.Normal | td.MultivariateNormal) else None


class Nodes(TorchDistribution):
    """A continuous distribution that enumerates the nodes of an exact integral.

    Args:
        base: the distribution itself, which says what ``log_prob`` and ``sample`` are.
    """

    has_rsample = False
    has_enumerate_support = True
    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, base: Any) -> None:
        self.base_dist = base
        kind = conjugate_kind(base)
        if kind is None:
            raise ProgramError(f"{type(base).__name__} has no exact integral known here")
        self.kind = kind
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)
        if kind == "gamma" and len(base.event_shape) > 0:
            raise ProgramError("a vector of Gammas is integrated element by element: use a plate")

    @property
    def support(self) -> Any:
        return self.base_dist.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> Nodes:
        return Nodes(self.base_dist.expand(batch_shape))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            result: Tensor = self.base_dist.sample(sample_shape)
            return result

    def log_prob(self, value: Tensor) -> Tensor:
        result: Tensor = self.base_dist.log_prob(value)
        return result

    def nodes(self) -> Tensor:
        """(nodes, *event), on the distribution's dtype and device."""
        like = self.sample()
        if self.kind == "gamma":
            return like.new_tensor([0.5, 1.0, 2.0, 0.25, 4.0])
        return _gaussian_nodes(int(self.event_shape.numel()), like).reshape(-1, *self.event_shape)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        nodes = self.nodes()
        count = len(nodes)
        nodes = nodes.reshape((count,) + (1,) * len(self.batch_shape) + self.event_shape)
        return nodes.expand((count, *self.batch_shape, *self.event_shape)) if expand else nodes

    def integral(self, table: Tensor, dim: int) -> Tensor:
        """ln of the integral of exp of a log-table over its nodes' dimension."""
        table = table.movedim(dim, -1)[..., : len(self.nodes()) - _CHECKS]
        return self._integral(self._coefficients(table))

    def defect(self, table: Tensor, dim: int) -> Tensor:
        """How far the checks are from what the other nodes predict, relative: zero in the span."""
        table = table.movedim(dim, -1)
        kept = self._basis().shape[1]
        coefficients = self._coefficients(table[..., :kept])
        predicted = coefficients @ self._basis(checks=True).to(table).mT
        size = table.abs().amax(-1, keepdim=True) + 1
        return ((predicted - table[..., kept:]).abs() / size).amax()

    def _coefficients(self, table: Tensor) -> Tensor:
        return torch.linalg.solve(self._basis().to(table), table.unsqueeze(-1)).squeeze(-1)

    def _basis(self, *, checks: bool = False) -> Tensor:
        """The functions of the span at the nodes, (nodes, functions)."""
        nodes = self.nodes()
        nodes = nodes[-_CHECKS:] if checks else nodes[:-_CHECKS]
        if self.kind == "gamma":
            return torch.stack([nodes.log(), -nodes, torch.ones_like(nodes)], -1)
        flat = nodes.reshape(len(nodes), -1)
        i, j = torch.triu_indices(flat.shape[1], flat.shape[1])
        squares = -flat[:, i] * flat[:, j] * torch.where(i == j, 0.5, 1.0).to(flat)
        return torch.cat([squares, flat, torch.ones_like(flat[:, :1])], 1)

    def _integral(self, c: Tensor) -> Tensor:
        if self.kind == "gamma":
            shape, rate = c[..., 0] + 1, c[..., 1]
            return torch.lgamma(shape) - shape * rate.log() + c[..., 2]
        d = int(self.event_shape.numel())
        count = d * (d + 1) // 2
        i, j = torch.triu_indices(d, d)
        precision = c.new_zeros((*c.shape[:-1], d, d))
        precision[..., i, j] = c[..., :count]
        precision[..., j, i] = c[..., :count]
        linear = c[..., count : count + d].unsqueeze(-1)
        tril = torch.linalg.cholesky(precision)
        white = torch.linalg.solve_triangular(tril, linear, upper=False).squeeze(-1)
        log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return 0.5 * white.square().sum(-1) - log_det + 0.5 * d * math.log(2 * math.pi) + c[..., -1]


def _gaussian_nodes(d: int, like: Tensor) -> Tensor:
    """0, ±e_i and e_i + e_j: as many as a quadratic has coefficients; and the checks."""
    eye = torch.eye(d, dtype=like.dtype, device=like.device)
    pairs = [eye[i] + eye[j] for i, j in itertools.combinations(range(d), 2)]
    zero = like.new_zeros(1, d)
    checks = torch.stack([1.5 * eye.sum(0), -2.0 * eye.sum(0)])
    return torch.cat([zero, eye, -eye, *(p.unsqueeze(0) for p in pairs), checks])


class ConjugateLatents(Messenger):
    """Replaces the distributions of latents by their nodes."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = frozenset(names)

    def __call__(self, program: Any) -> Any:
        return program if not self.names else super().__call__(program)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names and not isinstance(msg["fn"], Nodes):
            msg["fn"] = Nodes(msg["fn"])
            msg["infer"] = {**msg["infer"], "enumerate": "parallel"}
