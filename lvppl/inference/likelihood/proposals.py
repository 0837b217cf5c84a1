r"""Where the draws of an estimate of p(y) come from, and what each draw weighs.

.. math:: p(y) = E_r \frac{p(y, z)}{r(z)}: \quad
    r = p(z), \quad r = 1/|Z|, \quad r = q(z|y), \quad r = (1 - \alpha)\, q(z|y) + \alpha\, p(z)

A mixture is drawn from by strata: so many draws from each part, and every draw weighed by the whole
mixture (the deterministic mixture of Owen 2013, ch. 9; Hesterberg 1995). With n_j draws z_ji from
part r_j, which has the share a_j,

.. math:: \hat p(y) = \sum_j a_j \frac{1}{n_j} \sum_i \frac{p(y, z_{ji})}{\sum_k a_k r_k(z_{ji})}

is unbiased for all n_j of at least one, and no weight is above p(y|z) / a_j for a part that is the
prior, whatever the guide misses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from lvppl.enumerated import is_one
from lvppl.errors import ProgramError
from lvppl.inference.addressed import AddressedDraws
from lvppl.seeding import derived_seed
from lvppl.sweep.states import FiniteLatent, StateSpace
from lvppl.terms import Terms

__all__ = [
    "Proposal",
    "SetTo",
    "Stratum",
    "check_mixture",
    "defended",
    "importance",
    "prior",
    "uniform",
]

Program = Callable[..., Any]
Draws = Callable[..., AddressedDraws]


@dataclass(frozen=True)
class Stratum:
    """One part of a mixture.

    Attributes:
        share: its weight in the mixture, in (0, 1].
        from_prior: whether its draws come from p(z) and the guide is evaluated there.
    """

    share: float = 1.0
    from_prior: bool = False

    def seed(self, seed: int) -> int:
        """Parts draw independently: each has a random stream of its own."""
        return derived_seed(seed, "ln p(y), draws from the prior") if self.from_prior else seed


@dataclass(frozen=True)
class Proposal:
    """A distribution over the latents that can be drawn from and evaluated.

    Attributes:
        name: of the estimator, as the record gives it.
        guide: the program that draws, ``None`` for the model itself.
        log_weight: ln p(y, z) - ln r(z) of the terms of a run, (particles, data).
        draws: makes the handler that gives the draws their random numbers.
        strata: the parts of a mixture, of which the shares sum to one.
    """

    name: str
    guide: Program | None
    log_weight: Callable[[Terms], Tensor]
    draws: Draws = AddressedDraws
    strata: tuple[Stratum, ...] = (Stratum(),)

    @property
    def draws_prior(self) -> bool:
        return self.name == "prior" or any(stratum.from_prior for stratum in self.strata)

    @property
    def defensive(self) -> float:
        """Share of the prior in the mixture with a guide."""
        return sum(stratum.share for stratum in self.strata if stratum.from_prior)

    def counts(self, num_samples: int) -> tuple[int, ...]:
        """How many of the first ``num_samples`` draws come from each part.

        In proportion to the shares, but at least two of each as soon as there are four: one draw
        tells nothing of its variance. Every count grows with ``num_samples``.
        """
        if len(self.strata) == 1:
            return (num_samples,)
        least, most = min(2, num_samples // 2), num_samples - min(2, (num_samples + 1) // 2)
        last = min(max(round(self.strata[1].share * num_samples), least), most)
        return num_samples - last, last


def _of_terms(terms: Terms) -> Tensor:
    return terms.log_weight


def prior() -> Proposal:
    """z from p(z): the weight is p(y | z)."""
    return Proposal("prior", None, _of_terms)


def importance(guide: Program) -> Proposal:
    """z from q(z | y)."""
    return Proposal("importance", guide, _of_terms)


def defended(guide: Program, share: float) -> Proposal:
    """z from (1 - a) q(z | y) + a p(z), by strata: the weight is at most p(y | z) / a.

    Args:
        guide: q(z | y), whose sites are all latents of the model.
        share: a, the part of the prior, in (0, 1).
    """

    def log_weight(terms: Terms) -> Tensor:
        from_guide = math.log1p(-share) + terms.log_guide_drawn
        from_prior = math.log(share) + terms.log_prior_drawn
        return terms.log_joint_drawn - torch.logaddexp(from_guide, from_prior)

    strata = Stratum(1.0 - share), Stratum(share, from_prior=True)
    return Proposal("importance", guide, log_weight, strata=strata)


def check_mixture(terms: Terms) -> None:
    """Refuse a guide whose ln q is not known at draws from the prior, or is no density of them.

    Raises:
        ProgramError: the guide has auxiliary sites, enumerates a site, or scales one.
    """
    run = terms._runs[0]
    auxiliary = [name for name in run.guide_sites if name not in run.model_sites]
    if auxiliary:
        names = ", ".join(f"'{name}'" for name in auxiliary)
        raise ProgramError(
            "defensive= weighs draws by the mixture of guide and prior, but the guide draws "
            f"{names}, which the model does not have: a draw from the prior has no value there, so "
            "that ln q(z | y) of it cannot be evaluated. Autoguides draw such sites; write the "
            "guide with the model's own sites, or leave defensive out."
        )
    if any(name in terms.layout.enumerated for name in run.guide_sites):
        raise ProgramError(
            "defensive= needs draws of the guide's sites, but some are enumerated there. Take the "
            'mark infer={"enumerate": "parallel"} out of the guide, or leave defensive out.'
        )
    scaled = [name for name, site in run.guide_sites.items() if not is_one(site["scale"])]
    scaled += [n for n in run.guide_sites if not is_one(run.model_sites[n]["scale"])]
    if scaled:
        raise ProgramError(
            f"defensive= mixes two densities, but a poutine.scale around '{scaled[0]}' makes its "
            "term no density. Take the scale off the latent, or leave defensive out."
        )


class SetTo(Messenger):
    """Gives latent sites the values of draws from elsewhere."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or msg["name"] not in self.values:
            return
        msg["value"] = self.values[msg["name"]]
        msg["done"] = True


def uniform(space: StateSpace) -> Proposal:
    """z uniform on the |Z| states of a finite support: the weight is |Z| p(y, z)."""
    latents = {latent.name: latent for latent in space.latents}

    def log_weight(terms: Terms) -> Tensor:
        # the run takes its draws for the prior's: undo that
        return terms.log_weight + terms.log_guide_drawn + space.log_size

    def draws(*address: Any) -> AddressedDraws:
        return _UniformDraws(latents, *address)

    return Proposal("uniform", None, log_weight, draws)


class _UniformDraws(AddressedDraws):
    """Draws the named sites uniformly from their supports."""

    def __init__(self, latents: dict[str, FiniteLatent], *address: Any) -> None:
        super().__init__(*address)
        self.latents = latents

    def drawn(self, msg: Any) -> Tensor:
        latent = self.latents.get(msg["name"])
        if latent is None:
            return super().drawn(msg)
        fn, support = msg["fn"], latent.support
        elements = fn.batch_shape + fn.event_shape[: latent.event_dims]
        where = torch.rand(elements, dtype=torch.float64, device=support.device)
        return support[(where * len(support)).long().clamp_(max=len(support) - 1)]
