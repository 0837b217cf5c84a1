r"""Mean, variance and tail of a stream of weights.

Draws may come in strata, part j with the share a_j (:mod:`lvppl.inference.likelihood.proposals`).
With the mean m_j and the variance s_j^2 of the n_j weights of a part,

.. math:: \hat p = \sum_j a_j m_j, \qquad
    \operatorname{se}(\ln \hat p) = \frac{1}{\hat p} \sqrt{\sum_j a_j^2 s_j^2 / n_j}.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lvppl.inference.likelihood.resampling import Resamples
from lvppl.inference.psis import MIN_TAIL, khat_from_tail, khat_threshold, tail_size

__all__ = ["Finished", "Moments", "Trajectory", "WeightSums"]


class Trajectory(NamedTuple):
    """The estimate after the first few draws, and after more and more of them.

    Attributes:
        num_samples: how many draws, ascending, int64, (prefixes,).
        log_prob: ln p(y) from that many, float64, (prefixes, data), nats.
        std_error: its delta-method standard error, float64, (prefixes, data), nats.
        khat: Pareto shape of that many weights, float64, (prefixes, data); plus infinity where they
            are too few for a fit.
    """

    num_samples: Tensor
    log_prob: Tensor
    std_error: Tensor
    khat: Tensor

    @property
    def flagged(self) -> Tensor:
        """Where k-hat is above its threshold for so many draws, or they are too few to tell,
        (prefixes, data)."""
        limits = [khat_threshold(number) for number in self.num_samples.tolist()]
        return self.khat > self.khat.new_tensor(limits)[:, None]

    @classmethod
    def of(cls, sums: Sequence[Finished]) -> Trajectory:
        """The prefixes of all data side by side."""
        columns = [list(zip(*part.prefixes, strict=True)) for part in sums]
        log_prob, std_error, khat = (
            torch.cat([torch.stack(column[i]) for column in columns], -1) for i in (1, 2, 3)
        )
        return cls(torch.tensor(columns[0][0]), log_prob, std_error, khat)


class Finished(NamedTuple):
    """What all draws of some rows have shown; each (data,) unless said otherwise.

    Attributes:
        stop: the first row that is not among them.
        log_prob, std_error, ess, khat: as in the record of an estimate.
        observed: discrete and continuous values that these data score.
        replicates: ln p(y) of each bootstrap replicate, (replicates, data).
        prefixes: (draws, ln p(y), standard error, k-hat) after fewer draws.
        acceptance: of the moves of annealed chains, one entry a chunk.
    """

    stop: int
    log_prob: Tensor
    std_error: Tensor
    ess: Tensor
    khat: Tensor
    observed: tuple[int, int]
    replicates: Tensor | None = None
    prefixes: Sequence[tuple[int, Tensor, Tensor, Tensor]] = ()
    acceptance: Sequence[Tensor] = ()

    def to(self, device: torch.device | str) -> Finished:
        """The same on another device."""
        return Finished(*(_moved(value, device) for value in self))


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return tuple(_moved(item, device) for item in value)
    return value


class Moments:
    """Count, mean and squared deviations of weights over exp(reference), each (data,)."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, new: Tensor) -> None:
        """Chan, Golub & LeVeque's update of mean and squared deviations; (draws, data)."""
        if self.count == 0:
            self.mean = self.squares = torch.zeros_like(new[0])
            self.reference = torch.full_like(new[0], -math.inf)
        top = torch.maximum(self.reference, new.amax(0))
        top = top.where(top > -math.inf, torch.zeros_like(top))  # all weights zero so far
        shrink = (self.reference - top).exp()
        old_mean, old_squares = self.mean * shrink, self.squares * shrink.square()
        weight = (new - top).exp()
        mean = weight.mean(0)
        squares = (weight - mean).square().sum(0)
        number = new.shape[0]
        total = self.count + number
        gap = mean - old_mean
        self.mean = old_mean + gap * (number / total)
        self.squares = old_squares + squares + gap.square() * (self.count * number / total)
        self.reference = top.where(self.mean > 0, torch.full_like(top, -math.inf))
        self.count = total

    def over(self, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and squared deviations of weights over exp(reference)."""
        shrink = (self.reference - reference).exp()
        return self.mean * shrink, self.squares * shrink.square()


class Tail:
    """The largest log weights of a stream, and the smallest one.

    Args:
        num_samples: its length at most: the tail of fewer weights is no longer.
    """

    def __init__(self, num_samples: int) -> None:
        self.keep = min(tail_size(num_samples) + 1, num_samples)
        self.count = 0
        self.largest: Tensor | None = None

    def add(self, new: Tensor) -> None:
        """Add draws, float64, (draws, data)."""
        if self.largest is None:
            self.largest, self.smallest = new[:0], new[0]
        both = torch.cat([self.largest, new])
        self.largest = both.topk(min(self.keep, len(both)), dim=0, sorted=False).values
        self.smallest = torch.minimum(self.smallest, new.amin(0))
        self.count += len(new)

    def khat(self, epsilon: float) -> Tensor:
        """Pareto shape of the weights so far, (data,)."""
        assert self.largest is not None
        tail = self.largest.topk(min(tail_size(self.count) + 1, self.count), dim=0).values
        return khat_from_tail(tail, self.smallest, self.count, epsilon=epsilon)


class WeightSums:
    """Mean, variance and upper tail of the weights of some data, from a stream of draws.

    Args:
        num_samples: how many draws there will be in all.
        shares: of the parts that they come from, summing to one.
        counts: how many come from each part; all from the one part by default.
        resamples: running sums of bootstrap replicates, if wanted.
    """

    def __init__(
        self,
        num_samples: int,
        shares: Sequence[float] = (1.0,),
        counts: Sequence[int] = (),
        resamples: Resamples | None = None,
    ) -> None:
        self.tail = Tail(num_samples)
        self.part_tails = [Tail(count) for count in counts] if len(counts) > 1 else []
        self.shares = tuple(shares)
        self.parts = [Moments() for _ in shares]
        self.resamples = resamples
        self.observed = (0, 0)
        """Discrete and continuous values that these data score."""
        self.prefixes: list[tuple[int, Tensor, Tensor, Tensor]] = []
        """(draws, ln p(y), standard error, k-hat) of the prefixes that were looked at."""

    @property
    def count(self) -> int:
        return sum(part.count for part in self.parts)

    def add(self, log_weight: Tensor, part: int = 0) -> None:
        """Add the next draws of a part, (particles, data)."""
        self.epsilon = torch.finfo(log_weight.dtype).eps
        new = log_weight.to(torch.float64)
        for tail in (self.tail, *self.part_tails[part : part + 1]):
            tail.add(new)
        if self.resamples is not None:
            self.resamples.add(new, part)
        self.parts[part].add(new)

    def look(self) -> None:
        """Remember the estimate from the draws so far."""
        self.prefixes.append((self.count, self.log_prob, self.std_error, self.khat))

    def add_looking(self, log_weight: Tensor, prefixes: Sequence[int]) -> None:
        """Add the next draws, (particles, data), and look where there are as many as a prefix."""
        stops = [end - self.count for end in prefixes]
        stops = [stop for stop in stops if 0 < stop <= len(log_weight)]
        for first, stop in itertools.pairwise([0, *stops]):
            self.add(log_weight[first:stop])
            self.look()
        rest = log_weight[stops[-1] if stops else 0 :]
        if len(rest):
            self.add(rest)

    def finished(self, stop: int, acceptance: Sequence[Tensor] = ()) -> Finished:
        """The record of these rows, of which ``stop`` is the first that follows."""
        return Finished(
            stop,
            self.log_prob,
            self.std_error,
            self.ess,
            self.khat,
            self.observed,
            self.replicates,
            self.prefixes,
            acceptance,
        )

    @property
    def _drawn(self) -> list[tuple[float, Moments]]:
        return [(a, m) for a, m in zip(self.shares, self.parts, strict=True) if m.count]

    @property
    def _reference(self) -> Tensor:
        """The largest ln weight of all parts, zero where every weight is zero."""
        top = torch.stack([part.reference for _, part in self._drawn]).amax(0)
        return top.where(top > -math.inf, torch.zeros_like(top))

    @property
    def _mean(self) -> Tensor:
        """p(y) over exp(_reference)."""
        means = [share * part.over(self._reference)[0] for share, part in self._drawn]
        return torch.stack(means).sum(0)

    @property
    def log_prob(self) -> Tensor:
        mean = self._mean
        return torch.where(mean > 0, self._reference + mean.log(), -math.inf)

    @property
    def std_error(self) -> Tensor:
        mean = self._mean
        if any(part.count < 2 for part in self.parts):
            return torch.full_like(mean, math.nan)
        return self._variances.sum(0).sqrt() / mean

    @property
    def _variances(self) -> Tensor:
        """a_j^2 s_j^2 / n_j, the variance that each part adds, (parts, data)."""
        variances = [
            share**2 * part.over(self._reference)[1] / (part.count - 1) / part.count
            for share, part in self._drawn
        ]
        return torch.stack(variances)

    @property
    def ess(self) -> Tensor:
        """(sum v)^2 / sum v^2 with v = a_j w / n_j, what a draw adds to the estimate."""
        mean, total = self._mean, torch.zeros_like(self._mean)
        for share, part in self._drawn:
            part_mean, squares = part.over(self._reference)
            total += (share / part.count) ** 2 * (squares + part.count * part_mean.square())
        return torch.where(mean > 0, mean.square() / total, 0.0)

    @property
    def khat(self) -> Tensor:
        """Pareto shape of the weights, (data,); of strata, of the part with the largest variance.

        Draws of all strata together have no single tail: a few large weights of the prior's draws
        above many small ones of the guide's look heavier than any tail, though they are bounded.
        The part that carries the error is the one whose tail tells whether to trust it. Where it
        has too few draws for a fit, all weights are taken.
        """
        khat = self.tail.khat(self.epsilon)
        if not self.part_tails or any(part.count < 2 for part in self.parts):
            return khat
        largest = self._variances.argmax(0)
        for part, tail in enumerate(self.part_tails):
            if tail_size(tail.count) >= MIN_TAIL:
                khat = torch.where(largest == part, tail.khat(self.epsilon), khat)
        return khat

    @property
    def replicates(self) -> Tensor | None:
        """ln p(y) of each bootstrap replicate, (replicates, data)."""
        return None if self.resamples is None else self.resamples.log_prob(self.shares)
