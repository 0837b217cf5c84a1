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
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.inference.likelihood.annealed import Annealing
from lvppl.inference.likelihood.annealed.estimate import annealed_estimate
from lvppl.inference.likelihood.checkpoint import Checkpoint, seed_of
from lvppl.inference.likelihood.checks import (
    check_annealing,
    check_checkpoint,
    check_data,
    check_extras,
    check_options,
)
from lvppl.inference.likelihood.estimate import LikelihoodEstimate
from lvppl.inference.likelihood.exact import ExactSum, exact_sum, finite_states
from lvppl.inference.likelihood.job import Job, Plan, in_blocks, plan_of
from lvppl.inference.likelihood.passes import Wanted, run
from lvppl.inference.likelihood.proposals import Proposal, defended, importance, prior, uniform
from lvppl.inference.likelihood.ranks import agreed, num_processes, share, together
from lvppl.inference.likelihood.record import record_of
from lvppl.inference.likelihood.sizes import observed_sizes
from lvppl.inference.likelihood.weights import Trajectory
from lvppl.inference.psis import tail_size
from lvppl.missing import with_missing
from lvppl.seeding import checked_seed

__all__ = ["log_likelihood"]

Program = Callable[..., Any]


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
    defensive: float = 0.0,
    bootstrap: int | None = None,
    trajectory: bool = False,
    annealing: Annealing | None = None,
    missing: str | None = None,
    progress: bool = False,
    checkpoint: str | PathLike[str] | None = None,
    **kwargs: Any,
) -> LikelihoodEstimate:
    r"""Estimate ln p(y) of each datum: :math:`\ln \frac1S \sum_s p(y, z_s) / r(z_s)`, z_s ~ r.

    Sites marked for enumeration are summed exactly. Programs run without gradients, sums are kept
    in float64, and memory is bounded: data and samples are both taken in chunks, of which only
    running sums and the largest weights are kept. Where memory runs out, passes are halved, down to
    one draw of one datum.

    **Several processes.** Inside a ``torch.distributed`` group (``torchrun``) the processes share
    the rows, each on its own device, and every one returns the whole record. They call this with
    the same arguments; the numbers are those of one process. (Annealed chains adapt to the rows
    that they run with, and agree within their errors.)

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
        guide: q(z | y), a Pyro program of the same signature; used by ``"importance"``, and by
            ``"ais"`` where one is given.
        estimator: ``"importance"``: r is the guide; ``"prior"``: r is p(z); ``"uniform"``: r is
            uniform on a finite support; ``"naive"``: uniform where the support is finite, else the
            prior, and the record says which; ``"exact"``: the value itself, discrete latents summed
            and linear-Gaussian ones integrated by elimination, else by a sum over every state, or
            by quadrature where a datum has one or two continuous latents; ``"ais"``: annealed
            importance sampling, by chains that move from the guide, or else the prior, to the
            posterior.
        num_samples: S, draws per datum; of ``"ais"`` chains, of which a few dozen do.
        batch_size: most rows in one pass of the programs; chosen for memory and speed by default.
        sample_chunk: most draws per datum in one pass.
        seed: whole number; a fresh one by default. The global generators are left untouched.
        bin_width: width of the cells that continuous y was rounded to, for bits per dimension.
        data_plate: names of the plates that hold the data; default every plate common to all
            sites. With several of them the data stay whole.
        defensive: a, the share of draws from the prior beside the guide's: r = (1 - a) q(z | y) +
            a p(z), by strata. Weights are then at most p(y | z) / a, whatever the guide misses,
            for a variance at most 1 / (1 - a) times as large where it misses nothing. For
            ``"importance"``; the guide's sites must all be latents of the model.
        bootstrap: number of replicates for bootstrap standard errors beside the delta method's;
            200 are enough for an error to one part in twenty.
        trajectory: also keep the estimate from 2, 4, 8 ... draws, for ``estimate.plot()``.
        annealing: how the chains of ``"ais"`` move; chosen by a pilot run by default.
        missing: ``"nan"`` takes NaN in the data as missing values: ln p(y) is then that of what was
            observed, and 0 for a datum of which nothing was. They are summed out exactly where the
            distribution of their site allows, and the guide reads 0 in their place
            (:mod:`lvppl.missing`). Elements of an Autoregressive site that are missing before
            observed ones in its order are drawn by the model, one completion for each draw.
        progress: show a bar.
        checkpoint: a file in which finished data are kept, every few seconds and whatever ends the
            call; a second call with it goes on there, and one after the end reads it all. A file of
            another seed, option, program or data is refused; without ``seed`` its own is taken.
        **kwargs: passed to the programs whole.

    Returns:
        A :class:`LikelihoodEstimate`.

    Raises:
        ProgramError: no samples or data, NaN or infinity in the data, an unknown estimator, no
            guide for ``"importance"``, a prior that cannot be sampled for ``"naive"`` (as with
            ``pyro.factor``), a site without a density, a program that subsamples, ``batch_size``
            below the number of rows where the data cannot be cut, a weight that is NaN or plus
            infinity (by datum), a guide that ``defensive`` cannot evaluate at draws from the prior,
            memory too small for one datum, a ``checkpoint`` of another estimate.

    Warns:
        UserWarning: for ``"importance"``, which data have k-hat above min(1 - 1 / log10 S, 0.7).

    Sources: Owen (2013), Monte Carlo theory, methods and examples, ch. 9 (ratio and delta-method
    errors, effective sample size); Burda, Grosse & Salakhutdinov (2016), ICLR, section 3 (the
    bound E ln p-hat <= ln p); Vehtari et al. (2024), JMLR 25:72 (k-hat); Hesterberg (1995),
    Technometrics 37 (defensive mixtures).
    """
    check_options(estimator, guide, num_samples, batch_size, sample_chunk, bin_width)
    check_annealing(estimator, annealing, bootstrap)
    if not isinstance(annealing, Annealing | None):
        raise ProgramError(
            "annealing must be lvppl.Annealing(...), such as lvppl.Annealing(num_steps=100), got "
            f"{annealing!r}."
        )
    check_extras(estimator, num_samples, defensive, bootstrap, trajectory)
    model, guide = with_missing(model, guide, missing)
    rows = check_data(data, missing)
    check_checkpoint(estimator, checkpoint)
    if seed is None and checkpoint is not None:
        seed = seed_of(checkpoint)
    seed = agreed(checked_seed(seed))
    proposal = _proposal(estimator, model, guide, data, kwargs, data_plate, defensive)
    job = Job(model, proposal or prior(), data, kwargs, rows, seed, data_plate)
    known = {
        "seed": seed,
        "estimator": estimator,
        "num_samples": num_samples,
        "data_plate": data_plate,
        "defensive": defensive,
        "bootstrap": bootstrap,
        "trajectory": trajectory,
        "missing": missing,
    }
    with torch.no_grad():
        wanted = Wanted(num_samples, bootstrap, trajectory)
        if proposal is None:
            found = _exactly(job, batch_size, progress)
        elif estimator == "ais":
            chunks = batch_size, sample_chunk
            found = annealed_estimate(job, wanted, *chunks, annealing, progress, checkpoint, known)
        else:
            plan = plan_of(job, num_samples, batch_size, sample_chunk)
            if checkpoint is not None and batch_size is None:
                plan = in_blocks(plan, job.rows or 1)
            keep = None if checkpoint is None else Checkpoint(checkpoint, job, plan, known)
            found = _sampled(job, plan, wanted, progress, keep)
    if bin_width is not None and found.num_continuous == 0:
        raise ProgramError(
            "bin_width turns densities into probabilities, but every observed site is discrete and "
            "has probabilities already. Leave bin_width out."
        )
    estimate = replace(found, bin_width=bin_width)
    if estimator == "importance":
        _warn_of_tails(estimate)
    return estimate


