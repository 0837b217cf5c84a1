r"""ln p(y) by Monte Carlo, per datum, with honest error bars.

.. math:: \hat p(y) = \frac1S \sum_s w_s, \qquad w_s = \frac{p(y, z_s)}{r(z_s)}, \quad z_s \sim r,

is unbiased for p(y) for every r that covers the posterior: r = p(z) is the naive estimator,
r = q(z | y) importance sampling. The random numbers of a draw depend only on the seed, the site,
the datum and the sample, never on how data and samples are cut into chunks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from pyro.distributions import DirichletMultinomial, Independent, MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions import constraints
from tqdm.auto import tqdm

from lvppl.checks import check
from lvppl.errors import ProgramError
from lvppl.inference.addressed import AddressedDraws
from lvppl.inference.minibatch import gather, num_rows
from lvppl.inference.psis import khat_from_tail, khat_threshold, tail_size
from lvppl.layout import Layout, layout_of
from lvppl.seeding import checked_seed, derived_seed, seeded
from lvppl.terms import Terms, trace_terms
from lvppl.tracing import undisturbed

__all__ = ["LikelihoodEstimate", "log_likelihood"]

Program = Callable[..., Any]

ESTIMATORS = ("importance", "naive")
_PROBED = 2**24  # data elements that may go through the program at once to learn its plates
_BUDGET = {"cpu": 2**20}  # elements of observed and latent values in one pass: fits the cache
_BUDGET_ACCELERATOR = 2**26
_FEW = 256  # samples worth taking together: a guide's encoder runs once for all of them


# ----------------------------------------------------------------------------------------- record


@dataclass(frozen=True, eq=False)
class LikelihoodEstimate:
    """ln p(y) of each datum as estimated from S draws, in nats, with its reliability.

    All tensors are float64, in the order of the data, of shape (data,); (1,) where the whole data
    set is one datum.
    """

    log_prob: Tensor
    """ln of the mean weight. Minus infinity where every draw has weight zero."""
    std_error: Tensor
    """Delta-method standard error, sd(w) / (sqrt(S) mean(w)); NaN for one draw or no weight."""
    ess: Tensor
    """Effective number of draws, (sum w)^2 / sum w^2, between 1 and S; 0 with no weight."""
    khat: Tensor
    """Pareto shape of the weights' tail; see :func:`lvppl.inference.psis.psis`."""
    num_samples: int
    """S, draws per datum."""
    estimator: str
    """``"importance"`` or ``"naive"``."""
    seed: int
    """Gives the same numbers again."""
    num_discrete: int = 0
    """Observed discrete values that were scored, in all data: what a mask hides is not counted, and
    a one-hot vector or a vector of counts is one value."""
    num_continuous: int = 0
    """Observed continuous values that were scored, in all data."""
    bin_width: float | None = None
    """Width of the cells that continuous values were rounded to."""
    notes: tuple[str, ...] = field(default=())
    """What a reader of the numbers should know."""

    @property
    def num_data(self) -> int:
        return self.log_prob.numel()

    @property
    def total(self) -> float:
        """Sum of ln p(y) over data, nats."""
        return float(self.log_prob.sum())

    @property
    def total_std_error(self) -> float:
        """Monte Carlo standard error of ``total``, nats; draws are independent across data."""
        return float(self.std_error.square().sum().sqrt())

    @property
    def mean(self) -> float:
        """Average of ln p(y) over data, nats per datum."""
        return self.total / self.num_data

    @property
    def mean_std_error(self) -> float:
        """Monte Carlo standard error of ``mean``: of the estimate, not of the choice of data."""
        return self.total_std_error / self.num_data

    @property
    def bias(self) -> Tensor:
        """First-order bias of ``log_prob``, -std_error^2 / 2 (Jensen), shape (data,), nats."""
        return -0.5 * self.std_error.square()

    @property
    def bits_per_dim(self) -> float:
        """-log2 of the probability of the data, divided by the number of observed values.

        Values that a mask hides are not counted. A continuous value enters with the probability
        p(y) * bin_width of its cell.

        Raises:
            ProgramError: y is continuous and no bin width was given: a density is not a
                probability, and its logarithm changes with the unit of y.
        """
        return (-self.total - self._log_volume) / (self._num_dims * math.log(2.0))

    @property
    def bits_per_dim_std_error(self) -> float:
        """Monte Carlo standard error of ``bits_per_dim``."""
        return self.total_std_error / (self._num_dims * math.log(2.0))

    @property
    def _num_dims(self) -> int:
        if self.num_discrete + self.num_continuous == 0:
            raise ProgramError(
                "bits_per_dim needs observed values, but the model scores none: it has no observed "
                "site, or masks hide every value."
            )
        return self.num_discrete + self.num_continuous

    @property
    def _log_volume(self) -> float:
        if self.num_continuous == 0:
            return 0.0
        if self.bin_width is None:
            raise ProgramError(
                f"bits_per_dim needs probabilities, but {self.num_continuous} observed values "
                "are continuous and have densities, which depend on the unit of y. Pass "
                "bin_width=, the width of the cells that y was rounded to (1/255 for 8-bit pixels "
                "scaled to [0, 1]), or model y as discrete."
            )
        return self.num_continuous * math.log(self.bin_width)

    @property
    def khat_threshold(self) -> float:
        """min(1 - 1 / log10 S, 0.7): above it neither estimate nor standard error is reliable."""
        return khat_threshold(self.num_samples)

    @property
    def flagged(self) -> Tensor:
        """Indices of the data whose k-hat is above the threshold, int64."""
        return (self.khat > self.khat_threshold).nonzero().flatten()

    def summary(self) -> str:
        """A few lines to read."""
        source = "prior" if self.estimator == "naive" else "guide"
        number = self.num_data
        lines = [
            f"ln p(y), {self.estimator}: {number} {'datum' if number == 1 else 'data'}, "
            + f"{self.num_samples} draws each from the {source}",
            f"  mean per datum  {self.mean:.4f} ± {self.mean_std_error:.2g} nats",
            f"  total           {self.total:.4f} ± {self.total_std_error:.2g} nats",
        ]
        if self.num_discrete + self.num_continuous > 0 and (
            self.num_continuous == 0 or self.bin_width is not None
        ):
            lines.append(
                f"  bits per dim    {self.bits_per_dim:.5f} ± {self.bits_per_dim_std_error:.2g}"
            )
        lines.append(
            f"  effective draws {float(self.ess.median()):.1f} in the median, "
            f"{float(self.ess.min()):.1f} at worst"
        )
        lines.append(f"  {self._reliability()}")
        lines.append(
            "  ln of an unbiased estimate is biased low: here by about "
            f"{-float(self.bias.mean()):.2g} nats per datum to first order"
        )
        lines.extend(f"  note: {note}" for note in self.notes)
        return "\n".join(lines)

    def _reliability(self) -> str:
        if tail_size(self.num_samples) < 5:
            return f"k-hat cannot be fitted to {self.num_samples} draws: take at least 21"
        flagged = self.flagged.numel()
        text = f"k-hat above {self.khat_threshold:.2f} for {flagged} of {self.num_data} data"
        return text + (": their values and errors are not reliable" if flagged else "")

    def __repr__(self) -> str:
        return (
            f"LikelihoodEstimate({self.estimator}, {self.num_data} data, {self.num_samples} draws, "
            f"mean {self.mean:.4f} ± {self.mean_std_error:.2g} nats, "
            f"{self.flagged.numel()} flagged)"
        )

    __str__ = summary


