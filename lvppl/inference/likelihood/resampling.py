r"""Bootstrap replicates of an estimate of p(y), from a stream of weights.

In a replicate b, draw i is counted c_bi times, c_bi ~ Poisson(1) independently, which is the
bootstrap without its fixed total (Oza & Russell 2001, AISTATS; Chamandy et al. 2012, Google):

.. math:: \hat p_b = \sum_j a_j \frac{\sum_i c_{bji} w_{ji}}{\sum_i c_{bji}},

and the standard deviation of ln p_b over b is a standard error of ln p that sees the skewness of
the weights. The counts are a function of (seed, part, draw, replicate): chunks change nothing, and
two estimates from the same draws have the same counts, so that the difference of their replicates
is a replicate of their difference. They are the same for all data, which makes the sums a matrix
product; each datum has its own draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lvppl.inference.addressed import _mix_int, _Noise
from lvppl.seeding import derived_seed

__all__ = ["Resamples", "bootstrap_std_error", "poisson_counts"]

_BLOCK = 2**22  # counts held at once


def poisson_counts(
    seed: int, part: int, first: int, number: int, replicates: int, device: torch.device
) -> Tensor:
    """Poisson(1) counts of draws first ... first + number - 1, float64, (number, replicates)."""
    key = _mix_int(derived_seed(seed, f"bootstrap, part {part}"))
    noise = _Noise(key, torch.Size((number,)), (-1, first), (None, 0))
    uniform = noise.uniform((number, replicates), device)
    mass = torch.tensor([math.exp(-1) / math.factorial(k) for k in range(19)], dtype=torch.float64)
    return torch.searchsorted(mass.cumsum(0).to(device), uniform).to(torch.float64)


class Resamples:
    """Running sums of the weights of some data in each replicate.

    Args:
        replicates: B, how many.
        seed: of the estimate.
        parts: number of parts that the draws come from.
    """

    def __init__(self, replicates: int, seed: int, parts: int = 1) -> None:
        self.number, self.seed = replicates, seed
        self.drawn = [0] * parts
        self.counts: list[Tensor] = [torch.zeros(replicates, dtype=torch.float64)] * parts
        self.sums: list[Tensor] = [torch.zeros(replicates, 1, dtype=torch.float64)] * parts
        self.references: list[Tensor] = [torch.tensor(-math.inf, dtype=torch.float64)] * parts

    def add(self, log_weight: Tensor, part: int = 0) -> None:
        """Add the next draws of a part, float64, (draws, data)."""
        for block in log_weight.split(max(1, _BLOCK // self.number)):
            self._add(block, part)

    def _add(self, new: Tensor, part: int) -> None:
        reference = self.references[part].to(new)
        top = torch.maximum(reference, new.amax(0))
        top = top.where(top > -math.inf, torch.zeros_like(top))
        counts = poisson_counts(
            self.seed, part, self.drawn[part], len(new), self.number, new.device
        )
        old = self.sums[part].to(new) * (reference - top).exp()
        self.sums[part] = old + counts.T @ (new - top).exp()
        self.counts[part] = self.counts[part].to(new) + counts.sum(0)
        self.references[part] = top
        self.drawn[part] += len(new)

    def log_prob(self, shares: Sequence[float] = (1.0,)) -> Tensor:
        """ln p_b, (replicates, data); NaN where a part has no draw in the replicate."""
        top = torch.stack(self.references).amax(0)
        mean = torch.zeros_like(self.sums[0])
        for share, sums, counts, own in zip(
            shares, self.sums, self.counts, self.references, strict=True
        ):
            mean = mean + share * sums / counts[:, None] * (own - top).exp()
        return mean.log() + top


def bootstrap_std_error(replicates: Tensor) -> Tensor:
    """Standard deviation over replicates, (data,), those without a draw left out.

    Plus infinity where a replicate may have weight zero; NaN where every replicate has.
    """
    kept = replicates[~replicates.isnan().any(1)]
    if len(kept) < 2:
        return torch.full_like(replicates[0], math.nan)
    none = kept == -math.inf
    error = kept.masked_fill(none, 0.0).std(0)
    error = torch.where(none.any(0), math.inf, error)
    return torch.where(none.all(0), math.nan, error)
