r"""Moves that leave a distribution of the path as it is.

Hamiltonian Monte Carlo (Neal 2011, Handbook of MCMC, ch. 5): with momenta rho ~ N(0, I) and scales
s of the coordinates u,

.. math:: \rho \leftarrow \rho + \tfrac{\epsilon}{2} s \nabla \ln\pi(u), \quad
    u \leftarrow u + \epsilon s \rho, \quad
    \rho \leftarrow \rho + \tfrac{\epsilon}{2} s \nabla \ln\pi(u)

L times, accepted with probability min(1, exp(-dH)), H = |rho|^2 / 2 - ln pi(u); each chain of each
datum by itself. Finite latents take Gibbs steps, one element after the other (Geman & Geman 1984).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.inference.likelihood.annealed.noise import Noise
from lvppl.inference.likelihood.annealed.path import Path, Points
from lvppl.inference.likelihood.checks import few

__all__ = ["Steps", "gibbs", "hmc"]

_JITTER = 0.3  # of step sizes, against trajectories that return to where they started
_LENGTH = 1.1  # of trajectories, where time runs in units of the scales
_NUMBERS = 2**22  # coordinates of the states that a Gibbs step evaluates at once


@dataclass(frozen=True)
class Steps:
    """How far trajectories go at one temperature.

    Attributes:
        size: epsilon, (data,).
        scale: s, (data, n).
        number: L, (data,), int64.
    """

    size: Tensor
    scale: Tensor
    number: Tensor

    @classmethod
    def of(cls, size: Tensor, scale: Tensor, most: int) -> Steps:
        """As many steps as a trajectory of length 1.1 takes, but at most ``most``.

        In a Gaussian of deviations s, u(t) = u(0) cos t + s rho sin t, which at t = pi / 2 has
        forgotten where it was; longer trajectories cost more and mix less. The scales of pilot
        chains, which lag behind narrowing distributions, are a little above s.
        """
        number = (_LENGTH / size).ceil().clamp(1, most)
        return cls(torch.minimum(size, _LENGTH / number), scale, number.long())


def hmc(
    path: Path, points: Points, beta: Tensor, steps: Steps, noise: Noise, purpose: str
) -> tuple[Points, Tensor]:
    """One trajectory of every chain.

    Args:
        beta: inverse temperature of each datum, (data,) or 0-dim.
        purpose: address of its random numbers.

    Returns:
        Where chains are then, and the probability of acceptance, (chains, data), float64.
    """
    momentum = noise.normal(f"momentum {purpose}", tuple(points.vectors.shape))
    momentum = momentum.to(points.vectors.dtype)
    draws = noise.uniform(f"trajectory {purpose}", (*points.log_weight.shape, 2))
    jitter = 1 + _JITTER * (2 * draws[..., :1] - 1)
    step = (jitter * steps.size[:, None]).to(momentum) * steps.scale
    before, gradient = path.gradient(points.vectors, points.digits, beta)
    end, rho = before, momentum
    stayed = torch.ones_like(draws[..., 0], dtype=torch.bool)
    for number in range(int(steps.number.max())):
        rho = rho + 0.5 * step * gradient
        moved = end.vectors + step * rho
        finite = moved.isfinite().all(-1)
        stayed = stayed & finite  # a trajectory that leaves the numbers is refused, not its batch
        moved = torch.where(finite[..., None], moved, points.vectors)
        end, gradient = path.gradient(moved, points.digits, beta)
        rho = rho + 0.5 * step * gradient
        step = step * (number + 1 < steps.number)[:, None]  # those that are done stand still
    gain = _energy(before, momentum, beta) - _energy(end, rho, beta)
    gain = torch.where(stayed & ~gain.isnan(), gain, -torch.inf)
    return end.choose(draws[..., 1].log() < gain, points), gain.clamp(max=0).exp()


def _energy(points: Points, momentum: Tensor, beta: Tensor) -> Tensor:
    """H, (chains, data), float64."""
    kinetic = 0.5 * momentum.double().square().sum(-1)
    return kinetic - points.log_prob(beta)


def gibbs(
    path: Path, points: Points, beta: Tensor, noise: Noise, purpose: str, backwards: bool = False
) -> Points:
    """Draw each element of the finite latents given all others, in order or in reverse.

    Args:
        purpose: address of its random numbers.
        backwards: the reverse of the scan, element by element.

    Raises:
        ProgramError: ln p(y, z) is NaN at a value (by datum).
    """
    elements = range(len(path.coordinates.radices))
    for element in reversed(elements) if backwards else elements:
        points = _redraw(path, points, element, beta, noise, f"element {element} {purpose}")
    return points


def _redraw(
    path: Path, points: Points, element: int, beta: Tensor, noise: Noise, purpose: str
) -> Points:
    """Draw one element of each chain from its exact conditional, by the largest Gumbel value."""
    radix = path.coordinates.radices[element]
    chains = len(points.digits)
    uniform = noise.uniform(purpose, (*points.log_weight.shape, radix))
    gumbel = -(-uniform.log()).log()
    best, chosen = points.log_prob(beta) + gumbel[..., 0], points
    at_once = max(1, _NUMBERS // max(1, points.vectors.numel() + points.digits.numel()))
    for first in range(1, radix, at_once):
        shifts = range(first, min(first + at_once, radix))
        others = _shifted(path, points, element, radix, shifts)
        for i, shift in enumerate(shifts):
            rows = slice(i * chains, (i + 1) * chains)
            one = Points(
                points.vectors, others.digits[rows], others.log_start[rows], others.log_weight[rows]
            )
            value = one.log_prob(beta) + gumbel[..., shift]
            _refuse_nan(value, noise.first_datum)
            better = value > best
            chosen, best = one.choose(better, chosen), torch.maximum(value, best)
    return chosen


def _shifted(path: Path, points: Points, element: int, radix: int, shifts: range) -> Points:
    """The points with one digit moved on by each of ``shifts``, chains side by side."""
    digits = points.digits.repeat(len(shifts), 1, 1)
    by = torch.tensor(list(shifts), device=digits.device).repeat_interleave(len(points.digits))
    digits[..., element] = (digits[..., element] + by[:, None]) % radix
    return path.at(points.vectors.repeat(len(shifts), 1, 1), digits)


def _refuse_nan(value: Tensor, first_datum: int) -> None:
    bad = value.isnan().any(0)
    if bool(bad.any()):
        where = (bad.nonzero().flatten() + first_datum).tolist()
        raise ProgramError(
            f"ln p(y, z) is NaN at a value of the finite latents for {len(where)} data "
            f"({few(where)}). Look at these data with lvppl.check; bound scales away from zero."
        )
