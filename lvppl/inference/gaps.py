r"""Where a guide loses: in its family, or in its encoder.

.. math:: \ln p(y) - ELBO(q_{φ(y)}) =
    \underbrace{\ln p(y) - ELBO(q^*)}_{\text{approximation}} +
    \underbrace{ELBO(q^*) - ELBO(q_{φ(y)})}_{\text{amortisation}},
    \qquad q^* = \arg\max_{q ∈ \text{family}} ELBO(q)

for each datum by itself (Cremer, Li and Duvenaud 2018). More particles or a richer family are the
remedy for the first, a larger encoder or longer training for the second.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.inference.gap_record import Gaps
from lvppl.inference.likelihood import log_likelihood
from lvppl.inference.likelihood.annealed import Annealing, bidirectional
from lvppl.inference.likelihood.exact import finite_states
from lvppl.inference.per_datum import PerDatumSearch
from lvppl.seeding import checked_seed, derived_seed, seeded
from lvppl.simulation import simulated

__all__ = ["gaps"]

Program = Callable[..., Any]

_FEW_STATES = 2**20
"""Joint states of a datum that are summed over without being asked to."""
_EVIDENCE = ("auto", "exact", "importance", "ais")


def gaps(
    model: Program,
    guide: Program,
    *data: Any,
    simulate: bool = False,
    log_prob: Tensor | None = None,
    evidence: str = "auto",
    num_samples: int = 1000,
    num_chains: int = 16,
    annealing: Annealing | None = None,
    num_steps: int = 600,
    learning_rate: float = 0.05,
    num_particles: int = 8,
    num_repetitions: int = 20,
    data_plate: str | Sequence[str] | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Gaps:
    r"""Split ln p(y) − ELBO of each datum into what the guide's family and what its encoder loses.

    The best member of the family is searched for each datum, from the guide's own, as in
    :func:`lvppl.amortization_gap`: two thirds of the steps at a rate that falls to zero, and a
    third from the rate's start again. What the second part gains says whether the search had ended.
    A search can end in a local optimum: the approximation gap is at most what is shown.

    ln p(y) is exact where it can be summed. Elsewhere it is bounded from below, by draws from the
    best member found, and the approximation gap is at least what is shown, in expectation. An
    upper bound needs an exact draw from the posterior, which only simulated data come with: with
    ``simulate=True`` the data say how many to simulate and of which shapes, the gaps are those of
    the simulated data, and ln p(y) is bracketed by chains from both sides.

    Args:
        model, guide: Pyro programs with a data plate around every site, in evaluation mode. The
            guide's latents are Normal, MultivariateNormal, Bernoulli or Categorical, with
            parameters that are functions of the data.
        *data, **kwargs: their arguments: one batch.
        simulate: replace the data by draws from the model.
        log_prob: ln p(y) of each datum where you know it, (data,), nats.
        evidence: ``"auto"``: exact up to 2^20 states a datum, else ``"importance"``; or
            ``"exact"``, ``"importance"``, ``"ais"``. With ``simulate=True`` what is not exact is
            the bracket. Of no account with ``log_prob``.
        num_samples: draws for each datum of ``"importance"``.
        num_chains, annealing: of ``"ais"`` and of the bracket.
        num_steps: steps of the search.
        learning_rate: its first rate, in standard deviations of the guide; of logits in
            units of four nats.
        num_particles: draws for one step, and for one repetition of the evaluation.
        num_repetitions: repetitions of the evaluation, for standard errors: 2 or more.
        data_plate: names of the plates that hold the data; default every common plate.
        seed: of all draws; a fresh one by default. The global generators are left untouched.

    Raises:
        ProgramError: no guide, no data plate, a family that cannot be searched (which), too few
            steps or repetitions, a ``log_prob`` of another shape, a model that cannot be simulated,
            or whose evidence cannot be summed with ``evidence="exact"``.

    Source: Cremer, Li & Duvenaud (2018), "Inference suboptimality in variational autoencoders",
    ICML, section 3; Grosse, Ghahramani & Adams (2015), arXiv:1511.02543 (the bracket).
    """
    _check(evidence, num_steps, num_repetitions, simulate, log_prob)
    seed = checked_seed(seed)
    observed: dict[str, Tensor] = {}
    latents: dict[str, Tensor] | None = None
    with seeded(derived_seed(seed, "gaps")), torch.no_grad():
        if simulate:
            made = simulated(model, data, kwargs, "Measure the gaps of data that you have.")
            made.require_replaced("Write obs=y with y an argument.")
            observed, latents, data = made.observed, made.latents, made.args
            model = poutine.condition(model, data=observed)
    with seeded(derived_seed(seed, "search")) as own:
        search = PerDatumSearch(
            "gaps", model, guide, data, kwargs, num_particles=num_particles, data_plate=data_plate
        )
        search.climb(num_steps - num_steps // 3, learning_rate)
        before = search.frozen()
        search.climb(num_steps // 3, learning_rate)
        best = search.frozen()
        encoder, earlier, found = search.elbos((search.guide, before, best), num_repetitions, own)
    bounds = _Evidence(model, best, data, kwargs, data_plate, derived_seed(seed, "evidence"))
    if log_prob is not None:
        known = bounds.given(log_prob, search.num_data)
    elif latents is not None:
        known = bounds.bracket(latents, evidence, num_chains, annealing)
    else:
        known = bounds.of(evidence, num_samples, num_chains, annealing)
    elbo_search, elbo_encoder = _moments(found), _moments(encoder)
    lower, upper = ([x.to(found.device) for x in side] for side in (known.lower, known.upper))
    amortization, remaining = _moments(found - encoder), _moments(found - earlier)
    return Gaps(
        lower=lower[0],
        upper=upper[0],
        lower_std_error=lower[1],
        upper_std_error=upper[1],
        evidence=known.source,
        elbo_search=elbo_search[0],
        elbo_search_std_error=elbo_search[1],
        elbo_encoder=elbo_encoder[0],
        elbo_encoder_std_error=elbo_encoder[1],
        amortization=amortization[0],
        amortization_std_error=amortization[1],
        remaining=remaining[0],
        remaining_std_error=remaining[1],
        history=search.history,
        observed=observed,
        seed=seed,
        notes=known.notes,
    )


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and its standard error over repetitions, (data,) each, float64."""
    rows = rows.double()
    return rows.mean(0), rows.std(0) / len(rows) ** 0.5


