r"""Where the draws of an estimate of p(y) come from, and what each draw weighs.

.. math:: p(y) = E_r \frac{p(y, z)}{r(z)}: \quad
    r = p(z), \quad r = 1/|Z|, \quad r = q(z|y)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvppl.inference.addressed import AddressedDraws
from lvppl.sweep.states import FiniteLatent, StateSpace
from lvppl.terms import Terms

__all__ = ["Proposal", "importance", "prior", "uniform"]

Program = Callable[..., Any]
Draws = Callable[..., AddressedDraws]


@dataclass(frozen=True)
class Proposal:
    """A distribution over the latents that can be drawn from and evaluated.

    Attributes:
        name: of the estimator, as the record gives it.
        guide: the program that draws, ``None`` for the model itself.
        draws: makes the handler that gives the draws their random numbers.
        log_weight: ln p(y, z) - ln r(z) of the terms of a run, (particles, data).
    """

    name: str
    guide: Program | None
    log_weight: Callable[[Terms], Tensor]
    draws: Draws = AddressedDraws


def _of_terms(terms: Terms) -> Tensor:
    return terms.log_weight


def prior() -> Proposal:
    """z from p(z): the weight is p(y | z)."""
    return Proposal("prior", None, _of_terms)


def importance(guide: Program) -> Proposal:
    """z from q(z | y)."""
    return Proposal("importance", guide, _of_terms)


def uniform(space: StateSpace) -> Proposal:
    """z uniform on the |Z| states of a finite support: the weight is |Z| p(y, z)."""
    latents = {latent.name: latent for latent in space.latents}

    def log_weight(terms: Terms) -> Tensor:
        # the run takes its draws for the prior's: undo that
        return terms.log_weight + terms.log_guide_drawn + space.log_size

    def draws(*address: Any) -> AddressedDraws:
        return _UniformDraws(latents, *address)

    return Proposal("uniform", None, log_weight, draws)


class _UniformDraws(AddressedDraws):
    """Draws the named sites uniformly from their supports."""

    def __init__(self, latents: dict[str, FiniteLatent], *address: Any) -> None:
        super().__init__(*address)
        self.latents = latents

    def drawn(self, msg: Any) -> Tensor:
        latent = self.latents.get(msg["name"])
        if latent is None:
            return super().drawn(msg)
        fn, support = msg["fn"], latent.support
        elements = fn.batch_shape + fn.event_shape[: latent.event_dims]
        where = torch.rand(elements, dtype=torch.float64, device=support.device)
        return support[(where * len(support)).long().clamp_(max=len(support) - 1)]
