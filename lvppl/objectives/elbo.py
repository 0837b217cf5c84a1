"""The evidence lower bound."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.objectives.base import Objective, Report, expected, require_reparameterised
from lvppl.terms import Terms

__all__ = ["ELBO"]


class ELBO(Objective):
    r"""The negative evidence lower bound, in two forms of the same number.

    .. math:: \ln p(y) \ge E_q \ln p(z, y) + H(q)                 \quad \text{(entropy form)}
                         = E_q \ln p(y \mid z) - KL(q, p(z))       \quad \text{(KL form)}

    Sites that are enumerated are summed out exactly.

    Args:
        num_particles: draws from the guide.
        form: ``"kl"`` takes the KL of a site in closed form where torch registers one *and* no
            parent of the site in the model can depend on it in the guide; ``"entropy"`` takes the
            entropy of a site in closed form where its distribution has one. Elsewhere both use the
            draws. Both are unbiased for the same number; the forms differ in variance.
        gradient: ``"standard"``: pathwise, with a score function and a leave-one-out baseline for
            draws that are not reparameterised. ``"stl"``: sticking the landing, the derivative
            through the draws alone, whose variance vanishes as q reaches the posterior; every site
            then uses its draws, whatever the form.
        data_plate, strict: see :class:`Objective`.

    Raises:
        ProgramError: unknown ``form`` or ``gradient``; ``"stl"`` with a draw that is not
            reparameterised.

    References:
        Jordan et al. 1999; Kingma and Welling 2014, section 2.2; Roeder, Wu and Duvenaud 2017.
    """

    def __init__(
        self,
        *,
        num_particles: int = 1,
        form: str = "kl",
        gradient: str = "standard",
        data_plate: str | Sequence[str] | None = None,
        strict: bool = True,
    ) -> None:
        super().__init__(num_particles=num_particles, data_plate=data_plate, strict=strict)
        if form not in ("kl", "entropy"):
            raise ProgramError(f"form must be 'kl' or 'entropy', got {form!r}.")
        if gradient not in ("standard", "stl"):
            raise ProgramError(f"gradient must be 'standard' or 'stl', got {gradient!r}.")
        self.form = form
        self.gradient = gradient

    @property
    def cut(self) -> bool:  # type: ignore[override]
        return self.gradient == "stl"

    def per_datum(self, terms: Terms) -> Tensor:
        if self.gradient == "stl":
            require_reparameterised(terms, "stl")
            return -terms.elbo("sampled").mean(0)
        return expected(terms, -terms.elbo(self.form))

    def surrogate(self, terms: Terms) -> Tensor | None:
        if self.gradient != "stl":
            return None
        # Parameters of p: through ln p at fixed draws. Parameters of q: through the draws alone.
        log_joint = terms.log_weight + (terms.log_guide_drawn - terms.log_guide_drawn.detach())
        through_draws = terms.pathwise(terms.log_weight.mean(0).sum())
        return -terms.scale * (log_joint.mean(0).sum() + through_draws)

    @property
    def outcome_particles(self) -> int:
        return 1

    def describe(self, terms: Terms) -> Report:
        return self.standard_report(terms, form="sampled" if self.gradient == "stl" else self.form)
