"""Draws from a posterior q(z | y), from the prior p(z), and what the model says of y at them.

Everything is drawn in passes that hold a bounded number of elements, so that large data and many
draws need little more memory than the draws themselves. The random numbers of a draw depend on the
seed, the site, the datum and the sample, never on the passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.infer import infer_discrete
from pyro.poutine.messenger import Messenger
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.inference.addressed import AddressedDraws
from lvppl.layout import layout_of
from lvppl.missing import with_missing
from lvppl.replay import Replay
from lvppl.seeding import RandomStream, checked_seed, derived_seed
from lvppl.terms import Site, Terms, trace_terms
from lvppl.tracing import PARTICLES, plates_of, sample_sites, undisturbed

__all__ = ["Posterior", "Prior", "reconstruct", "sample_posterior", "sample_prior"]

Program = Callable[..., Any]

PASS_ELEMENTS = 2**22
"""Data elements times draws of one pass: 32 MB in float64 for each tensor of the data's size."""


@dataclass(frozen=True)
class Posterior:
    """Independent draws z ~ q(z | y) with their log-terms, in nats.

    Every tensor leads with the draws. ``samples``, ``predictive``, ``pointwise`` and ``observed``
    go by site; ``plates`` names their plate dimensions, left to right.
    """

    samples: dict[str, Tensor]
    """Latent sites, (num_samples, *plates, *event). Enumerated sites are drawn exactly."""
    predictive: dict[str, Tensor]
    """Posterior predictive draws of the observed sites, (num_samples, *plates, *event)."""
    pointwise: dict[str, Tensor]
    """ln p(y | z) of each element of an observed site, (num_samples, *plates). A site that depends
    on enumerated latents has them summed out."""
    observed: dict[str, Tensor]
    """The observed values, (*plates, *event)."""
    plates: dict[str, tuple[str, ...]]
    log_likelihood: Tensor
    """ln p(y | z), (num_samples, data); data = 1 where the whole data set is one datum."""
    log_prior: Tensor
    """ln p(z), (num_samples, data)."""
    log_guide: Tensor
    """ln q(z | y), (num_samples, data)."""
    log_weight: Tensor
    """ln p(y, z) - ln q(z | y), (num_samples, data): E_q of its exponential is p(y)."""
    data_plates: tuple[str, ...]
    """The plates that ``data`` is flattened from; () where the data set is one datum."""
    data_shape: tuple[int, ...]
    """Their sizes."""
    notes: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int:
        return len(self.log_weight)

    def mean(self, site: str) -> Tensor:
        """Posterior mean of a latent site, (*plates, *event)."""
        return self._values(site).mean(0)

    def std(self, site: str) -> Tensor:
        """Posterior standard deviation of a latent site, (*plates, *event).

        Raises:
            ProgramError: one draw has no spread.
        """
        if self.num_samples < 2:
            raise ProgramError("a standard deviation needs num_samples of at least 2; this has 1")
        return self._values(site).std(0)

    def _values(self, site: str) -> Tensor:
        if site not in self.samples:
            raise ProgramError(f"no latent site {site!r}; there are {sorted(self.samples)}")
        values = self.samples[site]
        return values if values.is_floating_point() else values.to(self.log_weight.dtype)


@dataclass(frozen=True)
class Prior:
    """Independent draws from the model itself, p(z) p(y | z), for data of the prototype's shape."""

    samples: dict[str, Tensor]
    """Latent sites, (num_samples, *plates, *event)."""
    predictive: dict[str, Tensor]
    """New data: draws of the observed sites, (num_samples, *plates, *event)."""
    predictive_mean: dict[str, Tensor]
    """E[y | z] at the same draws, for the observed sites whose distribution has a mean."""
    plates: dict[str, tuple[str, ...]]

    @property
    def num_samples(self) -> int:
        return len(next(iter({**self.samples, **self.predictive}.values())))


