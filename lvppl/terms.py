r"""The log-terms of one guide-to-model replay: the one identity, in tensors.

For a program p(z, y) and a guide q(z | y),

.. math:: \ln p(y) = E_q\Big[\ln \frac{p(z, y)}{q(z \mid y)}\Big] + KL(q(z|y), p(z|y)),

and every objective and estimator of lvppl is a short formula over the terms ln p(y | z), ln p(z)
and ln q(z | y), each kept per particle and per datum: shape (particles, data).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.layout import Layout, layout_of
from lvppl.leaves import leaves_of
from lvppl.matching import has_no_density, no_density
from lvppl.replay import Replay
from lvppl.site import Site
from lvppl.tracing import is_discrete

__all__ = ["Site", "Terms", "trace_terms"]


def trace_terms(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_particles: int = 1,
    data_plate: str | Sequence[str] | None = None,
    strict: bool = True,
    cut: bool = False,
) -> Terms:
    """Run the guide, replay the model against it, and return the log-terms.

    Args:
        model: any Pyro program.
        guide: a Pyro program of the same signature; ``None`` takes the prior as the guide.
        args, kwargs: arguments of both.
        num_particles: independent draws z ~ q. They run in one batch, inside an outer plate; a
            program whose numbers change under that plate runs as a loop, and ``notes`` says why.
        data_plate: the plates that hold the data; default every plate that is common to all sample
            sites of model and guide.
        strict: refuse sites that only one of model and guide has. Otherwise a latent without a
            guide is drawn from its prior, q = p there, and a site that only the guide has is
            auxiliary noise and adds no term.
        cut: hold the guide's draws as leaves of the autograd graph, for gradients through the
            draws alone (``Terms.pathwise``).

    Raises:
        ProgramError: model and guide do not fit each other, by site, plate and shape.
    """
    kwargs = dict(kwargs or {})
    for attempt in range(2):
        layout = layout_of(
            model,
            guide,
            args,
            kwargs,
            with_particles=num_particles > 1,
            data_plate=data_plate,
            strict=strict,
            refresh=attempt > 0,
        )
        if num_particles > 1 and not layout.loop_reason:
            runs = [Replay(model, guide, args, kwargs, layout, num_particles, strict, cut)]
        else:
            runs = _loop(num_particles, model, guide, args, kwargs, layout, strict, cut)
        if all(run.fits(layout) for run in runs):
            return Terms(runs, num_particles)
    return _changing(
        _loop(num_particles, model, guide, args, kwargs, layout, strict, cut), data_plate
    )


def _loop(
    num_particles: int,
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    layout: Layout,
    strict: bool,
    cut: bool,
) -> list[Replay]:
    runs: list[Replay] = []
    for _ in range(num_particles):
        if runs:
            runs[-1].evaluate_guide()  # before the next run draws anew
        runs.append(Replay(model, guide, args, kwargs, layout, None, strict, cut))
    return runs


def _changing(runs: Sequence[Replay], data_plate: Any) -> Terms:
    """Terms of a program whose sites change from run to run, as in a subsampled loop."""
    for run in runs:
        run.take_own_layout(data_plate)
    first = runs[0].layout.data_plates
    if any(run.layout.enumerated or run.layout.data_plates != first for run in runs):
        raise ProgramError(
            "The data plates or enumerated sites of this program change from one run to the next, "
            "so that its terms cannot be kept per datum. Make them depend on the arguments only."
        )
    return Terms(runs, len(runs))


# ------------------------------------------------------------------------------------------ Terms


class Terms:
    """Log-terms of the particles, each (particles, data), in nats, without the data-plate scale.

    Masks, the user's own ``poutine.scale`` and the scale of plates other than the data plates are
    inside; ``scale``, the product of full_size / size over the data plates, is kept apart, to be
    applied after any sum of exponentials over particles.

    Sites enumerated in the model are summed out: the guide of such a site is its exact posterior.
    Sites enumerated in the guide are averaged over q.
    """

    def __init__(self, runs: Sequence[Replay], num_particles: int) -> None:
        self._runs = tuple(runs)
        self.layout = runs[0].layout
        self.num_particles = num_particles

    def _stack(self, name: str) -> Tensor:
        parts = [getattr(run, name) for run in self._runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    # ---------------------------------------------------------------------------- the three terms

    @cached_property
    def log_likelihood(self) -> Tensor:
        """E ln p(y | z) over the enumerated sites, z as sampled: sum over observed sites."""
        return self._stack("log_likelihood")

    @cached_property
    def log_prior(self) -> Tensor:
        """ln p(z), summed over latent sites."""
        return self._stack("log_prior")

    @cached_property
    def log_guide(self) -> Tensor:
        """ln q(z | y), summed over the guide's sites."""
        return self._stack("log_guide")

    @cached_property
    def log_guide_drawn(self) -> Tensor:
        """ln q of the guide's own sites, without the posterior of what the model enumerates."""
        return self._stack("log_guide_drawn")

    @cached_property
    def log_prior_drawn(self) -> Tensor:
        """ln p(z) of the guide's own sites, with what the model enumerates summed out."""
        return self._stack("log_prior_drawn")

    @cached_property
    def log_joint_drawn(self) -> Tensor:
        """ln p(y, z) of the guide's own sites, with what the model enumerates summed out."""
        return self._stack("log_joint_drawn")

    @cached_property
    def log_weight(self) -> Tensor:
        """ln w = ln p(y, z) − ln q(z | y) with enumerated sites summed out: E_q w = p(y)."""
        return self._stack("log_weight")

    @cached_property
    def kl(self) -> Tensor:
        """KL(q, p(z)): by site in closed form where torch registers one and it is right."""
        return self._stack("kl")

    @cached_property
    def entropy(self) -> Tensor:
        """H(q): closed form by site where the distribution has one, else −ln q as drawn."""
        return self._stack("entropy")

    @cached_property
    def log_score(self) -> Tensor | None:
        """ln q of the draws that are not reparameterised, unscaled; ``None`` if there are none."""
        if any(run.log_score is None for run in self._runs):
            return None
        return self._stack("log_score")

    def elbo(self, form: str) -> Tensor:
        """The ELBO, (particles, data): form "kl", "entropy", or "sampled", without closed forms."""
        return self._stack(f"elbo_{form}")

    # ---------------------------------------------------------------------------------- structure

    @property
    def data_plates(self) -> tuple[str, ...]:
        """Names of the data plates; empty when the whole data set is one datum."""
        return tuple(plate.name for plate in self.layout.data_plates)

    @property
    def num_data(self) -> int:
        """Number of data in this batch."""
        return math.prod(plate.size for plate in self.layout.data_plates)

    @property
    def scale(self) -> float:
        """Product of full_size / size over the data plates."""
        return self._runs[0].data_scale

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the numbers should know."""
        reason = self.layout.loop_reason
        if len(self._runs) == 1 or not reason:
            return ()
        return (f"particles run as a loop, slower and with the same numbers: {reason}",)

    def total(self, per_datum: Tensor) -> Tensor:
        """Sum over data with the data-plate scale: from (data,) to a 0-dim tensor."""
        return self.scale * per_datum.sum()

    def require_per_datum(self, what: str) -> None:
        """Refuse ``what`` unless every sample site lies in a data plate.

        Raises:
            ProgramError: some site lies outside every plate that the others share.
        """
        if not self.layout.data_plates:
            raise ProgramError(
                f"{what} needs per-datum terms, but no plate is common to every sample site of "
                f"model and guide ({self._runs[0].outside()}): the whole data set is one datum. "
                "Put every latent and observed site in the data's pyro.plate, in the model and in "
                "the guide, or ask for the total."
            )

    def require_whole(self, what: str) -> None:
        """Refuse ``what`` where a subsampled plate's scale would stand inside a log-sum-exp.

        Raises:
            ProgramError: a plate that is not a data plate is subsampled.
        """
        if self.layout.subsampled_inside:
            plate = self.layout.subsampled_inside[0]
            raise ProgramError(
                f"{what} takes the logarithm of a mean over particles, but plate '{plate}' is "
                f"subsampled and not common to every sample site ({self._runs[0].outside(plate)}), "
                "so that its scale would stand inside the logarithm. Use ELBO, or the full data."
            )

    def require_densities(self) -> None:
        """Refuse a program whose observations have no density.

        Raises:
            ProgramError: an observed site is deterministic on a continuous space.
        """
        for site in self._runs[0].observed_sites:
            if has_no_density(site):
                raise ProgramError(no_density(site["name"]))

    # -------------------------------------------------------------------------------------- sites

    @cached_property
    def latents(self) -> dict[str, Site]:
        """The guide's latent sites, auxiliary ones included; enumerated sites are summed out."""
        return self._sites("guide_latents")

    @cached_property
    def observed(self) -> dict[str, Site]:
        """The model's observed sites."""
        return self._sites("observed_sites")

    def _sites(self, group: str) -> dict[str, Site]:
        names = [site["name"] for site in getattr(self._runs[0], group)]
        return {name: Site(name, self._runs, group) for name in names}

    @property
    def guide_site_names(self) -> tuple[str, ...]:
        return tuple(self._runs[0].guide_sites)

    @property
    def adopted(self) -> list[str]:
        """Latents that are drawn from their prior, for want of a guide."""
        return self._runs[0].adopted()

    @property
    def noise(self) -> list[str]:
        """Draws of the guide that are no latent of the model, and add no term."""
        return self._runs[0].noise()

    @property
    def reweighted_draws(self) -> list[str]:
        """Draws whose ln q enters the terms with a scale or a mask of its own."""
        return self._runs[0].reweighted_draws()

    @property
    def continuous_latents(self) -> tuple[str, ...]:
        """Latents of the model on a continuous space."""
        return tuple(
            name
            for name, site in self._runs[0].model_sites.items()
            if not site["is_observed"] and not is_discrete(site)
        )

    def distortion(self, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """E D(y, ŷ), (particles, data): D by element of each observed site, ŷ its mean.

        Args:
            function: D(y, reconstruction), element by element or summed over the event.
        """
        return torch.cat([run.distortion(function) for run in self._runs])

    def kl_by_latent(self) -> dict[str, Tensor]:
        """KL of each latent that was drawn, (particles, data); their sum is that of all draws.

        An autoguide splits ln q of a latent between an auxiliary draw and the point made of it.
        Where the auxiliary draw is that latent's own (``z_unconstrained`` of ``z``) the two are
        added; one that feeds several latents makes one group of them, named "z, w, …".
        """
        parts = [run.kl_by_site for run in self._runs]
        terms = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        latents, points = self._runs[0].latents_and_points()
        auxiliary = [name for name in terms if name not in latents]
        shared = [n for n in auxiliary if n.removesuffix("_unconstrained") not in points]
        for name in auxiliary:
            if name not in shared:
                own = name.removesuffix("_unconstrained")
                terms[own] = terms[own] + terms.pop(name)
        if shared:
            group = [name for name in terms if name in points or name in shared]
            members = ", ".join(name for name in group if name in points)
            terms[members or shared[0]] = torch.stack([terms.pop(name) for name in group]).sum(0)
        return terms

    def site_log_probs(self) -> list[tuple[str, tuple[str, ...], Tensor, bool]]:
        """Every site's (name, plates, log-probability, whether −∞ is an honest value)."""
        return [row for run in self._runs for row in run.site_log_probs()]

    def has_point(self) -> list[str]:
        """Guide sites that are points on a continuous space."""
        return self._runs[0].continuous_points()

    def parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """The model's and the guide's leaves of the autograd graph: what each has a gradient for.

        The model's are those of ln p(y, z) at the draws, the guide's those of ln q(z | y) and of
        the draws. Needs ``cut=True``, so that the draws do not lead from one to the other.
        """
        pairs = [pair for run in self._runs for pair in run.cut_pairs]
        cut = [leaf for _, leaf in pairs]
        model = leaves_of(self.log_joint_drawn, without=cut)
        guide = leaves_of(self.log_guide_drawn, *(draw for draw, _ in pairs), without=cut)
        return [*model.values()], [*guide.values()]

    def pathwise(self, value: Tensor) -> Tensor:
        """A 0-dim surrogate whose gradient is that of ``value`` through the guide's draws alone.

        Needs ``cut=True``. With z' the cut draws and z the draws themselves, its gradient is
        Σ_s (dvalue/dz'_s) · dz_s/dφ, where the total derivative follows z' through later draws.
        """
        pairs = [pair for run in self._runs for pair in run.cut_pairs]
        if not pairs:
            return value.new_zeros(())
        leaves = [leaf for _, leaf in pairs]
        draws = [draw for draw, _ in pairs]
        step: Sequence[Tensor | None] = torch.autograd.grad(
            value, leaves, retain_graph=True, allow_unused=True
        )
        surrogate = value.new_zeros(())
        # Later draws depend on earlier leaves: pass the gradient back one draw at a time. Each
        # round reaches one draw further up; a chain of sites ends it.
        for _ in range(len(pairs) + 1):
            active = [(g, z) for g, z in zip(step, draws, strict=True) if g is not None]
            active = [(g.detach(), z) for g, z in active if z.requires_grad]
            if not active:
                break
            inner = torch.stack([(g * z).sum() for g, z in active]).sum()
            surrogate = surrogate + inner
            step = torch.autograd.grad(inner, leaves, retain_graph=True, allow_unused=True)
        return surrogate
