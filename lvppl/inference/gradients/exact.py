r"""Gradients that need no sampling, where draws can be listed.

An objective of K particles has the expected loss

.. math:: \sum_{z_1 \dots z_K} \prod_k q_φ(z_k \mid y)\; loss(z_1, \dots, z_K),

and its gradient, q included, is what the objective's own gradient is to estimate. Particles are
exchangeable: the sum is over how often each state comes up.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.evidence import log_evidence
from lvppl.layout import Layout, layout_of
from lvppl.objectives import Objective
from lvppl.site import Site
from lvppl.sweep.joint import states_of
from lvppl.sweep.states import SetStates, StateSpace
from lvppl.terms import Terms, trace_terms

__all__ = ["evidence_loss", "expected_loss"]

Program = Callable[..., Any]

MOST_NUMBERS = 2**21
"""Log-weights, over outcomes, particles and data, that an expectation may need."""


def evidence_loss(model: Program, args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """−ln p(y), 0-dim; ``None`` where it has no exact sum."""
    try:
        return -log_evidence(model, *args, **kwargs).total
    except ProgramError:
        return None


def expected_loss(
    objective: Any, model: Program, guide: Program, args: Any, kwargs: Mapping[str, Any]
) -> Tensor | None:
    """A 0-dim tensor whose gradient is that of the expected loss.

    ``None`` where the guide's draws cannot be listed, are too many, or the loss is none of lvppl's.
    """
    particles = objective.outcome_particles if isinstance(objective, Objective) else None
    if particles is None:
        return None
    options = {"data_plate": objective.data_plate, "strict": objective.strict}
    layout = layout_of(model, guide, args, kwargs, with_particles=True, **options)
    try:
        space = states_of(guide, args, kwargs, layout)
        num_data = math.prod(plate.size for plate in layout.data_plates)
        outcomes = math.comb(space.size + particles - 1, particles)
        if max(outcomes * particles, space.size) * num_data > MOST_NUMBERS:
            return None
        table = _table(model, guide, args, kwargs, layout, space, options | {"cut": objective.cut})
        rows, log_count = _outcomes(space.size, particles)
        chosen = _Chosen(table, rows.to(table.log_weight.device))
        prob = (chosen.log_drawn.sum(0) + log_count.to(table.log_weight)[:, None]).exp().flatten()
        value = table.scale * objective.outcome(chosen, prob).sum()
    except ProgramError:  # a draw that is continuous, masked or scaled; a site that is asked for
        return None
    return value if bool(value.detach().isfinite()) else None


def _table(
    model: Program,
    guide: Program,
    args: Any,
    kwargs: Mapping[str, Any],
    layout: Layout,
    space: StateSpace,
    options: Mapping[str, Any],
) -> Terms:
    """The terms at every state, as particles."""

    def at(digits: Tensor, particles: int) -> Terms:
        with SetStates(space, digits, layout.nesting):
            return trace_terms(model, guide, args, kwargs, num_particles=particles, **options)

    digits = space.digits(0, space.size)
    if len(digits) > 1 and not layout.loop_reason:
        return at(digits, len(digits))
    runs = [run for one in digits for run in at(one, 1)._runs]
    return Terms(runs, len(runs))


def _outcomes(num_states: int, particles: int) -> tuple[Tensor, Tensor]:
    """States of the particles, (K, T), and ln of how many orders each choice has, (T,)."""
    choices = list(itertools.combinations_with_replacement(range(num_states), particles))
    orders = [
        math.lgamma(particles + 1) - sum(math.lgamma(n + 1) for n in Counter(choice).values())
        for choice in choices
    ]
    return torch.tensor(choices).T, torch.tensor(orders, dtype=torch.float64)


class _Chosen(Terms):
    """Particles chosen from a table of states: each outcome is a copy of the data.

    Nothing is drawn here, so that there is no score.
    """

    log_score = None  # type: ignore[assignment]

    def __init__(self, table: Terms, rows: Tensor) -> None:
        super().__init__(table._runs, len(rows))
        self._table, self._rows = table, rows

    def _pick(self, tensor: Tensor) -> Tensor:
        return tensor[self._rows].flatten(1)

    def _stack(self, name: str) -> Tensor:
        return self._pick(self._table._stack(name))

    @property
    def log_drawn(self) -> Tensor:
        """ln q of each particle's state, (K, T, data)."""
        drawn = self._table.log_score
        like = self._table.log_weight if drawn is None else drawn
        return (torch.zeros_like(like) if drawn is None else like)[self._rows]

    @property
    def num_data(self) -> int:
        return self._rows.shape[1] * self._table.num_data

    def distortion(self, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return self._pick(self._table.distortion(function))

    def kl_by_latent(self) -> dict[str, Tensor]:
        return {name: self._pick(kl) for name, kl in self._table.kl_by_latent().items()}

    def _sites(self, group: str) -> dict[str, Site]:
        raise ProgramError("Outcomes are listed by their log-terms, and have no sites.")
