"""How chains anneal: the schedule, the moves, the pilot."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lvppl.errors import ProgramError

__all__ = ["Annealing"]

_SCHEDULES = ("adaptive", "linear", "sigmoidal")
_STEEPNESS = 4.0


@dataclass(frozen=True)
class Annealing:
    """How each chain of annealed importance sampling moves.

    Attributes:
        num_steps: T, from the start to the posterior: each is one weight, and one move of each
            kind. The error of ln p(y) falls like 1 / sqrt(T), its bias like 1 / T.
        schedule: of the inverse temperatures: ``"adaptive"`` takes steps over which ln w changes
            alike, for each datum, as a pilot run finds them; ``"sigmoidal"`` is dense at both ends
            (Wu et al. 2017), ``"linear"`` even.
        num_leapfrog: most steps of one trajectory of Hamiltonian Monte Carlo. Fewer are taken
            where fewer forget the place where a trajectory began.
        target_acceptance: that the pilot tunes step sizes to, for each datum; 0.65 is optimal in
            many dimensions (Beskos et al. 2013, Bernoulli 19(5A)).
        pilot_chains: chains for each datum by which step sizes are found.

    Raises:
        ProgramError: an option out of its range.
    """

    num_steps: int = 500
    schedule: str = "adaptive"
    num_leapfrog: int = 10
    target_acceptance: float = 0.65
    pilot_chains: int = 16

    def __post_init__(self) -> None:
        if self.schedule not in _SCHEDULES:
            raise ProgramError(f"schedule must be one of {_SCHEDULES}, got {self.schedule!r}.")
        _check_whole("num_steps", self.num_steps, 1)
        _check_whole("num_leapfrog", self.num_leapfrog, 1)
        _check_whole("pilot_chains", self.pilot_chains, 2)
        if not 0 < self.target_acceptance < 1:
            raise ProgramError(
                f"target_acceptance must lie between 0 and 1, got {self.target_acceptance!r}."
            )

    def curve(self, share: Tensor) -> Tensor:
        r"""Inverse temperature at a share x of the steps, for a schedule that is fixed.

        .. math:: \beta(x) = \frac{\sigma(\delta (2 x - 1)) - \sigma(-\delta)}
            {\sigma(\delta) - \sigma(-\delta)}, \quad \delta = 4
        """
        if self.schedule == "linear":
            return share
        low, high = (1 / (1 + math.exp(sign * _STEEPNESS)) for sign in (1, -1))
        return ((_STEEPNESS * (2 * share - 1)).sigmoid() - low) / (high - low)


def _check_whole(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ProgramError(f"{name} must be a whole number of at least {least}, got {value!r}.")