def sample_posterior(
    model: Program,
    guide: Program | None,
    *data: Any,
    num_samples: int = 100,
    batch_size: int | None = None,
    seed: int | None = None,
    missing: str | None = None,
    **kwargs: Any,
) -> Posterior:
    """Draw z ~ q(z | y) for these data, which may be new and of another number.

    Latents that the model enumerates are drawn from their exact posterior given the rest.
    Predictive draws let go of every observation, so that an observed site that follows another one
    follows its new value.

    Args:
        model, guide: Pyro programs; ``guide=None`` for a model whose latents are all enumerated.
        data: arguments of both.
        num_samples: independent draws.
        batch_size: rows of the data held at once; default all. It slices dimension 0 of every
            tensor in ``data`` that has as many rows as there are data, and needs every site in one
            data plate. Draws do not depend on it, save those of ``log_likelihood``'s exceptions and
            of sites enumerated by the model.
        seed: the same seed gives the same draws; the global generators are left as they were.
        missing: ``"nan"`` takes NaN in observed sites as missing values (:mod:`lvppl.missing`):
            ``observed`` holds them as they are, and predictive draws are of whole new data. What
            they may have been is :func:`lvppl.impute`.
        kwargs: keyword arguments of model and guide.

    Raises:
        ProgramError: model and guide do not fit each other; the program draws a subsample of the
            data by itself; batches where a latent is shared between data.
    """
    model, guide = with_missing(model, guide, missing)
    job = _Job.of(model, guide, data, kwargs, num_samples, batch_size, seed)
    with torch.no_grad():
        batches = [
            _joined([_posterior_of(*one, job) for one in passes], dim_of=lambda plates: 0)
            for passes in job.batches()
        ]
    if len(batches) == 1:
        return batches[0]
    plate = batches[0].data_plates[0]
    return _joined(batches, dim_of=lambda plates: 1 + plates.index(plate))


