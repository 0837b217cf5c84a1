r"""ln p(y) of programs with one or two continuous latents a datum, by quadrature.

With u the latents of a datum as unconstrained coordinates, and u = c + s sinh t,

.. math:: p(y) = \int p(y, z(u)) \left|\frac{dz}{du}\right| du
               = \int p(y, z(u(t))) \left|\frac{dz}{du}\right| \prod_i s_i \cosh t_i \, dt,

by the trapezoidal rule in t, over a box that is found for each datum: outside of it the integrand
is e⁻⁵⁰ of its largest value or less. The integrand of a smooth density then vanishes with all its
derivatives at both ends, and the rule converges faster than any power of its step (Trefethen and
Weideman 2014, SIAM Review 56); sinh makes tails that fall like a power fall exponentially. Points
are doubled until the sum stands still.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvppl.enumerated import is_one, user_scale
from lvppl.errors import ProgramError
from lvppl.factor_graph import enumerating
from lvppl.inference.addressed import AddressedDraws
from lvppl.inference.likelihood.annealed.path import Path
from lvppl.inference.likelihood.checks import check_weights, few
from lvppl.seeding import seeded

__all__ = ["Integral", "Unsettled", "integrated"]

DEPTH = 50.0
"""Nats below the largest value where the integrand is left out."""
_DRAWS = 4096
_CLIMBERS = 32
"""Of the best draws, and of any, that look for peaks."""
_CLIMB = 150
_NEARLY = 3.0
"""Nats by which the grid may miss a peak: its spacing is then about two deviations."""
_FIRST = {1: 129, 2: 33}
"""Points of an axis while the box is sought."""
_MOST = {1: 2**15 + 1, 2: 2**10 + 1}
_BLOCK = {"cpu": 2**21}  # numbers that a program makes at once
_BLOCK_ACCELERATOR = 2**26
_ENOUGH = {torch.float64: 1e-11, torch.float32: 1e-6}
"""A doubling that moves ln p(y) by less, relative to 1 + |ln p(y)|, is the last."""
_LEAST = {torch.float64: 1e-7, torch.float32: 1e-4}
"""A sum that moves by more at the end is refused."""


@dataclass(frozen=True)
class Integral:
    """ln p(y), (data,), nats, and how well it is known."""

    log_prob: Tensor
    error: float
    """By how much the last doubling of the points moved a value, relative to 1 + |ln p(y)|."""
    num_points: int
    """Of each datum, in the last sum."""


class Unsettled(ProgramError):
    """The sum still moves with the most points that are taken."""


@torch.no_grad()
def integrated(
    model: Callable[..., Any],
    data: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    data_plate: Any = None,
) -> Integral | None:
    """ln p(y) of each datum; ``None`` where no datum has one or two continuous latents.

    Finite latents are summed out at every point.

    Raises:
        Unsettled: by datum.
        ProgramError: as of :class:`~lvppl.inference.likelihood.annealed.path.Path`.
    """
    path = Path(enumerating(model), None, data, kwargs, data_plate)
    sites = path._draw(1, nullcontext()).model_sites.values()
    if not all(is_one(user_scale(site)) for site in sites):
        return None  # a scale would stand inside the integral, as in no exact sum
    if path.coordinates.num_continuous not in _FIRST or path.coordinates.digits:
        return None
    with seeded(0):
        return _Quadrature(path).integral()


class _Quadrature:
    """One integrand for each datum, over t."""

    def __init__(self, path: Path) -> None:
        self.path, self.n = path, path.coordinates.num_continuous
        start = path.start(AddressedDraws(0, None, 0, 0, set()), _DRAWS)
        self.digits = start.digits[:1]
        self.dtype = start.vectors.dtype
        draws = start.vectors.double()
        low, middle, high = draws.quantile(draws.new_tensor([0.1, 0.5, 0.9]), 0)
        self.centre, self.unit = middle, ((high - low) / 2.5).clamp(min=1e-9)
        sites = path._draw(1, nullcontext()).model_sites.values()
        elements = sum(site["value"].numel() for site in sites)
        budget = _BLOCK.get(draws.device.type, _BLOCK_ACCELERATOR)
        self.at_once = max(1, budget // max(1, elements))
        check_weights(start.log_weight, 0)
        self.log_weight = start.log_weight.double()
        at = ((draws - self.centre) / self.unit).asinh()
        order = self.log_integrand(at).argsort(0, descending=True)[:_CLIMBERS, :, None]
        starts = torch.cat([at.gather(0, order.expand(-1, -1, self.n)), at[:_CLIMBERS]])
        self.peaks, self.heights = self._climbed(starts)

    def log_integrand(self, t: Tensor) -> Tensor:
        """(points, data) at t, (points, data, n)."""
        u = self.centre + self.unit * t.sinh()
        log_det = (self.unit.log() + t.cosh().log()).sum(-1)
        parts = []
        for part in u.to(self.dtype).split(self.at_once):
            points = self.path.at(part, self.digits.expand(len(part), -1, -1))
            parts.append((points.log_start + points.log_weight).double())
        found = torch.cat(parts) + log_det
        # far out a program may overflow; at draws from the prior a NaN was refused
        return torch.where(found.isnan(), -math.inf, found)

    def grid(self, low: Tensor, high: Tensor, points: int) -> Tensor:
        """(points^n, data, n) over boxes (data, n), ends included."""
        steps = torch.linspace(0, 1, points, dtype=low.dtype, device=low.device)
        axes = torch.cartesian_prod(*[steps] * self.n).reshape(-1, 1, self.n)
        return low + (high - low) * axes

    def box(self) -> tuple[Tensor, Tensor]:
        """Ends (data, n) of where the integrand is within ``DEPTH`` of its largest value."""
        points = _FIRST[self.n]
        low, high = torch.full_like(self.centre, -25.0), torch.full_like(self.centre, 25.0)
        seen = self.heights > self.heights.amax(0) - DEPTH  # a grid may step over peaks
        for _ in range(80):
            t = self.grid(low, high, points)
            values = self.log_integrand(t)
            best = torch.maximum(values.amax(0), self.heights.amax(0))
            known = [((values > best - DEPTH)[..., None], t), (seen[..., None], self.peaks)]
            step = (high - low) / (points - 1)
            first = torch.cat([torch.where(keep, at, math.inf) for keep, at in known]).amin(0)
            last = torch.cat([torch.where(keep, at, -math.inf) for keep, at in known]).amax(0)
            first, last = first - 2 * step, last + 2 * step
            # a region that reaches an end goes on beyond it; one that fills little is looked into
            kept = (first >= low) & (last <= high) & (last - first > 0.5 * (high - low))
            kept |= (best == -math.inf)[:, None]
            if bool(kept.all()):
                break
            first = torch.where(first < low, low - 0.5 * (high - low), first)
            last = torch.where(last > high, high + 0.5 * (high - low), last)
            low, high = torch.where(kept, low, first), torch.where(kept, high, last)
            low, high = low.clamp(min=-300.0), high.clamp(max=300.0)
        return low, high

    def _climbed(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Local maxima near t, (points, data, n), and the integrand there.

        By random steps that grow where they lead up and shrink where they do not: no derivative is
        needed, and a peak of any width is reached.
        """
        height, size = self.log_integrand(t), torch.full_like(t[..., :1], 0.3)
        for _ in range(_CLIMB):
            there = t + size * torch.randn_like(t)
            found = self.log_integrand(there)
            better = (found > height)[..., None]
            t, height = torch.where(better, there, t), torch.maximum(height, found)
            size = size * torch.where(better, 1.6, 0.88)
        return t, height

    def integral(self) -> Integral:
        low, high = self.box()
        points, before = _FIRST[self.n], None
        while True:
            total = self._trapezoid(low, high, points)
            if before is not None:
                moved = (total - before).nan_to_num(0.0).abs()
                moved = moved / (1 + total.nan_to_num(neginf=0.0).abs())
                moved = torch.where(self._resolved(low, high, points), moved, math.inf)
                if bool((moved < _ENOUGH.get(self.dtype, 1e-6)).all()):
                    break
                if 2 * points - 1 > _MOST[self.n]:
                    self._require_still(moved)
                    break
            before, points = total, 2 * points - 1
        self._require_whole(total)
        return Integral(total, float(moved.max()), points**self.n)

    def _resolved(self, low: Tensor, high: Tensor, points: int) -> Tensor:
        """Whether the grid point beside each peak that matters is nearly as high, (data,)."""
        step = (high - low) / (points - 1)
        beside = low + ((self.peaks - low) / step).round() * step
        near = self.log_integrand(beside) > self.heights - _NEARLY
        return (near | (self.heights < self.heights.amax(0) - DEPTH / 2)).all(0)

    def _trapezoid(self, low: Tensor, high: Tensor, points: int) -> Tensor:
        """The ends count whole: the integrand is nothing there."""
        total: Tensor | None = None
        rows = self.grid(low, high, points).split(max(1, self.at_once))
        for part in rows:
            value = self.log_integrand(part).logsumexp(0)
            total = value if total is None else torch.logaddexp(total, value)
        assert total is not None
        return total + ((high - low) / (points - 1)).log().sum(-1)

    def _require_whole(self, total: Tensor) -> None:
        """Draws from the prior must not find more than the sum: it would have missed a mode."""
        top = self.log_weight.amax(0)
        weight = (self.log_weight - top.nan_to_num(neginf=0.0)).exp()
        error = weight.std(0) / len(weight) ** 0.5
        least = (weight.mean(0) - 6 * error).clamp(min=0.0).log() + top
        missed = (least > total + 1e-3) | ((total == -math.inf) & (top > -math.inf))
        wrong = missed.nonzero().flatten().tolist()
        if wrong:
            raise Unsettled(
                f"The integral over the continuous latents of data {few(wrong)} by quadrature is "
                "less than what draws from the prior find: the integrand has parts that are too "
                "narrow and too far apart. Use estimator='importance' with a guide, or 'ais'."
            )

    def _require_still(self, moved: Tensor) -> None:
        wrong = (moved > _LEAST.get(self.dtype, 1e-4)).nonzero().flatten().tolist()
        if wrong:
            raise Unsettled(
                f"The integral over the continuous latents of data {few(wrong)} does not stand "
                f"still: {_MOST[self.n]:,} points an axis are too few. A density with a jump does "
                "that, narrow peaks that are far apart, or two latents on a thin ridge. Use "
                "estimator='importance' with a guide, or 'ais'."
            )
