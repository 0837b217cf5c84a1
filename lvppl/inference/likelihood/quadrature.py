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

from lvppl.errors import ProgramError
from lvppl.factor_graph import enumerating
from lvppl.inference.addressed import AddressedDraws
from lvppl.inference.likelihood.annealed.path import Path
from lvppl.inference.likelihood.checks import few
from lvppl.seeding import seeded

__all__ = ["Integral", "Unsettled", "integrated"]

DEPTH = 50.0
"""Nats below the largest value where the integrand is left out."""
_FIRST = {1: 65, 2: 33}
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
    if path.coordinates.num_continuous not in _FIRST or path.coordinates.digits:
        return None
    with seeded(0):
        return _Quadrature(path).integral()


class _Quadrature:
    """One integrand for each datum, over t."""

    def __init__(self, path: Path) -> None:
        self.path, self.n = path, path.coordinates.num_continuous
        start = path.start(AddressedDraws(0, None, 0, 0, set()), 512)
        self.digits = start.digits[:1]
        self.dtype = start.vectors.dtype
        draws = start.vectors.double()
        low, middle, high = draws.quantile(draws.new_tensor([0.1, 0.5, 0.9]), 0)
        self.centre, self.unit = middle, ((high - low) / 2.5).clamp(min=1e-9)
        sites = path._draw(1, nullcontext()).model_sites.values()
        elements = sum(site["value"].numel() for site in sites)
        budget = _BLOCK.get(draws.device.type, _BLOCK_ACCELERATOR)
        self.at_once = max(1, budget // max(1, elements))

    def log_integrand(self, t: Tensor) -> Tensor:
        """(points, data) at t, (points, data, n)."""
        u = self.centre + self.unit * t.sinh()
        log_det = (self.unit.log() + t.cosh().log()).sum(-1)
        parts = []
        for part in u.to(self.dtype).split(self.at_once):
            points = self.path.at(part, self.digits.expand(len(part), -1, -1))
            parts.append((points.log_start + points.log_weight).double())
        found = torch.cat(parts) + log_det
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
        for _ in range(80):
            t = self.grid(low, high, points)
            values = self.log_integrand(t)
            best = values.amax(0)
            inside = (values > best - DEPTH)[..., None]
            step = (high - low) / (points - 1)
            first = torch.where(inside, t, math.inf).amin(0) - 2 * step
            last = torch.where(inside, t, -math.inf).amax(0) + 2 * step
            # a region that reaches an end goes on beyond it; one that fills little is looked into
            outward = (first < low) | (last > high)
            settled = ~outward & (last - first > 0.5 * (high - low))
            if bool((settled | (best == -math.inf)[:, None]).all()):
                break
            first = torch.where(first < low, low - 0.5 * (high - low), first)
            last = torch.where(last > high, high + 0.5 * (high - low), last)
            keep = settled | (best == -math.inf)[:, None]
            low, high = torch.where(keep, low, first), torch.where(keep, high, last)
            low, high = low.clamp(min=-300.0), high.clamp(max=300.0)
        return low, high

    def integral(self) -> Integral:
        low, high = self.box()
        points, before = _FIRST[self.n], None
        while True:
            total = self._trapezoid(low, high, points)
            if before is not None:
                moved = (total - before).nan_to_num(0.0).abs()
                moved = moved / (1 + total.nan_to_num(neginf=0.0).abs())
                if bool((moved < _ENOUGH.get(self.dtype, 1e-6)).all()):
                    break
                if 2 * points - 1 > _MOST[self.n]:
                    self._require_still(moved)
                    break
            before, points = total, 2 * points - 1
        return Integral(total, float(moved.max()), points**self.n)

    def _trapezoid(self, low: Tensor, high: Tensor, points: int) -> Tensor:
        """The ends count whole: the integrand is nothing there."""
        total: Tensor | None = None
        rows = self.grid(low, high, points).split(max(1, self.at_once))
        for part in rows:
            value = self.log_integrand(part).logsumexp(0)
            total = value if total is None else torch.logaddexp(total, value)
        assert total is not None
        return total + ((high - low) / (points - 1)).log().sum(-1)

    def _require_still(self, moved: Tensor) -> None:
        wrong = (moved > _LEAST.get(self.dtype, 1e-4)).nonzero().flatten().tolist()
        if wrong:
            raise Unsettled(
                f"The integral over the continuous latents of data {few(wrong)} does not stand "
                f"still: with {_MOST[self.n]:,} points an axis it still moves by "
                f"{float(moved.max()):.2g} of itself. A density with a jump does that, or two "
                "latents on a thin ridge. Use estimator='importance' with a guide, or 'ais'."
            )
