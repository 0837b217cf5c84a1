"""How each parameter is maximised, as a table that one can read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lvppl.columns import in_columns

__all__ = ["FORMULA", "MStepTable", "Step"]


@dataclass(frozen=True)
class Step:
    """How one parameter is maximised.

    Attributes:
        parameter: its name.
        how: ``"closed form"`` (its value at the maximum of Q over all that have a formula, to
            rounding); ``"conditional"`` (the maximum given the other parameters: expectation
            conditional maximisation); ``"gradient"`` (Q is raised by L-BFGS); ``"fixed"`` (Q does
            not depend on it).
        form: what the formula is, in words.
        sites: the sites whose terms of Q it stands in.
        why: for a gradient step, why there is no closed form.
    """

    parameter: str
    how: str
    form: str
    sites: tuple[str, ...]
    why: str = ""


class MStepTable(Mapping[str, Step]):
    """The steps by parameter; prints as a table."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = {step.parameter: step for step in steps}

    def __getitem__(self, name: str) -> Step:
        return self._steps[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def __repr__(self) -> str:
        rows = [("parameter", "M-step", "formula", "sites")]
        for step in self.values():
            sites = ", ".join(step.sites[:3]) + (
                f", … ({len(step.sites)})" if len(step.sites) > 3 else ""
            )
            rows.append((step.parameter, step.how, step.why or step.form, sites))
        return "\n".join(in_columns(rows))


FORMULA = {
    "simplex": "expected counts / their sum",
    "probability": "expected successes / trials",
    "rate": "Σ r y / Σ r, as a rate",
    "concentration": "ln α − ψ(α) = ln ȳ − mean of ln y, by Newton",
    "concentration at a rate": "ψ(α) = ln β + mean of ln y, by Newton",
    "location": "Σ r y / Σ r",
    "regression": "weighted least squares",
    "scale": "√(Σ r (y − μ)² / Σ r)",
    "cholesky": "Σ r (y − μ)(y − μ)ᵀ / Σ r",
}
