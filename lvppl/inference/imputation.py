r"""What missing values may have been: their posterior mean, and draws, from weighted latents.

With z_s from the guide and w_s = p(y_o, z_s) / q(z_s), normalised to sum to one,

.. math:: E[y_m | y_o] ≈ \hat m = \sum_s w_s\, m_s, \quad m_s = E[y_m | y_o, z_s], \qquad
    \operatorname{se}^2 = \sum_s w_s^2 (m_s - \hat m)^2,

and an imputation is a draw from p(y_m | y_o, z_s) at an s drawn with probability w_s.

Source: Mattei and Frellsen (2019), "MIWAE: deep generative modelling and imputation of incomplete
data sets", ICML, section 3.3; Owen (2013), Monte Carlo theory, methods and examples, section 9.2
(the standard error of a self-normalised estimate); Rubin (1987), "The calculation of posterior
distributions by data augmentation: comment", JASA 82 (sampling, importance resampling).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch import distributions as td

from lvppl.completion import completion
from lvppl.errors import ProgramError
from lvppl.inference.addressed import addressed_uniform
from lvppl.inference.likelihood.checks import check_data, check_options, few
from lvppl.inference.likelihood.estimate import LikelihoodEstimate
from lvppl.inference.likelihood.job import Job, Plan, plan_of
from lvppl.inference.likelihood.passes import Wanted, run
from lvppl.inference.likelihood.proposals import importance, prior
from lvppl.inference.likelihood.record import record_of
from lvppl.inference.posterior import complete, without_enumeration
from lvppl.inference.psis import MIN_TAIL, tail_size
from lvppl.missing import MISSING, with_missing
from lvppl.replay import Replay
from lvppl.seeding import checked_seed, derived_seed, seeded
from lvppl.terms import Site, Terms
from lvppl.tracing import kind_of, without_wrappers

__all__ = ["Imputation", "impute"]

Program = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Imputation:
    """Completed data, by observed site; every tensor is in the order and units of the data.

    What was observed is as it was, everywhere.
    """

    values: dict[str, Tensor]
    """E[y | y_o], (*plates, *event), in the dtype of the data."""
    std: dict[str, Tensor]
    """Posterior standard deviation of each missing element, (*plates, *event); 0 if observed."""
    std_error: dict[str, Tensor]
    """Monte Carlo standard error of ``values``, (*plates, *event); 0 if observed, and where
    nothing was drawn; NaN for one draw."""
    draws: dict[str, Tensor]
    """Imputations, (num_imputations, *plates, *event): draws from p(y | y_o), for analyses that
    are to know how uncertain the missing values are."""
    missing: dict[str, Tensor]
    """True where a value was missing, (*plates, *event)."""
    plates: dict[str, tuple[str, ...]]
    estimate: LikelihoodEstimate
    """ln p(y_o) from the same draws, with the effective number of draws and k-hat per datum."""

    @property
    def ess(self) -> Tensor:
        """Effective number of draws, (data,)."""
        return self.estimate.ess

    @property
    def khat(self) -> Tensor:
        """Pareto shape of the weights' tail, (data,); see :class:`lvppl.LikelihoodEstimate`."""
        return self.estimate.khat

    @property
    def num_imputations(self) -> int:
        return len(next(iter(self.draws.values())))

    def summary(self) -> str:
        """A few lines to read."""
        lines = []
        for name, missing in self.missing.items():
            count = int(missing.sum())
            text = f"{name}: {count:,} of {missing.numel():,} values missing"
            if count:
                spread, error = (t[name][missing] for t in (self.std, self.std_error))
                text += (
                    f"; posterior std {float(spread.median()):.3g}, Monte Carlo error "
                    f"{float(error.median()):.2g} in the median"
                )
            lines.append(text)
        return "\n".join([*lines, self.estimate.summary()])

    __str__ = summary

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {int(m.sum()):,}" for name, m in self.missing.items())
        return (
            f"Imputation({counts} values missing; {self.estimate.num_samples} draws, "
            f"{self.num_imputations} imputations)"
        )


