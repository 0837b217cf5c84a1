"""Gaussian latents as vectors, one for each element of the plates that they keep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from lvppl.linear_gaussian.placing import Frame
from lvppl.tracing import Plate, plates_of

__all__ = ["Variable", "variables_of"]


@dataclass(frozen=True)
class Variable:
    """A Gaussian latent: for each element of the plates that it keeps a vector x."""

    site: Any
    kept: tuple[Plate, ...]
    """Plates along which elements are independent given everything that any of them meets."""
    frame: Frame

    @property
    def name(self) -> str:
        name: str = self.site["name"]
        return name

    @cached_property
    def _order(self) -> tuple[list[int], list[int]]:
        """Dimensions of the value: those of kept plates, then all others."""
        dims = self.frame.centre.dim()
        events = self.site["fn"].event_dim
        kept = [dims - events + plate.dim for plate in self.kept]
        return kept, [i for i in range(dims) if i not in kept]

    @property
    def kept_shape(self) -> tuple[int, ...]:
        return tuple(self.frame.centre.shape[i] for i in self._order[0])

    @property
    def size(self) -> int:
        return math.prod(self.frame.centre.shape[i] for i in self._order[1])

    def value(self, x: Tensor) -> Tensor:
        """The value of the site at x, (*kept, size)."""
        return self.frame.centre + self.frame.unit * self.unpacked(x)

    def values(self, x: Tensor) -> Tensor:
        """At several x, (draws, *kept, size): (draws, *plates, *event)."""
        return self.value(x).reshape(len(x), *self.plates, *self.site["fn"].event_shape)

    @property
    def plates(self) -> list[int]:
        """Sizes of the plates around the site, left to right."""
        return [plate.size for plate in plates_of(self.site)]

    def unpacked(self, x: Tensor) -> Tensor:
        """(..., *kept, size) as (..., *batch, *event) of the site."""
        kept, others = self._order
        shape, before = self.frame.centre.shape, x.dim() - len(kept) - 1
        x = x.reshape(x.shape[:before] + tuple(shape[i] for i in [*kept, *others]))
        where = {dim: before + position for position, dim in enumerate([*kept, *others])}
        return x.permute([*range(before), *(where[i] for i in range(len(shape)))])

    def covariance(self, C: Tensor) -> Tensor:
        """Of the value within an event, (*batch, d, d), from that of x, (*kept, size, size)."""
        kept, others = self._order
        centre, events = self.frame.centre, self.site["fn"].event_dim
        batch = centre.dim() - events
        apart = [i for i in others if i < batch]
        sizes = [centre.shape[i] for i in apart]
        count, d = math.prod(sizes), centre.shape[batch:].numel()
        blocks = C.reshape(*self.kept_shape, count, d, count, d).diagonal(dim1=-4, dim2=-2)
        blocks = blocks.movedim(-1, -3).reshape(*self.kept_shape, *sizes, d, d)
        where = [[*kept, *apart].index(i) for i in range(batch)]
        unit = self.frame.unit.reshape(*centre.shape[:batch], d)
        return blocks.permute(*where, batch, batch + 1) * unit[..., :, None] * unit[..., None, :]


def variables_of(
    sites: Mapping[str, Any], scopes: Mapping[str, Sequence[str]], frames: Mapping[str, Frame]
) -> dict[str, Variable]:
    """The latents with the plates that they keep.

    A plate is kept if every site that a latent meets lies inside it. Where the plates of two
    latents that meet do not nest (rows and columns of a table), one of them gives up its own.
    Latents meet in a site, or when one that both of them meet is integrated out.
    """
    kept: dict[str, dict[str, Plate]] = {}
    for name in frames:
        around = [
            {plate.name for plate in plates_of(sites[site])}
            for site, scope in scopes.items()
            if name in scope
        ]
        own = plates_of(sites[name])
        kept[name] = {p.name: p for p in own if all(p.name in plates for plates in around)}
    while (loser := _crossing(kept, scopes.values())) is not None:
        name, others = loser
        kept[name] = {n: plate for n, plate in kept[name].items() if n in others}
    return {
        name: Variable(
            sites[name], tuple(sorted(plates.values(), key=lambda p: p.dim)), frames[name]
        )
        for name, plates in kept.items()
    }


def _crossing(
    kept: Mapping[str, Mapping[str, Plate]], scopes: Iterable[Sequence[str]]
) -> tuple[str, set[str]] | None:
    """A latent that must give up plates, and those that it may keep; ``None`` for none."""

    def elements(name: str) -> int:
        return math.prod(plate.size for plate in kept[name].values())

    for scope in _cliques(kept, scopes):
        for a, b in itertools.combinations(sorted(scope), 2):
            if not (kept[a].keys() <= kept[b].keys() or kept[b].keys() <= kept[a].keys()):
                fewer, more = sorted((a, b), key=elements)
                return fewer, set(kept[more])
    return None


def _cliques(
    kept: Mapping[str, Mapping[str, Plate]], scopes: Iterable[Sequence[str]]
) -> list[set[str]]:
    """The latents that meet in sites, and those that are left when one is integrated out."""
    live = [set(scope) for scope in scopes]
    found = list(live)
    for name in sorted(kept, key=lambda n: -len(kept[n])):  # innermost plates first
        met = [scope for scope in live if name in scope]
        left = set().union(*met) - {name}
        live = [scope for scope in live if name not in scope] + [left]
        found.append(left)
    return found