def reconstruct(
    model: Program,
    guide: Program | None,
    *data: Any,
    num_samples: int = 1,
    batch_size: int | None = None,
    seed: int | None = None,
    missing: str | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """E[y | z] averaged over draws z ~ q(z | y): one tensor (*plates, *event) an observed site.

    Args: as ``sample_posterior``. Nothing is held but the running average.

    Raises:
        ProgramError: also where an observed site's distribution has no mean (Categorical).
    """
    model, guide = with_missing(model, guide, missing)
    job = _Job.of(model, guide, data, kwargs, num_samples, batch_size, seed)
    parts: list[dict[str, Tensor]] = []
    plates: dict[str, tuple[str, ...]] = {}
    with torch.no_grad():
        for passes in job.batches():
            total: dict[str, Tensor] = {}
            for _, terms in passes:
                for name, site in observed_values(terms).items():
                    plates[name] = site.plates
                    mean = _mean(site)
                    if mean is None:
                        raise ProgramError(
                            f"observed site '{name}' has no mean, so it cannot be reconstructed by "
                            "one: use the draws of fit.posterior(y).predictive"
                        )
                    total[name] = total.get(name, 0) + mean.sum(0) / num_samples
            parts.append(total)
    if len(parts) == 1:
        return parts[0]
    plate = job.data_plate
    assert plate is not None
    return {n: torch.cat([part[n] for part in parts], plates[n].index(plate)) for n in parts[0]}


def sample_prior(
    model: Program,
    *data: Any,
    num_samples: int = 1,
    seed: int | None = None,
    **kwargs: Any,
) -> Prior:
    """Draw latents and new data from the model: z ~ p(z), y ~ p(y | z).

    The observations are let go; ``data`` is a prototype whose shapes say how many data a draw has,
    so ``sample_prior(model, x[:64])`` gives one draw of 64 new data. The other arguments of a
    conditional model p(y | x) keep their values.

    Args:
        model: a Pyro program whose observed sites can be sampled.
        data, kwargs: its arguments.
        num_samples: independent draws of a data set of this size.
        seed: as in ``sample_posterior``.

    Raises:
        ProgramError: the model weighs its latents by ``pyro.factor``: it cannot be sampled.
    """
    with undisturbed(), poutine.block():
        sites = sample_sites(poutine.trace(model).get_trace(*data, **kwargs))
    factors = [site["name"] for site in sites if _is_factor(site)]
    if factors:
        raise ProgramError(
            f"the prior cannot be sampled: {', '.join(map(repr, factors))} weighs the model by "
            "pyro.factor, which says what a value is worth and not how to draw one. Write the "
            "site as a pyro.sample of a distribution."
        )
    names = {site["name"] for site in sites if site["is_observed"]}
    free = _Released()(without_enumeration(model))
    job = _Job.of(free, None, data, kwargs, num_samples, None, seed)
    parts: list[Prior] = []
    with torch.no_grad():
        for _, terms in next(iter(job.batches())):
            drawn = terms.latents
            means = {name: _mean(drawn[name]) for name in drawn if name in names}
            values = {name: site.value for name, site in drawn.items()}
            parts.append(
                Prior(
                    samples={n: v for n, v in values.items() if n not in names},
                    predictive={n: v for n, v in values.items() if n in names},
                    predictive_mean={n: m for n, m in means.items() if m is not None},
                    plates={name: site.plates for name, site in drawn.items()},
                )
            )
    return Prior(
        samples=_cat([part.samples for part in parts]),
        predictive=_cat([part.predictive for part in parts]),
        predictive_mean=_cat([part.predictive_mean for part in parts]),
        plates=parts[0].plates,
    )


# ----------------------------------------------------------------------------------------- passes


@dataclass
class _Job:
    """A model, a guide and data, run on some rows and some draws at a time."""

    model: Program
    guide: Program | None
    data: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    num_samples: int
    batch_size: int | None
    seed: int
    data_plate: str | None
    """The one plate of the data; None for several or none."""
    rows: int
    at_once: int
    """Draws of one pass."""
    notes: tuple[str, ...] = ()
    unaddressed: set[str] = field(default_factory=set)

    @staticmethod
    def of(
        model: Program,
        guide: Program | None,
        data: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        num_samples: int,
        batch_size: int | None,
        seed: int | None,
    ) -> _Job:
        for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not whole and (value is not None or name == "num_samples"):
                raise ProgramError(f"{name} must be a whole number of at least 1, not {value!r}")
        model, guide = _prepared(model, guide, data, kwargs)
        layout = layout_of(model, guide, data, kwargs, with_particles=num_samples > 1)
        plates = layout.data_plates
        if batch_size is not None:
            with undisturbed():
                trace_terms(model, guide, data, kwargs).require_per_datum("batch_size")
            if len(plates) != 1:
                names = ", ".join(plate.name for plate in plates)
                raise ProgramError(f"batch_size needs one data plate, but there are {names}")
        elements = sum(item.numel() for item in data if isinstance(item, Tensor))
        if batch_size is not None:
            elements = elements * min(batch_size, plates[0].size) // max(plates[0].size, 1)
        at_once = max(1, min(256, PASS_ELEMENTS // max(elements, 1)))
        looped = layout.loop_reason if num_samples > 1 else ""
        return _Job(
            model,
            guide,
            data,
            kwargs,
            num_samples,
            batch_size,
            checked_seed(seed),
            data_plate=plates[0].name if len(plates) == 1 else None,
            rows=plates[0].size if len(plates) == 1 else 1,
            at_once=1 if looped else at_once,
            notes=(f"particles run as a loop: {looped}",) if looped else (),
        )

    def batches(self) -> Iterator[Iterator[tuple[_Pass, Terms]]]:
        """For each batch of rows, the passes over the draws with their terms."""
        size = self.batch_size or self.rows
        for start in range(0, self.rows, size):
            yield self._passes(start, min(start + size, self.rows))

    def _passes(self, start: int, stop: int) -> Iterator[tuple[_Pass, Terms]]:
        data = self.data
        if (start, stop) != (0, self.rows):
            data = tuple(
                item[start:stop]
                if isinstance(item, Tensor) and item.shape[:1] == (self.rows,)
                else item
                for item in data
            )
        for sample in range(0, self.num_samples, self.at_once):
            one = _Pass(data, start, sample)
            count = min(self.at_once, self.num_samples - sample)
            with self.addressed(one):
                terms = trace_terms(self.model, self.guide, data, self.kwargs, num_particles=count)
            yield one, terms

    @contextmanager
    def addressed(self, one: _Pass, purpose: str = "guide") -> Iterator[None]:
        """Random numbers by site, datum and sample; what no address reaches is seeded by pass."""
        rest = derived_seed(self.seed, f"{purpose}/{one.first_datum}/{one.first_sample}")
        draws = AddressedDraws(
            self.seed, self.data_plate, one.first_datum, one.first_sample, self.unaddressed
        )
        with RandomStream(rest), draws:
            yield


@dataclass(frozen=True)
class _Pass:
    """The rows of one pass, and where its data and draws stand among all."""

    data: tuple[Any, ...]
    first_datum: int
    first_sample: int


def without_enumeration(program: Program) -> Program:
    return poutine.infer_config(program, config_fn=cast(Any, lambda site: {"enumerate": None}))


def _prepared(
    model: Program, guide: Program | None, data: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Program, Program | None]:
    """Refuse what has no posterior by datum; draw from what the guide would enumerate.

    A guide that enumerates a site holds its q(z | y): it can be drawn from, like any other.
    """
    enumerated = False
    for role, program in (("guide", guide), ("model", model)):
        if program is None:
            continue
        with undisturbed(), poutine.block():
            trace = poutine.trace(program).get_trace(*data, **kwargs)
        for name, site in trace.nodes.items():
            fn: Any = site.get("fn")
            if type(fn).__name__ == "_Subsample" and 0 < (fn.subsample_size or 0) < fn.size:
                raise ProgramError(
                    f"plate '{name}' of the {role} draws {fn.subsample_size} of {fn.size} data by "
                    "itself at every run, so that draws of two runs belong to different data. Let "
                    "the plate's subsample_size be an argument, and pass the full size here."
                )
        if role == "guide":
            enumerated = any(site["infer"].get("enumerate") for site in sample_sites(trace))
    if not enumerated:
        return model, guide
    assert guide is not None
    return without_enumeration(model), without_enumeration(guide)


# ------------------------------------------------------------------------------- from one replay


def _posterior_of(one: _Pass, terms: Terms, job: _Job) -> Posterior:
    with job.addressed(one, "predictive"):
        drawn = complete(terms, job.model, one.data, job.kwargs)
    latents = {n: site for n, site in terms.latents.items() if not site.is_auxiliary}
    observed = observed_values(terms)
    pointwise, notes = {}, list(job.notes)
    for name, site in observed.items():
        try:
            pointwise[name] = site.log_prob
        except ProgramError as error:  # shared enumerated latents: there is no value by element
            notes.append(f"no pointwise ln p(y | z): {error}")
    if job.unaddressed:
        notes.append(f"draws of {', '.join(sorted(job.unaddressed))} depend on batch_size")
    factors = terms.observed.keys() - observed.keys()
    if factors:
        notes.append(f"pyro.factor {', '.join(sorted(factors))} counts in log_likelihood only")
    return Posterior(
        samples={**{name: site.value for name, site in latents.items()}, **drawn.enumerated},
        predictive=drawn.predictive,
        pointwise=pointwise,
        observed={name: site.observed[0] for name, site in observed.items()},
        plates={
            **{name: site.plates for name, site in {**latents, **observed}.items()},
            **drawn.plates,
        },
        log_likelihood=terms.log_likelihood,
        log_prior=terms.log_prior,
        log_guide=terms.log_guide,
        log_weight=terms.log_weight,
        data_plates=terms.data_plates,
        data_shape=tuple(plate.size for plate in terms.layout.data_plates),
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class Completed:
    """What a replay leaves open: enumerated latents and new observations, particles first."""

    enumerated: dict[str, Tensor]
    predictive: dict[str, Tensor]
    plates: dict[str, tuple[str, ...]]


def complete(
    terms: Terms,
    model: Program,
    data: Sequence[Any],
    kwargs: Mapping[str, Any],
    release: Callable[[], Messenger] | None = None,
) -> Completed:
    """Draw the model's enumerated latents given y and the others, then new y given all of them.

    ``release`` makes the handler that lets go of observations, of all of them by default.

    Enumerated sites are drawn by forward filtering, backward sampling
    (``pyro.infer.infer_discrete``) at the values that ``terms`` holds.
    """
    runs = [_completed(run, model, data, kwargs, release or _Released) for run in terms._runs]
    return Completed(
        enumerated=_cat([run.enumerated for run in runs]),
        predictive=_cat([run.predictive for run in runs]),
        plates=runs[0].plates,
    )


def _completed(
    run: Replay,
    model: Program,
    data: Sequence[Any],
    kwargs: Mapping[str, Any],
    release: Callable[[], Messenger],
) -> Completed:
    values = poutine.Trace()
    for name, site in run.guide_sites.items():
        values.nodes[name] = cast(Any, site)
    program = model
    if run.batched:
        program = pyro.plate(PARTICLES, run.particles, dim=-run.width)(program)
    enumerated: list[Any] = []
    if run.layout.enumerated:
        given = poutine.replay(program, trace=values)
        exact = infer_discrete(given, first_available_dim=-1 - run.width)
        sites = sample_sites(poutine.trace(exact).get_trace(*data, **kwargs))
        enumerated = [site for site in sites if site["name"] in run.layout.enumerated]
        for site in enumerated:
            values.nodes[site["name"]] = cast(Any, site)
    free = release()(poutine.replay(program, trace=values))
    sites = sample_sites(poutine.trace(free).get_trace(*data, **kwargs))
    new = [site for site in sites if site["infer"].get("was_observed")]

    def by_name(group: list[Any]) -> dict[str, Tensor]:
        return {s["name"]: run.by_plates(s["value"], s, s["fn"].event_dim) for s in group}

    return Completed(
        enumerated=by_name(enumerated),
        predictive=by_name(new),
        plates={s["name"]: tuple(p.name for p in plates_of(s)) for s in [*enumerated, *new]},
    )


class _Released(Messenger):
    """Observed sites are drawn. Deterministic sites and factors stay what they are."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not msg["infer"].get("_deterministic") and not _is_factor(msg):
            msg["is_observed"] = False
            msg["infer"]["was_observed"] = True
            msg["value"] = None
            msg["done"] = False


def _is_factor(site: Any) -> bool:
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Unit)


def observed_values(terms: Terms) -> dict[str, Site]:
    """Observed sites that hold values: a factor's is empty."""
    return {n: site for n, site in terms.observed.items() if site.value.shape[-1:] != (0,)}


def _mean(site: Site) -> Tensor | None:
    """The mean of a site's distribution; None where it has none (torch then gives NaN)."""
    try:
        mean = site.mean()
    except (NotImplementedError, AttributeError, ProgramError):
        return None
    return None if bool(mean.isnan().all()) else mean


# ---------------------------------------------------------------------------------------- joining


def _cat(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _joined(parts: Sequence[Posterior], *, dim_of: Callable[[tuple[str, ...]], int]) -> Posterior:
    """Join over draws or over a data plate: ``dim_of`` gives the dimension from a site's plates."""
    first = parts[0]
    if len(parts) == 1:
        return first
    over_data = dim_of(first.data_plates) != 0

    def sites(group: str, shift: int = 0) -> dict[str, Tensor]:
        return {
            name: torch.cat(
                [getattr(p, group)[name] for p in parts], dim_of(first.plates[name]) - shift
            )
            for name in getattr(first, group)
        }

    def terms(group: str) -> Tensor:
        return torch.cat([getattr(part, group) for part in parts], 1 if over_data else 0)

    return Posterior(
        samples=sites("samples"),
        predictive=sites("predictive"),
        pointwise=sites("pointwise"),
        observed=sites("observed", shift=1) if over_data else first.observed,
        plates=first.plates,
        log_likelihood=terms("log_likelihood"),
        log_prior=terms("log_prior"),
        log_guide=terms("log_guide"),
        log_weight=terms("log_weight"),
        data_plates=first.data_plates,
        data_shape=(sum(p.data_shape[0] for p in parts),) if over_data else first.data_shape,
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )
