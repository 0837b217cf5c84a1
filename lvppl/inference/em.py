"""Expectation maximisation: the front door."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import pyro
import torch
from pyro import poutine

from lvppl.conjugate import ConjugateLatents
from lvppl.errors import ProgramError
from lvppl.factor_graph import FactorGraph, enumerating, explained_run
from lvppl.inference.arguments import (
    check_callables,
    check_counts,
    check_data,
    explained,
    place_of,
)
from lvppl.inference.e_step import Mode
from lvppl.inference.em_checks import (
    inside_constraints,
    probing,
    refuse_drawn_rows,
    refuse_infinite,
    refuse_observations,
    refuse_unseen_columns,
)
from lvppl.inference.em_fit import EMFit, Restart
from lvppl.inference.em_loop import Loop, Settings
from lvppl.inference.em_options import check_non_negative, check_options, check_program, shown
from lvppl.inference.em_problem import Problem
from lvppl.inference.first_states import FirstStates
from lvppl.inference.fit import Fit, moved, versions
from lvppl.inference.inner_latents import has_inner_latents
from lvppl.inference.m_step.entries import Parameters
from lvppl.inference.map_latents import (
    ContinuousLatents,
    MapLatents,
    continuous_latents,
    require_conjugate,
)
from lvppl.inference.minibatch import data_plates_of, gather, num_rows
from lvppl.inference.options import refuse_unknown
from lvppl.inference.starts import start_of
from lvppl.inference.state import FitState, modules_of
from lvppl.inference.variational_em import alternate
from lvppl.layout import layout_of
from lvppl.missing import MissingValues, check_option
from lvppl.objectives import ELBO
from lvppl.seeding import checked_seed, derived_seed, seeded
from lvppl.tracing import plates_of, sample_sites, trace_pair, traced, undisturbed

__all__ = ["EM"]

_NAN_REMEDY = 'fit(..., missing="nan") takes NaN as a missing value; or fill it before the fit.'

Program = Callable[..., Any]


class EM:
    r"""Maximum likelihood, or MAP, for any Pyro program whose latents can be enumerated.

    Two half-steps on one function, the ELBO :math:`E_q \ln p_θ(z, y) + H(q)`: over q at fixed θ
    (the exact posterior, by variable elimination), and over θ at fixed q (in closed form wherever
    the expected log-likelihood has one, found by probing the program). Neither can decrease it:

    =============  ================================================================
    soft           ln p(y)
    ``hard``       the hard ELBO, max over z of ln p(z, y)
    temperature T  E_q ln p(z, y) + T·H(q)
    with priors    the same + ln p(θ): global continuous latents are MAP parameters
    ``online``     nothing is promised step by step
    =============  ================================================================

    ::

        fit = lvppl.EM(model, init="kmeans++", restarts=5).fit(y, seed=0)
        print(fit)                      # status, ln p(y), how each parameter was maximised
        fit.posterior(y).marginals("z")

    :param model: a Pyro program whose latents are discrete with finite support, marked for
        enumeration or not. Continuous latents shared by all data become parameters.
    :param guide: q is then not the exact posterior but this program, and EM alternates gradient
        steps of the ELBO over the guide's parameters and over the model's; see
        :mod:`lvppl.inference.variational_em`.
    :param objective: the ELBO of such a fit, to choose its number of particles.
    :param hard: q is the single best assignment z; ties go to the first state.
    :param temperature: T > 0 of deterministic annealing; a callable from the number of the
        iteration to T anneals (Ueda and Nakano 1998).
    :param online: stochastic EM on minibatches, with the statistics averaged at a decaying step
        (t + 2)^(−0.6) (Cappé and Moulines 2009, section 2).
    :param restarts: independent starts; the best is kept, all are reported.
    :param init: ``"model"`` starts from the program's parameters as they are. ``"kmeans++"`` and
        ``"random"`` assign each datum to the nearest of K data, chosen by k-means++ or uniformly,
        and start with an M-step.
    :param floor: smallest variance, relative to that of the data of the same feature; of a
        covariance the smallest eigenvalue, each feature in units of its own standard deviation. A
        constant feature counts as one of the mean variance of the others. 0 for none: a component
        may then shrink onto one datum, where the likelihood is unbounded.
    :param num_gradient_steps: iterations of L-BFGS in an M-step, for parameters without a formula.
    :param engine: how an E-step is executed. ``"auto"``: by kernels where the program is a Gaussian
        mixture or a chain that they know, else as ``"eager"``: by the program's own
        log-probabilities and variable elimination. Both give the same numbers but for rounding.
    :raises ProgramError: for options that do not exist or do not go together.

    Source: Dempster, Laird and Rubin 1977 (JRSS B 39); Neal and Hinton 1998, for the two half-steps
    on one function; Meng and Rubin 1993, for conditional maximisation.
    """

    def __init__(
        self,
        model: Program,
        guide: Program | None = None,
        *,
        objective: ELBO | None = None,
        hard: bool = False,
        temperature: float | Callable[[int], float] | None = None,
        online: bool = False,
        restarts: int = 1,
        init: str = "model",
        floor: float = 1e-6,
        num_gradient_steps: int = 20,
        engine: str = "auto",
        **unknown: NoReturn,
    ) -> None:
        refuse_unknown(unknown, EM, EM.fit)
        check_program("model", model)
        if guide is not None:
            check_program("guide", guide)
        check_options(
            guide is not None,
            objective=objective,
            hard=hard,
            temperature=temperature,
            online=online,
            restarts=restarts,
            init=init,
            floor=floor,
            num_gradient_steps=num_gradient_steps,
            engine=engine,
        )
        self.model = model
        self.guide = guide
        self.objective = objective
        self.hard = hard
        self.temperature = temperature
        self.online = online
        self.restarts = restarts
        self.init = init
        self.floor = float(floor)
        self.num_gradient_steps = num_gradient_steps
        self.engine = engine
        if not callable(temperature):
            self._modes()  # refuses what is no temperature

    def __repr__(self) -> str:
        return shown(self)

    def fit(
        self,
        *data: Any,
        max_iter: int = 200,
        tol: float = 1e-6,
        batch_size: int | None = None,
        seed: int | None = None,
        device: str | torch.device = "auto",
        missing: str | None = None,
        callbacks: Sequence[Callable[[EMFit], Any]] = (),
        progress: bool = True,
        **kwargs: Any,
    ) -> Fit:
        """Iterate until an iteration gains less than ``tol`` nats per datum.

        :param data: positional arguments of the model.
        :param max_iter: iterations; passes over the data for ``online``.
        :param tol: smallest gain that goes on, in nats per datum. 0: only ``max_iter`` stops.
        :param batch_size: rows held at once. The E-step streams over the batches and the answer is
            that of all rows together; for ``online`` it is the minibatch.
        :param seed: of the start; the same seed gives the same fit. None draws one.
        :param device: as in :meth:`lvppl.SVI.fit`.
        :param missing: ``"nan"`` takes NaN in observed sites as missing values, which leave the
            likelihood; None refuses them. ``fit.posterior`` then does the same.
        :param callbacks: each is called with the fit in progress after each iteration.
            ``StopIteration`` ends the fit.
        :param progress: show a progress bar, or a line now and then.
        :returns: an :class:`EMFit`; with a guide, a :class:`Fit` whose history has the ELBO after
            every half-step, and the KL where the model can be summed exactly.
        :raises ProgramError: before the first iteration, where program, data or options do not fit;
            later where a datum becomes impossible under the model.
        """
        seed = checked_seed(seed)
        check_counts(max_iter=max_iter, batch_size=batch_size)
        check_non_negative(tol=tol)
        check_callables(callbacks)
        where, given = place_of(modules_of(self.model), device, data)
        data, kwargs = moved(data, where), moved(kwargs, where)
        batch_size = self._checked_batch_size(data, batch_size, missing)
        state = FitState(where if given else None)
        if self.guide is not None:
            if batch_size is not None or callbacks:
                raise ProgramError("batch_size and callbacks are not for EM with a guide")
            modules = modules_of(self.model, self.guide)
            with explained(data, kwargs, modules, EM.fit, EM):
                return alternate(
                    self.model,
                    self.guide,
                    data,
                    kwargs,
                    objective=self.objective,
                    max_iter=max_iter,
                    tol=float(tol),
                    num_gradient_steps=self.num_gradient_steps,
                    seed=seed,
                    state=state,
                    device=where,
                    progress=progress,
                    missing=missing,
                )
        try:
            problem = self._prepare(state, data, kwargs, batch_size, seed, where, missing)
            settings = Settings(
                max_iter=max_iter,
                tol=float(tol),
                mode=self._modes(),
                online=self.online,
                num_gradient_steps=self.num_gradient_steps,
                seed=seed,
                progress=progress,
                callbacks=tuple(callbacks),
            )
            return self._run(state, problem, settings)
        finally:
            state.finish()

    # --------------------------------------------------------------------------- before iterating

    def _checked_batch_size(
        self, data: tuple[Any, ...], batch_size: int | None, missing: str | None
    ) -> int | None:
        """Refuse data that cannot be right; the rows of a batch, None for all at once."""
        check_option(missing)
        refuse_infinite(data)
        if missing:
            refuse_unseen_columns(data)
        found = check_data(data, batch_size, None, missing is None, remedy=_NAN_REMEDY)
        if self.online and found is None:
            came = (
                f"{batch_size} came for {num_rows(data)} rows" if batch_size else "none was given"
            )
            raise ProgramError(
                "online=True needs fit(..., batch_size=...), the rows of a step, fewer than the "
                f"data have; {came}. Leave online out to use all rows at each step."
            )
        return found

    def _modes(self) -> Callable[[int], Mode]:
        given = self.temperature

        def mode(iteration: int) -> Mode:
            value = given(iteration) if callable(given) else given
            value = 1.0 if value is None else value
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ProgramError(
                    f"temperature must be a number above 0, but is {value!r}. The limit 0 is "
                    "hard=True."
                )
            return Mode(self.hard, float(value))

        mode(0)
        return mode

    def _prepare(
        self,
        state: FitState,
        data: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        batch_size: int | None,
        seed: int,
        device: torch.device,
        missing: str | None,
    ) -> Problem:
        """Make every parameter, refuse what EM cannot do, and find how each is maximised."""
        modules = modules_of(self.model)
        state.add_modules(modules)
        with (
            state.active(),
            seeded(derived_seed(seed, "prepare"), device),
            explained(data, kwargs, modules, EM.fit, EM),
            FirstStates(),
        ):
            with (
                state.discovering(),
                state.buffers_preserved(),
                torch.no_grad(),
                poutine.block(),
                inside_constraints(),
            ):
                trace, _ = trace_pair(FirstStates()(self.model), None, data, kwargs)
            refuse_drawn_rows(trace)
            refuse_observations(trace)
            model = MissingValues(parts=False)(self.model) if missing else self.model
            continuous = continuous_latents(FirstStates()(model), data, kwargs)
            latents = MapLatents(continuous.shared)
            program = latents(enumerating(ConjugateLatents(continuous.local)(model)))
            batches = _batches(self.model, data, kwargs, batch_size)
            _refuse_rows_of_parameters(continuous, self.model, batches, kwargs)
            with state.discovering(), state.buffers_preserved(), torch.no_grad(), poutine.block():
                traced(
                    "model", FirstStates()(program), batches[0], kwargs
                )  # the latents' parameters, too
            with undisturbed():
                graph = _few_rows(program, batches[0], kwargs)
                if continuous.local:  # what is integrated is checked at every datum
                    for batch in batches:
                        require_conjugate(_graph(program, batch, kwargs))
            _require_latents(graph, continuous)
            state.claim()
            _require_double(continuous, state)
            if not state.tensors():
                raise ProgramError(
                    "The model has no parameter to maximise. Write pyro.param(name, value), a "
                    "PyroModule with PyroParam, or pyro.module. The posterior of the latents is "
                    "lvppl.posterior(model, *data)."
                )
            store = pyro.get_param_store().get_state()
            with probing(store["constraints"]):
                problem = Problem(
                    program,
                    latents,
                    batches,
                    dict(kwargs),
                    Parameters(state.tensors(), store["constraints"]),
                    self.floor,
                    device,
                    integrated=continuous.local,
                    missing=missing,
                    engine=self.engine,
                )
                _ = problem.m_step  # probing may fail, and does so before the first iteration
                return problem

    # ---------------------------------------------------------------------------------- restarts

    def _run(self, state: FitState, problem: Problem, settings: Settings) -> EMFit:
        start, buffers = state.values()
        best: tuple[Loop, Any] | None = None
        restarts: list[Restart] = []
        for number in range(self.restarts):
            state.assign(start, buffers)
            loop = Loop(problem, settings, state, self._record(state, problem, settings, restarts))
            with state.active(), state.buffers_preserved():
                start_of(
                    self.init, problem, settings, derived_seed(settings.seed, f"start{number}")
                )
            loop.run()
            values = state.values()
            restarts.append(
                Restart(
                    number, loop.status, loop.reason, loop.best, loop.iteration, state.constrained()
                )
            )
            if best is None or loop.best > best[0].best:
                best = (loop, values)
            if loop.status == "interrupted":
                break
        assert best is not None
        loop, values = best
        state.finish(values)
        return self._record(state, problem, settings, restarts)(loop)

    def _record(
        self,
        state: FitState,
        problem: Problem,
        settings: Settings,
        restarts: list[Restart],
    ) -> Callable[[Loop], EMFit]:
        def record(loop: Loop) -> EMFit:
            return EMFit.of(
                self.model,
                loop,
                state,
                problem,
                settings,
                versions(),
                tuple(restarts),
                {
                    "hard": self.hard,
                    "temperature": settings.mode(loop.iteration).temperature,
                    "online": self.online,
                    "init": self.init,
                    "engine": self.engine,
                    "floor": self.floor,
                    "tol": settings.tol,
                    "map_latents": sorted(problem.latents.names),
                    "integrated_latents": sorted(problem.integrated),
                    "missing": problem.missing,
                },
            )

        return record


def _batches(
    model: Program, data: tuple[Any, ...], kwargs: Mapping[str, Any], batch_size: int | None
) -> list[tuple[Any, ...]]:
    rows = num_rows(data)
    if batch_size is None or rows is None:
        return [data]
    if not data_plates_of(model, None, data, dict(kwargs), batch_size=batch_size):
        raise ProgramError(
            f"batch_size={batch_size} asks for batches, but the data plate of the model states its "
            "full size and scales itself. Write pyro.plate(name, len(y)), or leave batch_size out."
        )
    return [
        gather(
            data, torch.arange(first, min(first + batch_size, rows), device=data[0].device), rows
        )
        for first in range(0, rows, batch_size)
    ]


_FEW = 2_000


def _few_rows(program: Program, batch: tuple[Any, ...], kwargs: Mapping[str, Any]) -> FactorGraph:
    """The program's factors on a few rows where it runs on any number, else on all."""
    rows = num_rows(batch)
    if rows is not None and rows > 2 * _FEW:
        store = pyro.get_param_store()
        few = gather(batch, torch.arange(_FEW, device=batch[0].device), rows)
        with store.scope({part: dict(v) for part, v in store.get_state().items()}):  # type: ignore
            try:
                return _graph(program, few, kwargs)
            except ProgramError:
                pass  # whatever it is, all rows will say it better
    return _graph(program, batch, kwargs)


