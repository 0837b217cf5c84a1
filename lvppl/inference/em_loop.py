"""The iterations of EM: E-step, look, M-step, until something stops them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lvppl.errors import ProgramError, ProgramFailure
from lvppl.inference.e_step import Mode
from lvppl.inference.em_problem import Problem
from lvppl.inference.em_steps import Expected, expectation, maximise, online_step
from lvppl.inference.m_step.averaging import AveragedStatistics
from lvppl.inference.m_step.statistics import Statistics
from lvppl.inference.progress import Progress
from lvppl.inference.remarks import remarks
from lvppl.inference.reseed import dead_components, reseed
from lvppl.inference.state import FitState
from lvppl.inference.stopping import Verdict, Yardstick, verdict_on
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


class _Kept(NamedTuple):
    """Parameters to go back to, how far the run was there, and whether the last value is theirs."""

    values: Any
    iteration: int
    num_objectives: int
    is_valued: bool


class Loop:
    """One run from one start.

    The value of the parameters is known whenever a run can end, as it is that of the next E-step:
    callbacks come after it. What is interrupted in an E-step or an M-step goes back to the last
    parameters whose value is known.

    Attributes:
        objectives: the tracked quantity before each M-step, and after the last; nats in all. With
            ``online`` those of a pass are sums over its batches, each before its own step, and the
            last is the tracked quantity after all.
        best: the last of them where it is finite; of the parameters that the run ends with.
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
        self.reseeded: list[tuple[str, int]] = []
        self._moved = False
        self._averaged = AveragedStatistics(problem.m_step)

    def run(self) -> None:
        progress = Progress(self.settings.max_iter, 0, self.settings.progress)
        iterate = self._pass_online if self.settings.online else self._iterate
        try:
            self._begin()
            while self.status == "running":
                iterate()
                progress.show(self.iteration, self._text)
        except KeyboardInterrupt:
            self._interrupt()
        finally:
            progress.show(self.iteration, self._text, force=True)
            progress.close()
        self._remark()

    @property
    def best(self) -> float:
        last = self.objectives[-1] if self.objectives else math.nan
        return last if math.isfinite(last) else -math.inf

    def _text(self) -> str:
        if not self.objectives:
            return ""
        return f"{self.mode.tracked} {self.objectives[-1]:.6g} nats"

    @property
    def mode(self) -> Mode:
        return self.settings.mode(self.iteration)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """The fit's parameters in place, and nothing that evaluating the program changes."""
        with self.state.active(), self.state.buffers_preserved(), torch.no_grad():
            yield

    def _begin(self) -> None:
        """From a start where every variance is at least the smallest that an M-step may find.

        Below it, the first M-step could only lower the tracked quantity.
        """
        self._keep(is_valued=False)
        if self.settings.online and self.problem.m_step.by_gradient:
            raise ProgramError(
                "online=True averages the statistics of closed-form M-steps, but "
                f"{', '.join(map(repr, self.problem.m_step.by_gradient))} have none: print the "
                "m_step table of a fit without online to see why. Use batch_size alone, or "
                "lvppl.SVI."
            )
        with self._inside():
            self.problem.m_step.raise_to_floors()
        self._keep(is_valued=False)

    def _keep(self, *, is_valued: bool) -> None:
        values, count = self.state.values(), len(self.objectives)
        self._kept = _Kept(values, self.iteration, count, is_valued)

    def _go_back(self) -> None:
        """To the parameters that were kept last, and the history up to there."""
        self.iteration = self._kept.iteration
        del self.objectives[self._kept.num_objectives :]
        self.state.assign(*self._kept.values)

    def _reject(self, verdict: Verdict) -> None:
        """End before the last M-step, which counts as an iteration all the same."""
        iteration = self.iteration
        self._go_back()
        self.iteration = iteration
        reason = f"{verdict.reason}; the parameters before it are kept"
        widths = self.problem.m_step.run_off_with_latents()
        if widths:
            reason += (
                f". {', '.join(map(repr, widths))} of a prior may have run off with the latents "
                "under it, as their joint density has no bound: use a number, or give it a prior"
            )
        elif verdict.status == "diverged":
            reason += (
                ". A component may have shrunk onto one datum: EM(floor=...) bounds its variance"
            )
        self._stop(verdict._replace(reason=reason))

    # ------------------------------------------------------------------------------ one iteration

    def _iterate(self) -> None:
        """E-step, a look at what it says, and if nothing stops the run, the M-step."""
        try:
            with self._inside():
                found = expectation(self.problem, self.mode)
        except ProgramFailure as error:
            self._fail(error)
            return
        self.objectives.append(found.objective)
        verdict = self._verdict()
        if verdict is not None and verdict.rejected:
            self._reject(verdict)
            return
        self._keep(is_valued=True)
        if self.iteration > 0:
            self._call_back()
        if self.status != "running":
            return
        if verdict is not None:
            self._stop(verdict)
            return
        self._maximise(found)

    def _maximise(self, found: Expected) -> None:
        steps = self.settings.num_gradient_steps
        self.iteration += 1
        try:
            with self._inside():
                maximise(self.problem, found, num_gradient_steps=steps)
                self._revive(found.statistics)
        except ProgramFailure as error:
            self._fail(error)
        except torch.linalg.LinAlgError as error:
            reason = f"the M-step of iteration {self.iteration} has no solution ({error})"
            self._reject(Verdict("diverged", reason))

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

    # --------------------------------------------------------------------------------- stopping

    def _verdict(self) -> Verdict | None:
        comparable = not self._moved and not _is_moving(self.settings, self.iteration)
        dtypes = [p.tensor.dtype for p in self.problem.parameters.values()]
        by = Yardstick(
            self.mode.tracked,
            self.problem.num_data,
            self.settings.tol,
            self.settings.max_iter,
            max(dtypes, key=lambda dtype: torch.finfo(dtype).eps),
            bool(self.problem.integrated),
        )
        return verdict_on(self.objectives, self.iteration, by, comparable=comparable)

    def _fail(self, error: ProgramFailure) -> None:
        """An M-step that led to where the program does not run."""
        if self.iteration == 0:
            raise error
        first = str(error).splitlines()[0].rstrip(":")
        reason = f"after iteration {self.iteration} the program does not run ({first})"
        self._reject(Verdict("diverged", reason))

    def _stop(self, verdict: Verdict) -> None:
        self.status, self.reason = verdict.status, verdict.reason

    def _remark(self) -> None:
        """Name in the reason what of the end is not as one may expect."""
        notes = []
        if self.reseeded:
            notes.append(f"without data, and started again: {_counted(self.reseeded)}")
        if self.status != "diverged":
            try:
                with self._inside():
                    notes += remarks(self.problem)
            except KeyboardInterrupt:
                pass  # they can be done without
        self.reason = "; ".join([self.reason, *notes])

    def _call_back(self) -> None:
        for callback in self.settings.callbacks:
            try:
                callback(self.record(self))
            except StopIteration as said:
                name = getattr(callback, "__name__", type(callback).__name__)
                why = f": {said}" if str(said) else ""
                self._stop(Verdict("interrupted", f"callback {name} ended the fit{why}"))
                return

    def _interrupt(self) -> None:
        """End where the value is known, or find it; a second interrupt does without."""
        self._go_back()
        if not self._kept.is_valued:
            try:
                self._value_the_end()
            except KeyboardInterrupt:
                self.objectives.append(math.nan)
        reason = f"interrupted after {self.iteration} iterations; the last parameters are kept"
        self._stop(Verdict("interrupted", reason))

    def _value_the_end(self) -> None:
        """The tracked quantity at the present parameters, where no E-step has found it."""
        with self._inside():
            self.objectives.append(expectation(self.problem, self.mode).objective)

    # ------------------------------------------------------------------------------------- online

    def _pass_online(self) -> None:
        """One pass over the batches in a random order, an averaged M-step after each."""
        problem, settings = self.problem, self.settings
        generator = torch.Generator().manual_seed(
            derived_seed(settings.seed, f"order{self.iteration}")
        )
        total = 0.0
        for i in torch.randperm(len(problem.batches), generator=generator).tolist():
            with self._inside():
                total += online_step(problem, problem.batches[i], self.mode, self._averaged)
            self._keep(is_valued=False)
        self.objectives.append(total + float(problem.latents.log_prob()))
        self.iteration += 1
        self._keep(is_valued=False)
        self._look_online()

    def _look_online(self) -> None:
        """Callbacks, and whether the run ends; both need the value of the parameters."""
        last = self.iteration >= self.settings.max_iter
        if not (last or self.settings.callbacks):
            return
        self._value_the_end()
        self._keep(is_valued=True)
        self._call_back()
        value = self.objectives[-1]
        if self.status == "running" and not math.isfinite(value):
            self._stop(Verdict("diverged", f"{self.mode.tracked} is {value}"))
        elif self.status == "running" and last:
            reason = f"all {self.settings.max_iter} passes over the data are done"
            self._stop(Verdict("max_steps", reason))
        elif self.status == "running":
            self.objectives.pop()  # the next pass says it again, by batch
            self._keep(is_valued=False)


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
