"""One sample site as a user reads it: over all particles, by plate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.missing import MISSING
from lvppl.replay import Replay
from lvppl.tracing import is_discrete, plates_of

__all__ = ["Site"]


@dataclass(frozen=True)
class Site:
    """One sample site over all particles: values, log-probabilities, means and draws."""

    name: str
    _runs: tuple[Replay, ...]
    _group: str

    def _messages(self) -> list[tuple[Replay, Any]]:
        return [
            (run, site)
            for run in self._runs
            for site in getattr(run, self._group)
            if site["name"] == self.name
        ]

    @property
    def _first(self) -> Any:
        return self._messages()[0][1]

    @property
    def plates(self) -> tuple[str, ...]:
        """Names of the plates around the site, left to right."""
        return tuple(plate.name for plate in plates_of(self._first))

    @property
    def event_dim(self) -> int:
        return int(self._first["fn"].event_dim)

    @property
    def is_auxiliary(self) -> bool:
        return bool(self._first["infer"].get("is_auxiliary", False))

    @property
    def is_discrete(self) -> bool:
        return is_discrete(self._first)

    @cached_property
    def value(self) -> Tensor:
        """(particles, *plate sizes, *event shape)"""
        return torch.cat(
            [run.by_plates(site["value"], site, self.event_dim) for run, site in self._messages()]
        )

    @cached_property
    def missing(self) -> Tensor | None:
        """True where an observed value is missing, (*plate sizes, *event); None if unknown."""
        run, site = self._messages()[0]
        missing = site["infer"].get(MISSING)
        return None if missing is None else run.by_plates(missing, site, self.event_dim)[0]

    @property
    def observed(self) -> Tensor:
        """The value, NaN where it is missing."""
        missing = self.missing
        return self.value if missing is None else self.value.masked_fill(missing, math.nan)

    @cached_property
    def log_prob(self) -> Tensor:
        """ln density under the model, mask applied and no scale: (particles, *plate sizes).

        An observed site that depends on sites enumerated in the model has those summed out.
        """
        return torch.cat([run.pointwise(site) for run, site in self._messages()])

    def mean(self) -> Tensor:
        """Mean under the model's distribution: (particles, *plate sizes, *event shape)."""
        return self._from_model(Replay.mean)

    def sample(self) -> Tensor:
        """A draw from the model's distribution: (particles, *plate sizes, *event shape)."""
        for run, site in self._messages():
            if run.depends_on_enumerated(site):
                raise ProgramError(
                    f"Site '{self.name}' depends on enumerated sites, whose values a replay does "
                    "not draw. Draw from the model itself (poutine.uncondition)."
                )
        return self._from_model(lambda site: site["fn"].sample())

    def _from_model(self, function: Callable[[Any], Tensor]) -> Tensor:
        results = []
        for run, site in self._messages():
            value = function(run.model_site(site))
            results.append(run.by_plates(run.averaged(site, value), site, self.event_dim))
        return torch.cat(results)
