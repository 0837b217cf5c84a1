r"""The amortization gap: what an encoder loses to a search for each datum's own parameters.

.. math:: gap(y) = \max_{λ} ELBO(y; q_λ) - ELBO(y; q_{φ(y)})

with q the guide's own family, φ the encoder and λ free parameters. "Generation replaces
search": the encoder answers in one pass what a search would find, and the gap is its price.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.inference.per_datum import PerDatumSearch
from lvppl.seeding import seeded

__all__ = ["AmortizationGap", "amortization_gap"]

Program = Callable[..., Any]


@dataclass(frozen=True)
class AmortizationGap:
    """ELBOs of the encoder and of the search, per datum, in nats; every field has shape (data,).

    Attributes:
        elbo_encoder: the ELBO under the guide as it is.
        elbo_search: the ELBO under the member of the family found for each datum.
        gap: their difference. It can come out slightly negative, where the search has not ended or
            within the error.
        std_error: standard error of ``gap`` over repeated draws; NaN with one repetition.
        history: (num_steps,) mean ELBO of a datum during the search: it should have flattened.
    """

    elbo_encoder: Tensor
    elbo_search: Tensor
    gap: Tensor
    std_error: Tensor
    history: Tensor

    def __str__(self) -> str:
        rows = ("elbo_encoder", "elbo_search", "gap")
        return "\n".join(f"{row:<14}{getattr(self, row).mean():10.4f} nats a datum" for row in rows)


def amortization_gap(
    model: Program,
    guide: Program,
    *data: Any,
    num_steps: int = 500,
    learning_rate: float = 0.05,
    num_particles: int = 8,
    num_repetitions: int = 10,
    seed: int | None = 0,
) -> AmortizationGap:
    """Search the best guide for each datum, from the guide's own, and report what it gains.

    Every latent keeps its family (Normal, MultivariateNormal, Bernoulli, Categorical) and gets free
    parameters for each datum, started where the guide is and moved by Adam, its rate falling to
    zero along a cosine. Model and guide are left as they are; put them into evaluation mode first.
    Both ELBOs use the same random numbers. :func:`lvppl.gaps` also says what the family loses.

    Args:
        model, guide: any Pyro programs with a data plate around every site.
        data: their arguments: one batch.
        num_steps: steps of the search.
        learning_rate: initial rate, in standard deviations of the guide; of logits in units of four
            nats.
        num_particles: draws for one step, and for one repetition of the evaluation.
        num_repetitions: repetitions of the evaluation, for the estimate and its standard error.
        seed: of all draws; the global generators are restored.

    Raises:
        ProgramError: no data plate; a latent of another family in the guide, or whose parameters
            are random (they depend on another latent, or the network is in training mode).

    References:
        Cremer, Li and Duvenaud 2018, "Inference suboptimality in variational autoencoders".
    """
    if num_steps < 1 or num_repetitions < 1:
        raise ProgramError(
            "amortization_gap needs at least one step and one repetition, but got "
            f"num_steps={num_steps!r}, num_repetitions={num_repetitions!r}."
        )
    with seeded(seed) as seed:
        search = PerDatumSearch("amortization_gap", model, guide, data, num_particles=num_particles)
        search.climb(num_steps, learning_rate)
        encoder, searched = search.elbos((search.guide, search.found), num_repetitions, seed)
    gaps = searched - encoder
    return AmortizationGap(
        elbo_encoder=encoder.mean(0),
        elbo_search=searched.mean(0),
        gap=gaps.mean(0),
        std_error=gaps.std(0) / num_repetitions**0.5,
        history=search.history,
    )