# ----------------------------------------------------------------------------------------- evidence


class _Known(NamedTuple):
    """Bounds on ln p(y): values and standard errors, (data,) each."""

    lower: tuple[Tensor, Tensor]
    upper: tuple[Tensor, Tensor]
    source: str
    notes: tuple[str, ...] = ()


class _Evidence:
    """ln p(y) of a batch, as well as it can be had, with the best guide for each datum."""

    def __init__(
        self,
        model: Program,
        best: Program,
        data: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        data_plate: Any,
        seed: int,
    ) -> None:
        self.model, self.best, self.data, self.kwargs = model, best, data, dict(kwargs)
        self.options: dict[str, Any] = {"data_plate": data_plate, "seed": seed}

    def given(self, log_prob: Tensor, num_data: int) -> _Known:
        value = torch.as_tensor(log_prob).detach().double().flatten()
        if value.numel() != num_data:
            raise ProgramError(
                f"log_prob must hold ln p(y) of each of {num_data} data, but has shape "
                f"{tuple(torch.as_tensor(log_prob).shape)}."
            )
        return _exactly(value, "given")

    def of(
        self, evidence: str, num_samples: int, num_chains: int, annealing: Annealing | None
    ) -> _Known:
        if evidence in ("auto", "exact"):
            exact = self._exact(required=evidence == "exact")
            if exact is not None:
                return exact
            evidence = "importance"
        size = {"importance": num_samples, "ais": num_chains}[evidence]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "k-hat is above")  # said below, with its remedy here
            estimate = log_likelihood(
                self.model,
                *self.data,
                guide=self.best,
                estimator=evidence,
                num_samples=size,
                batch_size=self._rows,  # the guide holds parameters of every row
                annealing=annealing if evidence == "ais" else None,
                **self.options,
                **self.kwargs,
            )
        nothing = torch.full_like(estimate.log_prob, torch.nan)
        flagged = len(estimate.flagged)
        notes: tuple[str, ...] = ()
        if flagged:
            notes = (
                f"k-hat is too large for {flagged} of {estimate.num_data} data: their ln p(y), and "
                "with it their approximation gap, may be larger by much more than the error "
                "stated. Use evidence='ais'",
            )
        return _Known((estimate.log_prob, estimate.std_error), (nothing, nothing), evidence, notes)

    def bracket(
        self,
        latents: Mapping[str, Tensor],
        evidence: str,
        num_chains: int,
        annealing: Annealing | None,
    ) -> _Known:
        exact = self._exact(required=evidence == "exact") if evidence in ("auto", "exact") else None
        if exact is not None:
            return exact
        both = bidirectional(
            self.model,
            *self.data,
            guide=self.best,
            draws=latents,
            num_chains=num_chains,
            annealing=annealing,
            **self.options,
            **self.kwargs,
        )
        return _Known(
            (both.lower, both.lower_std_error),
            (both.upper, both.upper_std_error),
            "bidirectional",
            both.notes,
        )

    @property
    def _rows(self) -> int | None:
        first = self.data[0] if self.data else None
        return len(first) if isinstance(first, Tensor) and first.dim() else None

    def _exact(self, *, required: bool) -> _Known | None:
        """The exact sum; ``None`` where there is none, or only one that takes long."""
        if not required:
            space = finite_states(self.model, self.data, self.kwargs, self.options["data_plate"])
            if space is not None and space.size > _FEW_STATES:
                return None
        try:
            found = log_likelihood(
                self.model, *self.data, estimator="exact", **self.options, **self.kwargs
            )
        except ProgramError:
            if required:
                raise
            return None
        return _exactly(found.log_prob, "exact")


def _exactly(value: Tensor, source: str) -> _Known:
    zero = torch.zeros_like(value)
    return _Known((value, zero), (value, zero), source)


def _check(
    evidence: str, num_steps: int, num_repetitions: int, simulate: bool, log_prob: Any
) -> None:
    if evidence not in _EVIDENCE:
        raise ProgramError(f"evidence must be one of {_EVIDENCE}, got {evidence!r}.")
    for name, value, least in (
        ("num_steps", num_steps, 3),
        ("num_repetitions", num_repetitions, 2),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ProgramError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    if simulate and log_prob is not None:
        raise ProgramError(
            "log_prob is that of data you have, but simulate=True replaces them. Leave one out."
        )
