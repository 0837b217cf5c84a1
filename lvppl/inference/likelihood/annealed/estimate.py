r"""ln p(y) of each datum by annealed importance sampling.

.. math:: \hat p(y) = \frac1S \sum_s w_s, \quad E \hat p(y) = p(y), \quad E \ln \hat p(y) \le
    \ln p(y)

Neal (2001), Statistics and Computing 11; Wu, Burda, Salakhutdinov & Grosse (2017), ICLR.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from os import PathLike
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lvppl.inference.addressed import AddressedDraws
from lvppl.inference.likelihood.annealed.chain import Annealed, backward, forward
from lvppl.inference.likelihood.annealed.noise import Noise
from lvppl.inference.likelihood.annealed.options import Annealing
from lvppl.inference.likelihood.annealed.path import Path, Points, without_marks
from lvppl.inference.likelihood.annealed.pilot import tuned
from lvppl.inference.likelihood.checkpoint import Checkpoint
from lvppl.inference.likelihood.checks import check_weights
from lvppl.inference.likelihood.estimate import LikelihoodEstimate
from lvppl.inference.likelihood.job import Job, Plan, in_blocks, plan_of
from lvppl.inference.likelihood.memory import PassSize
from lvppl.inference.likelihood.parts import in_parts
from lvppl.inference.likelihood.passes import Wanted
from lvppl.inference.likelihood.record import record_of
from lvppl.inference.likelihood.sizes import observed_sizes
from lvppl.inference.likelihood.weights import Finished, Trajectory, WeightSums
from lvppl.seeding import derived_seed, seeded

__all__ = ["Ladder", "annealed_estimate", "notes_of"]


def annealed_estimate(
    job: Job,
    wanted: Wanted,
    batch_size: int | None,
    sample_chunk: int | None,
    options: Annealing | None = None,
    progress: bool = False,
    checkpoint: str | PathLike[str] | None = None,
    known: Mapping[str, Any] = MappingProxyType({}),
) -> LikelihoodEstimate:
    """Anneal chains for each datum from where the job draws.

    Args:
        job: program, data, and what draws the starts: the prior or a guide.
        wanted: how many chains, and whether to look at the first few of them; no bootstrap.
        batch_size, sample_chunk: rows and chains of one pass.
        options: how chains move, and in how many steps.
        progress: show a bar.
        checkpoint, known: a file of finished parts, and what it must be of.

    Raises:
        ProgramError: as of :class:`~lvppl.inference.likelihood.annealed.path.Path`; a weight is
            NaN or plus infinity (by datum).
    """
    options = options or Annealing()
    num_samples = wanted.num_samples
    plan = plan_of(unmarked(job), num_samples, batch_size, sample_chunk)
    if checkpoint is not None and batch_size is None:
        plan = in_blocks(plan, job.rows or 1)
    keep = None
    if checkpoint is not None:
        keep = Checkpoint(checkpoint, unmarked(job), plan, {**known, "annealing": options})
    size, rows = PassSize(plan.batch, plan.chunk, plan.whole), job.rows or 1
    with tqdm(total=rows * num_samples, disable=not progress, unit="chain") as bar:

        def at(start: int) -> None:
            bar.update(start * num_samples - bar.n)

        def work(start: int, stop: int) -> Finished:
            return _annealed(job, plan, start, stop, size.draws, wanted, options)

        found = in_parts(rows, size, work, at, keep)
    if size.halvings:
        job.remarks.append(size.note)
    acceptance = [rates for part in found for rates in part.acceptance]
    notes = (*notes_of(job, options, acceptance), *job.notes(plan.layout))
    trajectory = Trajectory.of(found) if wanted.trajectory else None
    return record_of(job, found, num_samples, notes, estimator="ais", trajectory=trajectory)


def _annealed(
    job: Job, plan: Plan, start: int, stop: int, chunk: int, wanted: Wanted, options: Annealing
) -> Finished:
    """All chains of rows start:stop, at most ``chunk`` at once."""
    ladder = Ladder(job, plan, start, stop, options)
    sums, acceptance = WeightSums(wanted.num_samples), []
    sums.observed = ladder.observed
    for sample in range(0, wanted.num_samples, chunk):
        chains = ladder.up(sample, min(chunk, wanted.num_samples - sample))
        check_weights(chains.log_weight, start)
        sums.add_looking(chains.log_weight, wanted.prefixes if wanted.trajectory else ())
        acceptance += [] if chains.acceptance is None else [chains.acceptance]
    return sums.finished(stop, acceptance)


class Ladder:
    """The path of rows start:stop of a job, with moves that a pilot has tuned.

    Attributes:
        observed: discrete and continuous values that these rows score.
    """

    def __init__(self, job: Job, plan: Plan, start: int, stop: int, options: Annealing) -> None:
        self.job, self.plate, self.first_datum = job, plan.plate, start
        self.observed = observed_sizes(unmarked(job).run(start, stop, plate=plan.plate))
        data, guide = job.cut(start, stop), job.proposal.guide
        with self._seeded("pilot"):
            self.path = Path(job.model, guide, data, job.kwargs, job.data_plate)
            seed = derived_seed(job.seed, "pilot")
            points = self._start(seed, 0, options.pilot_chains)
            self.tuning = tuned(self.path, points, options, self._noise(seed, points))

    def up(self, first_chain: int, chains: int) -> Annealed:
        """Chains numbered from ``first_chain``, annealed from the start to the posterior."""
        seed = self.job.seed
        with self._seeded(f"chains {first_chain}"):
            points = self._start(seed, first_chain, chains)
            noise = self._noise(seed, points, first_chain)
            return forward(self.path, points, self.tuning, noise)

    def down(self, draws: Mapping[str, Tensor], chains: int) -> Annealed:
        """Chains annealed from exact draws of the posterior to the start."""
        seed = derived_seed(self.job.seed, "backward")
        with self._seeded("chains backward"):
            points = self.path.at_values(draws, chains)
            noise = self._noise(seed, points)
            return backward(self.path, points, self.tuning, noise)

    def _start(self, seed: int, first_chain: int, chains: int) -> Points:
        address = (seed, self.plate, self.first_datum, first_chain, self.job.unaddressed)
        return self.path.start(AddressedDraws(*address), chains)

    def _noise(self, seed: int, points: Points, first_chain: int = 0) -> Noise:
        device = points.log_weight.device
        return Noise(derived_seed(seed, "annealing"), first_chain, self.first_datum, device)

    def _seeded(self, purpose: str) -> AbstractContextManager[int]:
        """For randomness that no address reaches; the global generators stay as they are."""
        device = self.job.data[0].device if self.job.rows is not None else None
        return seeded(derived_seed(self.job.seed, f"{purpose}, rows {self.first_datum}"), device)


def unmarked(job: Job) -> Job:
    """The job without marks for enumeration, where chains start from the prior.

    A latent that is drawn given an enumerated site would be drawn once for each of its values.
    """
    if job.proposal.guide is not None:
        return job
    return replace(job, model=without_marks(job.model))


def notes_of(job: Job, options: Annealing, acceptance: list[Tensor]) -> tuple[str, ...]:
    """What a reader of the numbers should know of the chains."""
    start = "the guide" if job.proposal.guide is not None else "the prior"
    notes = [f"annealed from {start} to the posterior in {options.num_steps} steps"]
    if acceptance:
        rates = torch.cat(acceptance)
        notes.append(
            f"{float(rates.mean()):.0%} of trajectories were accepted on average, "
            f"{float(rates.min()):.0%} at the worst datum"
        )
    return tuple(notes)
