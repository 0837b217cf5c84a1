"""All draws of all data, weighed pass by pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from tqdm.auto import tqdm

from lvppl.inference.likelihood.checkpoint import Checkpoint
from lvppl.inference.likelihood.checks import check_weights
from lvppl.inference.likelihood.job import Job, Plan
from lvppl.inference.likelihood.memory import PassSize
from lvppl.inference.likelihood.parts import in_parts
from lvppl.inference.likelihood.proposals import Proposal
from lvppl.inference.likelihood.resampling import Resamples
from lvppl.inference.likelihood.sizes import observed_sizes
from lvppl.inference.likelihood.weights import Finished, WeightSums
from lvppl.terms import Terms

__all__ = ["Beside", "Wanted", "run"]


class Wanted(NamedTuple):
    """What is to be found out about each datum.

    Attributes:
        num_samples: S, draws.
        bootstrap: how many replicates of the estimate to keep sums of.
        trajectory: whether to look at the first 2, 4, 8 ... draws as well.
    """

    num_samples: int
    bootstrap: int | None = None
    trajectory: bool = False

    @property
    def prefixes(self) -> list[int]:
        """Numbers of draws at which to stop and look, ascending, S the last of them."""
        powers = [2**k for k in range(1, self.num_samples.bit_length())] if self.trajectory else []
        return [*(power for power in powers if power < self.num_samples), self.num_samples]


class Beside(Protocol):
    """Sums of something else over the weighted draws of some rows."""

    def add(self, terms: Terms, log_weight: Tensor, first_sample: int) -> None:
        """The next draws: their terms, their ln w (particles, data), the number of the first."""


def run(
    job: Job,
    plan: Plan,
    wanted: Wanted,
    progress: bool,
    keep: Checkpoint | None = None,
    beside: Callable[[int, int], Beside] | None = None,
) -> list[Finished]:
    """Weigh all draws of all data; passes are halved where memory runs out.

    Args:
        keep: what is finished already, and where to keep more.
        beside: makes what else is summed over the draws of rows start:stop; called again where
            memory ran out.
    """
    rows, each = job.rows or 1, wanted.num_samples
    size = PassSize(plan.batch, plan.chunk, plan.whole)
    with tqdm(total=rows * each, disable=not progress, unit="draw") as bar:

        def at(start: int) -> None:
            bar.update(start * each - bar.n)

        def work(start: int, stop: int) -> Finished:
            also = None if beside is None else beside(start, stop)
            return _weigh(job, plan, size, wanted, start, stop, bar.update, also).finished(stop)

        results = in_parts(rows, size, work, at, keep, shared=beside is None)
    job.note_strata(wanted.num_samples)
    if size.halvings:
        job.remarks.append(size.note)
    return results


def _weigh(
    job: Job,
    plan: Plan,
    size: PassSize,
    wanted: Wanted,
    start: int,
    stop: int,
    tell: Callable[[int], Any],
    also: Beside | None,
) -> WeightSums:
    """The weights of all draws of rows start:stop."""
    shares = [stratum.share for stratum in job.proposal.strata]
    resamples = Resamples(wanted.bootstrap, job.seed, len(shares)) if wanted.bootstrap else None
    counts = job.proposal.counts(wanted.num_samples)
    sums = WeightSums(wanted.num_samples, shares, counts, resamples)
    chunk = size.draws
    if chunk > 1 and job.layout(start, stop, with_particles=True).loop_reason:
        chunk = 1
    for end in wanted.prefixes:
        for part, first, particles in _passes(job.proposal, sums, end, chunk):
            terms = job.run(
                start, stop, first_sample=first, particles=particles, plate=plan.plate, part=part
            )
            log_weight = job.proposal.log_weight(terms)
            check_weights(log_weight, start)
            if sums.count == 0:
                sums.observed = observed_sizes(terms)
            if also is not None:
                also.add(terms, log_weight, first)
            del terms  # with all that the programs computed: the next pass needs room for its own
            sums.add(log_weight, part)
            tell((stop - start) * particles)
        if wanted.trajectory:
            sums.look()
    return sums


def _passes(
    proposal: Proposal, sums: WeightSums, end: int, chunk: int
) -> Iterator[tuple[int, int, int]]:
    """(part, first draw, number of draws) of the passes from where ``sums`` is to ``end`` draws."""
    for part, last in enumerate(proposal.counts(end)):
        for first in range(sums.parts[part].count, last, chunk):
            yield part, first, min(chunk, last - first)
