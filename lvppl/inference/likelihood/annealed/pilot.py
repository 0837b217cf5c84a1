r"""Temperatures and step sizes, found by chains that are thrown away.

Chains that adapt are no longer Markov chains of their path, and their weights are biased. Here
pilot chains, of other random numbers, anneal once and adapt; what they find is fixed before the
chains that count set out, so that those give unbiased estimates of p(y).

Along the path they measure the speed

.. math:: v(\beta) = \operatorname{sd}_{\pi_\beta} \ln w, \qquad
    \Lambda(\beta) = \int_0^\beta v(b) \, db

The variance of ln p(y) is least where steps are of equal length in Lambda (Gelman & Meng 1998,
Statistical Science 13, section 4.1; Neal 2001, section 4). Each datum has temperatures of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lvppl.inference.likelihood.annealed.moves import Steps, gibbs, hmc
from lvppl.inference.likelihood.annealed.noise import Noise
from lvppl.inference.likelihood.annealed.options import Annealing
from lvppl.inference.likelihood.annealed.path import Path, Points

__all__ = ["Tuning", "tuned"]

_PLACES = 48  # most temperatures at which pilot chains halt
_FIRST, _EACH = 20, 4  # trajectories at the first of them, and at each other
_STRIDE = 1.0  # from one to the next, in standard deviations of ln w
_PATIENCE = 24  # places after which strides grow, by half every fourth
_GAIN = 0.3  # of ln(step size) for a share of accepted trajectories of one above the target
_MEMORY = 0.2  # share of the scales of the last temperature in those of the next
_LEAST = 1e-6


@dataclass(frozen=True)
class Tuning:
    """Temperatures, step sizes and scales along the path, at K places that the pilot halted at.

    Attributes:
        progress: share of the steps at which a place is reached, rising from 0 to 1, (K, data).
        beta: inverse temperature there, (K, data).
        log_size: ln epsilon, (K, data).
        log_scale: ln s, (K, data, n).
        options: what chains do.
    """

    progress: Tensor
    beta: Tensor
    log_size: Tensor
    log_scale: Tensor
    options: Annealing

    def temperatures(self) -> Tensor:
        """Inverse temperatures, rising from 0 to 1, (T + 1, data), float64."""
        share = torch.arange(self.options.num_steps + 1, device=self.beta.device)
        share = share.double()[:, None] / self.options.num_steps
        if self.options.schedule != "adaptive":
            return self.options.curve(share).expand(-1, self.beta.shape[1])
        beta = self._between(self.beta, share)
        beta[0], beta[-1] = 0.0, 1.0
        return beta

    def at(self, step: int) -> Steps:
        """Of the move at distribution number ``step``, 1 to T."""
        share = self.beta.new_full((1, 1), step / self.options.num_steps)
        size = self._between(self.log_size, share)[0].exp()
        scale = self._between(self.log_scale, share)[0].exp()
        return Steps.of(size, scale, self.options.num_leapfrog)

    def _between(self, values: Tensor, share: Tensor) -> Tensor:
        """Values (K, data, ...) at shares (S, 1) of the way, interpolated: (S, data, ...)."""
        data = self.progress.shape[1]
        wanted = share.expand(-1, data).t().contiguous()
        after = torch.searchsorted(self.progress.t().contiguous(), wanted).t()
        after = after.clamp(1, len(self.progress) - 1)
        low, high = self.progress.gather(0, after - 1), self.progress.gather(0, after)
        part = ((share - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        each = torch.arange(data, device=values.device)
        first, second = values[after - 1, each], values[after, each]
        part = part.reshape(part.shape + (1,) * (values.dim() - 2))
        return first + part.to(values.dtype) * (second - first)


class _State(NamedTuple):
    """Pilot chains at a temperature."""

    points: Points
    beta: Tensor  # (data,)
    log_size: Tensor  # (data,)
    log_scale: Tensor  # (data, n)


def tuned(path: Path, points: Points, options: Annealing, noise: Noise) -> Tuning:
    """Anneal pilot chains from ``points``, adapting.

    Args:
        points: draws from the start of the path, of ``options.pilot_chains`` chains.
        options: what chains do, and the schedule.
        noise: of the pilot.
    """
    data = points.log_weight.shape[1]
    beta = torch.zeros(data, dtype=torch.float64, device=points.log_weight.device)
    state = _State(points, beta, _first_size(points), _log_spread(points.vectors))
    state = _adapted(path, state, options, noise, "0", _FIRST)
    states, travelled, speed = [state], [torch.zeros_like(beta)], _speed(points)
    for number in range(1, _PLACES + 1):
        beta = _next(state.beta, speed, options, number)
        state = _adapted(path, state._replace(beta=beta), options, noise, f"{number}", _EACH)
        before, speed = speed, _speed(state.points)
        way = 0.5 * (before + speed) * (beta - states[-1].beta)
        states.append(state)
        travelled.append(travelled[-1] + way)
        if bool((beta >= 1).all()):
            break
    betas = torch.stack([one.beta for one in states])
    return Tuning(
        _progress(torch.stack(travelled), betas, options),
        betas,
        torch.stack([one.log_size for one in states]),
        torch.stack([one.log_scale for one in states]),
        options,
    )


def _next(beta: Tensor, speed: Tensor, options: Annealing, number: int) -> Tensor:
    """The temperature of the place number ``number``, (data,)."""
    if options.schedule != "adaptive":
        return options.curve(torch.full_like(beta, number / _PLACES))
    if number == _PLACES:
        return torch.ones_like(beta)
    stride = _STRIDE * 1.5 ** (max(0, number - _PATIENCE) / 4)
    return (beta + stride / speed).clamp(max=1.0)


def _progress(travelled: Tensor, betas: Tensor, options: Annealing) -> Tensor:
    """Share of the way at each place, (K, data); by temperature where there is no way to go."""
    if options.schedule != "adaptive":
        share = torch.linspace(0, 1, len(betas), dtype=betas.dtype, device=betas.device)
        return share[:, None].expand(betas.shape)
    return torch.where(travelled[-1] > 0, travelled / travelled[-1].clamp(min=1e-300), betas)


def _speed(points: Points) -> Tensor:
    """Deviation of ln w over chains that are possible, (data,), float64.

    A pilot chain that is stuck would keep all others waiting: the standard deviation counts up to
    three times the half width of the central 68 %, where that is not zero.
    """
    log_weight = points.log_weight.double()
    possible = log_weight.isfinite()
    number = possible.sum(0).clamp(min=1)
    mean = log_weight.where(possible, 0.0).sum(0) / number
    apart = (log_weight - mean).where(possible, 0.0)
    deviation = (apart.square().sum(0) / (number - 1).clamp(min=1)).sqrt()
    width = _half_width(apart)
    deviation = torch.where(width > 0, deviation.minimum(3 * width), deviation)
    return deviation.clamp(min=1e-300)


def _half_width(values: Tensor) -> Tensor:
    """Half the width of the central 68 % over the first dimension: a robust deviation."""
    order, last = values.sort(0).values, len(values) - 1
    return 0.5 * (order[round(0.84 * last)] - order[round(0.16 * last)])


def _first_size(points: Points) -> Tensor:
    """n^(-1/4) / 2: of the order that keeps acceptance as dimensions grow."""
    _, data, n = points.vectors.shape
    size = math.log(0.5 * max(n, 1) ** -0.25)
    return torch.full((data,), size, dtype=torch.float64, device=points.vectors.device)


def _adapted(
    path: Path, state: _State, options: Annealing, noise: Noise, place: str, number: int
) -> _State:
    """The state after a scan and ``number`` trajectories at its temperature."""
    points, beta, log_size, log_scale = state
    if path.coordinates.radices:
        points = gibbs(path, points, beta, noise, f"pilot {place}")
    if not path.coordinates.num_continuous:
        return state._replace(points=points)
    seen = []
    for move in range(number):
        steps = Steps.of(log_size.exp(), log_scale.exp(), options.num_leapfrog)
        points, accepted = hmc(path, points, beta, steps, noise, f"pilot {place} {move}")
        log_size = log_size + _GAIN * (accepted.mean(0) - options.target_acceptance)
        seen.append(points.vectors)
    spread = _log_spread(torch.cat(seen[-_EACH:]))
    return _State(points, beta, log_size, log_scale.lerp(spread, 1 - _MEMORY))


def _log_spread(vectors: Tensor) -> Tensor:
    """ln of a robust deviation over chains, (data, n).

    Few chains tell it badly, so it is drawn towards its mean over coordinates.
    """
    log_spread = _half_width(vectors).clamp(min=_LEAST).log()
    if not log_spread.shape[-1]:
        return log_spread
    worth = len(vectors) / (len(vectors) + 10.0)
    return log_spread.mean(-1, keepdim=True).lerp(log_spread, worth)
