"""The iterations of EM: E-step, look, M-step, until something stops them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvppl.errors import ProgramError, ProgramFailure
from lvppl.inference.e_step import (
    Expectation,
    Mode,
    expected_log_joint,
)
from lvppl.inference.em_problem import Batch, Problem
from lvppl.inference.gradient_step import raise_by_gradient
from lvppl.inference.m_step.statistics import Statistics
from lvppl.inference.progress import Progress
from lvppl.inference.reseed import dead_components, reseed
from lvppl.inference.state import FitState
from lvppl.seeding import derived_seed

__all__ = ["Loop", "Settings"]

_MOST_RESEEDS = 20
"""In one run; a component that dies again and again is one too many."""


@dataclass(frozen=True)
class Settings:
    """What the user asked for, checked."""

    max_iter: int
    tol: float
    mode: Callable[[int], Mode]
    online: bool
    num_gradient_steps: int
    seed: int
    progress: bool
    callbacks: tuple[Callable[[Any], Any], ...]


class Loop:
    """One run from one start.

    Attributes:
        objectives: the tracked quantity before each M-step, and after the last; nats in all.
        best: the last (for ``decreased`` the largest) of them.
    """

    def __init__(
        self,
        problem: Problem,
        settings: Settings,
        state: FitState,
        record: Callable[[Loop], Any],
    ) -> None:
        self.problem = problem
        self.settings = settings
        self.state = state
        self.record = record
        self.iteration = 0
        self.objectives: list[float] = []
        self.status, self.reason = "running", "the fit is in progress"
        self.best = -math.inf
        self.reseeded: list[tuple[str, int]] = []
        self._moved = False
        self._averaged: Statistics | None = None
        self._step_number = 0

    def run(self) -> None:
        progress = Progress(self.settings.max_iter, 0, self.settings.progress)
        kept = self.state.values()
        try:
            while self.status == "running":
                with self.state.active(), self.state.buffers_preserved(), torch.no_grad():
                    stop = self._iterate()
                if stop in ("decreased", "failed", "diverged"):
                    self.state.assign(*kept)
                elif self.objectives and math.isfinite(self.objectives[-1]):
                    self.best = self.objectives[-1]
                if self.status == "running":
                    kept = self._before
                    progress.show(self.iteration, self._text)
                    self._call_back()
        except KeyboardInterrupt:
            self.status = "interrupted"
            self.reason = (
                f"interrupted after {self.iteration} iterations; the last parameters are kept"
            )
        finally:
            progress.show(self.iteration, self._text, force=True)
            progress.close()

    def _text(self) -> str:
        if not self.objectives:
            return ""
        return f"{self.mode.tracked} {self.objectives[-1]:.6g} nats"

    @property
    def mode(self) -> Mode:
        return self.settings.mode(self.iteration)

    # ------------------------------------------------------------------------------ one iteration

    def _iterate(self) -> str:
        """E-step, a look at what it says, and if nothing stops the run, the M-step."""
        if self.settings.online:
            if self.problem.m_step.by_gradient:
                raise ProgramError(
                    "online=True averages the statistics of closed-form M-steps, but "
                    f"{', '.join(map(repr, self.problem.m_step.by_gradient))} have none: print the "
                    "m_step table of a fit without online to see why. Use batch_size alone, or "
                    "lvppl.SVI."
                )
            return self._pass_online()
        self._before = self.state.values()
        try:
            objective, statistics, terms = self._expectation()
        except ProgramFailure as error:
            return self._fail(error)
        self.objectives.append(objective)
        self._look(objective)
        if self.status != "running":
            return self.status
        self._maximise(statistics, terms)
        self.iteration += 1
        self._revive(statistics)
        return ""

    def _revive(self, statistics: Statistics) -> None:
        """Start components without data again, and remember that values cannot be compared."""
        self._moved = False
        if self.iteration >= self.settings.max_iter:
            return  # no iteration is left for them to find data in
        dead = dead_components(self.problem.m_step, statistics)
        if not dead or len(self.reseeded) + len(dead) > _MOST_RESEEDS:
            return
        reseed(self.problem, dead)
        self.reseeded += [(str(one), self.iteration) for one in dead]
        self._moved = True

    def _expectation(self) -> tuple[float, Statistics, list[dict[str, Tensor]]]:
        problem, mode = self.problem, self.mode
        total = torch.zeros((), dtype=torch.float64, device=problem.device)
        statistics = problem.m_step.statistics(problem.device)
        weights: list[dict[str, Tensor]] = []
        for batch in problem.batches:
            objective = problem.fast(batch, mode, statistics)
            if objective is None:
                found = Expectation.of(
                    problem.program, batch, problem.kwargs, problem.layout(batch), mode
                )
                objective = found.objective
                problem.gather(batch, found.terms, statistics)
                if problem.m_step.by_gradient:
                    weights.append({term.name: term.weight for term in found.terms})
            total = total + objective.to(total.device)
        return float(total + problem.latents.log_prob()), statistics, weights

    def _maximise(self, statistics: Statistics, weights: Sequence[dict[str, Tensor]]) -> None:
        problem = self.problem
        problem.m_step.maximise(statistics)
        names = problem.m_step.by_gradient
        if not names or not weights:
            return

        def expected() -> Tensor:
            parts = [
                expected_log_joint(
                    problem.program, batch, problem.kwargs, problem.layout(batch), weight
                )
                for batch, weight in zip(problem.batches, weights, strict=True)
            ]
            return torch.stack(parts).sum() + problem.latents.log_prob()

        raise_by_gradient(
            expected,
            [problem.parameters[name].tensor for name in names],
            num_steps=self.settings.num_gradient_steps,
        )

    # --------------------------------------------------------------------------------- stopping

    def _look(self, objective: float) -> None:
        """Whether the E-step's value ends the run, and why."""
        settings, values = self.settings, self.objectives
        tracked = self.mode.tracked
        if not math.isfinite(objective):
            self._stop("diverged", f"{tracked} is {objective} after {self.iteration} iterations")
        elif len(values) > 1 and not self._moved and not _is_moving(settings, self.iteration):
            gain = values[-1] - values[-2]
            slack = self._rounding() * max(1.0, abs(values[-1]))
            per_datum = gain / self.problem.num_data
            if gain < -slack:
                self._stop(
                    "decreased",
                    f"{tracked} fell by {-gain:.3g} nats in iteration {self.iteration}, more than "
                    "rounding explains; the parameters before it are kept",
                )
                self.objectives.pop()
            elif settings.tol > 0 and per_datum < settings.tol:
                self._stop(
                    "converged",
                    f"iteration {self.iteration} gained {max(per_datum, 0.0):.2g} nats per datum, "
                    f"less than tol={settings.tol:g}",
                )
        if self.status == "running" and self.iteration >= settings.max_iter:
            self._stop("max_steps", f"all {settings.max_iter} iterations are done")

    def _rounding(self) -> float:
        dtypes = {p.tensor.dtype for p in self.problem.parameters.values()}
        if self.problem.integrated:
            return 1e-8
        return 1e-10 if dtypes <= {torch.float64} else 2e-6

    def _fail(self, error: ProgramFailure) -> str:
        """An M-step that led to where the program does not run."""
        if self.iteration == 0:
            raise error
        first = str(error).splitlines()[0].rstrip(":")
        self._stop(
            "diverged",
            f"after iteration {self.iteration} the program does not run ({first}); the parameters "
            "before it are kept. A component may have shrunk onto one datum: EM(floor=...) bounds "
            "its variance",
        )
        return "failed"

    def _stop(self, status: str, reason: str) -> None:
        if self.reseeded:
            reason += f"; without data, and started again: {_counted(self.reseeded)}"
        self.status, self.reason = status, reason

    def _call_back(self) -> None:
        for callback in self.settings.callbacks:
            try:
                callback(self.record(self))
            except StopIteration as said:
                name = getattr(callback, "__name__", type(callback).__name__)
                why = f": {said}" if str(said) else ""
                self._stop("interrupted", f"callback {name} ended the fit{why}")
                self._value_the_end()
                return

    def _value_the_end(self) -> None:
        """The tracked quantity after the last M-step, where no E-step follows it."""
        if not self.settings.online:
            with self.state.active(), self.state.buffers_preserved(), torch.no_grad():
                self.objectives.append(self._expectation()[0])
            self.best = self.objectives[-1]

    # ------------------------------------------------------------------------------------- online

    def _pass_online(self) -> str:
        """One pass over the batches in a random order, an averaged M-step after each."""
        problem, settings = self.problem, self.settings
        self._before = self.state.values()
        if self.iteration >= settings.max_iter:
            self.objectives.append(self._expectation()[0])
            self._look_online()
            return self.status
        generator = torch.Generator().manual_seed(
            derived_seed(settings.seed, f"order{self.iteration}")
        )
        total = 0.0
        for i in torch.randperm(len(problem.batches), generator=generator).tolist():
            total += self._online_step(problem.batches[i])
        self.objectives.append(total + float(problem.latents.log_prob()))
        self.iteration += 1
        return ""

    def _online_step(self, batch: Batch) -> float:
        problem = self.problem
        layout = problem.layout(batch)
        size = max(math.prod(p.size for p in layout.data_plates), 1)
        new = problem.m_step.statistics(problem.device)
        objective = problem.fast(batch, self.mode, new)
        if objective is None:
            found = Expectation.of(problem.program, batch, problem.kwargs, layout, self.mode)
            problem.gather(batch, found.terms, new)
            objective = found.objective
        new = new.scaled(problem.num_data / size)
        rate = (self._step_number + 2.0) ** -0.6
        if self._averaged is None:
            self._averaged = problem.m_step.recentred(new)
        else:
            old = problem.m_step.recentred(self._averaged.scaled(1 - rate))
            self._averaged = Statistics.joined([old, new.scaled(rate)])
        self._step_number += 1
        problem.m_step.maximise(self._averaged)
        return float(objective)

    def _look_online(self) -> None:
        objective = self.objectives[-1]
        if math.isfinite(objective):
            self._stop("max_steps", f"all {self.settings.max_iter} passes over the data are done")
        else:
            self._stop("diverged", f"{self.mode.tracked} is {objective}")


def _counted(reseeded: Sequence[tuple[str, int]]) -> str:
    """Each component once, with its iterations."""
    by_name: dict[str, list[int]] = {}
    for name, iteration in reseeded:
        by_name.setdefault(name, []).append(iteration)
    return ", ".join(
        f"{name} in iteration {its[0]}"
        + (f" and {len(its) - 1} times after" if len(its) > 1 else "")
        for name, its in by_name.items()
    )


def _is_moving(settings: Settings, iteration: int) -> bool:
    """Whether the temperature moves at this iteration, so that values cannot be compared."""
    if iteration < 1:
        return False
    return settings.mode(iteration) != settings.mode(iteration - 1)
