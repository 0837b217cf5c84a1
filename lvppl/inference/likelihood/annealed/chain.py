r"""Annealed chains, from the start to the posterior and back.

Forward (Neal 2001): z_0 ~ r, z_t from z_(t-1) by a move that leaves pi_t as it is, and

.. math:: \ln w = \sum_{t=1}^{T} (\beta_t - \beta_{t-1}) \ln \frac{p(y, z_{t-1})}{r(z_{t-1})},
    \qquad E w = p(y).

Backward (Grosse, Ghahramani & Adams 2015, section 4): z_(T-1) ~ p(z | y), z_(t-1) from z_t by the
reversed move of pi_t, with the same sum; then E 1/w = 1 / p(y).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lvppl.inference.likelihood.annealed.moves import gibbs, hmc
from lvppl.inference.likelihood.annealed.noise import Noise
from lvppl.inference.likelihood.annealed.path import Path, Points
from lvppl.inference.likelihood.annealed.pilot import Tuning

__all__ = ["Annealed", "backward", "forward"]


@dataclass(frozen=True)
class Annealed:
    """What chains come to.

    Attributes:
        log_weight: ln w, nats, (chains, data), float64.
        acceptance: share of trajectories that were accepted, (data,); ``None`` without any.
        points: where the chains ended.
    """

    log_weight: Tensor
    acceptance: Tensor | None
    points: Points


def forward(path: Path, points: Points, tuning: Tuning, noise: Noise) -> Annealed:
    """Anneal draws from the start to the posterior."""
    chains, temperatures = _Chains(path, points, tuning, noise), tuning.temperatures()
    for step in range(1, len(temperatures)):
        chains.add(temperatures[step] - temperatures[step - 1])
        if step < len(temperatures) - 1:  # the last move would change no weight
            chains.move(step, temperatures[step])
    return chains.annealed()


def backward(path: Path, points: Points, tuning: Tuning, noise: Noise) -> Annealed:
    """Anneal draws from the posterior to the start, by the forward moves reversed."""
    chains, temperatures = _Chains(path, points, tuning, noise), tuning.temperatures()
    for step in range(len(temperatures) - 1, 0, -1):
        chains.add(temperatures[step] - temperatures[step - 1])
        if step > 1:
            chains.move(step - 1, temperatures[step - 1], backwards=True)
    return chains.annealed()


class _Chains:
    """Chains under way."""

    def __init__(self, path: Path, points: Points, tuning: Tuning, noise: Noise) -> None:
        self.path, self.points, self.tuning, self.noise = path, points, tuning, noise
        self.log_weight = torch.zeros_like(points.log_weight, dtype=torch.float64)
        self.accepted: list[Tensor] = []

    def add(self, difference: Tensor) -> None:
        self.log_weight = self.log_weight + difference * self.points.log_weight.double()

    def move(self, step: int, beta: Tensor, backwards: bool = False) -> None:
        """A trajectory, then a scan; the other way round and the scan reversed going back."""
        for kind in ("scan", "trajectory") if backwards else ("trajectory", "scan"):
            if kind == "scan":
                self._scan(step, beta, backwards)
            else:
                self._trajectory(step, beta)

    def _trajectory(self, step: int, beta: Tensor) -> None:
        if not self.path.coordinates.num_continuous:
            return
        steps = self.tuning.at(step)
        self.points, accepted = hmc(self.path, self.points, beta, steps, self.noise, f"{step}")
        self.accepted.append(accepted.mean(0))

    def _scan(self, step: int, beta: Tensor, backwards: bool) -> None:
        self.points = gibbs(self.path, self.points, beta, self.noise, f"{step}", backwards)

    def annealed(self) -> Annealed:
        acceptance = torch.stack(self.accepted).mean(0) if self.accepted else None
        return Annealed(self.log_weight, acceptance, self.points)
