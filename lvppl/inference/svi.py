"""Stochastic variational inference: the front door."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from pyro import poutine

from lvppl.checks import check
from lvppl.errors import ProgramError, ProgramFailure
from lvppl.inference.arguments import (
    as_tuple,
    check_callables,
    check_counts,
    check_data,
    explained,
    place_of,
    shapes_of,
)
from lvppl.inference.fit import Fit, History, moved, versions
from lvppl.inference.minibatch import (
    Transform,
    data_plates_of,
    gather,
    num_rows,
    scaled_minibatch,
    transformed,
)
from lvppl.inference.optimizers import OptimizerLike, SchedulerLike, check_positive, make_mover
from lvppl.inference.options import refuse_unknown
from lvppl.inference.state import FitState, modules_of
from lvppl.inference.training import Plan, Stop, Training, loss_of
from lvppl.missing import with_missing
from lvppl.objectives import ELBO
from lvppl.seeding import RandomStream, checked_seed, derived_seed, seeded
from lvppl.tracing import trace_pair

__all__ = ["SVI"]

Program = Callable[..., Any]


class Programs(NamedTuple):
    """Model and guide as ``missing=`` has them run."""

    model: Program
    guide: Program
    missing: str | None


_STEPS_BETWEEN_EVALUATIONS = 50


class SVI:
    """Fit a guide q(z | y), and the parameters of a model p(z, y), by stochastic gradients.

    Minimises an objective, the negative ELBO unless said otherwise:

        −ELBO = KL(q(z | y), p(z)) − E_q ln p(y | z)        nats, summed over the data

    ::

        fit = lvppl.SVI(model, guide, learning_rate=1e-3).fit(y, num_epochs=50, batch_size=128)

    :param model, guide: Pyro programs of the same signature.
    :param objective: an objective of lvppl, a Pyro loss with ``differentiable_loss``, or a callable
        ``(model, guide, *args, **kwargs)`` that returns a 0-dim tensor. Default ``lvppl.ELBO()``.
    :param optimizer: a ``torch.optim`` class, a ``functools.partial`` of one, any callable from
        parameters to a torch optimiser, or a Pyro optimizer. Default ``torch.optim.Adam``.
    :param learning_rate: passed to the optimiser as ``lr``. Default its own; 1e-3 for the default
        optimiser.
    :param scheduler: a callable from a torch optimiser to a learning-rate scheduler, such as
        ``lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 100)``. A plateau scheduler gets
        the last negative validation ELBO, or the last loss.
    :param scheduler_interval: step the scheduler each ``"epoch"`` or each ``"step"``. The scheduler
        of a Pyro optimizer goes by epochs.
    :param clip_norm: largest Euclidean norm of the gradient of all parameters together.

    Source: Hoffman, Blei, Wang and Paisley 2013 (JMLR 14); Kingma and Welling 2014, section 2.3.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        *,
        objective: Any = None,
        optimizer: OptimizerLike | None = None,
        learning_rate: float | None = None,
        scheduler: SchedulerLike | None = None,
        scheduler_interval: str = "epoch",
        clip_norm: float | None = None,
        **unknown: NoReturn,
    ) -> None:
        refuse_unknown(unknown, SVI, SVI.fit)
        for name, program in (("model", model), ("guide", guide)):
            if not callable(program) or isinstance(program, type):
                raise ProgramError(f"{name} must be a Pyro program (a callable), not {program!r}")
        check_positive("clip_norm", clip_norm)
        self.model = model
        self.guide = guide
        self.objective = ELBO() if objective is None else _checked_objective(objective)
        self.clip_norm = clip_norm
        self._mover = lambda: make_mover(optimizer, learning_rate, scheduler, scheduler_interval)
        self._mover()  # refuse a wrong optimiser here rather than in fit

    def fit(
        self,
        *data: Any,
        num_epochs: int | None = None,
        num_steps: int | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        device: str | torch.device = "auto",
        validation: Any = None,
        tolerance: float | None = None,
        patience: int = 10,
        evaluate_every: int | None = None,
        callbacks: Sequence[Callable[[Fit], Any]] = (),
        transform: Transform | None = None,
        progress: bool = True,
        strict: bool = True,
        missing: str | None = None,
        resume: Fit | None = None,
        **kwargs: Any,
    ) -> Fit:
        """Train, and return the record of it.

        With ``batch_size``, each epoch goes once through the rows in a random order. Every tensor
        among ``data`` (also inside tuples, lists and dictionaries) whose first dimension is that of
        the first argument is gathered; anything else, and ``kwargs``, is passed whole. The plates
        that follow the rows are found by running the program, and their sites are scaled by
        rows / batch so that a model with global latents stays unbiased.

        A fit starts from the values that modules had before any fit (or that were set since), and
        leaves its parameters in them; :class:`Fit` keeps copies.

        :param data: positional arguments of model and guide; the first gives the number of rows.
        :param num_epochs, num_steps: how long, in all (steps of a resumed fit count); whichever
            comes first. At least one is needed.
        :param batch_size: rows of a minibatch. None, or all rows: no minibatches.
        :param seed: the same seed gives the same run; None draws one, kept in ``Fit.seed``.
        :param device: ``"auto"`` is where the modules of the program are, else where the data are;
            a device given by name also receives the modules, and tensors that the program makes.
        :param validation: held-out data, a tensor or a tuple like ``data``. The fit then returns
            the parameters of the best validation ELBO.
        :param tolerance: stop when the mean ELBO (on validation data, if given) of the last
            ``patience`` evaluations is less than this above the mean of the ``patience`` before, in
            nats per row. Evaluations share their random numbers, so differences have little noise.
        :param evaluate_every: epochs between evaluations; default about 50 steps.
        :param callbacks: each is called with the fit in progress after each epoch, outside its
            parameters and random numbers. ``StopIteration`` ends the fit.
        :param transform: a function from the tuple of a minibatch's arguments to another, on the
            device, for training and validation alike (dynamic binarisation).
        :param progress: show a progress bar, or a line now and then where there is no terminal.
        :param strict: refuse NaN in the data, and sites that only one of model and guide has (the
            objective has a ``strict`` of its own).
        :param missing: ``"nan"`` takes NaN in the data as missing values, which leave the
            likelihood; the guide reads 0 in their place (:mod:`lvppl.missing`). With
            ``objective=lvppl.IWAE(...)`` this is the MIWAE bound. By default NaN is an error.
        :param resume: go on from this fit. On a CPU the result is that of an uninterrupted run.
        :raises ProgramError: before the first step, where program, data or options do not fit.
        """
        check_callables(callbacks, transform)
        if resume is not None:
            seed, batch_size = _resumed_settings(resume, seed, batch_size)
            missing = missing or resume.settings.get("missing")
        pair = Programs(*with_missing(self.model, self.guide, missing), missing)
        seed = checked_seed(seed)
        where, given = place_of(modules_of(self.model, self.guide), device, data)
        data, kwargs = moved(data, where), moved(kwargs, where)
        held_out = None if validation is None else moved(as_tuple(validation), where)
        check_counts(
            num_epochs=num_epochs,
            num_steps=num_steps,
            batch_size=batch_size,
            patience=patience,
            evaluate_every=evaluate_every,
        )
        check_positive("tolerance", tolerance, zero=True)
        batch_size = check_data(data, batch_size, held_out, strict, missing=missing)
        state = FitState(where if given else None)
        try:
            plates, own, prototype = self._prepare(
                state, pair, data, kwargs, batch_size, seed, where, strict, transform, held_out
            )
            plan = Plan(
                model=pair.model,
                guide=pair.guide,
                objective=self.objective,
                args=data,
                kwargs=kwargs,
                data_plates=plates,
                batch_size=batch_size,
                max_steps=_max_steps(num_epochs, num_steps, num_rows(data), batch_size),
                max_epochs=num_epochs,
                clip_norm=self.clip_norm,
                validation=held_out,
                evaluate_every=1,
                tolerance=tolerance,
                patience=patience,
                transform=transform,
                device=where,
                seed=seed,
                callbacks=tuple(callbacks),
                progress=progress,
                strict=strict,
                missing=missing,
            )
            plan.evaluate_every = evaluate_every or -(
                -_STEPS_BETWEEN_EVALUATIONS // plan.batches_per_epoch
            )
            training = Training(plan, state, self._mover(), RandomStream(seed, where))
            if resume is not None:
                training.resume(resume.checkpoint())
                done, limit = training.position, plan
                if done.step > limit.max_steps or done.epoch > (limit.max_epochs or math.inf):
                    raise ProgramError(
                        f"the fit to be resumed has done {done.step} steps and {done.epoch} epochs "
                        "already, more than was asked for: num_steps and num_epochs count from its "
                        "start, so give larger ones"
                    )
            return self._run(training, own, prototype)
        finally:
            state.finish()

    def _run(self, training: Training, own: tuple[str, ...], prototype: tuple[Any, ...]) -> Fit:
        def in_progress() -> Fit:
            running = Stop("running", "the fit is in progress")
            return self._record(training, running, own, prototype, training.checkpoint)

        stop = training.run(in_progress)
        checkpoint = training.checkpoint()
        last = training.evaluations[-1].step if training.evaluations else 0
        if stop.status in ("max_steps", "converged") and last != training.position.step:
            training.evaluate()
        training.state.finish(training.best)
        return self._record(training, stop, own, prototype, lambda: checkpoint)

    def _record(
        self,
        training: Training,
        stop: Stop,
        own: tuple[str, ...],
        prototype: tuple[Any, ...],
        checkpoint: Callable[[], dict[str, Any]],
    ) -> Fit:
        plan, position = training.plan, training.position
        return Fit(
            model=self.model,
            guide=self.guide,
            objective=self.objective,
            status=stop.status,
            reason=stop.reason,
            seed=plan.seed,
            num_steps=position.step,
            num_epochs=position.epoch,
            history=History(training.losses[: position.step], training.evaluations),
            versions=versions(),
            settings={
                "batch_size": plan.batch_size,
                "data_plates": list(plan.data_plates),
                "num_rows": plan.rows,
                "clip_norm": plan.clip_norm,
                "evaluate_every": plan.evaluate_every,
                "tolerance": plan.tolerance,
                "patience": plan.patience,
                "strict": plan.strict,
                "missing": plan.missing,
                "device": str(plan.device),
                "learning_rate": training.mover.learning_rate(),
            },
            state=training.state,
            prototype=(prototype, plan.kwargs),
            own_params=own,
            checkpoint=checkpoint,
        )

    # -------------------------------------------------------------------------- before the steps

    def _prepare(
        self,
        state: FitState,
        pair: Programs,
        data: tuple[Any, ...],
        kwargs: dict[str, Any],
        batch_size: int | None,
        seed: int,
        device: torch.device,
        strict: bool,
        transform: Transform | None,
        held_out: tuple[Any, ...] | None,
    ) -> tuple[tuple[str, ...], tuple[str, ...], tuple[Any, ...]]:
        """Make every parameter, check the program, and find the data plates.

        Returns the plates, the parameters that only the objective makes, and arguments on which
        the program can be run again: few rows if it takes any number, else all.

        It draws from a stream of its own: whether parameters are made here or exist from an
        earlier fit, the steps see the same random numbers.
        """
        model, guide, missing = pair
        rows, batch = num_rows(data), data
        modules = modules_of(self.model, self.guide)
        state.add_modules(modules)
        with state.active(), seeded(derived_seed(seed, "prepare"), device):
            plates: tuple[str, ...] = ()
            with (
                explained(data, kwargs, modules, SVI.fit, SVI),
                state.discovering(),
                state.buffers_preserved(),
            ):
                if batch_size is not None:
                    # First, because an autoguide takes its shapes from its first batch.
                    plates = data_plates_of(
                        model,
                        guide,
                        data,
                        kwargs,
                        batch_size=batch_size,
                        transform=transform,
                    )
                    index = torch.arange(batch_size, device=data[0].device)
                    batch = gather(data, index, rows or batch_size)
                batch = transformed(transform, batch)
                first_run(model, guide, batch, kwargs)
            with state.buffers_preserved(), explained(data, kwargs, modules, SVI.fit, SVI):
                report = check(
                    self.model, self.guide, *batch, strict=strict, missing=missing, **kwargs
                )
                programs = set(state.tensors())
                with scaled_minibatch(plates, rows or 1):
                    loss = loss_of(self.objective, model, guide, batch, kwargs)
                if not bool(loss.isfinite()):
                    # Only here: an objective may do without densities, as a GAN's does.
                    report.require(computable=True)
                if held_out is not None:
                    _try_validation(pair, held_out, data, kwargs, batch_size, transform)
            state.claim()
            if batch_size is not None:
                batch = gather(
                    data, torch.arange(min(2, batch_size), device=data[0].device), rows or 1
                )
                batch = transformed(transform, batch)
            return plates, tuple(n for n in state.tensors() if n not in programs), batch


