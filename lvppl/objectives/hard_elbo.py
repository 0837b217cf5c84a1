"""The ELBO without its entropy: hard EM as a loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lvppl.objectives.base import Objective, Quantity, Report, expected, quantity
from lvppl.terms import Terms

__all__ = ["HardELBO", "HardReport"]


@dataclass(frozen=True)
class HardReport(Report):
    """A report with ``hard_elbo`` = E_q ln p(z, y); hard_elbo + entropy = elbo."""

    hard_elbo: Quantity = None  # type: ignore[assignment]


class HardELBO(Objective):
    r"""The loss :math:`-E_q \ln p(z, y)`, without the entropy of q.

    The hard ELBO bounds ln p(y) from below when z is discrete, since H(q) ≥ 0 there; a point guide
    over discrete z makes it hard EM. Over continuous z it is no bound, and the report says so. It
    is deterministic when the guide is a point. A site enumerated in the model keeps its exact
    posterior as its guide.

    Args:
        num_particles, data_plate, strict: see :class:`Objective`.

    References:
        Neal and Hinton 1998, section 5.
    """

    def per_datum(self, terms: Terms) -> Tensor:
        return expected(terms, -(terms.log_likelihood + terms.log_prior))

    @property
    def outcome_particles(self) -> int:
        return 1

    def describe(self, terms: Terms) -> HardReport:
        report = self.standard_report(terms, form="entropy")
        notes = report.notes
        if terms.continuous_latents:
            notes += (
                "hard_elbo is no bound on ln p(y): "
                f"{', '.join(terms.continuous_latents)} is continuous, where the entropy of q can "
                "be negative",
            )
        hard = (terms.log_likelihood + terms.log_prior).mean(0)
        return HardReport(**{**vars(report), "notes": notes, "hard_elbo": quantity(terms, hard)})