def impute(
    model: Program,
    *data: Any,
    guide: Program | None = None,
    num_samples: int = 1000,
    num_imputations: int = 0,
    batch_size: int | None = None,
    sample_chunk: int | None = None,
    seed: int | None = None,
    data_plate: str | Sequence[str] | None = None,
    progress: bool = False,
    **kwargs: Any,
) -> Imputation:
    r"""Fill the NaN of observed data: E[y_m | y_o], and draws from p(y_m | y_o).

    .. math:: E[y_m | y_o] ≈ \sum_s w_s\, E[y_m | y_o, z_s], \qquad
        w_s ∝ p(y_o, z_s) / q(z_s | y_o), \quad z_s ∼ q

    Given the latents the mean is exact, so that only the latents are drawn. Latents that the model
    enumerates are averaged over exactly; with no others, nothing of the mean is random. Memory is
    bounded, and results do not depend on chunks but by rounding, as in
    :func:`lvppl.log_likelihood`. Imputations do where the model enumerates latents, or draws
    elements of an Autoregressive site: right and reproducible, but other numbers for other chunks.

    Args:
        model: a Pyro program ``model(*data, **kwargs)``; see :mod:`lvppl.missing` for what it and
            the guide read in place of a missing value.
        *data: its arguments, NaN where a value is missing.
        guide: q(z | y); the prior by default.
        num_samples: S, draws per datum.
        num_imputations: M, completed data sets by sampling-importance-resampling; more draws S than
            imputations make them nearly independent.
        batch_size, sample_chunk, seed, data_plate, progress: as in ``log_likelihood``.
        **kwargs: passed to the programs whole.

    Raises:
        ProgramError: as ``log_likelihood``; more imputations than draws; a site whose conditional
            given its observed part is not known (a HiddenMarkov); a missing level of a Categorical
            without ``num_imputations``, since levels have no mean.

    Warns:
        UserWarning: which data have k-hat above min(1 - 1 / log10 S, 0.7).

    Source: Mattei and Frellsen (2019), "MIWAE", ICML, equations 12 and 13.
    """
    name = "prior" if guide is None else "importance"
    check_options(name, guide, num_samples, batch_size, sample_chunk, None)
    _check_imputations(num_imputations, num_samples)
    model, guide = with_missing(model, guide, "nan")
    # given a draw of its latents, weighed: an enumerated q would stand in for the posterior
    proposal = prior() if guide is None else importance(without_enumeration(guide))
    rows, seed = check_data(data, "nan"), checked_seed(seed)
    job = Job(model, proposal, data, kwargs, rows, seed, data_plate)
    with torch.no_grad():
        plan = plan_of(job, num_samples, batch_size, sample_chunk)

        parts: dict[int, _Sums] = {}

        def beside(start: int, stop: int) -> _Sums:
            parts[start] = _Sums(job, plan, start, stop, num_imputations)
            return parts[start]

        sums = run(job, plan, Wanted(num_samples), progress, beside=beside)
    estimate = record_of(job, sums, num_samples, job.notes(plan.layout))
    _warn_of_tails(estimate)
    starts = [0, *(part.stop for part in sums[:-1])]
    return _joined([parts[start] for start in starts], estimate)


