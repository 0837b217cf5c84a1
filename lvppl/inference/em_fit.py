"""The record of an EM fit, and what can be asked of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.inference.fit import Fit, History
from lvppl.inference.m_step import MStepTable
from lvppl.inference.state import FitState

if TYPE_CHECKING:
    from lvppl.evidence import ExactPosterior, LogEvidence
    from lvppl.inference.em_loop import Loop, Problem, Settings

__all__ = ["EMFit", "EMHistory", "Restart"]


class EMHistory(History):
    """``objective``: the tracked quantity before each M-step and after the last, nats in all.

    ``loss`` is its negative.
    """

    def __init__(self, objectives: list[float]) -> None:
        super().__init__(-torch.tensor(objectives, dtype=torch.float64), ())

    def __getitem__(self, name: str) -> np.ndarray:
        return -super().__getitem__("loss") if name == "objective" else super().__getitem__(name)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(("objective", "loss"))

    def __len__(self) -> int:
        return 2


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

    def _program(self) -> Callable[..., Any]:
        from lvppl.inference.map_latents import MapLatents

        names = [n for n in self.m_step if n not in self._own_params()]
        return MapLatents(names)(self.model)

    def _own_params(self) -> set[str]:
        """Parameters that the program itself makes; the others stand for latents."""
        return set(self.m_step) - set(self.settings.get("map_latents", ()))

    def posterior(self, *data: Any, temperature: float = 1.0, **kwargs: Any) -> ExactPosterior:  # type: ignore[override]
        """The exact posterior of the latents for these data, which may be new.

        See :func:`lvppl.posterior`.
        """
        from lvppl.evidence import posterior

        with self._inside(data) as inside:
            return posterior(self._program(), *inside, temperature=temperature, **kwargs)

    def log_evidence(self, *data: Any, **kwargs: Any) -> LogEvidence:
        """ln p(y) of these data at the fit's parameters; see :func:`lvppl.log_evidence`."""
        from lvppl.evidence import log_evidence

        with self._inside(data) as inside, torch.no_grad():
            return log_evidence(self._program(), *inside, **kwargs)

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
            values = ", ".join(f"{restart.objective:.6g}" for restart in self.restarts)
            lines.append(f"  restarts: {values}")
        table = repr(self.m_step).replace("\n", "\n  ")
        return "\n".join([*lines, "", f"  {table}"])
