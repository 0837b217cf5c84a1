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

The nodes span twelve or more orders of magnitude around the prior, in its units, so that each
coefficient is read where f is small or where it dominates: an outlier of 10⁶ standard deviations
costs six digits of sixteen. Every integral checks itself. Two further nodes tell whether f is in
the span, and Σ |w_i f(u_i)| bounds what rounding does: where either fails the integral is NaN,
which :class:`~lvppl.factor_graph.FactorGraph` turns into a sentence.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection
from typing import Any, NamedTuple, Protocol

import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch import distributions as td

from lvppl.errors import ProgramError

__all__ = ["ConjugateLatents", "Nodes", "centre_and_spread", "conjugate_kind"]

LARGEST_ERROR = 1e-6
"""Of ln Z, relative to 1 + |ln Z|: an integral that rounding may move by more is NaN."""


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
        frame: where the nodes lie; ``None``: where this prior has its mass.
    """

    has_rsample = False
    has_enumerate_support = True
    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, base: Any, frame: Frame | None = None) -> None:
        self.base_dist = base
        kind = conjugate_kind(base)
        if kind is None:
            raise ProgramError(f"{type(base).__name__} has no exact integral known here")
        if kind == "gamma" and len(base.event_shape) > 0:
            raise ProgramError("a vector of Gammas is integrated element by element: use a plate")
        self.kind = kind
        self.frame = Frame.around(base, kind) if frame is None else frame
        size = int(base.event_shape.numel())
        self.span: _Span = _gamma_span() if kind == "gamma" else _gaussian_span(size)
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.base_dist.support

    @property
    def tolerance(self) -> float:
        """Of :meth:`defect`: what is in the span is there to about 50 times the rounding unit."""
        return 1e-11 if self.is_double else 1e-3

    @property
    def is_double(self) -> bool:
        """Whether the prior is in float64: an integral is made of differences, lost in float32."""
        return self.frame.unit.dtype == torch.float64

    def expand(self, batch_shape: Any, _instance: Any = None) -> Nodes:
        return Nodes(self.base_dist.expand(batch_shape), self.frame)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            result: Tensor = self.base_dist.sample(sample_shape)
            return result

    def log_prob(self, value: Tensor) -> Tensor:
        result: Tensor = self.base_dist.log_prob(value)
        return result

    def nodes(self) -> Tensor:
        """(nodes, *event), on the distribution's dtype and device; the checks come last."""
        return self.frame.placed(self.span.points).reshape(-1, *self.event_shape)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        nodes = self.nodes()
        count = len(nodes)
        nodes = nodes.reshape((count,) + (1,) * len(self.batch_shape) + self.event_shape)
        return nodes.expand((count, *self.batch_shape, *self.event_shape)) if expand else nodes

    # ------------------------------------------------------------- from a log-table over the nodes

    def integral(self, table: Tensor, dim: int) -> Tensor:
        """ln of the integral of exp of a log-table over its nodes' dimension.

        −inf where every node is impossible. NaN where the table is not in the span, where its
        integral does not exist, or where rounding may have moved it by ``LARGEST_ERROR``.
        """
        values, impossible = self._possible(table.movedim(dim, -1))
        coefficients = self._coefficients(values)
        found = self.span.log_integral(coefficients)
        with torch.no_grad():
            sound = self._deviation(values) < self.tolerance
            error = self._rounding(values, coefficients)
            sound &= error <= LARGEST_ERROR * (1 + found.abs())
        found = torch.where(sound, found + self.frame.log_unit.to(found), math.nan)
        return torch.where(impossible, -math.inf, found)

    def defect(self, table: Tensor, dim: int) -> Tensor:
        """How far the checks are from what the other nodes predict, relative: zero in the span."""
        values, _ = self._possible(table.movedim(dim, -1))
        return self._deviation(values).amax()

    def moments(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (..., d) and covariance (..., d, d) of the density whose log-table is given.

        Args:
            table: (..., nodes); d is the size of the event.
        """
        values, _ = self._possible(table)
        mean, covariance = self.span.moments(self._coefficients(values))
        unit = self.frame.unit.to(mean)
        return self.frame.placed(mean), covariance * unit * unit[:, None]

    def drawn(self, table: Tensor) -> Tensor:
        """A draw (..., d) from each density whose log-table (..., nodes) is given."""
        values, _ = self._possible(table)
        return self.frame.placed(self.span.drawn(self._coefficients(values)))

    def _possible(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """The table with something regular where all is impossible, and where that is."""
        impossible = (table == -math.inf).all(-1)
        regular = self.span.regular.to(table)
        return torch.where(impossible[..., None], regular, table), impossible

    def _coefficients(self, values: Tensor) -> Tensor:
        return values[..., : self.span.fit.shape[1]] @ self.span.fit.to(values).mT

    def _deviation(self, values: Tensor) -> Tensor:
        """Of the checks from their prediction, relative to what the prediction is made of."""
        rule = self.span.prediction.to(values)
        kept, checks = values[..., : rule.shape[1]], values[..., rule.shape[1] :]
        size = 1 + kept.abs() @ rule.abs().mT + checks.abs()
        return ((kept @ rule.mT - checks).abs() / size).amax(-1)

    def _rounding(self, values: Tensor, coefficients: Tensor) -> Tensor:
        """What the rounding of each f(u_i) may do to ln Z, to first order."""
        fit = self.span.fit.to(values).abs()
        unsure = values[..., : fit.shape[1]].abs() @ fit.mT
        slopes = self.span.expectations(coefficients).abs()
        return torch.finfo(values.dtype).eps * (unsure * slopes).sum(-1)


class ConjugateLatents(Messenger):
    """Replaces the distributions of latents by their nodes.

    The nodes stay where the priors of the first run put them: what one run weighs, a later one
    evaluates at other parameters.

    Args:
        names: of the latents.
        kinds: of those, the ones that get nodes.
    """

    def __init__(
        self, names: Collection[str], kinds: Collection[str] = ("gamma", "gaussian")
    ) -> None:
        super().__init__()
        self.names = frozenset(names)
        self.kinds = kinds
        self.frames: dict[str, Frame] = {}

    def __call__(self, program: Any) -> Any:
        return program if not self.names else super().__call__(program)

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.names or isinstance(msg["fn"], Nodes):
            return
        if conjugate_kind(msg["fn"]) in self.kinds:
            msg["fn"] = Nodes(msg["fn"], self.frames.get(name))
            self.frames.setdefault(name, msg["fn"].frame)
            msg["infer"] = {**msg["infer"], "enumerate": "parallel"}


# -------------------------------------------------------------------------------- where nodes lie


class Frame(NamedTuple):
    """u = centre + unit · x, element by element, for x on a grid that is the same for all."""

    centre: Tensor
    """(d,)"""
    unit: Tensor
    """(d,), positive."""

    @staticmethod
    def around(prior: Any, kind: str) -> Frame:
        """The mean and the spread of a Gaussian prior, the scale of a Gamma; over its batch."""
        with torch.no_grad():
            size = int(prior.event_shape.numel())
            mean, variance = (v.detach().reshape(-1, size) for v in (prior.mean, prior.variance))
            if kind == "gamma":
                return Frame(torch.zeros_like(mean[0]), _usable(mean.log().mean(0).exp(), 1.0))
            return Frame(*centre_and_spread(mean, variance))

    def placed(self, points: Tensor) -> Tensor:
        return self.centre + self.unit * points.to(self.unit)

    @property
    def log_unit(self) -> Tensor:
        return self.unit.log().sum()


def centre_and_spread(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Of the equal mixture of Gaussians along the first dimension: its mean and deviation."""
    centre = _usable(mean.mean(0), 0.0)
    spread = variance.mean(0) + (mean - centre).square().mean(0)
    return centre, _usable(spread.sqrt(), 1.0)


def _usable(values: Tensor, otherwise: float) -> Tensor:
    usable = values.isfinite() if otherwise == 0 else values.isfinite() & (values > 0)
    return torch.where(usable, values, otherwise)


# ----------------------------------------------------------------------------------- the two spans


class _Span(Protocol):
    """A family of log-densities f(x) = Σ coefficient · function, over x of d elements."""

    points: Tensor
    """(nodes, d); the checks come last."""
    fit: Tensor
    """(functions, nodes without checks): what makes coefficients of values."""
    prediction: Tensor
    """(checks, nodes without checks): what the values at the checks must be."""
    regular: Tensor
    """(nodes,): values of some density of the family."""

    def log_integral(self, coefficients: Tensor) -> Tensor:
        """ln ∫ exp f; NaN where it does not exist."""

    def expectations(self, coefficients: Tensor) -> Tensor:
        """E of each function: the gradient of ``log_integral``."""

    def moments(self, coefficients: Tensor) -> tuple[Tensor, Tensor]: ...

    def drawn(self, coefficients: Tensor) -> Tensor: ...


class _GammaSpan:
    """f = a ln x − b x + c.

    The last node tells b, however small; the first two, where b x is small however large b is, tell
    a and c.
    """

    def __init__(self) -> None:
        first, second, last = 2.0**-34, 2.0**-24, 2.0**20
        checks = (math.e**-1.5, math.pi / 3, 5**0.7)
        points = torch.tensor([first, second, last, *checks], dtype=torch.float64)
        self.points = points[:, None]
        ratio = (second - first) / (last - first)
        a = torch.tensor([ratio - 1, 1.0, -ratio], dtype=torch.float64)
        a = a / (math.log(second / first) - ratio * math.log(last / first))
        difference = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
        b = (a * math.log(last / first) - difference) / (last - first)
        c = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64) - a * math.log(first) + b * first
        self.fit = torch.stack([a, b, c])
        functions = torch.stack([points.log(), -points, torch.ones_like(points)], -1)
        self.prediction = functions[3:] @ self.fit
        self.regular = functions @ torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)

    def log_integral(self, coefficients: Tensor) -> Tensor:
        a, b, c = coefficients.unbind(-1)
        found = torch.lgamma(a + 1) - (a + 1) * b.log() + c
        return torch.where((a > -1) & (b > 0), found, math.nan)

    def expectations(self, coefficients: Tensor) -> Tensor:
        a, b, c = coefficients.unbind(-1)
        return torch.stack([torch.digamma(a + 1) - b.log(), -(a + 1) / b, torch.ones_like(c)], -1)

    def moments(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        shape, rate = coefficients[..., :1] + 1, coefficients[..., 1:2]
        return shape / rate, (shape / rate.square())[..., None]

    def drawn(self, coefficients: Tensor) -> Tensor:
        shape, rate = coefficients[..., :1] + 1, coefficients[..., 1:2]
        return td.Gamma(shape, rate, validate_args=False).sample()


class _GaussianSpan:
    """f = −½ xᵀ A x + bᵀ x + c.

    A is told by nodes far out, where it dominates however large f(0) is; b by nodes nearby, where
    a large A does no harm.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        far, eye = 2.0**10, torch.eye(size, dtype=torch.float64)
        pairs = [far * (eye[i] + eye[j]) for i, j in itertools.combinations(range(size), 2)]
        # in general position: what is not quadratic may be so on lines and lattices
        generator = torch.Generator().manual_seed(5)
        checks = 1.7 * torch.randn(size + 2, size, generator=generator, dtype=torch.float64)
        kept = torch.cat([0 * eye[:1], eye, -eye, far * eye, -far * eye, *(p[None] for p in pairs)])
        self.points = torch.cat([kept, checks])
        self.rows, self.columns = torch.triu_indices(size, size)
        self.fit = self._fit(far, torch.eye(len(kept), dtype=torch.float64))
        self.prediction = self._functions(checks) @ self.fit
        self.regular = -0.5 * self.points.square().sum(-1)

    def _fit(self, far: float, f: Tensor) -> Tensor:
        """The rule for each coefficient, from values at the nodes, one a row of ``f``."""
        d = self.size
        zero, near, far_plus, far_minus = f[0], f[1 : 1 + 2 * d], f[1 + 2 * d :], f[1 + 3 * d :]
        pairs = iter(f[1 + 4 * d :])
        quadratic = []
        for i, j in zip(self.rows.tolist(), self.columns.tolist(), strict=True):
            if i == j:
                quadratic.append((2 * zero - far_plus[i] - far_minus[i]) / far**2)
            else:
                quadratic.append((far_plus[i] + far_plus[j] - zero - next(pairs)) / far**2)
        return torch.stack([*quadratic, *((near[:d] - near[d:]) / 2), zero])

    def _functions(self, x: Tensor) -> Tensor:
        return torch.cat(
            [self._halved(-x[:, :, None] * x[:, None]), x, torch.ones_like(x[:, :1])], 1
        )

    def _halved(self, products: Tensor) -> Tensor:
        """The upper triangle (..., d (d + 1) / 2) of −x xᵀ, its diagonal halved."""
        upper = products[..., self.rows, self.columns]
        return upper * torch.where(self.rows == self.columns, 0.5, 1.0).to(upper)

    def _parts(self, coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A's Cholesky factor, whether it exists (it is I where not), b and c."""
        d, count = self.size, len(self.rows)
        precision = coefficients.new_zeros((*coefficients.shape[:-1], d, d))
        precision[..., self.rows, self.columns] = coefficients[..., :count]
        precision[..., self.columns, self.rows] = coefficients[..., :count]
        tril, failed = torch.linalg.cholesky_ex(precision)
        exists = failed == 0
        tril = torch.where(exists[..., None, None], tril, torch.eye(d).to(tril))
        return tril, exists, coefficients[..., count : count + d], coefficients[..., -1]

    def log_integral(self, coefficients: Tensor) -> Tensor:
        tril, exists, linear, constant = self._parts(coefficients)
        white = torch.linalg.solve_triangular(tril, linear.unsqueeze(-1), upper=False).squeeze(-1)
        log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        found = 0.5 * white.square().sum(-1) - log_det + constant
        return torch.where(exists, found + 0.5 * self.size * math.log(2 * math.pi), math.nan)

    def expectations(self, coefficients: Tensor) -> Tensor:
        mean, covariance = self.moments(coefficients)
        squares = self._halved(-covariance - mean[..., :, None] * mean[..., None, :])
        return torch.cat([squares, mean, torch.ones_like(mean[..., :1])], -1)

    def moments(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        tril, _, linear, _ = self._parts(coefficients)
        mean = torch.cholesky_solve(linear.unsqueeze(-1), tril).squeeze(-1)
        return mean, torch.cholesky_inverse(tril)

    def drawn(self, coefficients: Tensor) -> Tensor:
        tril, _, linear, _ = self._parts(coefficients)
        mean = torch.cholesky_solve(linear.unsqueeze(-1), tril).squeeze(-1)
        noise = torch.randn_like(mean).unsqueeze(-1)
        return mean + torch.linalg.solve_triangular(tril.mT, noise, upper=True).squeeze(-1)


@functools.cache
def _gamma_span() -> _GammaSpan:
    return _GammaSpan()


@functools.cache
def _gaussian_span(size: int) -> _GaussianSpan:
    return _GaussianSpan(size)
