"""A program and its proposal, run on some rows and samples at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lvppl.checks import check
from lvppl.errors import ProgramError
from lvppl.inference.likelihood.memory import attempt, names_memory, ran_out, too_small
from lvppl.inference.likelihood.proposals import Proposal, SetTo, check_mixture
from lvppl.inference.minibatch import gather
from lvppl.layers import FastLayers
from lvppl.layout import Layout, layout_of
from lvppl.seeding import derived_seed, seeded
from lvppl.terms import Terms, trace_terms
from lvppl.tracing import is_enumerated, sample_sites, trace_pair, undisturbed

__all__ = ["Job", "Plan", "in_blocks", "plan_of"]

Program = Callable[..., Any]

_PROBED = 2**24  # data elements that may go through the program at once to learn its plates
_BUDGET = {"cpu": 2**22}  # elements of observed and latent values in one pass
_BUDGET_ACCELERATOR = 2**26
_ENOUGH = 20  # draws of a part: then a variance is known to about a third
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
    remarks: list[str] = field(default_factory=list)

    def cut(self, start: int, stop: int) -> tuple[Any, ...]:
        """Arguments with rows start:stop of every tensor that follows the rows."""
        if self.rows is None or (start == 0 and stop >= self.rows):
            return self.data
        device = self.data[0].device
        return gather(self.data, torch.arange(start, stop, device=device), self.rows)

    def layout(self, start: int, stop: int, *, with_particles: bool = False) -> Layout:
        """The structure of model and guide on rows start:stop; remembered by shape."""
        return layout_of(
            self.model,
            self.proposal.guide,
            self.cut(start, stop),
            self.kwargs,
            with_particles=with_particles,
            data_plate=self.data_plate,
        )

    def run(
        self,
        start: int,
        stop: int,
        *,
        first_sample: int = 0,
        particles: int = 1,
        plate: Any = None,
        part: int = 0,
    ) -> Terms:
        """Terms of draws of a part of the proposal from ``first_sample`` on, rows start:stop."""
        stratum = self.proposal.strata[part]
        seed = stratum.seed(self.seed)
        draws = self.proposal.draws(seed, plate, start, first_sample, self.unaddressed)
        # For randomness that no address reaches: no two passes share it.
        other = derived_seed(seed, f"ln p(y), rows {start}, draws {first_sample}")
        device = self.data[0].device if self.rows is not None else None
        try:
            with seeded(other, device), draws:
                values = self._prior_draws(start, stop, particles) if stratum.from_prior else {}
                with SetTo(values), FastLayers():
                    terms = self._terms(start, stop, particles)
                terms.log_weight  # noqa: B018  evaluated here, where it may fail
        except (ValueError, RuntimeError, IndexError) as error:
            if self.rows is None or stop - start >= self.rows or ran_out(error):
                raise
            raise ProgramError(
                f"The program fails on rows {start} to {stop - 1} of {self.rows}: {error} If all "
                "rows together run, the program fixes plate sizes or the guide keeps parameters "
                f"for every row: write sizes as x.shape[0], or use batch_size={self.rows}."
            ) from error
        if self.rows is not None and stop - start < self.rows and plate is not None:
            self._check_rows(terms, start, stop, plate)
        return terms

    def _terms(self, start: int, stop: int, particles: int) -> Terms:
        return trace_terms(
            self.model,
            self.proposal.guide,
            self.cut(start, stop),
            self.kwargs,
            num_particles=particles,
            data_plate=self.data_plate,
        )

    def _prior_draws(self, start: int, stop: int, particles: int) -> dict[str, Tensor]:
        """z ~ p(z) by site, in the dimensions that a run of model and guide has."""
        several = particles > 1
        layout = self.layout(start, stop, with_particles=several)
        trace, _ = trace_pair(
            self.model,
            None,
            self.cut(start, stop),
            self.kwargs,
            nesting=layout.nesting,
            num_particles=particles if several else None,
        )
        latents = (s for s in sample_sites(trace) if not s["is_observed"] and not is_enumerated(s))
        return {site["name"]: site["value"] for site in latents}

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
        return (*notes, *self.remarks)

    def note_strata(self, num_samples: int) -> None:
        """Say where a part has so few draws that its share of the standard error is rough."""
        fewest = min(self.proposal.counts(num_samples))
        if len(self.proposal.strata) > 1 and fewest < _ENOUGH:
            self.remarks.append(
                f"only {fewest} draws from one of guide and prior: their part of the standard "
                "error is rough, and intervals are a little short"
            )


class Plan(NamedTuple):
    layout: Layout
    plate: str | None  # the one data plate, if there is one
    batch: int  # rows in a pass
    chunk: int  # samples in a pass
    whole: str = ""  # why the rows cannot be cut


def plan_of(job: Job, num_samples: int, batch_size: int | None, sample_chunk: int | None) -> Plan:
    """Learn the program's plates from one pass; choose how many rows and samples a pass takes."""
    rows = job.rows or 1
    wanted = min(rows, batch_size or _default_probe(job))
    probed, terms, layout = _probe_what_fits(job, wanted, num_samples)
    most = rows if probed == wanted else probed  # more did not fit
    obstacle = _why_whole(job, layout, probed)
    if obstacle and batch_size is None and probed < rows:
        found = attempt(_probe, job, rows, num_samples)
        if found is None:
            raise too_small(rows, obstacle)
        (terms, layout), probed, most = found, rows, rows
    run = terms._runs[0]
    sites = [*run.observed_sites, *run.guide_latents]
    elements = max(1, sum(site["value"].numel() for site in sites))
    budget = _BUDGET.get(terms.log_weight.device.type, _BUDGET_ACCELERATOR)
    together = min(num_samples, sample_chunk or _FEW)
    batch = min(most, batch_size or _evenly(rows, budget * probed // (elements * together)))
    plate = layout.data_plates[0].name if len(layout.data_plates) == 1 else None
    if not obstacle and batch not in (rows, probed):
        try:
            attempt(job.run, 0, batch, plate=plate)
        except ProgramError as error:
            obstacle = str(error)
    if obstacle:
        if probed < rows or (batch_size is not None and job.rows is None):
            raise ProgramError(f"The data cannot be cut into {probed} rows at a time: {obstacle}")
        batch = rows
    chunk = sample_chunk or _evenly(num_samples, budget * probed // (elements * batch))
    chunk = min(num_samples, chunk)
    chunk = 1 if layout.loop_reason else chunk
    return Plan(layout, plate, batch, chunk, obstacle)


_BLOCKS = 32


def in_blocks(plan: Plan, rows: int) -> Plan:
    """A plan with some tens of parts of rows at least: each is kept on disk when it is done."""
    return plan if plan.whole else plan._replace(batch=min(plan.batch, -(-rows // _BLOCKS)))


def _evenly(number: int, most: int) -> int:
    """The size of a part, ``most`` or less, where as few parts as can be are about equal."""
    parts = -(-number // max(1, most))
    return -(-number // parts)


def _probe_what_fits(job: Job, probed: int, num_samples: int) -> tuple[int, Terms, Layout]:
    """Probe with as many rows as memory holds, ``probed`` at most: (rows, terms, layout)."""
    while True:
        found = attempt(_probe, job, probed, num_samples)
        if found is not None:
            # two particles that memory cannot hold are no reason to loop while rows can be cut
            cramped = names_memory(found[1].loop_reason)
            if not cramped or probed == 1 or _why_whole(job, found[1], probed):
                return probed, *found
        if probed == 1:
            raise too_small(1, "" if job.rows is not None else "they are no tensor of rows.")
        probed = (probed + 1) // 2


def _probe(job: Job, probed: int, num_samples: int) -> tuple[Terms, Layout]:
    terms = job.run(0, probed)
    layout = job.layout(0, probed, with_particles=num_samples > 1)
    _refuse_subsampling(terms.layout)  # of this run: a fit on minibatches leaves other full sizes
    _check_assumptions(job, probed)
    if job.proposal.defensive:
        _check_defensive(job, terms, probed)
    return terms, layout


def _check_defensive(job: Job, terms: Terms, probed: int) -> None:
    """Refuse a guide that cannot be evaluated at draws from the prior."""
    check_mixture(terms)
    try:
        job.run(0, probed, part=1)
    except ProgramError as error:
        if ran_out(error):
            raise
        raise ProgramError(
            f"defensive= needs ln q(z | y) of the guide at draws from the prior, which fails: "
            f"{error} Leave defensive out, or use a guide whose density is known everywhere."
        ) from error


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
    what = "defensive=" if job.proposal.defensive else 'estimator="prior"'
    for row in report.rows if job.proposal.draws_prior else ():
        if row.role != "observed" and not row.samplable:
            raise ProgramError(
                f"{what} draws z from the prior, which cannot be sampled: {row.reason} "
                'Use estimator="importance" with a guide, and no defensive=.'
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