def _try_validation(
    pair: Programs,
    held_out: tuple[Any, ...],
    data: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch_size: int | None,
    transform: Transform | None,
) -> None:
    """Run the programs on the first rows of the validation data, which fails before a step."""
    rows, batch = num_rows(held_out), held_out
    if rows is not None and batch_size is not None and rows > batch_size:
        batch = gather(held_out, torch.arange(batch_size, device=held_out[0].device), rows)
    try:
        first_run(pair.model, pair.guide, transformed(transform, batch), kwargs)
    except ProgramFailure as error:
        came, expected = (shapes_of(args) for args in (held_out, data))
        raise ProgramError(
            f"the program does not run on the validation data, of shape {came}; that of the "
            f"training data is {expected}. Give held-out rows of the same kind. {error}"
        ) from error


def first_run(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Run guide and model once, so that every parameter exists."""
    with torch.no_grad(), poutine.block():
        trace_pair(model, guide, args, kwargs)


# --------------------------------------------------------------------------------------- arguments


def _checked_objective(objective: Any) -> Any:
    if isinstance(objective, type) or not (
        hasattr(objective, "differentiable_loss") or callable(objective)
    ):
        raise ProgramError(
            "objective must be an objective such as lvppl.ELBO(), a Pyro loss with "
            f"differentiable_loss, or a callable, but is {objective!r}"
        )
    return objective


def _resumed_settings(fit: Any, seed: int | None, batch_size: int | None) -> tuple[int, int | None]:
    if not isinstance(fit, Fit):
        raise ProgramError(
            f"resume must be a fit, but is {fit!r}. Read a fit on disk with "
            "lvppl.load(folder, model, guide)."
        )
    if "learning_rate" not in fit.settings:
        raise ProgramError(
            "resume must be a fit by lvppl.SVI, but this one is by lvppl.EM: it has no optimiser "
            "to go on with. Start from its parameters instead: write fit.params[name] as the first "
            "values of the program."
        )
    if seed is not None and seed != fit.seed:
        raise ProgramError(f"the fit to be resumed has seed {fit.seed}, not {seed}: leave seed out")
    before = fit.settings["batch_size"]
    if batch_size is not None and before is not None and batch_size != before:
        raise ProgramError(
            f"the fit to be resumed has batch_size={before}, not {batch_size}: leave it out"
        )
    return fit.seed, before


def _max_steps(
    num_epochs: int | None, num_steps: int | None, rows: int | None, batch_size: int | None
) -> int:
    if num_epochs is None and num_steps is None:
        raise ProgramError("say how long to train: fit(..., num_epochs=...) or num_steps=...")
    per_epoch = 1 if batch_size is None else -(-(rows or 1) // batch_size)
    by_epochs = math.inf if num_epochs is None else num_epochs * per_epoch
    return int(min(by_epochs, math.inf if num_steps is None else num_steps))
