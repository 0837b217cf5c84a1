"""Reweighted wake–sleep: no score function, no derivative through draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.layout import layout_of
from lvppl.objectives.base import Objective, Program, Quantity, log_mean_exp, require_plain_weights
from lvppl.objectives.iwae import IWAEReport
from lvppl.replay import Replay
from lvppl.simulation import HeldValues, simulated
from lvppl.terms import Terms

__all__ = ["ReweightedWakeSleep"]

_WAKE_SHARE = {"wake": 1.0, "sleep": 0.0, "both": 0.5}


class ReweightedWakeSleep(Objective):
    r"""The negative importance-weighted bound, with a gradient of its own for the guide.

    .. math:: L_K = \ln \frac1K \sum_k w_k, \quad w_k = \frac{p_θ(z_k, y)}{q_φ(z_k \mid y)},
              \quad \tilde w_k = \frac{w_k}{\sum_j w_j}, \quad z_k \sim q_φ \text{ held fixed}

    The model's parameters θ get the gradient of −L_K, the guide's φ one of two others:

    .. math:: -\nabla_θ L_K = -\sum_k \tilde w_k \nabla_θ \ln p_θ(z_k, y), \qquad
              \text{wake: } -\sum_k \tilde w_k \nabla_φ \ln q_φ(z_k \mid y), \qquad
              \text{sleep: } -\nabla_φ \ln q_φ(z' \mid y'), \; (z', y') \sim p_θ

    Wake fits q to the posterior of the data by KL(p, q), with a bias that falls as 1/K; with K = 1
    it has mean zero and φ stays where it is. Sleep fits q to the posteriors of data that the model
    dreams up, without bias. Neither needs draws that are reparameterised, and neither has a score
    function: latents may be discrete, continuous or both, at the same cost. More particles improve
    both gradients, where those of the guide in the IWAE drown in noise (Rainforth et al. 2018).

    Sites enumerated in the model are summed inside each weight.

    Args:
        num_particles: K.
        phase: how the guide learns: ``"wake"``; ``"sleep"``, from one dream for each datum; or
            ``"both"``, the mean of the two. A model dreams if all its sites can be sampled and
            every observed site observes an argument as it is.
        data_plate, strict: see :class:`Objective`.

    Raises:
        ProgramError: an unknown ``phase``; a subsampled plate that is not common to every site; a
            parameter that model and guide share; a latent that is a point or enumerated in the
            guide, or that the guide leaves to its prior; a draw with a scale or a mask of its own;
            a model that cannot dream.

    References:
        Bornschein and Bengio 2015, "Reweighted wake-sleep", section 2; Le et al. 2019, "Revisiting
        reweighted wake-sleep for models with stochastic control flow", section 3.
    """

    cut = True
    score_function = False

    def __init__(
        self,
        *,
        num_particles: int,
        phase: str = "wake",
        data_plate: str | Sequence[str] | None = None,
        strict: bool = True,
    ) -> None:
        super().__init__(num_particles=num_particles, data_plate=data_plate, strict=strict)
        if phase not in _WAKE_SHARE:
            raise ProgramError(f"phase must be 'wake', 'sleep' or 'both', got {phase!r}.")
        self.phase = phase

    def per_datum(self, terms: Terms) -> Tensor:
        terms.require_whole("ReweightedWakeSleep")
        _require_densities_to_fit(terms)
        return -log_mean_exp(terms.log_weight)

    def surrogate(self, terms: Terms) -> Tensor:
        _require_apart(terms)
        return terms.total(self._weighted(terms))

    def _weighted(self, terms: Terms) -> Tensor:
        """−Σ w̃ (ln p(z, y) + ln q(z | y)), (data,): each parameter's gradient from its own term."""
        weights = _normalised(terms.log_weight.detach())
        drawn = weights > 0  # what is impossible has no gradient
        fitted = terms.log_joint_drawn + _WAKE_SHARE[self.phase] * terms.log_guide_drawn
        return -(weights * torch.where(drawn, fitted, 0.0)).sum(0)

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        loss = super().differentiable_loss(model, guide, *args, **kwargs)
        share = 1.0 - _WAKE_SHARE[self.phase]
        if not share or not torch.is_grad_enabled():
            return loss
        dreamt = share * self._dreamt(model, guide, args, kwargs)
        return loss + (dreamt - dreamt.detach())

    def _dreamt(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Tensor:
        """−ln q(z' | y') of as many draws z', y' from the model as there are data, scaled."""
        remedy = "Use phase='wake'."
        layout = layout_of(
            model, guide, args, kwargs, data_plate=self.data_plate, strict=self.strict
        )
        with torch.no_grad():
            dream = simulated(model, args, kwargs, remedy)
        dream.require_replaced("Write obs=y with y an argument, or use phase='wake'.")
        held = HeldValues({**dream.latents, **dream.subsamples})
        run = Replay(
            poutine.condition(model, data=dream.observed),
            held(guide),
            dream.args,
            kwargs,
            layout,
            None,
            self.strict,
            False,
        )
        awake = [name for name, site in run.guide_sites.items() if name not in dream.latents]
        if awake:
            raise ProgramError(
                f"Guide site '{awake[0]}' is no latent of the model, so that a dream says nothing "
                f"of it. {remedy}"
            )
        return -run.data_scale * run.log_guide_drawn.sum()

    def outcome(self, terms: Terms, prob: Tensor) -> Tensor:
        return prob.detach() * self._weighted(terms)

    @property
    def outcome_particles(self) -> int | None:
        return self.num_particles if self.phase == "wake" else None  # dreams are drawn as well

    def describe(self, terms: Terms) -> IWAEReport:
        report = self.standard_report(terms, form="kl")
        bound = Quantity(total=-report.loss.total, per_datum=-report.loss.per_datum)
        return IWAEReport(**{**vars(report), "bound": bound})


def _normalised(log_weight: Tensor) -> Tensor:
    """Weights that sum to one over the particles; zero where all are."""
    impossible = (log_weight == -math.inf).all(0)
    weights = torch.softmax(log_weight.masked_fill(impossible, 0.0), 0)
    return weights.masked_fill(impossible, 0.0)


def _require_densities_to_fit(terms: Terms) -> None:
    """Refuse a guide whose ln q at held draws does not say how to move it."""
    name = "ReweightedWakeSleep"
    if terms.adopted:
        raise ProgramError(
            f"{name} fits ln q of every latent, but '{terms.adopted[0]}' is drawn from its prior. "
            "Add it to the guide, or use IWAE."
        )
    if terms.noise:
        raise ProgramError(
            f"{name} fits ln q of every draw, but guide site '{terms.noise[0]}' is noise whose "
            "density is not counted. Name it in the model too, or use IWAE."
        )
    enumerated = [n for n in terms.layout.enumerated if n in terms.guide_site_names]
    if enumerated:
        raise ProgramError(
            f"{name} weighs draws, but guide site '{enumerated[0]}' is enumerated. Take the mark "
            "for enumeration off, or use ELBO, whose gradient is then exact in it."
        )
    if terms.has_point():
        raise ProgramError(
            f"Guide site '{terms.has_point()[0]}' is a point: ln q at a draw that is held fixed "
            f"does not say where it should move, as {name} needs. Use HardELBO, or a density."
        )
    require_plain_weights(terms, name, "Take it off, or use IWAE.")


def _require_apart(terms: Terms) -> None:
    """Refuse a parameter of both programs: it has two gradients, of two different losses."""
    model, guide = terms.parameters()
    known = {id(leaf) for leaf in guide}
    for leaf in model:
        if id(leaf) in known:
            raise ProgramError(
                f"Model and guide share {_name_of(leaf)}. ReweightedWakeSleep lowers another loss "
                "for each of them, and what is shared has a gradient of neither. Give each its "
                "own, detach it in one of them, or use IWAE, whose one loss both share."
            )


def _name_of(leaf: Tensor) -> str:
    names = [n for n, p in pyro.get_param_store().named_parameters() if p is leaf]
    return f"parameter '{names[0]}'" if names else f"a parameter of shape {tuple(leaf.shape)}"