# ------------------------------------------------------------------------------------- the estimate


def log_likelihood(
    model: Program,
    *data: Any,
    guide: Program | None = None,
    estimator: str = "importance",
    num_samples: int = 1000,
    batch_size: int | None = None,
    sample_chunk: int | None = None,
    seed: int | None = None,
    bin_width: float | None = None,
    data_plate: str | Sequence[str] | None = None,
    progress: bool = False,
    **kwargs: Any,
) -> LikelihoodEstimate:
    r"""Estimate ln p(y) of each datum: :math:`\ln \frac1S \sum_s p(y, z_s) / r(z_s)`, z_s ~ r.

    Sites marked for enumeration are summed exactly. Programs run without gradients, sums are kept
    in float64, and memory is bounded: data and samples are both taken in chunks, of which only
    running sums and the largest weights are kept.

    **What does not depend on chunks.** Noise is a function of (seed, site, datum, sample), so that
    ``batch_size`` and ``sample_chunk`` change the results by rounding only. Draws by rejection
    (Poisson, binomial and von Mises latents) and randomness outside sample sites (dropout) are
    the exceptions: right and reproducible, but other numbers for other chunks; ``notes`` names
    such sites. Batch normalisation in training mode mixes data: put such modules in ``eval()``.

    Args:
        model: a Pyro program ``model(*data, **kwargs)``.
        *data: arguments of the program. Where all latents are local, tensors with as many rows as
            the first argument are cut into chunks of rows together, and everything else is passed
            whole, as in minibatches. With global latents the data set is one datum, kept whole.
        guide: q(z | y), a Pyro program of the same signature; not used by ``"naive"``.
        estimator: ``"importance"`` (r is the guide) or ``"naive"`` (r is the prior).
        num_samples: S, draws per datum.
        batch_size: most rows in one pass of the programs; chosen for memory and speed by default.
        sample_chunk: most draws per datum in one pass.
        seed: whole number; a fresh one by default. The global generators are left untouched.
        bin_width: width of the cells that continuous y was rounded to, for bits per dimension.
        data_plate: names of the plates that hold the data; default every plate common to all
            sites. With several of them the data stay whole.
        progress: show a bar.
        **kwargs: passed to the programs whole.

    Returns:
        A :class:`LikelihoodEstimate`.

    Raises:
        ProgramError: no samples or data, NaN or infinity in the data, an unknown estimator, no
            guide for ``"importance"``, a prior that cannot be sampled for ``"naive"`` (as with
            ``pyro.factor``), a site without a density, a program that subsamples, ``batch_size``
            below the number of rows where the data cannot be cut, a weight that is NaN or plus
            infinity (by datum).

    Warns:
        UserWarning: for ``"importance"``, which data have k-hat above min(1 - 1 / log10 S, 0.7).

    Sources: Owen (2013), Monte Carlo theory, methods and examples, ch. 9 (ratio and delta-method
    errors, effective sample size); Burda, Grosse & Salakhutdinov (2016), ICLR, section 3 (the
    bound E ln p-hat <= ln p); Vehtari et al. (2024), JMLR 25:72 (k-hat).
    """
    _check_options(estimator, guide, num_samples, batch_size, sample_chunk, bin_width)
    rows = _check_data(data)
    seed = checked_seed(seed)
    proposal = guide if estimator == "importance" else None
    job = _Job(model, proposal, data, kwargs, rows, seed, data_plate)
    with torch.no_grad():
        plan = _plan(job, num_samples, batch_size, sample_chunk)
        sums = _run(job, plan, num_samples, progress)
    discrete, continuous = (sum(part.observed[kind] for part in sums) for kind in (0, 1))
    if bin_width is not None and continuous == 0:
        raise ProgramError(
            "bin_width turns densities into probabilities, but every observed site is discrete and "
            "has probabilities already. Leave bin_width out."
        )
    estimate = LikelihoodEstimate(
        log_prob=torch.cat([part.log_prob for part in sums]),
        std_error=torch.cat([part.std_error for part in sums]),
        ess=torch.cat([part.ess for part in sums]),
        khat=torch.cat([part.khat for part in sums]),
        num_samples=num_samples,
        estimator=estimator,
        seed=seed,
        num_discrete=discrete,
        num_continuous=continuous,
        bin_width=bin_width,
        notes=job.notes(plan.layout),
    )
    if estimator == "importance":
        _warn(estimate)
    return estimate


