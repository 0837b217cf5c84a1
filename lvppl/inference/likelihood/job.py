"""A program and its proposal, run on some rows and samples at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lvppl.checks import check
from lvppl.errors import ProgramError
from lvppl.inference.likelihood.checks import check_weights
from lvppl.inference.likelihood.proposals import Proposal
from lvppl.inference.likelihood.sizes import observed_sizes
from lvppl.inference.likelihood.weights import WeightSums
from lvppl.inference.minibatch import gather
from lvppl.layout import Layout, layout_of
from lvppl.seeding import derived_seed, seeded
from lvppl.terms import Terms, trace_terms
from lvppl.tracing import undisturbed

__all__ = ["Job", "Plan", "plan_of", "run"]

Program = Callable[..., Any]

_PROBED = 2**24  # data elements that may go through the program at once to learn its plates
_BUDGET = {"cpu": 2**20}  # elements of observed and latent values in one pass: fits the cache
_BUDGET_ACCELERATOR = 2**26
_FEW = 256  # samples worth taking together: a guide's encoder runs once for all of them


@dataclass
class Job:
    """A (model, proposal, data) triple, run on some rows and samples at a time."""

    model: Program
    proposal: Proposal
    data: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: int | None
    seed: int
    data_plate: str | Sequence[str] | None
    unaddressed: set[str] = field(default_factory=set)

    def cut(self, start: int, stop: int) -> tuple[Any, ...]:
        """Arguments with rows start:stop of every tensor that follows the rows."""
        if self.rows is None or (start == 0 and stop >= self.rows):
            return self.data
        device = self.data[0].device
        return gather(self.data, torch.arange(start, stop, device=device), self.rows)

    def run(
        self, start: int, stop: int, *, first_sample: int = 0, particles: int = 1, plate: Any = None
    ) -> Terms:
        """Terms of draws numbered from ``first_sample`` for rows start:stop."""
        draws = self.proposal.draws(self.seed, plate, start, first_sample, self.unaddressed)
        # For randomness that no address reaches: no two passes share it.
        other = derived_seed(self.seed, f"ln p(y), rows {start}, draws {first_sample}")
        device = self.data[0].device if self.rows is not None else None
        try:
            with seeded(other, device), draws:
                terms = trace_terms(
                    self.model,
                    self.proposal.guide,
                    self.cut(start, stop),
                    self.kwargs,
                    num_particles=particles,
                    data_plate=self.data_plate,
                )
                terms.log_weight  # noqa: B018  evaluated here, where it may fail
        except torch.cuda.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError, IndexError) as error:
            if self.rows is None or stop - start >= self.rows:
                raise
            raise ProgramError(
                f"The program fails on rows {start} to {stop - 1} of {self.rows}: {error} If all "
                "rows together run, the program fixes plate sizes or the guide keeps parameters "
                f"for every row: write sizes as x.shape[0], or use batch_size={self.rows}."
            ) from error
        if self.rows is not None and stop - start < self.rows and plate is not None:
            self._check_rows(terms, start, stop, plate)
        return terms

    def _check_rows(self, terms: Terms, start: int, stop: int, plate: str) -> None:
        if terms.num_data != stop - start:
            raise ProgramError(
                f"Rows {start} to {stop - 1} gave {terms.num_data} data: plate '{plate}' does not "
                f"follow the rows of the first argument. Use batch_size={self.rows}."
            )

    def notes(self, layout: Layout) -> tuple[str, ...]:
        notes = []
        if layout.loop_reason:
            notes.append(f"particles run as a loop: {layout.loop_reason}")
        if self.unaddressed:
            sites = ", ".join(f"'{name}'" for name in sorted(self.unaddressed))
            notes.append(f"draws of {sites} depend on batch_size and sample_chunk")
        return tuple(notes)


class Plan(NamedTuple):
    layout: Layout
    plate: str | None  # the one data plate, if there is one
    batch: int  # rows in a pass
    chunk: int  # samples in a pass


def plan_of(job: Job, num_samples: int, batch_size: int | None, sample_chunk: int | None) -> Plan:
    """Learn the program's plates from one pass; choose how many rows and samples a pass takes."""
    rows = job.rows or 1
    probed = min(rows, batch_size or _default_probe(job))
    terms, layout = _probe(job, probed, num_samples)
    obstacle = _why_whole(job, layout, probed)
    if obstacle and batch_size is None and probed < rows:
        probed = rows
        terms, layout = _probe(job, rows, num_samples)
    sites = [*terms.observed.values(), *terms.latents.values()]
    elements = max(1, sum(site.value.numel() for site in sites))
    budget = _BUDGET.get(terms.log_weight.device.type, _BUDGET_ACCELERATOR)
    together = min(num_samples, sample_chunk or _FEW)
    batch = min(rows, batch_size or max(1, budget * probed // (elements * together)))
    plate = layout.data_plates[0].name if len(layout.data_plates) == 1 else None
    if not obstacle and batch not in (rows, probed):
        try:
            job.run(0, batch, plate=plate)
        except ProgramError as error:
            obstacle = str(error)
    if obstacle:
        if probed < rows or (batch_size is not None and job.rows is None):
            raise ProgramError(f"The data cannot be cut into {probed} rows at a time: {obstacle}")
        batch = rows
    chunk = min(num_samples, sample_chunk or max(1, budget * probed // (elements * batch)))
    chunk = 1 if layout.loop_reason else chunk
    return Plan(layout, plate, batch, chunk)


def _probe(job: Job, probed: int, num_samples: int) -> tuple[Terms, Layout]:
    terms = job.run(0, probed)
    layout = layout_of(
        job.model,
        job.proposal.guide,
        job.cut(0, probed),
        job.kwargs,
        with_particles=num_samples > 1,
        data_plate=job.data_plate,
    )
    _refuse_subsampling(layout)
    _check_assumptions(job, probed)
    return terms, layout


def _check_assumptions(job: Job, probed: int) -> None:
    """Refuse what has no density, and a prior that cannot be sampled where it is to be."""
    # Not strictly: an observation of probability zero is honest here, its ln p(y) minus infinity.
    report = check(job.model, job.proposal.guide, *job.cut(0, probed), strict=False, **job.kwargs)
    report.require(computable=True)
    if job.proposal.guide is not None:
        with undisturbed():
            data = job.cut(0, probed)
            terms = trace_terms(job.model, job.proposal.guide, data, job.kwargs, strict=False)
        points = terms.has_point()
        if points:
            raise ProgramError(
                f"The guide holds '{points[0]}' at a point of a continuous space: it does not "
                "cover the posterior, and one point gives ln p(y, z), not ln p(y). Use a guide "
                "with a density, such as AutoNormal, or estimator='prior'."
            )
    for row in report.rows if job.proposal.name == "prior" else ():
        if row.role != "observed" and not row.samplable:
            raise ProgramError(
                f'estimator="prior" draws z from the prior, which cannot be sampled: {row.reason} '
                'Use estimator="importance" with a guide.'
            )


def _default_probe(job: Job) -> int:
    rows = job.rows or 1
    size = sum(x.numel() for x in job.data if isinstance(x, Tensor) and x.shape[:1] == (rows,))
    return max(1, rows * _PROBED // max(size, _PROBED))


def _refuse_subsampling(layout: Layout) -> None:
    names = [plate.name for plate in layout.data_plates if plate.size != plate.full_size]
    for name in (*names, *layout.subsampled_inside):
        raise ProgramError(
            f"Plate '{name}' is subsampled, and ln p(y) is about all the data it is given. Run "
            "the program on full plates: leave subsample and subsample_size out, and pass the "
            "rows to evaluate."
        )


def _why_whole(job: Job, layout: Layout, probed: int) -> str:
    """Why the data cannot be cut into rows; empty if they may be."""
    if not layout.data_plates:
        return (
            "no plate is common to every sample site, as with global latents, so that the whole "
            "data set is one datum and ln p(y) its joint value. Leave batch_size out."
        )
    if job.rows is None:
        return "the first argument is no tensor of rows. Leave batch_size out."
    if len(layout.data_plates) > 1:
        names = ", ".join(f"'{plate.name}'" for plate in layout.data_plates)
        return (
            f"plates {names} all hold data, and rows belong to one of them. Name it with "
            "data_plate=, or leave batch_size out."
        )
    plate = layout.data_plates[0]
    if plate.size != probed:
        return (
            f"data plate '{plate.name}' has size {plate.size} for {probed} rows of the first "
            "argument. Make rows its first dimension, or leave batch_size out."
        )
    return ""


def run(job: Job, plan: Plan, num_samples: int, progress: bool) -> list[WeightSums]:
    rows = job.rows or 1
    results = []
    with tqdm(total=rows * num_samples, disable=not progress, unit="draw") as bar:
        for start in range(0, rows, plan.batch):
            stop = min(start + plan.batch, rows)
            sums = WeightSums(num_samples)
            for sample in range(0, num_samples, plan.chunk):
                particles = min(plan.chunk, num_samples - sample)
                terms = job.run(
                    start, stop, first_sample=sample, particles=particles, plate=plan.plate
                )
                log_weight = job.proposal.log_weight(terms)
                check_weights(log_weight, start)
                if sample == 0:
                    sums.observed = observed_sizes(terms)
                sums.add(log_weight)
                bar.update((stop - start) * particles)
            results.append(sums)
    return results