def _proposal(
    estimator: str,
    model: Program,
    guide: Program | None,
    data: Any,
    kwargs: Any,
    data_plate: Any,
    share: float,
) -> Proposal | None:
    """Where draws come from; ``None`` for an exact sum."""
    if estimator == "exact":
        return None
    if estimator == "importance":
        assert guide is not None
        return defended(guide, share) if share else importance(guide)
    if estimator == "ais" and guide is not None:
        return importance(guide)
    if estimator in ("ais", "prior"):
        return prior()
    space = finite_states(model, data, kwargs, data_plate)
    if space is not None:
        return uniform(space)
    if estimator == "naive":
        return prior()
    raise ProgramError(
        'estimator="uniform" draws z from a finite support, but a latent of the model has none, or '
        'is masked or scaled, or there is no latent. Use estimator="prior" or "importance".'
    )


def _sampled(
    job: Job, plan: Plan, wanted: Wanted, progress: bool, keep: Checkpoint | None
) -> LikelihoodEstimate:
    sums = run(job, plan, wanted, progress, keep)
    return record_of(
        job,
        sums,
        wanted.num_samples,
        job.notes(plan.layout),
        defensive=job.proposal.defensive,
        replicates=_beside([part.replicates for part in sums]),
        trajectory=Trajectory.of(sums) if wanted.trajectory else None,
    )


