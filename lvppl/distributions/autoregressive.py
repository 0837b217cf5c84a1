"""A distribution over arrays, as a product of conditionals that one network computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints

from lvppl.errors import ProgramError

__all__ = ["Autoregressive"]


class Autoregressive(TorchDistribution):
    r"""Elements drawn one after another, each given those before it in an order.

    .. math:: p(y) = \prod_{i=1}^D p(y_{o(i)} | y_{o(1)}, …, y_{o(i-1)})

    ``conditionals(y)`` returns the D conditionals at once: a distribution of the event shape of y,
    whose elements are independent *given the argument*, such as
    ``Bernoulli(logits=network(y)).to_event(1)``. The parameters of element o(i) must depend on
    y_{o(1)}, …, y_{o(i−1)} alone, as the masks of :class:`lvppl.models.MADE` see to. That is not
    checked here, and without it p does not sum to one.

    ``log_prob`` is one call of ``conditionals``; a draw is D, for any number of draws at once.

    :param conditionals: called with y, (…, \*event); returns a distribution of batch shape (…).
    :param blank: (\*batch, \*event), what the network reads in place of elements that are not yet
        drawn, such as zeros. It has no influence on any draw, but gives shape, dtype and device.
    :param event_dim: how many dimensions of ``blank`` make one event, at least 1.
    :param order: o, a permutation of 0 … D − 1: elements of the flattened event; by default
        0, 1, …, row by row.
    :raises ProgramError: for an event without dimensions, an order that is no permutation, and
        values of another event shape.

    Source: Bengio, Bengio (2000), "Modeling high-dimensional discrete data with multi-layer neural
    networks", equation 1; Germain, Gregor, Murray, Larochelle (2015), "MADE: masked autoencoder for
    distribution estimation", equation 6.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(
        self,
        conditionals: Callable[[Tensor], Distribution],
        blank: Tensor,
        event_dim: int = 1,
        *,
        order: Sequence[int] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not 1 <= event_dim <= blank.dim():
            raise ProgramError(
                f"event_dim must be from 1 to {blank.dim()}, as blank has shape "
                f"{tuple(blank.shape)}, but is {event_dim}."
            )
        batch_dim = blank.dim() - event_dim
        batch_shape, event_shape = blank.shape[:batch_dim], blank.shape[batch_dim:]
        size = event_shape.numel()
        self.conditionals, self.blank = conditionals, blank
        self.order = tuple(range(size)) if order is None else tuple(int(i) for i in order)
        if sorted(self.order) != list(range(size)):
            raise ProgramError(
                f"order must hold each of 0 ... {size - 1} once, as the event shape is "
                f"{tuple(event_shape)}, but is {_shortened(self.order)}."
            )
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint | None:
        with torch.no_grad():
            return self.conditionals(self.blank).support

    def expand(self, batch_shape: Any, _instance: Any = None) -> Autoregressive:
        new = self._get_checked_instance(Autoregressive, _instance)
        batch_shape = torch.Size(batch_shape)
        new.conditionals, new.order = self.conditionals, self.order
        new.blank = self.blank.expand(batch_shape + self.event_shape)
        super(Autoregressive, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """ln p(y), sample and batch shape, in nats."""
        self.require_event("value", value)
        # the network runs on the data as they are: copies along the batch are made of the result
        log_p = self.conditionals(value).log_prob(value)
        return log_p.expand(torch.broadcast_shapes(log_p.shape, self.batch_shape))

    def element_log_prob(self, value: Tensor) -> Tensor:
        """ln p(y_i | what comes before i) of every element, (…, \\*event), in nats.

        :raises ProgramError: for conditionals that do not end in ``.to_event(event_dim)``.
        """
        self.require_event("value", value)
        return self._elements(value).log_prob(value)

    @property
    def element_constraint(self) -> Any:
        """The support of one element."""
        with torch.no_grad():
            return self._elements(self.blank).support

    @property
    def element_support(self) -> Tensor:
        """The values that each element can have, (K,), where they are finite in number.

        :raises NotImplementedError: where they are not.
        """
        with torch.no_grad():
            elements = self._elements(self.blank)
            values: Tensor = elements.enumerate_support(expand=False).flatten()
        return values

    def _elements(self, value: Tensor) -> Any:
        """The conditionals as a batch of elements."""
        found = self.conditionals(value)
        while isinstance(found, Independent):
            found = found.base_dist
        if len(found.event_shape) or found.batch_shape[-self.event_dim :] != self.event_shape:
            raise ProgramError(
                "The conditionals of single elements are needed, but those of this distribution "
                f"have batch shape {tuple(found.batch_shape)} and event shape "
                f"{tuple(found.event_shape)} for an array of {tuple(self.event_shape)}: let "
                f"conditionals(y) return a distribution of elements, .to_event({self.event_dim})."
            )
        return found

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, (\\*sample, \\*batch, \\*event)."""
        nothing = torch.zeros(self.event_shape, dtype=torch.bool, device=self.blank.device)
        return self.completed(self.blank, nothing, self.order, torch.Size(sample_shape))

    @torch.no_grad()
    def conditional_sample(self, value: Tensor, observed: Tensor, sample_shape: Any = ()) -> Tensor:
        """Draws of the elements that were not observed, from p(y_rest | y_observed), exactly.

        The observed elements must come first in the order, for then what remains of the product of
        conditionals is that very distribution.

        :param value: broadcasts to (\\*batch, \\*event); what stands in other elements has no
            influence.
        :param observed: true where ``value`` was observed; broadcasts likewise, so that each datum
            may have a mask of its own.
        :returns: (\\*sample, \\*batch, \\*event), with the observed elements in their places.
        :raises ProgramError: an observed element comes after one that was not; shapes that do not
            fit; a mask that is not boolean.
        """
        self.require_event("value", value)
        self.require_event("observed", observed)
        if observed.dtype != torch.bool:
            raise ProgramError(
                f"observed must be boolean, true where value was observed, but is {observed.dtype}."
            )
        in_order = observed.reshape(-1, len(self.order))[:, list(self.order)]
        too_late = (in_order[:, 1:] & ~in_order[:, :-1]).any(0)
        if bool(too_late.any()):
            i = int(too_late.nonzero()[0])
            raise ProgramError(
                "observed elements must come first in the order, but element "
                f"{self.order[i + 1]} is observed and element {self.order[i]}, which comes before "
                "it, is not (elements of the flattened event). Use an order that begins with the "
                "observed elements."
            )
        first = int(in_order.sum(-1).min())  # those before it are observed in every datum
        start = torch.where(observed, value.to(self.blank), self.blank)
        return self.completed(start, observed, self.order[first:], torch.Size(sample_shape))

    def completed(
        self, start: Tensor, observed: Tensor, missing: Sequence[int], sample_shape: torch.Size
    ) -> Tensor:
        """``start`` with its elements ``missing`` drawn in this order, where not observed."""
        y = start.expand(sample_shape + start.shape).clone(memory_format=torch.contiguous_format)
        flat, keep = y.flatten(-self.event_dim), observed.flatten(-self.event_dim)  # flat: a view
        for i in missing:
            drawn = self.conditionals(y).sample().flatten(-self.event_dim)[..., i]
            flat[..., i] = torch.where(keep[..., i], flat[..., i], drawn)
        return y

    def require_event(self, name: str, value: Tensor) -> None:
        """Refuse a value of another event shape, or whose batch does not go with this one."""
        n = len(self.event_shape)
        if value.shape[-n:] != self.event_shape:
            event = ", ".join(map(str, self.event_shape))
            raise ProgramError(
                f"{name} must have shape (..., {event}), but has shape {tuple(value.shape)}."
            )
        try:
            torch.broadcast_shapes(value.shape[:-n], self.batch_shape)
        except RuntimeError as error:
            raise ProgramError(
                f"{name} has leading dimensions {tuple(value.shape[:-n])}, which do not go with "
                f"the batch shape {tuple(self.batch_shape)}."
            ) from error


def _shortened(order: Sequence[int]) -> str:
    return (
        str(list(order)) if len(order) <= 16 else f"{list(order[:16])} ... ({len(order)} numbers)"
    )