def _check_imputations(number: Any, num_samples: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ProgramError(f"num_imputations must be a whole number from 0 on, got {number!r}.")
    if number > num_samples:
        raise ProgramError(
            f"num_imputations={number} draws cannot come from num_samples={num_samples}: they are "
            "chosen among those. Take more samples."
        )


def _warn_of_tails(estimate: LikelihoodEstimate) -> None:
    flagged = estimate.flagged.tolist() if tail_size(estimate.num_samples) >= MIN_TAIL else []
    if flagged:
        warnings.warn(
            f"k-hat is above {estimate.khat_threshold:.2f} for {len(flagged)} of "
            f"{estimate.num_data} data ({few(flagged)}): a few draws carry most of the weight, and "
            "the errors of their imputations may be larger than stated. Take a wider guide or more "
            "samples.",
            UserWarning,
            stacklevel=3,
        )


class _Completing(Messenger):
    """Missing values are drawn given what was observed of their event; the rest stays."""

    def _pyro_sample(self, msg: Any) -> None:
        missing = msg["infer"].get(MISSING)
        if not msg["is_observed"] or missing is None:
            return
        msg["fn"] = completion(msg["name"], msg["fn"], missing, msg["value"])
        msg["is_observed"], msg["value"], msg["done"] = False, None, False
        msg["infer"]["was_observed"] = True


class _Sums:
    """Weighted sums over the draws of some rows; see the module's formulas."""

    def __init__(self, job: Job, plan: Plan, start: int, stop: int, num_imputations: int) -> None:
        self.job, self.plan, self.start, self.stop = job, plan, start, stop
        self.num_imputations = num_imputations
        self.sites: dict[str, _SiteSums] = {}
        self.log_total: Any = None  # ln Σ w so far, (data,)

    def add(self, terms: Terms, log_weight: Tensor, first_sample: int) -> None:
        """The next draws; their ln w is (particles, data)."""
        log_weight = log_weight.double()
        incomplete = {n: s for n, s in terms.observed.items() if s.missing is not None}
        if self.log_total is None:
            self.exact = not terms.latents
            self.best = log_weight.new_full((log_weight.shape[1], self.num_imputations), -math.inf)
            self.log_total = log_weight.new_full(log_weight.shape[1:], -math.inf)
            self.sites = {n: _SiteSums(s, terms, self) for n, s in incomplete.items()}
        moments = {name: self.sites[name].moments(site) for name, site in incomplete.items()}
        drawn: dict[str, Tensor] = {}
        if self.num_imputations or any(found is None for found in moments.values()):
            drawn = self._drawn(terms, first_sample)
        before = self.log_total
        self.log_total = torch.logaddexp(before, log_weight.logsumexp(0))
        finite = self.log_total.where(self.log_total > -math.inf, torch.zeros_like(before))
        weight, shrink = (log_weight - finite).exp(), (before - finite).exp()
        chosen = self._chosen(log_weight, first_sample)
        for name, sums in self.sites.items():
            values = sums.by_datum(drawn[name]) if name in drawn else None
            sums.add(weight, shrink, moments[name], values)
            if values is not None and self.num_imputations:
                sums.choose(chosen, values)

    def _drawn(self, terms: Terms, first_sample: int) -> dict[str, Tensor]:
        """Completed values by site, (particles, *plates, *event)."""
        job, start = self.job, self.start
        seed = derived_seed(job.seed, "imputations")
        draws = job.proposal.draws(seed, self.plan.plate, start, first_sample, job.unaddressed)
        device = job.data[0].device if job.rows is not None else None
        other = derived_seed(seed, f"rows {start}, draws {first_sample}")
        with seeded(other, device), draws:
            data = job.cut(start, self.stop)
            return complete(terms, job.model, data, job.kwargs, _Completing).predictive

    def _chosen(self, log_weight: Tensor, first_sample: int) -> Tensor:
        """Which of these draws an imputation is now, (data, M); -1 where it stays what it was.

        The largest ln w_s + Gumbel noise is at s with probability w_s, whatever order draws come
        in. Where no latent was drawn, every draw is an imputation by itself.
        """
        particles, count = len(log_weight), self.num_imputations
        if self.exact:
            number = torch.arange(count, device=log_weight.device) - first_sample
            return number.where((number >= 0) & (number < particles), -1).expand(
                log_weight.shape[1], count
            )
        shape, first = (*log_weight.shape, count), (first_sample, self.start)
        uniform = addressed_uniform(self.job.seed, "imputed", shape, first, log_weight.device)
        top, which = (log_weight.unsqueeze(-1) - (-uniform.log()).log()).max(0)
        better = top > self.best
        self.best = torch.where(better, top, self.best)
        return which.where(better, -1)


class _SiteSums:
    """Sums of one site. Tensors are (..., data, elements), whatever plates the site has."""

    def __init__(self, site: Site, terms: Terms, all_sums: _Sums) -> None:
        value, missing = site.value[0], site.missing
        assert missing is not None
        self.name, self.plates, self.exact = site.name, site.plates, all_sums.exact
        self.count = all_sums.num_imputations
        own = [i for i, plate in enumerate(self.plates) if plate in terms.data_plates]
        rest = [i for i in range(value.dim()) if i not in own]
        self.order, self.shape, self.num_data = [*own, *rest], value.shape, terms.num_data
        self.dtype = value.dtype
        fn = without_wrappers(site._first["fn"])
        self.levels = isinstance(fn, td.Categorical)  # so is OrderedLogistic
        if self.levels and not self.count and bool(missing.any()):
            raise ProgramError(
                f"levels of '{self.name}' are missing, and those of its {kind_of(fn)} have no "
                "mean. Ask for draws, num_imputations=..., or use OneHotCategorical, whose mean "
                "is the probability of each level."
            )
        self.value = self.by_datum(value[None])[0]
        self.missing = self.by_datum(missing[None])[0]
        zero = torch.zeros_like(self.value, dtype=torch.float64)
        self.centre: Tensor | None = None
        self.mean, self.second = zero, zero
        self.squares = [zero, zero, zero]  # Σ w², Σ w² m, Σ w² m²
        self.draws = self.value.expand(self.count, *self.value.shape).clone()

    def by_datum(self, tensor: Tensor) -> Tensor:
        """(particles, *plates, *event) as (particles, data, elements)."""
        moved = tensor.permute(0, *(1 + i for i in self.order))
        return moved.reshape(len(tensor), self.num_data, -1)

    def back(self, tensor: Tensor) -> Tensor:
        """(..., data, elements) as (..., *plates, *event)."""
        lead = tensor.shape[:-2]
        moved = tensor.reshape(*lead, *(self.shape[i] for i in self.order))
        where = sorted(range(len(self.order)), key=self.order.__getitem__)
        return moved.permute(*range(len(lead)), *(len(lead) + i for i in where))

    def moments(self, site: Site) -> tuple[Tensor, Tensor] | None:
        """E[y | y_o, z] and Var[y | y_o, z], (particles, data, elements); None where not known."""
        means, variances = [], []
        try:
            for run, message in site._messages():
                mean, variance = _moments(run, message)
                means.append(run.by_plates(mean, message, site.event_dim))
                variances.append(run.by_plates(variance, message, site.event_dim))
        except NotImplementedError:
            return None
        mean, variance = (self.by_datum(torch.cat(part)) for part in (means, variances))
        return mean, variance

    def add(
        self,
        weight: Tensor,
        shrink: Tensor,
        moments: tuple[Tensor, Tensor] | None,
        drawn: Tensor | None,
    ) -> None:
        """Weighted draws; what was summed before counts ``shrink`` times."""
        if moments is None:
            assert drawn is not None
            self.exact = False  # an average of draws of the values themselves
            moments = drawn.double(), torch.zeros_like(drawn, dtype=torch.float64)
        mean, variance = moments
        if self.levels:  # draws there are, but no mean
            mean = variance = torch.full_like(mean, math.nan)
        if self.centre is None:
            self.centre = mean.mean(0)  # so that nothing cancels in the standard error
        w, s = weight.unsqueeze(-1), shrink.unsqueeze(-1)
        mean = mean - self.centre
        second = variance + mean.square()
        self.mean = s * self.mean + (w * mean).sum(0)
        self.second = s * self.second + (w * second).sum(0)
        new = [(w.square() * mean**power).sum(0) for power in range(3)]
        self.squares = [s.square() * old + n for old, n in zip(self.squares, new, strict=True)]

    def choose(self, chosen: Tensor, drawn: Tensor) -> None:
        """Draws that become imputations: ``chosen`` is (data, M), -1 for none."""
        index = chosen.T.clamp(min=0).unsqueeze(-1).expand(-1, -1, drawn.shape[-1])
        picked = drawn.gather(0, index)
        self.draws = torch.where((chosen.T >= 0).unsqueeze(-1), picked, self.draws)

    def results(self, num_samples: int, possible: Tensor) -> dict[str, Tensor]:
        """``values``, ``std``, ``std_error``, ``draws`` and ``missing`` in the data's shape.

        A datum all of whose weights are zero is not ``possible``, (data,): it has no posterior.
        """
        assert self.centre is not None
        mean = (self.mean + self.centre).where(possible[:, None], math.nan).to(self.dtype)
        variance = (self.second - self.mean.square()).clamp(min=0.0)
        zeroth, first, second = self.squares
        error = (second - self.mean * (2 * first - self.mean * zeroth)).clamp(min=0.0).sqrt()
        if self.exact:
            error = torch.zeros_like(error)
        elif num_samples < 2:
            error = torch.full_like(error, math.nan)
        zero = torch.zeros_like(mean)
        found = {
            "values": torch.where(self.missing, mean, self.value),
            "std": torch.where(self.missing, variance.sqrt().to(mean), zero),
            "std_error": torch.where(self.missing, error.to(mean), zero),
            "draws": self.draws.where(possible[:, None] | ~self.missing, math.nan),
            "missing": self.missing,
        }
        return {key: self.back(tensor) for key, tensor in found.items()}


def _moments(run: Replay, message: Any) -> tuple[Tensor, Tensor]:
    """E[y | y_o] and Var[y | y_o] of a site, enumerated latents averaged over their posterior.

    In double precision, and about the mean: E y² - (E y)² would cancel.
    """
    name, missing = message["name"], message["infer"][MISSING]
    given = completion(name, message["fn"], missing, message["value"])
    each = given.mean.double()
    mean = run.averaged(message, each)
    return mean, run.averaged(message, given.variance.double() + (each - mean).square())


def _joined(parts: Sequence[_Sums], estimate: LikelihoodEstimate) -> Imputation:
    """Batches of rows side by side."""
    if not parts[0].sites:
        raise ProgramError(
            "There is nothing to impute: no site observes a tensor of floating numbers, which "
            "alone can be NaN. Give the data as y.float(), with NaN where a value is missing."
        )
    plate = parts[0].plan.plate
    found: dict[str, dict[str, Tensor]] = {}
    for name, sums in parts[0].sites.items():
        results = [
            part.sites[name].results(estimate.num_samples, part.log_total > -math.inf)
            for part in parts
        ]
        dim = sums.plates.index(plate) if plate is not None else 0
        for key in results[0]:
            pieces = [result[key] for result in results]
            joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim + (key == "draws"))
            found.setdefault(key, {})[name] = joined
    plates = {name: sums.plates for name, sums in parts[0].sites.items()}
    return Imputation(**found, plates=plates, estimate=estimate)