def _warn(estimate: LikelihoodEstimate) -> None:
    if tail_size(estimate.num_samples) < 5:
        return  # k-hat says nothing about the data then; the summary says so
    flagged = estimate.flagged.tolist()
    if flagged:
        names = ", ".join(map(str, flagged[:10])) + (", ..." if len(flagged) > 10 else "")
        warnings.warn(
            f"k-hat is above {estimate.khat_threshold:.2f} for {len(flagged)} of "
            f"{estimate.num_data} data ({names}): the guide misses mass of their posteriors, and "
            "their ln p(y) and standard errors are not reliable. Take a wider guide or more "
            "samples.",
            UserWarning,
            stacklevel=3,
        )


# ----------------------------------------------------------------------------------------- checks


def _check_options(
    estimator: str,
    guide: Program | None,
    num_samples: int,
    batch_size: int | None,
    sample_chunk: int | None,
    bin_width: float | None,
) -> None:
    if estimator not in ESTIMATORS:
        raise ProgramError(f"estimator must be one of {ESTIMATORS}, got {estimator!r}.")
    if estimator == "importance" and guide is None:
        raise ProgramError(
            'estimator="importance" draws z from a guide, and none was given: pass guide=, or '
            'estimator="naive" to draw from the prior.'
        )
    counts = {"num_samples": num_samples, "batch_size": batch_size, "sample_chunk": sample_chunk}
    for name, value in counts.items():
        if value is None and name != "num_samples":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ProgramError(f"{name} must be a whole number of at least 1, got {value!r}.")
    if bin_width is not None and not (bin_width > 0 and math.isfinite(bin_width)):
        raise ProgramError(f"bin_width must be a positive number, got {bin_width!r}.")


