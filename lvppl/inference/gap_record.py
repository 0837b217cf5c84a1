"""The record of a guide's gaps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lvppl.errors import ProgramError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Gaps"]

_SETTLED = 1e-3
"""Nats per datum that a further search may gain where the search is called ended."""


@dataclass(frozen=True, eq=False)
class Gaps:
    """The parts of ln p(y) − ELBO by datum, in nats. Tensors are float64, (data,).

    A standard error is that of the Monte Carlo draws, for the datum's own numbers; data are
    independent.

    Attributes:
        lower, upper: bounds on ln p(y), in expectation; the same where it is known, and ``upper``
            NaN where nothing bounds it.
        lower_std_error, upper_std_error: zero where it is known.
        evidence: where they come from: ``"exact"``, ``"given"``, ``"importance"``, ``"ais"``, or
            ``"bidirectional"`` on simulated data.
        elbo_search: the ELBO of the best member of the family, as the search found it.
        elbo_encoder: the ELBO of the guide as it is.
        amortization: their difference, over common draws; ``amortization_std_error`` is paired.
        remaining: what the last third of the search gained, with ``remaining_std_error``, paired.
            Above the noise the search has not ended, the true approximation gap is smaller, and
            the true amortisation gap larger.
        history: mean ELBO of a datum in each step of the search, (steps,).
        observed: simulated data by site; empty where data were given.
        seed: gives the same numbers again.
        notes: what a reader of the numbers should know.
    """

    lower: Tensor
    upper: Tensor
    lower_std_error: Tensor
    upper_std_error: Tensor
    evidence: str
    elbo_search: Tensor
    elbo_search_std_error: Tensor
    elbo_encoder: Tensor
    elbo_encoder_std_error: Tensor
    amortization: Tensor
    amortization_std_error: Tensor
    remaining: Tensor
    remaining_std_error: Tensor
    history: Tensor
    observed: dict[str, Tensor]
    seed: int
    notes: tuple[str, ...] = ()

    @property
    def num_data(self) -> int:
        return self.lower.numel()

    @property
    def is_exact(self) -> bool:
        """Whether ln p(y) is known."""
        return self.evidence in ("exact", "given")

    @property
    def log_prob(self) -> Tensor:
        """ln p(y).

        Raises:
            ProgramError: it is not known, but bounded.
        """
        if not self.is_exact:
            raise ProgramError(
                f"ln p(y) is not known here, but bounded ({self.evidence}): read gaps.lower and, "
                "on simulated data, gaps.upper."
            )
        return self.lower

    @property
    def approximation(self) -> Tensor:
        """ln p(y) − ELBO of the best member of the family; at least this, where ``lower`` is."""
        return self.lower - self.elbo_search

    @property
    def approximation_std_error(self) -> Tensor:
        return torch.hypot(self.lower_std_error, self.elbo_search_std_error)

    @property
    def approximation_upper(self) -> Tensor:
        """At most this; NaN where nothing bounds ln p(y) from above."""
        return self.upper - self.elbo_search

    @property
    def approximation_upper_std_error(self) -> Tensor:
        return torch.hypot(self.upper_std_error, self.elbo_search_std_error)

    @property
    def total(self) -> Tensor:
        """ln p(y) − ELBO of the guide: approximation + amortisation."""
        return self.lower - self.elbo_encoder

    @property
    def total_std_error(self) -> Tensor:
        return torch.hypot(self.lower_std_error, self.elbo_encoder_std_error)

    @property
    def has_ended(self) -> bool:
        """Whether the last third of the search gained nothing that counts: on average no more than
        0.001 nats per datum, or four standard errors."""
        gain, error = _mean(self.remaining, self.remaining_std_error)
        return gain <= max(_SETTLED, 4 * error)

    @property
    def unsettled(self) -> Tensor:
        """Indices of data whose own search still gained much, int64: more than 0.01 nats, and than
        four standard errors."""
        enough = (4 * self.remaining_std_error).clamp(min=10 * _SETTLED)
        return (self.remaining > enough).nonzero().flatten()

    def mean(self, name: str) -> tuple[float, float]:
        """Mean over the data of a part by its name, nats per datum, and its standard error."""
        return _mean(getattr(self, name), getattr(self, f"{name}_std_error"))

    def __str__(self) -> str:
        number = f"{self.num_data} {'datum' if self.num_data == 1 else 'data'}"
        word = "" if self.is_exact else " at least"
        rows = [
            ("ln p(y)" + word, "lower", _SOURCES[self.evidence]),
            ("  approximation gap" + word, "approximation", "ln p(y) − ELBO of the best member"),
            ("ELBO of the best member", "elbo_search", "by search for each datum"),
            ("  amortisation gap", "amortization", "paired draws"),
            ("ELBO of the guide", "elbo_encoder", ""),
        ]
        if not self.is_exact and bool(self.upper.isfinite().all()):
            rows.insert(0, ("ln p(y) at most", "upper", "backward chains"))
            rows.insert(3, ("  approximation gap at most", "approximation_upper", ""))
        lines = [f"gaps of {number}, nats per datum", ""]
        for label, name, source in rows:
            value, error = self.mean(name)
            lines.append(f"{label:<28}{value:12.4f} ± {error:<9.2g}{source}".rstrip())
        return "\n".join([*lines, "", self._ending(), *(f"note: {note}" for note in self.notes)])

    def _ending(self) -> str:
        gain, error = _mean(self.remaining, self.remaining_std_error)
        text = f"the last third of the search gained {gain:.2g} ± {error:.2g} nats per datum"
        unsettled = self.unsettled.numel()
        if self.has_ended and not unsettled:
            return f"the search has ended: {text}"
        if self.has_ended:
            return f"the search has ended for all but {unsettled} of {self.num_data} data: {text}"
        return (
            f"THE SEARCH HAS NOT ENDED: {text}. Raise num_steps: the approximation gap is smaller "
            "than shown, and the amortisation gap larger"
        )

    def __repr__(self) -> str:
        approximation, amortization = (
            self.mean(name)[0] for name in ("approximation", "amortization")
        )
        return (
            f"Gaps({self.num_data} data, approximation {approximation:.4f}, "
            f"amortisation {amortization:.4f} nats per datum)"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw both gaps of each datum on top of each other, from the largest sum to the smallest.

        Args:
            ax: axes to draw in; a new figure by default.
        """
        from lvppl.inspection.diagnostics import gap_stack

        return gap_stack(self, ax)


_SOURCES = {
    "exact": "exact",
    "given": "given",
    "importance": "importance sampling from the best member",
    "ais": "annealed from the best member",
    "bidirectional": "forward chains, on simulated data",
}


def _mean(values: Tensor, errors: Tensor) -> tuple[float, float]:
    """Mean over data and its Monte Carlo standard error."""
    return float(values.mean()), float(errors.square().sum().sqrt()) / values.numel()