def _beside(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Replicates of all data side by side, if there are any."""
    found = [part for part in parts if part is not None]
    return torch.cat(found, -1) if found else None


def _exactly(job: Job, batch_size: int | None, progress: bool) -> LikelihoodEstimate:
    rows, plan = job.rows or 1, plan_of(job, 1, batch_size, None)
    first, last = share(rows, bool(plan.whole))

    def sums() -> list[tuple[ExactSum, tuple[int, int]]]:
        return [
            _exact_part(job, plan, start, min(start + plan.batch, last), progress)
            for start in range(first, last, plan.batch)
        ]

    found, sizes = zip(*together(sums), strict=True)
    log_prob = torch.cat([part.log_prob for part in found])
    zero = torch.zeros_like(log_prob)
    discrete, continuous = (sum(kind) for kind in zip(*sizes, strict=True))
    return LikelihoodEstimate(
        log_prob=log_prob,
        std_error=zero,
        ess=zero + math.inf,
        khat=zero - math.inf,
        num_samples=0,
        estimator="exact",
        seed=job.seed,
        num_discrete=discrete,
        num_continuous=continuous,
        notes=(found[0].how,),
    )


def _exact_part(
    job: Job, plan: Plan, start: int, stop: int, progress: bool
) -> tuple[ExactSum, tuple[int, int]]:
    """ln p(y) of rows start:stop, and how many discrete and continuous values they have."""
    sizes = observed_sizes(job.run(start, stop, plate=plan.plate))
    found = exact_sum(
        job.model, job.cut(start, stop), job.kwargs, data_plate=job.data_plate, progress=progress
    )
    return (found if num_processes() == 1 else found.to("cpu")), sizes


def _warn_of_tails(estimate: LikelihoodEstimate) -> None:
    if tail_size(estimate.num_samples) < 5:
        return  # k-hat says nothing about the data then; the summary says so
    flagged = estimate.flagged.tolist()
    if flagged:
        remedy = "Take a wider guide or more samples" + (
            "." if estimate.defensive else ", or defensive=0.1 to mix the prior into the guide."
        )
        names = ", ".join(map(str, flagged[:10])) + (", ..." if len(flagged) > 10 else "")
        warnings.warn(
            f"k-hat is above {estimate.khat_threshold:.2f} for {len(flagged)} of "
            f"{estimate.num_data} data ({names}): the guide misses mass of their posteriors, and "
            f"their ln p(y) and standard errors are not reliable. {remedy}",
            UserWarning,
            stacklevel=3,
        )
