"""The record of an EM fit, and what can be asked of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from pyro import poutine
from pyro.distributions import Independent, MaskedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch import distributions as td

from lvppl.conjugate import ConjugateLatents
from lvppl.distributions import HiddenMarkov
from lvppl.errors import ProgramError, ProgramFailure
from lvppl.inference.fit import Fit, History
from lvppl.inference.information import num_free
from lvppl.inference.m_step import MStepTable
from lvppl.inference.map_latents import MapLatents
from lvppl.inference.state import FitState
from lvppl.missing import with_missing
from lvppl.tracing import plates_of, sample_sites, traced, undisturbed

if TYPE_CHECKING:
    from lvppl.evidence import ExactPosterior, LogEvidence
    from lvppl.inference.em_loop import Loop, Settings
    from lvppl.inference.em_problem import Problem
    from lvppl.inference.imputation import Imputation
    from lvppl.inference.likelihood import LikelihoodEstimate
    from lvppl.inference.posterior import Prior

__all__ = ["EMFit", "EMHistory", "Restart", "StepsOfData"]

T = TypeVar("T")


class EMHistory(History):
    """``objective``: the tracked quantity before each M-step and after the last, nats in all.

    ``loss`` is its negative.
    """

    def __init__(self, objectives: Sequence[float]) -> None:
        super().__init__(-torch.tensor(objectives, dtype=torch.float64), ())

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        loss = self._losses.numpy().copy()
        return {"objective": -loss, "loss": loss}


@dataclass(frozen=True)
class Restart:
    """One start: how it ended, the tracked quantity there in nats, and its parameters."""

    number: int
    status: str
    reason: str
    objective: float
    num_steps: int
    params: dict[str, Tensor]

    def __repr__(self) -> str:
        return (
            f"Restart {self.number}: {self.objective:.6g} nats, {self.status} after "
            f"{self.num_steps} iterations"
        )


@dataclass(frozen=True, eq=False, repr=False)
class EMFit(Fit):
    """A fit by :class:`lvppl.EM`. Its posterior is exact, and needs no guide.

    ::

        fit.posterior(y).map().values["z"]     # the cluster of each datum
        fit.posterior(y).marginals("z")        # responsibilities
        fit.log_evidence(y_test).per_datum     # ln p(y)
        fit.sample(y).predictive["y"]          # new data

    :ivar tracked: what the iterations raise: ``ln p(y)``, ``hard ELBO``, ...
    :ivar m_step: how each parameter was maximised; prints as a table.
    :ivar restarts: every start, in order; the best is the fit's own.
    """

    tracked: str = ""
    m_step: MStepTable = None  # type: ignore[assignment]
    restarts: tuple[Restart, ...] = ()

    @staticmethod
    def of(
        model: Callable[..., Any],
        loop: Loop,
        state: FitState,
        problem: Problem,
        settings: Settings,
        versions: dict[str, str],
        restarts: tuple[Restart, ...],
        options: dict[str, Any],
    ) -> EMFit:
        prior = " + ln p(θ)" if problem.latents.names else ""
        return EMFit(
            model=model,
            guide=None,  # type: ignore[arg-type]
            objective=None,
            status=loop.status,
            reason=loop.reason,
            seed=settings.seed,
            num_steps=loop.iteration,
            num_epochs=loop.iteration,
            history=EMHistory(loop.objectives),
            versions=versions,
            settings={
                **options,
                "device": str(problem.device),
                "num_batches": len(problem.batches),
            },
            state=state,
            prototype=(problem.batches[0], problem.kwargs),
            tracked=loop.mode.tracked + prior,
            m_step=problem.m_step.table,
            restarts=restarts,
        )

    @property
    def objective_value(self) -> float:
        """The tracked quantity at the fit's parameters, nats in all."""
        return float(self.history["objective"][-1])

    def _program(self, kinds: Collection[str] = ("gamma", "gaussian")) -> Callable[..., Any]:
        """The model with its continuous latents as the fit took them.

        Args:
            kinds: of the latents that are integrated, those that get nodes.
        """
        shared = self.settings.get("map_latents", ())
        local = self.settings.get("integrated_latents", ())
        missing = self.settings.get("missing")
        model, _ = with_missing(self.model, None, missing, draws=False)
        return MapLatents(shared)(ConjugateLatents(local, kinds)(StepsOfData()(model)))

    @contextmanager
    def _running(
        self, data: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]:
        """The program with the fit's parameters in place, and the data on their device."""
        with self._inside(data) as inside:
            shared = self.settings.get("map_latents", ())
            if shared:
                _require_same_elements(self.model, shared, self.params, inside, kwargs)
            yield self._program(), inside

    def posterior(self, *data: Any, temperature: float = 1.0, **kwargs: Any) -> ExactPosterior:  # type: ignore[override]
        """The exact posterior of the latents for these data, which may be new.

        See :class:`lvppl.ExactPosterior` for what it can be asked, and for the names of latents
        inside a HiddenMarkov (``"<site>_states"``) or a MixtureSameFamily (``"<site>_component"``).
        Draws are ``fit.posterior(y).sample(100, seed=0)``.

        :raises ProgramError: as :func:`lvppl.posterior`; a latent that was maximised (MAP) has
            other elements in these data than in those of the fit.
        """
        from lvppl.evidence import posterior

        sampling = sorted(kwargs.keys() & {"batch_size", "num_samples", "seed"})
        if sampling:
            raise ProgramError(
                f"the posterior of an EM fit is exact and takes no {' or '.join(sampling)}. Draws "
                "are fit.posterior(y).sample(num_samples, seed=seed)."
            )
        with self._running(data, kwargs) as (_, inside):
            ask = partial(posterior, temperature=temperature)
            return self._exactly(ask, inside, kwargs)

    def log_evidence(self, *data: Any, **kwargs: Any) -> LogEvidence:
        """ln p(y) of these data at the fit's parameters; see :func:`lvppl.log_evidence`."""
        from lvppl.evidence import log_evidence

        with self._running(data, kwargs) as (_, inside), torch.no_grad():
            return self._exactly(log_evidence, inside, kwargs)

    def _exactly(
        self, ask: Callable[..., T], data: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> T:
        """An exact answer: Gaussian latents by algebra where every site is Normal and linear in
        them, else at nodes, as in the fit."""
        if self.settings.get("integrated_latents"):
            try:
                return ask(self._program(("gamma",)), *data, **kwargs)
            except ProgramError:
                pass  # Gaussian by its terms, though not by its sites
        return ask(self._program(), *data, **kwargs)

    @property
    def num_free(self) -> int:
        """k, independent real numbers of the parameters that data bear upon, MAP latents included.

        Logits that a softmax takes count one less a row. What else is redundant is not known, such
        as one of K networks whose logits compete: k is then too large.
        """
        constraints, total = self.state.constraints(), 0
        for name, value in self.params.items():
            step = self.m_step.get(name)
            if step is None or step.how != "fixed":
                total += num_free(value, constraints[name])
            if step is not None and step.form.startswith("softmax"):
                total -= value[..., 0].numel()
        return total

    def aic(self, *data: Any, **kwargs: Any) -> float:
        """Akaike's criterion 2 k − 2 ln p(y), nats; smaller is better. Source: Akaike (1974)."""
        return 2.0 * self.num_free - 2.0 * float(self.log_evidence(*data, **kwargs))

    def bic(self, *data: Any, **kwargs: Any) -> float:
        """Schwarz's criterion k ln N − 2 ln p(y), nats, N the number of data; smaller is better.

        :raises ProgramError: the whole data set is one datum, as with one sequence: what N is then
            is for the reader to say.

        Source: Schwarz (1978), Annals of Statistics 6.
        """
        evidence = self.log_evidence(*data, **kwargs)
        if not evidence.data_plates:
            raise ProgramError(
                "bic needs N, the number of data, but no plate is common to all sites: the whole "
                "data set is one datum. Compute fit.num_free * math.log(N) - "
                "2 * float(fit.log_evidence(y)) with the N that you mean."
            )
        count = evidence.per_datum.numel()
        return self.num_free * math.log(count) - 2.0 * float(evidence)

    def impute(self, *data: Any, num_imputations: int = 0, **options: Any) -> Imputation:
        """Fill the NaN of these data, which may be new; see :func:`lvppl.impute`.

        Nothing of the mean is random: ``num_samples`` changes nothing.
        """
        from lvppl.factor_graph import enumerating
        from lvppl.inference.imputation import impute

        options = {**options, "num_samples": max(1, num_imputations)}
        with self._running(data, {}) as (program, inside):
            return impute(enumerating(program), *inside, num_imputations=num_imputations, **options)

    def reconstruct(
        self,
        *data: Any,
        num_samples: int = 1,
        batch_size: int | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """E[y | z] averaged over p(z | y), by observed site, (*plates, *event).

        The average is exact: ``num_samples`` and ``seed`` change nothing.
        """
        from lvppl.factor_graph import enumerating
        from lvppl.inference.posterior import reconstruct

        with self._running(data, kwargs) as (program, inside):
            return reconstruct(enumerating(program), None, *inside, batch_size=batch_size, **kwargs)

    def sample(
        self, *data: Any, num_samples: int = 1, seed: int | None = None, **kwargs: Any
    ) -> Prior:
        """New latents and data at the fit's parameters; see :meth:`Fit.sample`.

        Latents that were maximised (MAP) keep their values. Sequences of a HiddenMarkov that does
        not say how long they are get the length of the data.
        """
        from lvppl.inference.posterior import sample_prior

        if not data and self.prototype is not None:
            data, kwargs = self.prototype[0], {**self.prototype[1], **kwargs}
        with self._running(data, kwargs) as (program, inside):
            options: dict[str, Any] = {"num_samples": num_samples, "seed": seed, **kwargs}
            return sample_prior(program, *inside, **options)

    def log_likelihood(self, *data: Any, **options: Any) -> LikelihoodEstimate:  # type: ignore[override]
        raise ProgramError(
            "ln p(y) of an EM fit is exact: there is nothing to estimate. Use "
            "fit.log_evidence(y).per_datum, or float(fit.log_evidence(y)) for the total, in nats."
        )

    def report(self, *data: Any, seed: int | None = None, **kwargs: Any) -> Any:
        raise ProgramError(
            "an EM fit has no guide to report on: its bound is ln p(y) itself. Use "
            "fit.log_evidence(y)."
        )

    def __repr__(self) -> str:
        lines = [
            f"EM fit: {self.status} after {self.num_steps:,} iterations, seed {self.seed}",
            f"  {self.reason}",
            f"  {self.tracked} = {self.objective_value:.6f} nats",
        ]
        if len(self.restarts) > 1:
            values = sorted(restart.objective for restart in self.restarts)
            lines.append(
                f"  best of {len(values)} restarts; the worst ended at {values[0]:.6f} nats"
            )
        table = repr(self.m_step).replace("\n", "\n  ")
        return "\n".join([*lines, "", f"  {table}"])


# ------------------------------------------------------------------------- the program on new data


class StepsOfData(Messenger):
    """A HiddenMarkov that says no number of steps has that of its data: it can then be drawn."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and isinstance(msg["value"], Tensor):
            msg["fn"] = _with_steps(msg["fn"], msg["value"])


def _with_steps(fn: Any, value: Tensor) -> Any:
    if isinstance(fn, HiddenMarkov) and fn.num_steps is None:
        step = value.dim() - len(fn.event_shape)
        return fn if step < 0 else fn.with_steps(value.shape[step])
    if isinstance(fn, MaskedDistribution):
        inner = _with_steps(fn.base_dist, value)
        return fn if inner is fn.base_dist else MaskedDistribution(inner, fn._mask)
    if isinstance(fn, td.Independent):
        inner = _with_steps(fn.base_dist, value)
        return fn if inner is fn.base_dist else Independent(inner, fn.reinterpreted_batch_ndims)
    return fn


def _require_same_elements(
    model: Callable[..., Any],
    names: Sequence[str],
    params: Mapping[str, Tensor],
    data: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    """Refuse data in which a latent that was maximised has more or fewer elements than in the fit.

    Raises:
        ProgramError: by latent and plate.
    """
    try:
        with undisturbed(), poutine.block():
            sites = sample_sites(traced("model", model, data, kwargs))
    except ProgramFailure:
        return  # the run that is wanted says it better
    for site in sites:
        name, shape = site["name"], tuple(site["value"].shape)
        if name not in names or shape == tuple(params[name].shape):
            continue
        known = tuple(params[name].shape)
        plates = [f"'{plate.name}' (now {plate.size})" for plate in plates_of(site)]
        where = f" in plate {', '.join(plates)}" if plates else ""
        raise ProgramError(
            f"Latent '{name}' was maximised: the fit has values of shape {known} for it, but these "
            f"data ask for {shape}{where}. What was found for some elements says nothing of "
            "others: pass data of the elements of the fit, all of them and in their order, or fit "
            "again with the new ones among the data."
        )
