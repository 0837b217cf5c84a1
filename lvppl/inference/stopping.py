"""Whether the values that EM has reached so far end a run, and in what words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

__all__ = ["Verdict", "Yardstick", "verdict_on"]


class Verdict(NamedTuple):
    """How a run ends; ``rejected``: at the parameters before its last M-step."""

    status: str
    reason: str
    rejected: bool = False


class Yardstick(NamedTuple):
    """What gains are measured by.

    Attributes:
        tracked: name of what is tracked.
        num_data: data that ``tol`` is per.
        tol: smallest gain that goes on, nats per datum.
        max_iter: iterations.
        dtype: the narrowest of the parameters.
        integrated: the tracked quantity holds integrals by quadrature.
    """

    tracked: str
    num_data: int
    tol: float
    max_iter: int
    dtype: torch.dtype
    integrated: bool

    @property
    def slack(self) -> float:
        """Relative loss in the tracked quantity that rounding explains."""
        if self.integrated:
            return 1e-8
        return 1e-10 if self.dtype == torch.float64 else 2e-6


def verdict_on(
    values: Sequence[float], iteration: int, by: Yardstick, *, comparable: bool
) -> Verdict | None:
    """How the run ends, ``None`` where it goes on.

    Args:
        values: the tracked quantity after each iteration so far, at the start first.
        iteration: how many there were.
        comparable: whether the last two are values of one function, reached by one M-step.
    """
    if not math.isfinite(values[-1]):
        reason = f"{by.tracked} is {values[-1]} after {iteration} iterations"
        return Verdict("diverged", reason, rejected=len(values) > 1)
    found = _on_gain(values, iteration, by) if comparable and len(values) > 1 else None
    if found is None and iteration >= by.max_iter:
        found = Verdict("max_steps", f"all {by.max_iter} iterations are done")
    return found


def _on_gain(values: Sequence[float], iteration: int, by: Yardstick) -> Verdict | None:
    """Whether the last iteration lost, or gained too little to go on."""
    gain = values[-1] - values[-2]
    if gain < -by.slack * max(1.0, abs(values[-1])):
        return Verdict(
            "decreased",
            f"{by.tracked} fell by {-gain:.3g} nats in iteration {iteration}, more than rounding "
            "explains",
            rejected=True,
        )
    if not (by.tol > 0 and gain / by.num_data < by.tol):
        return None
    reason = f"iteration {iteration} gained {max(gain / by.num_data, 0.0):.2g} nats per datum, less"
    # a loss shows how coarse the numbers are
    resolved = max(torch.finfo(by.dtype).eps * abs(values[-1]), -gain) / by.num_data
    if by.dtype != torch.float64 and gain / by.num_data < resolved and resolved > by.tol:
        kind = str(by.dtype).removeprefix("torch.")
        reason += (
            f" than the {resolved:.2g} that {kind} resolves: tol={by.tol:g} means nothing there, "
            "and data and parameters in float64 go further"
        )
    else:
        reason += f" than tol={by.tol:g}"
    return Verdict("converged", reason)
