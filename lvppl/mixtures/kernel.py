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
thousand sigma.

On processors the same statistics come from one compiled loop over tiles of rows
(:mod:`lvppl.mixtures.native`), whose residuals are whitened in float64 and do not cancel. Products
are left for accelerators, for many wide components, tied covariances, and machines for
which nothing was compiled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.mixtures import native
from lvppl.mixtures.chunks import LARGEST_CHUNK, rows_at_once
from lvppl.mixtures.families import FAMILIES
from lvppl.mixtures.lloyd import Centres, first_max

__all__ = ["MixtureKernel", "MixtureStatistics"]


_MOST_CANCELLED = 1e8  # (spread / sigma)^2 that leaves 1e-8 of a second moment


@dataclass(frozen=True)
class MixtureStatistics:
    """What one E-step leaves for the M-step; float64, about the locations of that E-step.

    Second moments have a relative error of about 1e-16 (spread / sigma)^2; see ``resolves``.

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
        if covariance not in FAMILIES:
            raise ProgramError(
                f"covariance={covariance!r} is not known; choose one of {', '.join(FAMILIES)}"
            )
        if y.dim() != 2 or y.dtype not in (torch.float32, torch.float64) or y.numel() == 0:
            raise ProgramError(
                "a mixture kernel needs data of shape (N, D) in float32 or float64; got "
                f"{y.dtype} of shape {tuple(y.shape)}: pass one row per datum, or convert them"
            )
        if chunk is not None and chunk < 1:
            raise ProgramError(f"chunk is a number of data of at least 1; got {chunk}")
        self.y, self.covariance, self.hard, self.chunk = y.detach(), covariance, hard, chunk
        self._rows = FAMILIES[covariance](y.shape[1])
        self._shift, self._square_norm = _moments(self.y)
        if not torch.isfinite(self._shift).all():
            raise ProgramError(
                "the data of a mixture must be finite, but some are NaN or infinite: drop or "
                "impute them first"
            )

    def resolves(self, scale: Tensor) -> bool:
        """Whether moments about the mean of the data tell widths like these, to 1e-8 of themselves.

        They cancel by (spread / sigma)^2; narrower components want sums of residuals.

        Args:
            scale: as in a call.
        """
        widths = scale.diagonal(dim1=-2, dim2=-1) if self.covariance in ("full", "tied") else scale
        spread = self._square_norm / len(self.y)
        return bool(spread <= _MOST_CANCELLED * widths.double().square().amin())

    @torch.no_grad()
    def __call__(
        self,
        log_weights: Tensor,
        loc: Tensor,
        scale: Tensor | None = None,
        *,
        temperature: float | Tensor = 1.0,
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
            second: whether second moments are wanted; only k-means, hard and unit, looks at it.
                Without them sums of the data replace sums of residuals, and the objective, which
                follows from these, is exact to 1e-16 (spread / sigma)^2 for each datum.

        Raises:
            ProgramError: shapes that do not fit each other or the data.
        """
        at = self._parameters(log_weights, loc, scale)
        if self.hard and self.covariance == "unit":
            return self._lloyd(at, second)
        if self.covariance != "tied" and native.takes(self.y, at.natural.numel()):
            return self._compiled(at, temperature)
        return self._soft(at, temperature)

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
        scatter = self._scatter()
        for rows, phi in self._chunks(at, 0):
            r = responsibilities[rows].to(phi)
            total.addmm_(r.t(), phi.t())
            if scatter is not None:
                linear = phi[self._rows.order_two : -1]
                scatter.addmm_(linear * r.sum(-1), linear.t())
        return self._central(at, self._shift.new_tensor(math.nan), total, scatter)

    def _compiled(self, at: _Parameters, temperature: float | Tensor) -> MixtureStatistics:
        """The same statistics by whitened residuals, in one compiled loop."""
        factor, offset, constant = _whitening(at)
        if not self.hard:
            root = torch.as_tensor(temperature, dtype=torch.float64).sqrt()
            factor, offset, constant = factor / root, offset / root, constant / root**2
        total, objective = native.mixture_totals(
            self.y, self._shift, factor, offset, constant, hard=self.hard
        )
        if self._rows.order_two == 1:
            squares, rest = total.split([self.y.shape[1], self.y.shape[1] + 1], -1)
            total = torch.cat([squares.sum(-1, keepdim=True), rest], -1)
        return self._central(at, objective if self.hard else objective * temperature, total)

    def _soft(self, at: _Parameters, temperature: float | Tensor) -> MixtureStatistics:
        """Statistics by r Phi^T; hard assignments are responsibilities of zero and one."""
        total = torch.zeros_like(at.natural)
        objective = self._shift.new_zeros(())
        scatter = self._scatter()
        for _, phi, terms in self._terms(at, temperature):
            objective += _share(terms, self.hard).sum()
            total.addmm_(terms, phi.t())
            if scatter is not None:
                linear = phi[self._rows.order_two : -1]
                scatter.addmm_(linear, linear.t())
        if not self.hard:
            objective = objective * temperature
        return self._central(at, objective, total, scatter)

    def _central(
        self, at: _Parameters, objective: Tensor, total: Tensor, scatter: Tensor | None = None
    ) -> MixtureStatistics:
        """From moments about the origin to moments about the locations."""
        split = self._rows.order_two
        raw, moment, counts = total[:, :split], total[:, split:-1], total[:, -1]
        first = moment - counts[:, None] * at.loc
        if scatter is None:
            second = self._rows.central(raw, first, counts, at.loc)
            return MixtureStatistics(objective, counts, first, second)
        cross = first.t() @ at.loc
        second = scatter - cross - cross.t() - (at.loc * counts[:, None]).t() @ at.loc
        first, second = first @ at.scale.t(), at.scale @ second @ at.scale.t()
        return MixtureStatistics(objective, counts, first, second)

    def _scatter(self) -> Tensor | None:
        """Room for the second moments of all data together, where they are wanted."""
        dim = self.y.shape[1]
        return self._shift.new_zeros(dim, dim) if self.covariance == "tied" else None

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
        size = rows_at_once(self.y, 8 * (width + more + self.y.shape[1]), self.chunk)
        phi, centred = at.natural.new_ones(width, size), at.loc.new_empty(self.y.shape[1], size)
        for start in range(0, len(self.y), size):
            rows = slice(start, min(start + size, len(self.y)))
            n = rows.stop - start
            data = centred[:, :n].copy_(self.y[rows].t()).sub_(self._shift[:, None])
            if self.covariance == "tied":
                data = torch.linalg.solve_triangular(at.scale, data, upper=False)
            self._rows.fill(data, phi[:, :n])
            yield rows, phi[:, :n]

    def _lloyd(self, at: _Parameters, second: bool) -> MixtureStatistics:
        """k-means; the objective follows from the sums, as sum of |y|^2 does not depend on them."""
        centres = self._centres(at)
        if second:
            counts, first, square = centres.residuals(self.y, self.chunk)
            distance = square.sum()
        else:
            total, counts = centres.sums(self.y, self.chunk)
            first = total - counts[:, None] * at.loc
            square = torch.full_like(counts, torch.nan)
            distance = self._square_norm - (at.loc * (total + first)).sum()
        used = torch.where(counts > 0, counts * at.log_weights, 0.0)  # 0 ln 0 is 0
        log_norm = -self.y.shape[1] * (at.scale.log() + 0.5 * math.log(2 * math.pi))
        objective = used.sum() - 0.5 * distance / at.scale**2 + log_norm * counts.sum()
        return MixtureStatistics(objective, counts, first, square)

    def _centres(self, at: _Parameters) -> Centres:
        preference = at.scale**2 * (at.log_weights - at.log_weights.max())
        return Centres(at.loc, preference, self._shift)

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
    parts = y.split(LARGEST_CHUNK if y.device.type == "cpu" else 2**20)
    total = torch.zeros(y.shape[1], dtype=torch.float64, device=y.device)
    for part in parts:
        total += part.double().sum(0)
    shift = (total / len(y)).to(y.dtype).double()
    square = torch.zeros_like(total)
    for part in parts:
        square += (part.double() - shift).square().sum(0)
    return shift, square.sum()


def _whitening(at: _Parameters) -> tuple[Tensor, Tensor, Tensor]:
    """A_k = L_k^-1, full or diagonal; A_k mu_k; ln w_k N_k at its mode."""
    count, dim = at.loc.shape
    if at.scale.dim() == 3:
        identity = torch.eye(dim, dtype=at.scale.dtype)
        factor = torch.linalg.solve_triangular(at.scale, identity, upper=False)
        log_det = at.scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        offset = (factor @ at.loc[..., None])[..., 0]
    else:
        widths = at.scale if at.scale.dim() == 2 else at.scale.reshape(-1, 1)
        widths = widths.expand(count, dim)
        factor, log_det, offset = 1 / widths, widths.log().sum(-1), at.loc / widths
    return factor, offset, at.log_weights - log_det - 0.5 * dim * math.log(2 * math.pi)


def _share(terms: Tensor, hard: bool) -> Tensor:
    """Responsibilities in place of the terms (K, n); the log of their sum, or the largest."""
    if hard:
        label, largest = first_max(terms)
        terms.zero_().scatter_(0, label[None], 1.0)
        return largest
    largest = terms.amax(0)
    total = terms.sub_(largest).exp_().sum(0)
    terms.div_(total)
    return largest.add_(total.log_())
