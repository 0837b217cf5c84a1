r"""The path of distributions from a start r to the posterior, at given coordinates.

.. math:: \ln \pi_\beta(z) = (1 - \beta) \ln r(z) + \beta \ln p(y, z)
    = \ln r(z) + \beta \ln w(z), \qquad w(z) = \frac{p(y, z)}{r(z)}

(Neal 2001, section 2, geometric path). One run of the programs gives ln r and ln w of every chain
of every datum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.inference.addressed import AddressedDraws
from lvppl.inference.likelihood.annealed.coordinates import (
    Coordinates,
    Place,
    PlaceValues,
    Unmask,
)
from lvppl.inference.likelihood.checks import few
from lvppl.inference.likelihood.memory import ran_out
from lvppl.layout import Layout, layout_of
from lvppl.replay import Replay
from lvppl.tracing import is_point

__all__ = ["Path", "Points", "without_marks"]

Program = Callable[..., Any]


@dataclass(frozen=True)
class Points:
    """Where chains are.

    Attributes:
        vectors: unconstrained coordinates, (chains, data, n).
        digits: numbers of finite values, (chains, data, E), int64.
        log_start: ln r, with respect to the coordinates, nats, (chains, data).
        log_weight: ln w = ln p(y, z) - ln r(z), nats, (chains, data).
    """

    vectors: Tensor
    digits: Tensor
    log_start: Tensor
    log_weight: Tensor

    def log_prob(self, beta: Tensor) -> Tensor:
        """ln of the distributions at inverse temperatures (data,), without their constants."""
        tempered = torch.where(beta == 0, 0.0, beta * self.log_weight.double())
        return self.log_start.double() + tempered

    def choose(self, mask: Tensor, other: Points) -> Points:
        """These points where ``mask``, (chains, data), is true, the others elsewhere."""
        return Points(
            torch.where(mask[..., None], self.vectors, other.vectors),
            torch.where(mask[..., None], self.digits, other.digits),
            torch.where(mask, self.log_start, other.log_start),
            torch.where(mask, self.log_weight, other.log_weight),
        )


class Path:
    """A model, its start and its data, as functions of the chains' coordinates.

    Args:
        model: a Pyro program.
        guide: where chains start; ``None`` for the prior.
        args, kwargs: of both.
        data_plate: as in :func:`lvppl.log_likelihood`.

    Raises:
        ProgramError: particles cannot run in one batch; a latent cannot be moved (by site); ln p
            at given values is random.
    """

    def __init__(
        self,
        model: Program,
        guide: Program | None,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        data_plate: str | Sequence[str] | None = None,
    ) -> None:
        self.model, self.guide, self.args, self.kwargs = model, guide, args, dict(kwargs)
        self.layout = layout_of(
            model, guide, args, self.kwargs, with_particles=True, data_plate=data_plate
        )
        if self.layout.loop_reason:
            raise ProgramError(
                "Annealing runs all chains in one batch, which this program does not bear: "
                f"{self.layout.loop_reason}. Write it for batches (sizes from the right, no "
                "fixed shapes), or use estimator='importance'."
            )
        # Latents given an enumerated site are drawn given one value of it, then it is summed.
        self._plain = model if guide is not None else without_marks(model)
        run = self._draw(2, Unmask())
        sites = [s for s in _drawn(run) if s["name"] not in _summed(self.layout, guide)]
        self.coordinates = Coordinates(sites, self.layout, run.data_scale)
        self._check_repeatable(run)

    @property
    def num_data(self) -> int:
        return math.prod(plate.size for plate in self.layout.data_plates)

    # -------------------------------------------------------------------------------------- points

    def start(self, draws: AddressedDraws, chains: int) -> Points:
        """Draws from r."""
        with draws:
            return self.at(*self._read(self._draw(chains, Unmask()), chains))

    def at_values(self, values: Mapping[str, Tensor], chains: int) -> Points:
        """Points of given values of the latents, one for all chains or one for each.

        Args:
            values: by site, (*plates, *event) or (chains, *plates, *event).

        Raises:
            ProgramError: a drawn site has no value, or one of another shape.
        """
        for name in (*self.coordinates.vectors, *self.coordinates.digits):
            if name not in values:
                raise ProgramError(
                    f"Site '{name}' has no draw: an exact draw from the posterior needs a value of "
                    f"each latent, and there are values of {sorted(values) or 'none'}. A guide "
                    "that draws auxiliary sites (AutoNormal) cannot be run backwards: start from "
                    "the prior, or write the guide over the latents themselves."
                )
        run = self._draw(chains, PlaceValues(values, self.layout.nesting))
        return self.at(*self._read(run, chains))

    def at(self, vectors: Tensor, digits: Tensor) -> Points:
        """ln r and ln w at these coordinates."""
        place = Place(self.coordinates, vectors, digits)
        # Trajectories that diverge pass through values that no distribution takes.
        with pyro.validation_enabled(False):
            run = self._replay(len(vectors), place)
            log_start, log_weight = self._terms(run)
            for name, log_det in place.log_det.items():
                site = run.guide_sites[name]
                log_start = log_start + run.per_datum(log_det, site, scaled=False)
        # both ln p(z) and ln r(z) are minus infinity at an impossible z: their difference is none
        log_weight = torch.where(log_start == -math.inf, torch.zeros_like(log_weight), log_weight)
        return Points(vectors, digits, log_start, log_weight)

    def gradient(self, vectors: Tensor, digits: Tensor, beta: Tensor) -> tuple[Points, Tensor]:
        """Points, and d ln pi_beta / d vectors, (chains, data, n).

        Raises:
            ProgramError: ln p has no derivative.
        """
        with torch.enable_grad():
            leaf = vectors.detach().requires_grad_()
            points = self.at(leaf, digits)
            try:
                (gradient,) = torch.autograd.grad(points.log_prob(beta).sum(), [leaf])
            except (NotImplementedError, RuntimeError) as error:
                if ran_out(error):
                    raise
                raise ProgramError(
                    "Annealing moves continuous latents along the gradient of ln p(y, z), which "
                    f"cannot be taken: {error} Use estimator='importance' with a guide."
                ) from error
        return (
            Points(vectors, digits, points.log_start.detach(), points.log_weight.detach()),
            gradient,
        )

    # ---------------------------------------------------------------------------------------- runs

    def _terms(self, run: Replay) -> tuple[Tensor, Tensor]:
        """ln of the density of the sites that hold the randomness, and ln w."""
        if self.guide is None:
            log_prior = run.log_prior_drawn
            return log_prior, run.log_joint_drawn - log_prior
        log_weight = run.log_weight
        names = [*self.coordinates.vectors, *self.coordinates.digits]
        sites = [run.guide_sites[name] for name in names]
        terms = [run.per_datum(run.log_prob(site), site) for site in sites]
        return torch.stack([torch.zeros_like(log_weight), *terms]).sum(0), log_weight

    def _draw(self, chains: int, handler: Any) -> Replay:
        """A run that draws, without enumeration of the model's sites."""
        layout = self.layout if self.guide is not None else replace(self.layout, enumerated=())
        with handler:
            return self._run(self._plain, layout, chains)

    def _run(self, model: Program, layout: Layout, chains: int) -> Replay:
        return Replay(model, self.guide, self.args, self.kwargs, layout, chains, True, False)

    def _replay(self, chains: int, handler: Any) -> Replay:
        with handler:
            run = self._run(self.model, self.layout, chains)
        if not run.fits(self.layout):
            raise ProgramError(
                "The sites or data plates of this program change from run to run, so that no chain "
                "can move among its latents. Make them depend on the arguments only."
            )
        return run

    def _read(self, run: Replay, chains: int) -> tuple[Tensor, Tensor]:
        vectors, digits = self.coordinates.read(run.guide_sites)
        shape = (chains, self.num_data, -1)
        return vectors.expand(shape), digits.expand(shape)

    def _check_repeatable(self, run: Replay) -> None:
        vectors, digits = self._read(run, 2)
        one, two = self.at(vectors, digits), self.at(vectors, digits)
        for name in ("log_start", "log_weight"):
            first, second = getattr(one, name), getattr(two, name)
            if not torch.allclose(first, second, rtol=1e-4, atol=1e-4, equal_nan=True):
                where = (first - second).abs().amax(0).nonzero().flatten().tolist()
                raise ProgramError(
                    "ln p(y, z) at the same z is another number in each run (data "
                    f"{few(where)}): randomness outside sample sites, such as dropout. Put "
                    "modules in eval()."
                )


def without_marks(model: Program) -> Program:
    """The program with no site marked for enumeration."""
    unmarked: Program = poutine.infer_config(model, _no_mark)
    return unmarked


def _no_mark(site: Any) -> Any:
    return {"enumerate": None}


def _summed(layout: Layout, guide: Program | None) -> tuple[str, ...]:
    """Sites that no chain holds; a guide draws what it has."""
    return layout.enumerated if guide is None else ()


def _drawn(run: Replay) -> list[Any]:
    """Sites that hold the randomness: what a guide sets to a point follows from the others."""
    return [s for s in run.guide_sites.values() if not (s["is_observed"] or is_point(s))]
