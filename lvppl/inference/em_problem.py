"""A program on its data, batch by batch, and how its parameters are maximised."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lvppl.inference.e_step import (
    Mode,
    sites_of,
    traced_sites,
)
from lvppl.inference.fast_chain import FastChain
from lvppl.inference.fast_mixture import FastMixture
from lvppl.inference.m_step import MStep
from lvppl.inference.m_step.bindings import Affine, Binding, Bound, Key, bind, merged
from lvppl.inference.m_step.entries import Parameters
from lvppl.inference.m_step.floors import Floors
from lvppl.inference.m_step.statistics import Statistics
from lvppl.inference.m_step.weighted import Weighted
from lvppl.inference.map_latents import MapLatents
from lvppl.inference.plate_indices import PlateIndices
from lvppl.layout import Layout, layout_of

__all__ = ["Batch", "Problem"]

Batch = tuple[Any, ...]

_KERNELS: tuple[type[FastMixture] | type[FastChain], ...] = (FastMixture, FastChain)


@dataclass
class Problem:
    """A program on its data, batch by batch, and how its parameters are maximised."""

    program: Callable[..., Any]
    latents: MapLatents
    batches: Sequence[Batch]
    kwargs: dict[str, Any]
    parameters: Parameters
    floor: float
    device: torch.device
    integrated: tuple[str, ...] = ()
    """Continuous latents of each datum, integrated out."""
    missing: str | None = None
    """``"nan"`` where NaN is a missing value."""
    engine: str = "auto"
    """``"eager"``: no kernels."""
    kernels: dict[Any, FastMixture | FastChain | None] = field(default_factory=dict)
    indices: PlateIndices = field(default_factory=PlateIndices)
    by_data: bool = False
    """Bindings depend on the data (``A[x]``), and are found anew for each batch."""

    @cached_property
    def m_step(self) -> MStep:
        """How each parameter is maximised, found once."""
        return self._plan()

    def layout(self, batch: Batch) -> Layout:
        return layout_of(self.program, None, batch, self.kwargs)

    def bindings(self, batch: Batch) -> dict[Key, Binding]:
        """What probing on a batch finds."""
        layout = self.layout(batch)

        def run() -> list[Weighted]:
            terms = sites_of(self.program, batch, self.kwargs, layout)
            return [*terms, *self.latents.priors.values()]

        kept = dict(self.latents.priors)
        try:
            with torch.no_grad():
                return bind(run, self.parameters)
        finally:  # probing has left them at a random point
            self.latents.priors.update(kept)

    def _plan(self) -> MStep:
        """The M-step, found by probing on the first batch, and on all where they may differ."""
        found, others = self.bindings(self.batches[0]), []
        if len(self.batches) > 1:
            others = [self.bindings(batch) for batch in (self.batches[1], self.batches[-1])]
            self.by_data = _follow_data([found, *others], self._rows)
            if self.by_data:
                others += [self.bindings(batch) for batch in self.batches[2:]]
        every = [found, *others]
        found = merged(every)
        with torch.no_grad():
            floors = Floors(map(self._sites, self.batches))
        terms = self._sites(self.batches[0])
        priors = self.latents.priors
        return MStep(
            self.parameters,
            terms,
            priors,
            found,
            others=[b for b in every if self.by_data],
            floor=self.floor,
            floors=floors,
        )

    def _sites(self, batch: Batch) -> list[Weighted]:
        return sites_of(self.program, batch, self.kwargs, self.layout(batch))

    def gather(self, batch: Batch, terms: Sequence[Weighted], into: Statistics) -> Statistics:
        """Add the statistics of a batch's weighted sites."""
        own = self.bindings(batch) if self.by_data else None
        return self.m_step.gather(terms, into, own)

    def fast(self, batch: Batch, mode: Mode, into: Statistics) -> Tensor | None:
        """The E-step by a kernel made for the kind of program; ``None`` where there is none."""
        if self.engine == "eager" or self.by_data:
            return None
        if self.m_step.by_gradient or self._has_regressions:
            return None
        layout = self.layout(batch)
        with self.indices:
            sites = traced_sites(self.program, batch, self.kwargs, layout)
        key = (id(batch), mode.hard)
        if key not in self.kernels:
            found = [kind.of(sites, layout, self.m_step.bindings, mode) for kind in _KERNELS]
            self.kernels[key] = next((kernel for kernel in found if kernel is not None), None)
        kernel = self.kernels[key]
        return None if kernel is None else kernel(sites, layout, mode, into)

    @cached_property
    def _has_regressions(self) -> bool:
        """Locations that are sums of entries, which the kernels do not know: ``loc[z] + shift``."""
        return any(isinstance(binding, Affine) for binding in self.m_step.bindings.values())

    @property
    def _rows(self) -> set[int]:
        return {plate.size for plate in self.layout(self.batches[0]).data_plates}

    @property
    def num_data(self) -> int:
        """Data that a tolerance is per: those of the data plates, else rows of the data."""
        sizes = [
            math.prod(p.size for p in self.layout(batch).data_plates) for batch in self.batches
        ]
        return max(sum(sizes), 1)


def _follow_data(found: Sequence[Mapping[Key, Binding]], rows: set[int]) -> bool:
    """Whether which entry is which argument depends on the rows of a batch.

    With batches of one row it cannot be seen, and is taken to.
    """
    if 1 in rows:
        return True
    for binding in found[0].values():
        if isinstance(binding, Affine) or (
            isinstance(binding, Bound) and rows & set(binding.index.shape)
        ):
            return True
    return any(
        type(other.get(key)) is not type(binding)
        or (isinstance(binding, Bound) and not binding.equals(other[key]))
        for other in found[1:]
        for key, binding in found[0].items()
    )
