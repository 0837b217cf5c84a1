"""The importance-weighted bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.objectives.base import (
    Objective,
    Quantity,
    Report,
    expected,
    leave_one_out_mean,
    log_mean_exp,
    require_plain_weights,
    require_reparameterised,
)
from lvppl.terms import Terms

__all__ = ["IWAE", "IWAEReport"]


@dataclass(frozen=True)
class IWAEReport(Report):
    """A report with ``bound``, the importance-weighted bound on ln p(y)."""

    bound: Quantity = None  # type: ignore[assignment]


class IWAE(Objective):
    r"""The negative importance-weighted bound of K particles, one logarithm per datum.

    .. math:: \ln p(y) \ge L_K = E\Big[\ln \frac1K \sum_{k=1}^K w_k\Big], \qquad
              w_k = \frac{p(z_k, y)}{q(z_k \mid y)}, \quad z_k \sim q

    L_1 is the ELBO and L_K never decreases in K. The plate scale stays outside the logarithm.
    Sites enumerated in model or guide are summed inside each weight, which is then exact in them.

    **MIWAE.** Under ``missing="nan"`` (``lvppl.SVI(...).fit(y, missing="nan")``, or the programs of
    :func:`lvppl.missing.with_missing`) the weights are p(z_k, y_o) / q(z_k | y_o), with the missing
    elements integrated out of p and read as 0 by q: L_K is then the bound on ln p(y_o) of Mattei
    and Frellsen (2019), equation 4. What is missing is filled by :func:`lvppl.impute`.

    Args:
        num_particles: K.
        gradient: ``"standard"``: pathwise, with VIMCO's leave-one-out baseline for draws that are
            not reparameterised. ``"dreg"``: doubly reparameterised, for reparameterised guides: the
            guide's parameters get the gradient through the draws alone, weighed by the squared
            normalised weights.
        data_plate, strict: see :class:`Objective`.

    Raises:
        ProgramError: unknown ``gradient``; a plate is subsampled that is not common to every site,
            so that its scale would stand inside the logarithm; ``"dreg"`` with draws that are not
            reparameterised.

    References:
        Burda, Grosse and Salakhutdinov 2016, equation 8; Mnih and Rezende 2016 (VIMCO); Tucker et
        al. 2019 (DReG), equation 8; Mattei and Frellsen 2019, "MIWAE", ICML, section 3.1.
    """

    def __init__(
        self,
        *,
        num_particles: int,
        gradient: str = "standard",
        data_plate: str | Sequence[str] | None = None,
        strict: bool = True,
    ) -> None:
        super().__init__(num_particles=num_particles, data_plate=data_plate, strict=strict)
        if gradient not in ("standard", "dreg"):
            raise ProgramError(f"gradient must be 'standard' or 'dreg', got {gradient!r}.")
        self.gradient = gradient

    @property
    def cut(self) -> bool:  # type: ignore[override]
        return self.gradient == "dreg"

    def per_datum(self, terms: Terms) -> Tensor:
        terms.require_whole("IWAE")
        if self.gradient == "dreg":
            require_reparameterised(terms, "dreg")
            # the squared weights come from E_q ∂ln q = 0, which a power or a mask of q breaks
            require_plain_weights(terms, "gradient='dreg'", "Use gradient='standard'.")
        log_weight = terms.log_weight
        if self.num_particles == 1:  # L_1 is linear in the particles: average what was drawn
            return expected(terms, -log_weight)
        bound = log_mean_exp(log_weight)
        log_score = terms.log_score if torch.is_grad_enabled() else None
        if log_score is not None:
            score = (log_score * _vimco_signal(log_weight.detach())).sum(0)
            bound = bound + (score - score.detach())
        return -bound

    def surrogate(self, terms: Terms) -> Tensor | None:
        if self.gradient != "dreg":
            return None
        weights = torch.softmax(terms.log_weight.detach(), 0)
        log_joint = terms.log_weight + (terms.log_guide_drawn - terms.log_guide_drawn.detach())
        through_draws = terms.pathwise((weights.square() * terms.log_weight).sum())
        return -terms.scale * ((weights * log_joint).sum() + through_draws)

    def describe(self, terms: Terms) -> IWAEReport:
        report = self.standard_report(terms, form="kl")
        bound = Quantity(total=-report.loss.total, per_datum=-report.loss.per_datum)
        return IWAEReport(**{**vars(report), "bound": bound})


def _vimco_signal(log_weight: Tensor) -> Tensor:
    """L minus the same bound with each particle's weight replaced by the others' geometric mean.

    Where all others are zero, or all are, the baseline is 0: any number that does not depend on
    the particle itself is right.
    """
    zero = log_weight.new_full((1, *log_weight.shape[1:]), -math.inf)
    before = torch.cat([zero, log_weight.logcumsumexp(0)[:-1]])
    after = torch.cat([log_weight.flip(0).logcumsumexp(0).flip(0)[1:], zero])
    others = torch.logaddexp(before, after)
    replaced = torch.logaddexp(others, leave_one_out_mean(log_weight))
    baseline = replaced - math.log(log_weight.shape[0])
    bound = log_mean_exp(log_weight)
    signal = bound - baseline.masked_fill(baseline == -math.inf, 0.0)
    return signal.masked_fill(bound == -math.inf, 0.0)
