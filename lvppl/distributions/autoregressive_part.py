"""Some elements of an autoregressive array, the others being known: completions, and evidence."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from lvppl.distributions.autoregressive import Autoregressive
from lvppl.errors import ProgramError

__all__ = ["AutoregressivePart"]


class AutoregressivePart(TorchDistribution):
    r"""The chosen elements of an array, each given what comes before it, the others held fixed.

    .. math:: r(y_C | y_{\bar C}) = \prod_{i \in C} p(y_{o(i)} | y_{o(1)}, …, y_{o(i-1)})

    for C a set of places in the order o of ``whole``. A value is the vector of the chosen elements,
    in the order of the flattened array. The parts of a set and of its complement multiply to p(y),
    so that an image with missing pixels is the program

    >>> missing = AutoregressivePart(model.distribution(), y, ~observed)
    >>> z = pyro.sample("missing", missing)
    >>> rest = AutoregressivePart(model.distribution(), missing.filled(z), observed)
    >>> pyro.sample("y", rest, obs=y[..., observed])

    whose evidence is p(y_observed) = Σ p(y) over all completions. ``lvppl.log_likelihood`` finds
    it, by ``"exact"`` for up to some 20 missing pixels. Its ``"prior"`` draws completions from the
    model itself, in its order: each missing pixel from its conditional, observed ones put in their
    places. The weights are then the conditionals of the observed pixels,

    .. math:: w = \prod_{i \notin C} p(y_{o(i)} | y_{o(1)}, …, y_{o(i-1)}),

    all equal where the observed pixels come first in the order, for they do not depend on what is
    drawn: r is p(y_missing | y_observed), and w is p(y_observed). Where missing pixels come first,
    they are drawn blindly, and w varies as a likelihood does.

    :param whole: the distribution over the array.
    :param value: whole arrays, (\*batch, \*event); chosen elements in it have no influence.
    :param chosen: true where an element is one of this part, of the shape of the event.
    :raises ProgramError: for a mask that is not boolean, has another shape or chooses nothing; for
        a value of another shape; for conditionals whose elements are not independent.

    Source: Uria, Murray, Larochelle (2014), "A deep and tractable density estimator", ICML, section
    1, on what is easy at the beginning and at the end of an order, and what is not.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(
        self,
        whole: Autoregressive,
        value: Tensor,
        chosen: Tensor,
        *,
        validate_args: bool | None = None,
    ) -> None:
        whole.require_event("value", value)
        if chosen.dtype != torch.bool or chosen.shape != whole.event_shape:
            raise ProgramError(
                f"chosen must be boolean of the event's shape, {tuple(whole.event_shape)}, but is "
                f"{chosen.dtype} of shape {tuple(chosen.shape)}. One mask serves all data: run "
                "data with other masks by themselves."
            )
        if not bool(chosen.any()):
            raise ProgramError(
                "chosen is false everywhere, so that this part has no elements. Leave the site out."
            )
        self.whole, self.chosen = whole, chosen.to(whole.blank.device)
        blank = whole.blank.new_zeros(())
        self.fixed = torch.where(self.chosen, blank, value.to(whole.blank))
        batch_shape = torch.broadcast_shapes(
            whole.batch_shape, value.shape[: value.dim() - whole.event_dim]
        )
        size = torch.Size([int(chosen.sum())])
        super().__init__(batch_shape, size, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=None, event_dim=1)
    def support(self) -> constraints.Constraint | None:
        return constraints.independent(self.whole.element_constraint, 1)

    @property
    def element_support(self) -> Tensor:
        """The values that each element can have, (K,); see :class:`Autoregressive`."""
        return self.whole.element_support

    def expand(self, batch_shape: Any, _instance: Any = None) -> AutoregressivePart:
        new = self._get_checked_instance(AutoregressivePart, _instance)
        new.whole, new.chosen, new.fixed = self.whole, self.chosen, self.fixed
        shape = torch.Size(batch_shape)
        super(AutoregressivePart, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def filled(self, part: Tensor) -> Tensor:
        """Whole arrays, (…, \\*event): ``part``, (…, size), in its places among the others."""
        self._require_part(part)
        leading = torch.broadcast_shapes(
            part.shape[:-1], self.fixed.shape[: self.fixed.dim() - self.whole.event_dim]
        )
        whole = self.fixed.expand(*leading, *self.whole.event_shape).clone()
        whole[..., self.chosen] = part.to(whole).expand(*leading, -1)
        return whole

    def log_prob(self, value: Tensor) -> Tensor:
        """ln r(y_C | others), sample and batch shape, in nats."""
        log_p = self.whole.element_log_prob(self.filled(value))[..., self.chosen].sum(-1)
        return log_p.expand(torch.broadcast_shapes(log_p.shape, self.batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, (\\*sample, \\*batch, size), element by element."""
        start = self.fixed.expand(*self.batch_shape, *self.whole.event_shape)
        flat = self.chosen.flatten().tolist()
        places = [i for i in self.whole.order if flat[i]]
        drawn = self.whole.completed(start, ~self.chosen, places, torch.Size(sample_shape))
        return drawn[..., self.chosen]

    def _require_part(self, part: Tensor) -> None:
        if part.shape[-1:] != self.event_shape:
            raise ProgramError(
                f"The chosen elements are a vector of {self.event_shape[0]}, but their values have "
                f"shape {tuple(part.shape)}. Take y[..., chosen] of whole arrays y."
            )