def _check_data(data: tuple[Any, ...]) -> int | None:
    """Number of rows of the first argument, ``None`` if it is no tensor; bad data are refused."""
    for i, x in enumerate(data):
        if not isinstance(x, Tensor):
            continue
        if x.numel() == 0:
            raise ProgramError(
                f"The data are empty: argument {i} has shape {tuple(x.shape)}. Pass at least one "
                "row."
            )
        bad = ~x.isfinite()
        if bool(bad.any()):
            where = bad.reshape(len(bad) if bad.dim() else 1, -1).any(-1).nonzero().flatten()
            raise ProgramError(
                f"Argument {i} has NaN or infinite values in {where.numel()} rows "
                f"({_few(where.tolist())}). Remove those rows, or fill their values and mask them."
            )
    return num_rows(data)


def _check_weights(log_weight: Tensor, first_datum: int) -> None:
    bad = (log_weight.isnan() | (log_weight == math.inf)).any(0)
    if bool(bad.any()):
        where = (bad.nonzero().flatten() + first_datum).tolist()
        kind = "NaN" if bool(log_weight.isnan().any()) else "infinite"
        raise ProgramError(
            f"Importance weights are {kind} for {len(where)} data ({_few(where)}): at a drawn z "
            "the model has no finite density, or the guide gives density zero to its own draw. "
            "Look at these data with lvppl.check; bound scales away from zero, and let the guide "
            "cover the support of the prior."
        )


def _few(indices: Sequence[int]) -> str:
    return ", ".join(map(str, indices[:10])) + (", ..." if len(indices) > 10 else "")


# ------------------------------------------------------------------------------- chunks and passes