def _graph(program: Program, batch: tuple[Any, ...], kwargs: Mapping[str, Any]) -> FactorGraph:
    with explained_run(program, batch, kwargs):
        layout = layout_of(program, None, batch, kwargs)
        graph = FactorGraph(program, batch, kwargs, layout, guarded=True)
    graph.require_affordable()
    return graph


def _require_double(continuous: ContinuousLatents, state: FitState) -> None:
    """An integral is made of differences of log-densities, which float32 does not hold."""
    if continuous.local and any(t.dtype != torch.float64 for t in state.tensors().values()):
        raise ProgramError(
            f"Latent '{continuous.local[0]}' is integrated out of each datum, which needs float64, "
            "but parameters are float32. Begin with torch.set_default_dtype(torch.float64), or use "
            "model.double(); and y.double()."
        )


def _refuse_rows_of_parameters(
    continuous: ContinuousLatents,
    model: Program,
    batches: list[tuple[Any, ...]],
    kwargs: Mapping[str, Any],
) -> None:
    """A latent of each row of a batch cannot be a parameter: all batches would share it."""
    if len(batches) < 2 or not continuous.shared:
        return
    with undisturbed(), poutine.block():
        sites = sample_sites(poutine.trace(model).get_trace(*batches[0], **kwargs))
    rows = num_rows(batches[0])
    for site in sites:
        if site["name"] in continuous.shared and any(p.size == rows for p in plates_of(site)):
            raise ProgramError(
                f"Latent '{site['name']}' becomes a parameter, one for each row of the data, so "
                "that batches cannot share it. Leave batch_size out."
            )


def _require_latents(graph: FactorGraph, continuous: ContinuousLatents) -> None:
    if graph.latents or any(has_inner_latents(site["fn"]) for site in graph.sites.values()):
        return
    if continuous.shared:
        raise ProgramError(
            f"Latent '{continuous.shared[0]}' is continuous and belongs to the whole data set: EM "
            "takes it for a parameter (MAP), and nothing is left to take an expectation over. "
            "Where it belongs to one of several sequences or groups, put these into a plate: one "
            "sequence is y[None]. Where its integral is exact, the parameters are fitted by "
            "gradients of -lvppl.log_evidence(model, *data).total and any optimizer of torch."
        )
    raise ProgramError(
        "The model has no discrete latent, so that there is nothing to take an expectation over. "
        "Write pyro.sample('z', dist.Categorical(weights)) without obs=, or fit the parameters by "
        "lvppl.SVI with an empty guide."
    )
