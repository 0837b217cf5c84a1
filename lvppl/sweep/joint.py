"""ln p(z, y) of a program at given states of its finite latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lvppl.layout import Layout, layout_of
from lvppl.sweep.states import SetStates, StateSpace, state_space
from lvppl.terms import Terms, trace_terms
from lvppl.tracing import sample_sites, trace_pair, undisturbed

__all__ = ["Joint", "states_of"]


class Joint:
    """A program on its data, as a function of the states of its latents.

    Sites marked for enumeration are summed out at every state.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        data_plate: Any = None,
    ) -> None:
        self.model, self.args, self.kwargs, self.data_plate = model, args, kwargs, data_plate
        self.layout: Layout = layout_of(
            model, None, args, kwargs, with_particles=True, data_plate=data_plate
        )
        self.space = states_of(model, args, kwargs, self.layout)

    @property
    def dtype(self) -> torch.dtype:
        """Of ln p(z, y)."""
        return self.log_prob(self.space.digits(0, 1)).dtype

    def terms(self, digits: Tensor) -> Terms:
        """The terms of the states with these digits, (particles, E)."""
        batched = len(digits) > 1 and not self.layout.loop_reason
        at = digits if batched else digits[0]
        with SetStates(self.space, at, self.layout.nesting):
            return trace_terms(
                self.model,
                None,
                self.args,
                self.kwargs,
                num_particles=len(digits) if batched else 1,
                data_plate=self.data_plate,
            )

    def log_prob(self, digits: Tensor) -> Tensor:
        """ln p(z, y) in nats, (particles, data)."""
        if len(digits) > 1 and self.layout.loop_reason:
            return torch.cat([self.log_prob(one[None]) for one in digits])
        return self.of(self.terms(digits))

    @staticmethod
    def of(terms: Terms) -> Tensor:
        """ln p(z, y) of terms whose guide is the prior."""
        return terms.log_weight + terms.log_guide_drawn


def states_of(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], layout: Layout
) -> StateSpace:
    """The joint states of a program's latents.

    Raises:
        ProgramError: a latent is continuous or has no finite support, by site.
    """
    with undisturbed(), torch.no_grad():
        trace, _ = trace_pair(model, None, args, kwargs)
    return state_space(sample_sites(trace), layout)
