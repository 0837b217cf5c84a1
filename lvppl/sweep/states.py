"""The joint states of a program's finite latents: counted, numbered, and set in a run.

A datum's state is one value for each of its elements: the elements of every latent site that lie
in no data plate of their own, such as the 30 bits of ``Bernoulli(p).to_event(1)``. States are
numbered in mixed radix, the first element being the most significant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Independent

from lvppl.enumerated import is_one, user_scale
from lvppl.errors import ProgramError
from lvppl.layout import Layout
from lvppl.tracing import is_masked, kind_of, plates_of, subsampled_plates

__all__ = ["FiniteLatent", "SetStates", "StateSpace", "state_space"]


@dataclass(frozen=True)
class FiniteLatent:
    """A latent site with finite support."""

    name: str
    support: Tensor
    """Values of one element, (K, *event)."""
    shape: tuple[int, ...]
    """Elements of one datum: the batch dimensions that are in use, size 1 for data plates, then
    those that ``to_event`` took."""
    event_dims: int
    """How many of the dimensions of ``shape`` ``to_event`` took."""

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


class StateSpace:
    """All joint states of one datum.

    :ivar latents: the sites, in the order of the program.
    :ivar radices: values of each element, (E,).
    """

    def __init__(self, latents: Sequence[FiniteLatent]) -> None:
        self.latents = tuple(latents)
        self.radices = torch.tensor(
            [len(latent.support) for latent in latents for _ in range(latent.num_elements)]
        )

    @property
    def num_elements(self) -> int:
        return len(self.radices)

    @property
    def size(self) -> int:
        """Number of joint states, exactly."""
        return math.prod(self.radices.tolist())

    @property
    def log_size(self) -> float:
        return float(self.radices.double().log().sum())

    @property
    def is_binary(self) -> bool:
        return bool((self.radices == 2).all())

    def digits(self, first: int, count: int) -> Tensor:
        """Values' numbers in the states ``first`` to ``first + count - 1``, int64, (count, E)."""
        index, columns = torch.arange(first, first + count), []
        for radix in self.radices.flip(0).tolist():
            columns.append(index % radix)
            index = index.div(radix, rounding_mode="floor")
        return torch.stack(columns[::-1], -1) if columns else index.new_zeros(count, 0)

    def values(self, digits: Tensor) -> dict[str, Tensor]:
        """By site, (*batch, *shape, *event), of digits (*batch, E)."""
        found, start = {}, 0
        for latent in self.latents:
            own = digits[..., start : start + latent.num_elements]
            start += latent.num_elements
            at = own.reshape(*digits.shape[:-1], *latent.shape).to(latent.support.device)
            found[latent.name] = latent.support[at]
        return found


def state_space(sites: Sequence[Any], layout: Layout) -> StateSpace:
    """The states of the latents that one run without particles draws and does not enumerate.

    Raises:
        ProgramError: a latent is continuous or has no finite support, or is masked or scaled, by
            site; a plate inside the data is subsampled.
    """
    data = {plate.name for plate in layout.data_plates}
    inside = sorted(subsampled_plates(sites) - data)
    if inside:
        raise ProgramError(
            f"Plate '{inside[0]}' is subsampled inside each datum, so that its "
            "scale would stand inside the sum over states. Run the program on full plates."
        )
    return StateSpace(
        [
            _finite(site, data)
            for site in sites
            if not site["is_observed"] and site["name"] not in layout.enumerated
        ]
    )


def _finite(site: Any, data: set[str]) -> FiniteLatent:
    fn = site["fn"]
    outer, base, to_event = list(fn.batch_shape), fn, 0
    while isinstance(base, (Independent, ExpandedDistribution, MaskedDistribution)):
        to_event += getattr(base, "reinterpreted_batch_ndims", 0)
        base = base.base_dist
    support = _elementwise(base)
    if support is None and not getattr(base, "has_enumerate_support", False):
        raise ProgramError(
            f"Latent '{site['name']}' ({kind_of(base)}) has no finite support, so that its states "
            "cannot be swept. Give it a guide and use estimator='importance'."
        )
    if is_masked(site) or not is_one(user_scale(site)):
        raise ProgramError(
            f"Latent '{site['name']}' has a mask or a poutine.scale, so that its probabilities do "
            "not sum to one over the states of a sweep. Take it off, or use estimator='prior' or "
            "'importance'."
        )
    for plate in plates_of(site):
        if plate.name in data:
            outer[plate.dim] = 1
    if support is not None:
        return FiniteLatent(site["name"], support, (*outer, *fn.event_shape), len(fn.event_shape))
    events = fn.event_shape[:to_event]
    support = base.enumerate_support(expand=False)
    support = support.reshape(len(support), *base.event_shape)
    return FiniteLatent(site["name"], support, (*outer, *events), to_event)


def _elementwise(base: Any) -> Tensor | None:
    """The values of one element where a distribution says that each element has these, such as
    :class:`lvppl.distributions.Autoregressive`; ``None`` elsewhere."""
    try:
        found: Tensor | None = getattr(base, "element_support", None)
    except NotImplementedError:  # says so, but its elements have infinitely many
        return None
    return found


class SetStates(Messenger):
    """Gives latent sites their values in given states, the same for every datum.

    Args:
        space: the states of the program.
        digits: (particles, E); without a particle plate, (E,).
        nesting: batch dimensions that plates occupy, the particle plate left out.
    """

    def __init__(self, space: StateSpace, digits: Tensor, nesting: int) -> None:
        super().__init__()
        self.values = space.values(digits)
        self.latents = {latent.name: latent for latent in space.latents}
        self.particles = digits.dim() - 1
        self.nesting = nesting

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or msg["name"] not in self.latents:
            return
        latent, value = self.latents[msg["name"]], self.values[msg["name"]]
        if self.particles:  # the particles' dimension is the leftmost of those in use
            batch_dims = len(latent.shape) - latent.event_dims
            missing = (1,) * (self.nesting - batch_dims)
            value = value.reshape(value.shape[:1] + missing + value.shape[1:])
        msg["value"] = value.expand(msg["fn"].shape())
        msg["done"] = True
