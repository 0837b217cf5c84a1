"""E-step of a Gaussian mixture over fixed data: matrix products with one matrix of statistics.

ln w_k N(y | mu_k, Sigma_k) is linear in the sufficient statistics of y: for a full covariance the
products y_i y_j, i <= j, then y, then 1. With them as the rows of Phi (F, N), and the natural
parameters as the rows of Q (K, F),

    ln w_k N(y_n | mu_k, Sigma_k) = (Q Phi)_kn,   r = softmax over k,   statistics = r Phi^T (K, F),

so that an E-step is two matrix products and the exponentials between them. Phi is made anew for
each chunk of data, small enough to stay in the cache, and is never stored.

Quadratic forms written in this way cancel: the error is the rounding unit times the squared
distance of y from the origin in standard deviations. Hence the data are shifted by their mean, and
all products are in float64 whatever the dtype of the data: the error of a log-density in nats is
then about 1e-16 (spread / sigma)^2, where float32 would lose whole nats at a spread of a few
thousand sigma. Float64 products cost twice as much as float32 ones, as much as float32 residuals
whitened for each component do, which are less exact.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lvppl.errors import ProgramError

__all__ = ["MixtureKernel", "MixtureStatistics"]

_CHUNK_BYTES = 2**23  # held at once on a processor, whose caches hold about as much
_DEVICE_BYTES = 2**28  # on accelerators, where launches cost more than misses
_LARGEST_CHUNK = 2**14
_TILE = 2**15  # scores of a batch of `_scores`: what a first-level cache and its product like
_MARK = 2.0**20  # in float32, the sum of two of these and of any indices below it is exact


@dataclass(frozen=True)
class MixtureStatistics:
    """What one E-step leaves for the M-step; float64, about the locations of that E-step.

    The M-step is mu_k + first_k / counts_k and, for a full covariance, second_k / counts_k minus
    the outer product of the step first_k / counts_k with itself.

    Attributes:
        objective: 0-dim, nats, sum over data of ln sum_k w_k N_k; the largest term of that sum for
            hard assignments; T ln sum_k (w_k N_k)^(1 / T) at temperature T.
        counts: (K,), sum of the responsibilities r_nk.
        first: (K, D), sum of r_nk (y_n - mu_k).
        second: sum of r_nk (y_n - mu_k)(y_n - mu_k)^T: (K, D, D) for full; summed over k, (D, D),
            for tied; its diagonal (K, D) for diag; its trace (K,) for spherical and unit. NaN where
            it was not asked for.
    """

    objective: Tensor
    counts: Tensor
    first: Tensor
    second: Tensor


class _Statistics(ABC):
    """One family's sufficient statistics: rows of second order, then y, then 1."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    @property
    @abstractmethod
    def order_two(self) -> int:
        """How many rows of second order there are."""

    @abstractmethod
    def square(self, y: Tensor, rows: Tensor) -> None:
        """Write the rows of second order of y (D, n)."""

    @abstractmethod
    def natural(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Coefficients (K, F) of ln N in these rows."""

    @abstractmethod
    def central(self, raw: Tensor, first: Tensor, counts: Tensor, loc: Tensor) -> Tensor:
        """Second moments about loc, from those about the origin and the first moments about loc."""

    def fill(self, y: Tensor, rows: Tensor) -> None:
        """Write the rows of y (D, n), all but the last, which is always one."""
        self.square(y, rows[: self.order_two])
        rows[self.order_two : -1] = y

    def coefficients(self, square: Tensor, linear: Tensor, loc: Tensor, log_det: Tensor) -> Tensor:
        """Rows of Q: at y = mu, ln N is -D/2 ln 2 pi - ln det L."""
        constant = -0.5 * (linear * loc).sum(-1) - log_det - 0.5 * self.dim * math.log(2 * math.pi)
        return torch.cat([square, linear, constant[:, None]], -1)


class _Products(_Statistics):
    """y_i y_j for i <= j: full covariances."""

    @property
    def order_two(self) -> int:
        return self.dim * (self.dim + 1) // 2

    def square(self, y: Tensor, rows: Tensor) -> None:
        start = 0
        for i in range(self.dim):
            torch.mul(y[i], y[i:], out=rows[start : start + self.dim - i])
            start += self.dim - i

    def natural(self, loc: Tensor, scale: Tensor) -> Tensor:
        precision = torch.cholesky_inverse(scale)
        i, j = self._pairs(loc.device)
        square = -precision[:, i, j] * torch.where(i == j, 0.5, 1.0)
        linear = (precision @ loc[..., None])[..., 0]
        log_det = scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return self.coefficients(square, linear, loc, log_det)

    def central(self, raw: Tensor, first: Tensor, counts: Tensor, loc: Tensor) -> Tensor:
        i, j = self._pairs(loc.device)
        moments = raw.new_empty(*loc.shape, self.dim)
        moments[:, i, j] = moments[:, j, i] = raw
        cross = first[:, :, None] * loc[:, None, :]
        return (
            moments - cross - cross.mT - counts[:, None, None] * loc[:, :, None] * loc[:, None, :]
        )

    def _pairs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        i, j = torch.triu_indices(self.dim, self.dim, device=device)
        return i, j


class _Squares(_Statistics):
    """y_i^2: diagonal covariances."""

    @property
    def order_two(self) -> int:
        return self.dim

    def square(self, y: Tensor, rows: Tensor) -> None:
        torch.mul(y, y, out=rows)

    def natural(self, loc: Tensor, scale: Tensor) -> Tensor:
        precision = scale**-2
        return self.coefficients(-0.5 * precision, precision * loc, loc, scale.log().sum(-1))

    def central(self, raw: Tensor, first: Tensor, counts: Tensor, loc: Tensor) -> Tensor:
        return raw - 2 * first * loc - counts[:, None] * loc**2


class _Norm(_Statistics):
    """|y|^2: spherical covariances."""

    @property
    def order_two(self) -> int:
        return 1

    def square(self, y: Tensor, rows: Tensor) -> None:
        torch.sum(y * y, 0, keepdim=True, out=rows)

    def natural(self, loc: Tensor, scale: Tensor) -> Tensor:
        precision = (scale**-2).expand(len(loc))[:, None]
        log_det = self.dim * scale.log().expand(len(loc))
        return self.coefficients(-0.5 * precision, precision * loc, loc, log_det)

    def central(self, raw: Tensor, first: Tensor, counts: Tensor, loc: Tensor) -> Tensor:
        return raw[:, 0] - 2 * (first * loc).sum(-1) - counts * loc.square().sum(-1)


_FAMILIES: dict[str, type[_Statistics]] = {
    "full": _Products,
    "tied": _Norm,  # of the whitened data
    "diag": _Squares,
    "spherical": _Norm,
    "unit": _Norm,
}
_SCALE_SHAPES = {
    "full": "(K, D, D)",
    "tied": "(D, D)",
    "diag": "(K, D)",
    "spherical": "(K,)",
    "unit": "0-dim, or None",
}


@dataclass(frozen=True)
class _Parameters:
    """A mixture in float64, in the coordinates of the kernel: y less its mean, whitened if tied."""

    natural: Tensor  # (K, F)
    loc: Tensor  # (K, D)
    log_weights: Tensor  # (K,)
    scale: Tensor  # as given


class MixtureKernel:
    """E-step and sufficient statistics of a Gaussian mixture over fixed data, streamed in chunks.

    Args:
        y: data, shape (N, D), float32 or float64; kept, not copied.
        covariance: ``"full"``, ``"tied"`` (one full matrix for all components), ``"diag"``,
            ``"spherical"`` or ``"unit"`` (a known common scale, the identity by default).
        hard: whether each datum belongs wholly to its most probable component, the first of them
            where several are; with ``covariance="unit"`` and equal weights this is k-means.
        chunk: data held at once; by default what a processor's cache holds.

    Raises:
        ProgramError: data that are not a matrix in float32 or float64, or not finite; an unknown
            covariance; a chunk below one.

    Source: Dempster, Laird & Rubin (1977), JRSS B 39, section 4.3; for hard assignments, Lloyd
    (1982), IEEE Trans. Information Theory 28.
    """

    def __init__(
        self, y: Tensor, *, covariance: str, hard: bool = False, chunk: int | None = None
    ) -> None:
        if covariance not in _FAMILIES:
            raise ProgramError(
                f"covariance={covariance!r} is not known; choose one of {', '.join(_FAMILIES)}"
            )
        if y.dim() != 2 or y.dtype not in (torch.float32, torch.float64) or y.numel() == 0:
            raise ProgramError(
                "a mixture kernel needs data of shape (N, D) in float32 or float64; got "
                f"{y.dtype} of shape {tuple(y.shape)}: pass one row per datum, or convert them"
            )
        if chunk is not None and chunk < 1:
            raise ProgramError(f"chunk is a number of data of at least 1; got {chunk}")
        self.y, self.covariance, self.hard, self.chunk = y.detach(), covariance, hard, chunk
        self._rows = _FAMILIES[covariance](y.shape[1])
        self._shift, self._square_norm = _moments(self.y)
        if not torch.isfinite(self._shift).all():
            raise ProgramError(
                "the data of a mixture must be finite, but some are NaN or infinite: drop or "
                "impute them first"
            )

    @torch.no_grad()
    def __call__(
        self,
        log_weights: Tensor,
        loc: Tensor,
        scale: Tensor | None = None,
        *,
        temperature: float | Tensor = 1.0,
        weight: Tensor | None = None,
        second: bool = True,
    ) -> MixtureStatistics:
        """One E-step.

        Args:
            log_weights: ln w_k, shape (K,); minus infinity is an absent component.
            loc: mu_k, shape (K, D).
            scale: Cholesky factors of the covariances, (K, D, D) for full, (D, D) for tied;
                standard deviations, (K, D) for diag, (K,) for spherical, 0-dim or None for unit.
            temperature: T > 0; responsibilities are proportional to (w_k N_k)^(1 / T). Hard
                assignments do not depend on it.
            weight: how often each datum counts, shape (N,).
            second: whether second moments are wanted; only k-means, hard and unit, looks at it.
                Without them it takes about 0.6 of the time: sums in the dtype of the data within a
                chunk replace residuals in float64, and the objective comes from scores in that
                dtype, to the rounding unit times (spread / sigma)^2 for each datum.

        Raises:
            ProgramError: shapes that do not fit each other or the data.
        """
        at = self._parameters(log_weights, loc, scale)
        if weight is not None and weight.shape != self.y.shape[:1]:
            raise ProgramError(
                f"weight has one number per datum, shape ({len(self.y)},); got "
                f"{tuple(weight.shape)}"
            )
        if self.hard and self.covariance == "unit":
            if second or weight is not None:
                return self._residuals(at, weight)
            return self._sums(at)
        return self._soft(at, temperature, weight)

    @torch.no_grad()
    def responsibilities(
        self,
        log_weights: Tensor,
        loc: Tensor,
        scale: Tensor | None = None,
        *,
        temperature: float | Tensor = 1.0,
    ) -> Tensor:
        """Responsibilities r_nk, shape (N, K), in the dtype of the data; arguments as in a call."""
        at = self._parameters(log_weights, loc, scale)
        result = self.y.new_empty(len(self.y), len(loc))
        for rows, _, terms in self._terms(at, temperature):
            _share(terms, self.hard)
            result[rows] = terms.t().to(result.dtype)
        return result

    @torch.no_grad()
    def log_evidence(self, log_weights: Tensor, loc: Tensor, scale: Tensor | None = None) -> Tensor:
        """ln sum_k w_k N(y_n), nats, float64, shape (N,); the largest term where hard."""
        at = self._parameters(log_weights, loc, scale)
        result = self._shift.new_empty(len(self.y))
        for rows, _, terms in self._terms(at, 1.0):
            result[rows] = _share(terms, self.hard)
        return result

    @torch.no_grad()
    def assignments(self, log_weights: Tensor, loc: Tensor, scale: Tensor | None = None) -> Tensor:
        """The most probable component of each datum, the first of equals, int64, shape (N,)."""
        at = self._parameters(log_weights, loc, scale)
        result = torch.empty(len(self.y), dtype=torch.int64, device=self.y.device)
        if self.covariance == "unit":
            for rows, _, scores in self._scores(at):
                result[rows] = _first_max(scores)[0].flatten()
        else:
            for rows, _, terms in self._terms(at, 1.0):
                result[rows] = _first_max(terms)[0]
        return result

    @torch.no_grad()
    def log_densities(self, loc: Tensor, scale: Tensor | None = None) -> Tensor:
        """ln N(y_n | k), nats, float64, shape (N, K)."""
        at = self._parameters(loc.new_zeros(len(loc)), loc, scale)
        result = self._shift.new_empty(len(self.y), len(loc))
        for rows, _, terms in self._terms(at, 1.0):
            result[rows] = terms.t()
        return result

    @torch.no_grad()
    def moments(
        self, responsibilities: Tensor, loc: Tensor, scale: Tensor | None = None
    ) -> MixtureStatistics:
        """The statistics of given responsibilities (N, K), as of a hidden Markov model's states.

        The objective is NaN: it is not the mixture's.
        """
        at = self._parameters(loc.new_zeros(len(loc)), loc, scale)
        total = torch.zeros_like(at.natural)
        scatter = self._shift.new_zeros(self.y.shape[1], self.y.shape[1])
        for rows, phi in self._chunks(at, 0):
            r = responsibilities[rows].to(phi)
            total.addmm_(r.t(), phi.t())
            if self.covariance == "tied":
                linear = phi[self._rows.order_two : -1]
                scatter.addmm_(linear * r.sum(-1), linear.t())
        return self._central(at, self._shift.new_tensor(math.nan), total, scatter)

    def _soft(
        self, at: _Parameters, temperature: float | Tensor, weight: Tensor | None
    ) -> MixtureStatistics:
        """Statistics by r Phi^T; hard assignments are responsibilities of zero and one."""
        total = torch.zeros_like(at.natural)
        objective = self._shift.new_zeros(())
        scatter = self._shift.new_zeros(self.y.shape[1], self.y.shape[1])
        for rows, phi, terms in self._terms(at, temperature):
            evidence = _share(terms, self.hard)
            linear = centred = phi[self._rows.order_two : -1]
            if weight is not None:
                count = weight[rows].double()
                evidence, centred = evidence * count, linear * count
                terms *= count
            objective += evidence.sum()
            total.addmm_(terms, phi.t())
            if self.covariance == "tied":
                scatter.addmm_(centred, linear.t())
        if not self.hard:
            objective = objective * temperature
        return self._central(at, objective, total, scatter)

    def _central(
        self, at: _Parameters, objective: Tensor, total: Tensor, scatter: Tensor
    ) -> MixtureStatistics:
        """From moments about the origin to moments about the locations."""
        split = self._rows.order_two
        raw, moment, counts = total[:, :split], total[:, split:-1], total[:, -1]
        first = moment - counts[:, None] * at.loc
        if self.covariance != "tied":
            second = self._rows.central(raw, first, counts, at.loc)
            return MixtureStatistics(objective, counts, first, second)
        cross = first.t() @ at.loc
        second = scatter - cross - cross.t() - (at.loc * counts[:, None]).t() @ at.loc
        first, second = first @ at.scale.t(), at.scale @ second @ at.scale.t()
        return MixtureStatistics(objective, counts, first, second)

    def _terms(
        self, at: _Parameters, temperature: float | Tensor
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Each chunk's slice, Phi (F, n) and ln w_k N_k (K, n), divided by T unless hard."""
        count = len(at.natural)
        natural = at.natural if self.hard else at.natural / temperature
        terms = natural.new_empty(0)
        for rows, phi in self._chunks(at, 2 * count):
            if terms.numel() == 0:  # the first chunk is the largest
                terms = natural.new_empty(count, phi.shape[1])
            yield rows, phi, torch.mm(natural, phi, out=terms[:, : phi.shape[1]])

    def _chunks(self, at: _Parameters, more: int) -> Iterator[tuple[slice, Tensor]]:
        """Each chunk's slice and Phi (F, n); a chunk leaves room for ``more`` numbers a datum."""
        width = at.natural.shape[1]
        size = self._size(8 * (width + more + self.y.shape[1]))
        phi, centred = at.natural.new_ones(width, size), at.loc.new_empty(self.y.shape[1], size)
        for start in range(0, len(self.y), size):
            rows = slice(start, min(start + size, len(self.y)))
            n = rows.stop - start
            data = centred[:, :n].copy_(self.y[rows].t()).sub_(self._shift[:, None])
            if self.covariance == "tied":
                data = torch.linalg.solve_triangular(at.scale, data, upper=False)
            self._rows.fill(data, phi[:, :n])
            yield rows, phi[:, :n]

    def _sums(self, at: _Parameters) -> MixtureStatistics:
        """k-means: sums of the data that each component won; no residuals."""
        counts, moment = torch.zeros_like(at.log_weights), torch.zeros_like(at.loc)
        won, part = self._shift.new_zeros(()), self.y.new_empty(at.loc.shape)
        for _, data, scores in self._scores(at):
            label, largest = _first_max(scores)
            label = label.flatten()
            moment += part.zero_().index_add_(0, label, data)
            counts.index_add_(0, label, counts.new_ones(()).expand(len(label)))
            won += largest.sum(dtype=won.dtype)
        fit = (won - 0.5 * self._square_norm) / at.scale**2
        objective = fit + len(self.y) * (self._log_norm(at) + at.log_weights.max())
        first = moment - counts[:, None] * at.loc
        return MixtureStatistics(objective, counts, first, torch.full_like(counts, torch.nan))

    def _residuals(self, at: _Parameters, weight: Tensor | None) -> MixtureStatistics:
        """k-means with second moments: sums of the residuals themselves, in float64."""
        counts, second = torch.zeros_like(at.log_weights), torch.zeros_like(at.log_weights)
        first, loc = torch.zeros_like(at.loc), at.loc + self._shift
        for rows, _, scores in self._scores(at):
            label = _first_max(scores)[0].flatten()
            residual = self.y[rows] - loc[label]
            distance = residual.square().sum(1)
            if weight is None:
                count = torch.ones_like(distance)
            else:
                count = weight[rows].double()
                residual, distance = residual * count[:, None], distance * count
            counts.index_add_(0, label, count)
            first.index_add_(0, label, residual)
            second.index_add_(0, label, distance)
        used = torch.where(counts > 0, counts * at.log_weights, 0.0)  # 0 ln 0 is 0
        fit = used.sum() - 0.5 * second.sum() / at.scale**2
        return MixtureStatistics(fit + self._log_norm(at) * counts.sum(), counts, first, second)

    def _log_norm(self, at: _Parameters) -> Tensor:
        """ln N at its mode, for a common scale."""
        return -self.y.shape[1] * (at.scale.log() + 0.5 * math.log(2 * math.pi))

    def _scores(self, at: _Parameters) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Slices, their data less the mean (n, D), and scores (tiles, K, n / tiles).

        With a common scale s the squares of y cancel: the component chosen has the largest
        y mu_k - |mu_k|^2 / 2 + s^2 (ln w_k - max ln w). It is computed in the dtype of the data, so
        rounding may settle what is all but a tie.
        """
        y, (count, dim) = self.y, at.loc.shape
        weight = at.log_weights - at.log_weights.max()
        bias = (at.scale**2 * weight - 0.5 * at.loc.square().sum(-1)).to(y.dtype)[:, None]
        slope, shift = at.loc.to(y.dtype), self._shift.to(y.dtype)
        size = self._size(y.element_size() * (count + 2 * dim))
        tile = min(max(_TILE // count, 32), size) if y.device.type == "cpu" else size
        data, scores = y.new_empty(size, dim), y.new_empty(size * count)
        for rows in _whole_tiles(len(y), size, tile):
            n = rows.stop - rows.start
            part, shape = torch.sub(y[rows], shift, out=data[:n]), (max(n // tile, 1), count, -1)
            columns = part.view(shape[0], -1, dim).mT
            out = scores[: n * count].view(shape)
            torch.baddbmm(bias, slope.expand(shape[0], -1, -1), columns, out=out)
            yield rows, part, out

    def _size(self, bytes_each: int) -> int:
        """Data in a chunk, when each takes so many bytes."""
        if self.chunk is not None:
            return min(self.chunk, len(self.y))
        if self.y.device.type == "cpu":
            return min(max(_CHUNK_BYTES // bytes_each, 64), _LARGEST_CHUNK, len(self.y))
        return min(max(_DEVICE_BYTES // bytes_each, 64), len(self.y))

    def _parameters(self, log_weights: Tensor, loc: Tensor, scale: Tensor | None) -> _Parameters:
        dim, count = self.y.shape[1], len(log_weights)
        if scale is None and self.covariance == "unit":
            scale = self._shift.new_ones(())
        shape = {
            "full": (count, dim, dim),
            "tied": (dim, dim),
            "diag": (count, dim),
            "spherical": (count,),
            "unit": (),
        }[self.covariance]
        given = None if scale is None else tuple(scale.shape)
        if log_weights.dim() != 1 or loc.shape != (count, dim) or given != shape:
            raise ProgramError(
                f"a {self.covariance} mixture over data of {dim} columns needs log_weights (K,), "
                f"loc (K, {dim}) and scale {_SCALE_SHAPES[self.covariance]}; got "
                f"{tuple(log_weights.shape)}, {tuple(loc.shape)} and {given}"
            )
        assert scale is not None
        log_weights, scale = log_weights.to(self._shift), scale.to(self._shift)
        centred = loc.to(self._shift) - self._shift
        if self.covariance == "tied":
            centred = torch.linalg.solve_triangular(scale, centred.t(), upper=False).t()
            natural = self._rows.natural(centred, self._shift.new_ones(()))
            natural[:, -1] -= scale.diagonal().log().sum()
        else:
            natural = self._rows.natural(centred, scale)
        natural[:, -1] += log_weights
        return _Parameters(natural, centred, log_weights, scale)


def _moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """A shift near the mean, a number of the dtype of y, and the sum of |y - shift|^2; float64."""
    parts = y.split(_LARGEST_CHUNK if y.device.type == "cpu" else 2**20)
    total = torch.zeros(y.shape[1], dtype=torch.float64, device=y.device)
    for part in parts:
        total += part.double().sum(0)
    shift = (total / len(y)).to(y.dtype).double()
    square = torch.zeros_like(total)
    for part in parts:
        square += (part.double() - shift).square().sum(0)
    return shift, square.sum()


def _whole_tiles(count: int, size: int, tile: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``range(count)``: whole tiles, or less than one."""
    start = 0
    while start < count:
        n = min(size, count - start)
        n = n - n % tile if n > tile else n
        yield slice(start, start + n)
        start += n


def _share(terms: Tensor, hard: bool) -> Tensor:
    """Responsibilities in place of the terms (K, n); the log of their sum, or the largest."""
    if hard:
        label, largest = _first_max(terms)
        terms.zero_().scatter_(0, label[None], 1.0)
        return largest
    largest = terms.amax(0)
    total = terms.sub_(largest).exp_().sum(0)
    terms.div_(total)
    return largest.add_(total.log_())


def _first_max(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the largest of K scores, the first of equals, and its value.

    On a processor argmax is slow; the index of the only entry equal to the largest is a product.

    Args:
        scores: shape (*batch, K, n); overwritten.

    Returns:
        Index, int64, and value, both of shape (*batch, n).
    """
    largest = scores.amax(-2)
    if scores.device.type != "cpu":
        return scores.argmax(-2), largest
    chosen = torch.eq(scores, largest[..., None, :], out=scores)
    mark = torch.arange(_MARK, _MARK + scores.shape[-2], dtype=scores.dtype)
    index = torch.matmul(mark, chosen)
    low, high = index.aminmax()
    label = (index - _MARK).long()
    if low < _MARK or high >= 2 * _MARK:  # none is equal to NaN; several tie
        tied = (index < _MARK) | (index >= 2 * _MARK)
        label[tied] = chosen.mT[tied].argmax(-1)
    return label, largest
