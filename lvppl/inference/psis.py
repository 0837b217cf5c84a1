"""Pareto smoothed importance sampling: the tail of importance weights, measured and smoothed.

With heavy-tailed weights w = p / q a few samples carry the whole average. Above a high threshold
u the weights follow a generalized Pareto distribution, P(w - u > t) = (1 + k t / sigma)^(-1/k);
its shape k says how many moments exist (1 / k of them) and so whether a standard error means
anything. The fit is the empirical Bayes estimate of Zhang & Stephens (2009, Technometrics 51),
used as in Vehtari, Simpson, Gelman, Yao & Gabry (2024, JMLR 25:72, section 3 and appendices).

Sign convention: every function here takes log *weights*, the larger the more important.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lvppl.errors import ProgramError

__all__ = ["MIN_TAIL", "khat_from_tail", "khat_threshold", "psis", "tail_size"]

MIN_TAIL = 5
"""Fewer points above the cutoff are not enough for a fit."""

_PRIOR_SCALE = 3.0  # of the grid of b = k / sigma, in quartiles of the tail
_PRIOR_COUNT = 10  # samples that the weak prior k = 1/2 is worth
_BLOCK = 2**22  # elements held at once by the fit
_ROUNDING = 1000.0  # spreads of all log weights below this many rounding units are no spread
_TIE = 100.0  # the same for the tail alone, which may be narrow and still have a shape


def khat_threshold(num_samples: int) -> float:
    """Largest k-hat at which ``num_samples`` weights still give a trustworthy average.

    min(1 - 1 / log10 S, 0.7) (Vehtari et al. 2024, section 3.2.4).

    Args:
        num_samples: S, the number of weights per datum.

    Returns:
        The threshold; minus infinity for one sample.
    """
    if num_samples <= 1:
        return -math.inf
    return min(1.0 - 1.0 / math.log10(num_samples), 0.7)


def tail_size(num_samples: int) -> int:
    """Number of largest weights that the Pareto tail is fitted to: ceil(min(S / 5, 3 sqrt S)).

    Rounded up, as in ArviZ 0.2x; ArviZ 1.x rounds down, which moves k-hat by a few hundredths.
    """
    return math.ceil(min(num_samples / 5.0, 3.0 * num_samples**0.5))


def psis(log_weights: Tensor, *, normalize: bool = True) -> tuple[Tensor, Tensor]:
    """Pareto smoothed log weights and the shape k-hat of their tail.

    The M = ceil(min(S / 5, 3 sqrt S)) largest weights are replaced by the quantiles
    F^-1((i - 1/2) / M) of the generalized Pareto distribution fitted to them, cut off at the
    largest raw weight. Everything is computed in float64.

    Args:
        log_weights: ln w, shape (samples, *data), nats; minus infinity is a weight of zero.
        normalize: whether the smoothed weights of each datum sum to one (as ``az.psislw`` does by
            default); otherwise they keep the scale of ``log_weights``.

    Returns:
        The smoothed log weights, float64, shape (samples, *data), and k-hat, float64, shape
        (data). k-hat is plus infinity where no tail can be fitted (fewer than five weights above
        the cutoff, which always holds below S = 21; all weights zero), and minus infinity where
        there is no tail: the log weights are equal up to rounding, as for an exact proposal, or at
        least the M + 1 >= 6 largest of them are, as for weights of few distinct values, which are
        bounded (ArviZ gives plus infinity there). In both cases nothing is smoothed.

    Raises:
        ProgramError: no samples, or log weights that are NaN or plus infinity.

    Source: Vehtari et al. (2024), JMLR 25:72, algorithm 1.
    """
    if log_weights.dim() == 0 or log_weights.shape[0] == 0:
        raise ProgramError(
            "psis expects log weights of shape (samples, *data) with at least one sample, "
            f"got shape {tuple(log_weights.shape)}."
        )
    if bool((log_weights.isnan() | (log_weights == math.inf)).any()):
        raise ProgramError(
            "psis expects log weights that are finite or minus infinity, got NaN or plus infinity: "
            "the model has no finite density at a draw, or the guide has none."
        )
    data_shape = log_weights.shape[1:]
    num_samples = log_weights.shape[0]
    rows = log_weights.reshape(num_samples, -1).T.to(torch.float64)  # (data, samples)
    ordered, order = rows.sort(dim=-1, stable=True)
    size = min(tail_size(num_samples) + 1, num_samples)
    epsilon = _epsilon(log_weights)
    tail = ordered[:, -size:]
    tail, khat = _smooth_tail(tail, _is_flat(tail, ordered[:, 0], num_samples, epsilon))
    smoothed = torch.cat([ordered[:, :-size], tail], -1)
    smoothed = torch.empty_like(smoothed).scatter_(-1, order, smoothed)
    if normalize:
        total = smoothed.logsumexp(-1, keepdim=True)
        smoothed = smoothed - total.where(total > -math.inf, torch.zeros_like(total))
    return smoothed.T.reshape(num_samples, *data_shape), khat.reshape(data_shape)


def khat_from_tail(
    largest: Tensor, smallest: Tensor, num_samples: int, *, epsilon: float | None = None
) -> Tensor:
    """k-hat of a stream of weights from its upper tail alone; the same value as :func:`psis`.

    Args:
        largest: the min(M + 1, S) largest log weights of each datum in any order, M =
            :func:`tail_size` (S), shape (tail, data), nats.
        smallest: the smallest log weight of each datum, shape (data,).
        num_samples: S, the number of weights in the stream.
        epsilon: relative rounding of the log weights; that of ``largest.dtype`` by default. Give
            it where weights computed in single precision were stored in double.

    Returns:
        k-hat, float64, shape (data,); infinities as in :func:`psis`.
    """
    ordered = largest.to(torch.float64).T.sort(-1).values
    epsilon = _epsilon(largest) if epsilon is None else epsilon
    flat = _is_flat(ordered, smallest.to(torch.float64), num_samples, epsilon)
    return _smooth_tail(ordered, flat)[1]


def _epsilon(values: Tensor) -> float:
    return torch.finfo(values.dtype).eps if values.is_floating_point() else 0.0


def _is_flat(tail: Tensor, smallest: Tensor, num_samples: int, epsilon: float) -> Tensor:
    """Whether all weights are equal, or those of an ascending tail long enough to tell."""
    largest = tail[:, -1]
    # One weight has no spread to speak of, so it is no evidence of an exact proposal.
    if num_samples < 2:
        return torch.zeros_like(largest, dtype=torch.bool)
    unit = epsilon * largest.abs().clamp(min=1.0)
    equal = largest - smallest <= _ROUNDING * unit
    if tail_size(num_samples) < MIN_TAIL:
        return equal
    return equal | (largest - tail[:, 0] <= _TIE * unit)


def _smooth_tail(ordered: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
    """Smooth ascending upper tails (data, 1 + M) whose first entry is the cutoff; give k-hat."""
    if ordered.shape[0] == 0:
        return ordered, ordered.new_empty(0)
    block = max(1, _BLOCK // (ordered.shape[1] * (31 + math.isqrt(ordered.shape[1]))))
    pieces = [
        _smooth_block(rows, flags)
        for rows, flags in zip(ordered.split(block), flat.split(block), strict=True)
    ]
    return torch.cat([tail for tail, _ in pieces]), torch.cat([khat for _, khat in pieces])


def _smooth_block(ordered: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
    largest = ordered[:, -1:]
    reference = largest.where(largest > -math.inf, torch.zeros_like(largest))
    relative = ordered - reference
    # Weights that underflow against the largest one say nothing about the tail.
    cutoff = relative[:, :1].clamp(min=math.log(torch.finfo(torch.float64).tiny))
    in_tail = relative > cutoff
    count = in_tail.sum(-1)
    excess = (relative.exp() - cutoff.exp()).where(in_tail, torch.zeros_like(relative))
    khat, sigma = _fit_pareto(excess, count)
    fitted = (count >= MIN_TAIL) & khat.isfinite() & (sigma > 0) & ~flat

    start = (ordered.shape[1] - count).unsqueeze(-1)  # the tail is the last `count` entries
    position = torch.arange(ordered.shape[1], dtype=ordered.dtype, device=ordered.device) - start
    probability = (position + 0.5) / count.clamp(min=1).unsqueeze(-1)
    quantile = _pareto_quantile(probability.clamp(0.0, 1.0), khat, sigma)
    smoothed = (quantile + cutoff.exp()).log().clamp(max=0.0) + reference
    tail = smoothed.where(in_tail & fitted.unsqueeze(-1), ordered)

    khat = khat.where(fitted, torch.full_like(khat, math.inf))
    return tail, khat.where(~flat, torch.full_like(khat, -math.inf))


def _fit_pareto(excess: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Shape k and scale sigma of generalized Pareto tails (Zhang & Stephens 2009, section 3).

    ``excess`` is ascending, shape (data, tail); its last ``count`` entries are the sample and the
    rest are zeros, which add ln(1 - 0) = 0 to every sum.
    """
    number = count.clamp(min=1)
    size = number.to(excess.dtype)
    grid_size = 30 + size.sqrt().floor()
    step = torch.arange(1, int(grid_size.max()) + 1, dtype=excess.dtype, device=excess.device)
    on_grid = step <= grid_size.unsqueeze(-1)
    quartile_index = excess.shape[1] - number + ((number + 2) // 4).clamp(min=1) - 1
    quartile = excess.gather(-1, quartile_index.unsqueeze(-1))
    grid = 1.0 - (grid_size.unsqueeze(-1) / (step - 0.5)).sqrt()
    grid = grid / (_PRIOR_SCALE * quartile) + 1.0 / excess[:, -1:]

    shape = torch.log1p(-grid.unsqueeze(-1) * excess.unsqueeze(-2)).sum(-1) / size.unsqueeze(-1)
    profile = size.unsqueeze(-1) * ((-grid / shape).log() - shape - 1.0)
    weight = profile.masked_fill(~on_grid, -math.inf).softmax(-1)
    weight = weight.masked_fill(weight < 10 * torch.finfo(excess.dtype).eps, 0.0)
    weight = weight / weight.sum(-1, keepdim=True)
    b = (weight * grid.where(weight > 0, torch.zeros_like(grid))).sum(-1)

    k = torch.log1p(-b.unsqueeze(-1) * excess).sum(-1) / size
    sigma = -k / b
    return (size * k + _PRIOR_COUNT * 0.5) / (size + _PRIOR_COUNT), sigma


def _pareto_quantile(probability: Tensor, k: Tensor, sigma: Tensor) -> Tensor:
    k, sigma = k.unsqueeze(-1), sigma.unsqueeze(-1)
    exponential = -torch.log1p(-probability)
    is_exponential = k.abs() < torch.finfo(k.dtype).eps
    safe = k.masked_fill(is_exponential, 1.0)
    return sigma * exponential.where(is_exponential, torch.expm1(safe * exponential) / safe)