@dataclass
class _Job:
    """A (model, proposal, data) triple, run on some rows and samples at a time."""

    model: Program
    proposal: Program | None
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
        draws = AddressedDraws(self.seed, plate, start, first_sample, self.unaddressed)
        # For randomness that no address reaches: no two passes share it.
        other = derived_seed(self.seed, f"ln p(y), rows {start}, draws {first_sample}")
        device = self.data[0].device if self.rows is not None else None
        try:
            with seeded(other, device), draws:
                terms = trace_terms(
                    self.model,
                    self.proposal,
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


class _Plan(NamedTuple):
    layout: Layout
    plate: str | None  # the one data plate, if there is one
    batch: int  # rows in a pass
    chunk: int  # samples in a pass


def _plan(job: _Job, num_samples: int, batch_size: int | None, sample_chunk: int | None) -> _Plan:
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
    return _Plan(layout, plate, batch, chunk)


def _probe(job: _Job, probed: int, num_samples: int) -> tuple[Terms, Layout]:
    terms = job.run(0, probed)
    layout = layout_of(
        job.model,
        job.proposal,
        job.cut(0, probed),
        job.kwargs,
        with_particles=num_samples > 1,
        data_plate=job.data_plate,
    )
    _refuse_subsampling(layout)
    _check_assumptions(job, probed)
    return terms, layout


def _check_assumptions(job: _Job, probed: int) -> None:
    """Refuse what has no density, and a prior that cannot be sampled where it is to be."""
    # Not strictly: an observation of probability zero is honest here, its ln p(y) minus infinity.
    report = check(job.model, job.proposal, *job.cut(0, probed), strict=False, **job.kwargs)
    report.require(computable=True)
    if job.proposal is not None:
        with undisturbed():
            data = job.cut(0, probed)
            terms = trace_terms(job.model, job.proposal, data, job.kwargs, strict=False)
        points = terms.has_point()
        if points:
            raise ProgramError(
                f"The guide holds '{points[0]}' at a point of a continuous space: it does not "
                "cover the posterior, and one point gives ln p(y, z), not ln p(y). Use a guide "
                "with a density, such as AutoNormal, or estimator='naive'."
            )
    for row in report.rows if job.proposal is None else ():
        if row.role != "observed" and not row.samplable:
            raise ProgramError(
                f'estimator="naive" draws z from the prior, which cannot be sampled: {row.reason} '
                'Use estimator="importance" with a guide.'
            )


def _default_probe(job: _Job) -> int:
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


def _why_whole(job: _Job, layout: Layout, probed: int) -> str:
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


def _observed_sizes(terms: Terms) -> tuple[int, int]:
    """Discrete and continuous values that were scored, in all data of these terms."""
    sizes = [0, 0]
    run = terms._runs[0]
    for message in run.observed_sites:
        # A mask that depends on draws is read at the first; enumerated dimensions are leftmost.
        scored = run.full(_scored(message["fn"], message["mask"]), message)
        scored = scored[(0,) * (scored.dim() - run.width + run.batched)]
        sizes[not terms.observed[message["name"]].is_discrete] += int(scored.sum())
    return sizes[0], sizes[1]


def _scored(fn: Any, mask: Any = None) -> Tensor:
    """How many values each batch element of a distribution scores, int64, (*batch)."""
    if isinstance(fn, MaskedDistribution):
        counts = _scored(fn.base_dist, fn._mask)
    elif isinstance(fn, ExpandedDistribution):
        counts = _scored(fn.base_dist)
    elif isinstance(fn, Independent):
        inner = _scored(fn.base_dist)
        counts = inner.sum(tuple(range(-fn.reinterpreted_batch_ndims, 0)))
    else:
        counts = torch.tensor(1 if _is_one_value(fn) else fn.event_shape.numel())
    counts = counts.expand(fn.batch_shape)
    return counts if mask is None else counts * torch.as_tensor(mask, device=counts.device)


def _is_one_value(fn: Any) -> bool:
    """Whether the elements of an event make one value together: one choice, or one tally."""
    tally = isinstance(fn, (torch.distributions.Multinomial, DirichletMultinomial))
    return tally or fn.support is constraints.one_hot


def _run(job: _Job, plan: _Plan, num_samples: int, progress: bool) -> list[_WeightSums]:
    rows = job.rows or 1
    results = []
    with tqdm(total=rows * num_samples, disable=not progress, unit="draw") as bar:
        for start in range(0, rows, plan.batch):
            stop = min(start + plan.batch, rows)
            sums = _WeightSums(num_samples)
            for sample in range(0, num_samples, plan.chunk):
                particles = min(plan.chunk, num_samples - sample)
                terms = job.run(
                    start, stop, first_sample=sample, particles=particles, plate=plan.plate
                )
                _check_weights(terms.log_weight, start)
                if sample == 0:
                    sums.observed = _observed_sizes(terms)
                sums.add(terms.log_weight)
                bar.update((stop - start) * particles)
            results.append(sums)
    return results


class _WeightSums:
    """Mean, variance and upper tail of the weights of some data, from a stream of draws."""

    def __init__(self, num_samples: int) -> None:
        self.keep = min(tail_size(num_samples) + 1, num_samples)
        self.count = 0
        self.observed = (0, 0)
        """Discrete and continuous values that these data score."""

    def add(self, log_weight: Tensor) -> None:
        """Add draws, (particles, data)."""
        self.epsilon = torch.finfo(log_weight.dtype).eps
        new = log_weight.to(torch.float64)
        if self.count == 0:
            self.largest, self.smallest = new[:0], new[0]
            self.mean = self.squares = torch.zeros_like(new[0])
            self.reference = torch.full_like(new[0], -math.inf)
        both = torch.cat([self.largest, new])
        self.largest = both.topk(min(self.keep, both.shape[0]), dim=0, sorted=False).values
        self.smallest = torch.minimum(self.smallest, new.amin(0))
        self._add_moments(new)

    def _add_moments(self, new: Tensor) -> None:
        """Chan, Golub & LeVeque's update of mean and squared deviations, weights over exp(max)."""
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

    @property
    def log_prob(self) -> Tensor:
        return torch.where(self.mean > 0, self.reference + self.mean.log(), -math.inf)

    @property
    def std_error(self) -> Tensor:
        if self.count < 2:
            return torch.full_like(self.mean, math.nan)
        return (self.squares / (self.count - 1) / self.count).sqrt() / self.mean

    @property
    def ess(self) -> Tensor:
        mean_square = self.squares / self.count + self.mean.square()
        return torch.where(self.mean > 0, self.count * self.mean.square() / mean_square, 0.0)

    @property
    def khat(self) -> Tensor:
        return khat_from_tail(self.largest, self.smallest, self.count, epsilon=self.epsilon)
