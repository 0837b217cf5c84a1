"""One replay: the guide run, the model run against it, and every log-term of the two.

``Terms`` gathers replays; objectives and estimators read ``Terms``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from inspect import unwrap
from typing import Any

import torch
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide.effect import AutoMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import kl_divergence

from lvppl.densities import log_density
from lvppl.enumerated import Enumerated, is_one, user_scale
from lvppl.errors import ProgramError, ProgramFailure
from lvppl.layout import Layout, describe, signature_of
from lvppl.matching import check_same_subsamples, refuse_mismatch
from lvppl.missing import MISSING, OWN_PROPOSAL
from lvppl.tracing import (
    is_discrete,
    is_enumerated,
    is_masked,
    is_point,
    kind_of,
    plates_of,
    sample_sites,
    subsampled_plates,
    trace_pair,
    unmasked,
)

__all__ = ["Replay"]


class Cut(Messenger):
    """Replaces the guide's draws by leaves of the same value; keeps the draws in ``pairs``."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["is_observed"] or not isinstance(msg["value"], Tensor):
            return
        draw = msg["value"]
        if draw.requires_grad and draw.is_floating_point():
            msg["value"] = draw.detach().requires_grad_()
            self.pairs.append((draw, msg["value"]))


class Replay:
    """One replay: all particles in one batch, or a single particle of a loop.

    Terms are (particles, data), in nats; E averages over enumerated sites, under their exact
    posterior (model) or under q (guide). *Summed* are the model's sites inside an enumeration.

    =====================  ==================================================================
    ``log_likelihood``     Σ E ln p over observed sites
    ``log_prior``          Σ E ln p over latent sites
    ``log_guide_drawn``    Σ E ln q over the guide's sites
    ``log_guide``          log_guide_drawn + E ln p(enumerated | everything else)
    ``_evidence``          ln Σ over enumerated values of the product of the summed factors
    ``_observed_apart``    ln p of the observed sites that are not summed + _evidence
    ``_prior_drawn``       ln p of the drawn latents that are not summed
    ``log_prior_drawn``    ln p of the drawn latents, ln Σ over enumerated values of p(latents)
    ``log_joint_drawn``    _observed_apart + _prior_drawn
    ``log_weight``         log_joint_drawn − log_guide_drawn
    =====================  ==================================================================

    Args:
        layout: the structure of the pair, as found before.
        num_particles: size of the particle plate; ``None`` for one particle without a plate.
        strict, cut: see ``trace_terms``.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any] | None,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        layout: Layout,
        num_particles: int | None,
        strict: bool,
        cut: bool,
    ) -> None:
        self.batched = num_particles is not None
        self.particles = num_particles or 1
        cutter = Cut()
        model_trace, guide_trace = trace_pair(
            model,
            guide,
            args,
            kwargs,
            nesting=layout.nesting,
            num_particles=num_particles,
            enumerate_sites=bool(layout.enumerated),
            around_guide=cutter if cut else None,
        )
        self.cut_pairs = cutter.pairs
        self.model_sites = {site["name"]: site for site in sample_sites(model_trace)}
        self.guide_sites = {site["name"]: site for site in sample_sites(guide_trace)}
        self.signature = signature_of([*self.model_sites.values()], [*self.guide_sites.values()])
        check_same_subsamples(model_trace, guide_trace)
        self.layout = self._current(layout)
        # such a guide meets the observations of the model that it runs
        self._runs_model = guide is not None and isinstance(unwrap(guide), AutoMessenger)
        self._noise = self._match(strict and guide is not None)

    def evaluate_guide(self) -> Replay:
        """Evaluate ln q now: some flows know it at their latest draw only."""
        for site in self.guide_sites.values():
            self.log_prob(site)
        return self

    def _current(self, layout: Layout) -> Layout:
        """The layout with this run's own plate sizes: full sizes are not part of the structure."""
        sites = [*self.model_sites.values(), *self.guide_sites.values()]
        names = {plate.name for plate in layout.data_plates}
        plates = tuple(plate for plate in plates_of(sites[0]) if plate.name in names)
        inside = tuple(sorted(subsampled_plates(sites) - names))
        return replace(layout, data_plates=plates, subsampled_inside=inside)

    # ------------------------------------------------------------------------ do the two fit?

    def _match(self, strict: bool) -> frozenset[str]:
        """Give the prior to latents without a guide; return the guide's own noise sites."""
        latent = [n for n, s in self.model_sites.items() if not s["is_observed"]]
        missing = [
            n
            for n in latent
            if n not in self.guide_sites and not is_enumerated(self.model_sites[n])
        ]
        extra = {
            n
            for n, s in self.guide_sites.items()
            if not s["is_observed"] and n not in latent and not s["infer"].get("is_auxiliary")
        }
        seen = {
            n
            for n, s in self.guide_sites.items()
            if s["is_observed"]
            and not isinstance(s["fn"], Unit)
            and s["mask"] is not False
            and getattr(s["fn"], "_mask", None) is not False
        }
        if strict:
            proposed = [n for n in missing if not self.model_sites[n]["infer"].get(OWN_PROPOSAL)]
            observes = [] if self._runs_model else sorted(seen)
            refuse_mismatch(proposed, sorted(extra), observes, self.model_sites)
        for name in missing:
            self.guide_sites[name] = self.model_sites[name]
        return frozenset(extra | seen)

    def take_own_layout(self, data_plate: Any) -> None:
        """For a program whose structure changes from run to run: what this run looks like."""
        found = describe([*self.model_sites.values()], self._guide_alone(), data_plate)
        self.layout = self._current(replace(found, loop_reason="its sites change from run to run"))

    def _guide_alone(self) -> list[Any]:
        adopted = set(self.adopted())
        return [site for name, site in self.guide_sites.items() if name not in adopted]

    def fits(self, layout: Layout) -> bool:
        """Whether this run has the structure that was found before."""
        if self.signature != layout.signature:
            return False
        data = {(p.name, p.dim, p.size) for p in layout.data_plates}
        sites = [*self.model_sites.values(), *self.guide_sites.values()]
        return all(data <= {(p.name, p.dim, p.size) for p in plates_of(site)} for site in sites)

    def outside(self, plate: str | None = None) -> str:
        """The sites outside a plate, or the plates of each site, in words."""
        sites = {**self.guide_sites, **self.model_sites}
        if plate is not None:
            names = [n for n, s in sites.items() if plate not in {p.name for p in plates_of(s)}]
            return "outside it: " + ", ".join(f"'{name}'" for name in names)
        return ", ".join(
            f"'{n}' in {[p.name for p in plates_of(s)] or 'no plate'}" for n, s in sites.items()
        )

    @property
    def guide_latents(self) -> list[Any]:
        sites = self.guide_sites.values()
        return [s for s in sites if not s["is_observed"] and not is_enumerated(s)]

    @property
    def observed_sites(self) -> list[Any]:
        return [site for site in self.model_sites.values() if site["is_observed"]]

    def model_site(self, site: Any) -> Any:
        return self.model_sites.get(site["name"], site)

    def site_log_probs(self) -> list[tuple[str, tuple[str, ...], Tensor, bool]]:
        rows = []
        for program, sites in (("", self.model_sites), (" of the guide", self.guide_sites)):
            for name, site in sites.items():
                log_prob = self.log_prob(site)
                impossible = log_prob.dim() > self.width or is_point(site)
                if log_prob.dim() <= self.width:
                    log_prob = self.by_plates(log_prob, site, 0)
                plates = tuple(plate.name for plate in plates_of(site))
                rows.append((name + program, plates, log_prob, impossible))
        return rows

    def continuous_points(self) -> list[str]:
        return [
            name
            for name, site in self.guide_sites.items()
            if name in self.model_sites
            and site is not self.model_sites[name]
            and is_point(site)
            and not is_point(self.model_sites[name])
            and not site["infer"].get("is_auxiliary")
            and not any(s["infer"].get("is_auxiliary") for s in self.guide_sites.values())
            and not is_discrete(self.model_sites[name])
        ]

    # -------------------------------------------------------------------------------- log-terms

    @cached_property
    def data_scale(self) -> float:
        return math.prod(plate.full_size / plate.size for plate in self.layout.data_plates)

    @property
    def shape(self) -> tuple[int, int]:
        return self.particles, math.prod(plate.size for plate in self.layout.data_plates)

    @property
    def width(self) -> int:
        return self.layout.nesting + self.batched

    def log_prob(self, site: Any) -> Tensor:
        """The site's raw log-probability, masked, unscaled, expanded over its plates."""
        if "lvppl_log_prob" not in site:
            raw = self.full(self._log_density(site, site["fn"]), site)
            site["lvppl_log_prob"] = scale_and_mask(raw, 1.0, site["mask"])
        result: Tensor = site["lvppl_log_prob"]
        return result

    @staticmethod
    def _log_density(site: Any, fn: Any) -> Tensor:
        try:
            return log_density(site, fn)
        except KeyError as error:
            raise ProgramError(
                f"Site '{site['name']}': a transform of its {kind_of(fn)} has no inverse, so that "
                "its density is known at its own draws only. Use gradient='standard' of ELBO or "
                "IWAE."
            ) from error
        except NotImplementedError as error:
            raise ProgramError(
                f"Site '{site['name']}' ({kind_of(fn)}) has no density: log_prob is not "
                "implemented. Use a distribution that has one."
            ) from error
        except torch.cuda.OutOfMemoryError:
            raise
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            text = str(error).split("\n\n")[0].rstrip(".")
            value = site["value"]
            if not isinstance(value, Tensor):
                text = f"{text}. Its value is a {type(value).__name__}: use torch.as_tensor"
            elif not value.is_floating_point():
                text = f"{text}. Its value is {value.dtype}: a float may be wanted, .float()"
            raise ProgramFailure(
                f"The log-probability of site '{site['name']}' ({kind_of(fn)}) fails: {text}. "
                "lvppl.check(model, guide, *data) says where."
            ) from error

    def full(self, tensor: Tensor, site: Any, event_dim: int = 0) -> Tensor:
        """Expand batch dimensions over the particle plate and the site's plates."""
        batch_dim = tensor.dim() - event_dim
        pad = max(self.width - batch_dim, 0)
        tensor = tensor.reshape((1,) * pad + tensor.shape)
        sizes = list(tensor.shape)
        if self.batched:
            sizes[-self.width - event_dim] = self.particles
        for plate in plates_of(site):
            sizes[plate.dim - event_dim] = plate.size
        return tensor.expand(sizes)

    def depends_on_enumerated(self, site: Any) -> bool:
        return bool(self.layout.enumerated) and self.log_prob(site).dim() > self.width

    def per_datum(self, tensor: Tensor, site: Any, *, scaled: bool = True) -> Tensor:
        """Sum a batch-shaped tensor to (particles, data), with every scale but the data plates'."""
        if scaled:
            scale = site["scale"] / self.data_scale
            tensor = tensor if is_one(scale) else tensor * scale
        tensor = self.full(tensor, site)
        if tensor.dim() > self.width:
            raise ProgramError(
                f"Site '{site['name']}' has batch shape {tuple(tensor.shape)}, with more "
                f"dimensions than the {self.layout.nesting} of its plates. Use .to_event, or a "
                "pyro.plate."
            )
        data = {plate.dim for plate in self.layout.data_plates}
        inner = [dim for dim in range(-self.layout.nesting, 0) if dim not in data]
        tensor = tensor.sum(inner) if inner else tensor
        return tensor.reshape(self.shape)

    def averaged(self, site: Any, tensor: Tensor) -> Tensor:
        """Average a tensor of a site, batch-shaped and then its event, over enumerated sites."""
        log_prob = self.log_prob(site)
        if self.enumeration is None or log_prob.dim() <= self.width:
            return tensor
        event_dim = self.model_site(site)["fn"].event_dim if tensor is not log_prob else 0
        event_dim = event_dim if tensor.dim() - event_dim >= self.width else 0
        shape = log_prob.shape + tensor.shape[tensor.dim() - event_dim :]
        return self.enumeration.average(self._role(site), tensor.expand(shape))

    def _role(self, site: Any) -> str:
        """The name of a site in an enumeration: ``"p z"`` in the model, ``"q z"`` in the guide."""
        name = site["name"]
        return f"p {name}" if self.model_sites.get(name) is site else f"q {name}"

    def _factor(self, site: Any) -> Tensor:
        """What a site multiplies a sum over enumerated values by.

        A mask takes ln p out of the score, not the site out of the program: an enumerated site
        keeps its probabilities, which sum to one.
        """
        if is_enumerated(site) and is_masked(site):
            return self.full(self._log_density(site, unmasked(site["fn"])), site)
        return self.log_prob(site)

    def _term(self, site: Any, tensor: Tensor | None = None) -> Tensor:
        """A site's log-probability, or another tensor of its shape, to (particles, data)."""
        tensor = self.log_prob(site) if tensor is None else tensor
        if self.enumeration is not None and tensor.dim() > self.width:
            tensor = self.enumeration.average(self._role(site), tensor)
        return self.per_datum(tensor, site)

    def _zeros(self) -> Tensor:
        site = next(iter(self.model_sites.values()), None) or next(iter(self.guide_sites.values()))
        log_prob = self.log_prob(site)
        return torch.zeros(self.shape, dtype=log_prob.dtype, device=log_prob.device)

    def _sum(self, terms: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(terms)).sum(0) if terms else self._zeros()

    # Sites by role. "Summed" are the model's sites inside an enumeration of the model.

    @cached_property
    def enumeration(self) -> Enumerated | None:
        if not self.layout.enumerated:
            return None
        in_guide = {n for n, s in self.guide_sites.items() if is_enumerated(s)}
        in_model = {
            n for n, s in self.model_sites.items() if is_enumerated(s) and n not in in_guide
        }
        if in_guide and in_model:
            raise ProgramError(
                f"Sites {sorted(in_guide)} are enumerated in the guide and {sorted(in_model)} in "
                "the model. Enumerate them in one place: leave them all out of the guide, and the "
                "model sums them exactly."
            )
        every = [*self.model_sites.values(), *self.guide_sites.values()]
        inside = {self._role(s): s for s in every if self.log_prob(s).dim() > self.width}
        if in_model:
            return self._enumerated(inside)
        if in_guide:
            own = {self._role(self.guide_sites[n]): self.guide_sites[n] for n in in_guide}
            rest = {role: s for role, s in inside.items() if role not in own}
            return self._enumerated(own, rest)
        return None

    def _enumerated(
        self, factors: Mapping[str, Any], queries: Mapping[str, Any] | None = None
    ) -> Enumerated:
        return Enumerated(
            {role: (site, self._factor(site)) for role, site in factors.items()},
            self.layout,
            queries={role: (site, self.log_prob(site)) for role, site in (queries or {}).items()},
            averaged=queries is not None,
        )

    @cached_property
    def _summed(self) -> frozenset[str]:
        if self.enumeration is None or self._enumerated_in_guide:
            return frozenset()
        return frozenset(role.removeprefix("p ") for role in self.enumeration.factors)

    @property
    def _enumerated_in_guide(self) -> bool:
        return any(is_enumerated(site) for site in self.guide_sites.values())

    @cached_property
    def _evidence(self) -> Tensor:
        """ln of the sum over the model's enumerated sites."""
        assert self.enumeration is not None
        return self.enumeration.log_evidence(self.shape)

    def _drawn(self) -> list[tuple[Any, Any | None]]:
        """(guide site, model site) for every term of the guide that is not auxiliary noise."""
        return [
            (site, self._latent(name))
            for name, site in self.guide_sites.items()
            if name not in self._noise
        ]

    def _latent(self, name: str) -> Any | None:
        site = self.model_sites.get(name)
        return None if site is None or site["is_observed"] else site

    @cached_property
    def log_likelihood(self) -> Tensor:
        return self._sum([self._term(site) for site in self.observed_sites])

    @cached_property
    def _prior_drawn(self) -> Tensor:
        pairs = [model for _, model in self._drawn() if model is not None]
        return self._sum([self._term(s) for s in pairs if s["name"] not in self._summed])

    @cached_property
    def log_prior(self) -> Tensor:
        sites = [s for s in self.model_sites.values() if not s["is_observed"]]
        return self._sum([self._term(site) for site in sites])

    @cached_property
    def log_guide_drawn(self) -> Tensor:
        return self._sum([self._term(site) for site, _ in self._drawn()])

    @cached_property
    def log_guide(self) -> Tensor:
        if not self._summed:
            return self.log_guide_drawn
        # ln of the exact posterior, averaged under it: the factors' mean minus ln Z.
        factors = [self._term(self.model_sites[name]) for name in self._summed]
        return self.log_guide_drawn + self._sum(factors) - self._evidence

    @cached_property
    def _observed_apart(self) -> Tensor:
        """Observed sites that no enumeration touches, plus the evidence of those it does."""
        apart = [self._term(s) for s in self.observed_sites if s["name"] not in self._summed]
        return self._sum(apart) + self._evidence if self._summed else self._sum(apart)

    @property
    def log_joint_drawn(self) -> Tensor:
        return self._observed_apart + self._prior_drawn

    @property
    def log_prior_drawn(self) -> Tensor:
        if not self._summed:
            return self._prior_drawn
        assert self.enumeration is not None
        factors = self.enumeration.factors
        latents = {role: pair for role, pair in factors.items() if not pair[0]["is_observed"]}
        return self._prior_drawn + Enumerated(latents, self.layout).log_evidence(self.shape)

    @cached_property
    def log_weight(self) -> Tensor:
        if self._enumerated_in_guide:
            return self._summed_weight()
        return self.log_joint_drawn - self.log_guide_drawn

    def _summed_weight(self) -> Tensor:
        """ln Σ_z p(y, z, x) / q(x | z) over the guide's enumerated z: the sum is exact."""
        factors, apart = {}, []
        for name, site in self.model_sites.items():
            if self.log_prob(site).dim() > self.width:
                factors[name] = (site, self.log_prob(site))
            else:
                apart.append(self._term(site))
        for site, _ in self._drawn():
            if is_enumerated(site):
                # q cancels out of q · p / q, except for what a mask takes out of the weight
                kept, masked = self._factor(site), self.log_prob(site)
                left = torch.where(kept == masked, torch.zeros_like(kept), kept - masked)
                factors[f"q {site['name']}"] = (site, left)
            elif self.log_prob(site).dim() > self.width:
                factors[f"q {site['name']}"] = (site, -self.log_prob(site))
            else:
                apart.append(-self._term(site))
        summed = Enumerated(factors, self.layout).log_evidence(self.shape)
        return self._sum(apart) + summed if apart else summed

    def distortion(self, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return self._sum(
            [self._term(s, self._distortion(s, function)) for s in self.observed_sites]
        )

    @staticmethod
    def mean(site: Any) -> Tensor:
        """The mean of a site's distribution; torch gives NaN for that of a Categorical."""
        kind = kind_of(site["fn"])
        try:
            if kind != "Categorical":
                result: Tensor = site["fn"].mean
                return result
        except NotImplementedError:
            pass
        raise ProgramError(
            f"Site '{site['name']}' ({kind}) has no mean to serve as a reconstruction. Use "
            "distortion=None, or a likelihood with a mean."
        )

    def _distortion(self, site: Any, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        fn, shape = site["fn"], self.log_prob(site).shape
        reconstruction = self.mean(site)
        cost = function(site["value"], reconstruction)
        by_element, by_event = fn.batch_shape + fn.event_shape, fn.batch_shape
        missing = site["infer"].get(MISSING)
        if cost.shape[-len(by_element) :] == by_element and by_element:
            cost = cost if missing is None else cost.masked_fill(missing, 0.0)
            cost = cost.sum(list(range(-fn.event_dim, 0))) if fn.event_dim else cost
        elif cost.shape[cost.dim() - len(by_event) :] != by_event:
            raise ProgramError(
                f"The distortion of site '{site['name']}' has shape {tuple(cost.shape)}; expected "
                f"{tuple(by_element)}, one value for each element, or {tuple(by_event)}."
            )
        elif missing is not None and fn.event_dim and bool(missing.any()):
            raise ProgramError(
                f"Values of site '{site['name']}' are missing, but its distortion is summed over "
                f"the elements of an event already: return {tuple(by_element)}, one value for each "
                "element, so that the missing ones are left out."
            )
        return scale_and_mask(cost.expand(shape), 1.0, site["mask"])

    # ------------------------------------------------------------------ closed forms, both ELBOs

    @cached_property
    def kl_by_site(self) -> dict[str, Tensor]:
        """KL of each guide term; the sites that only the guide has count ln q."""
        return {
            site["name"]: self._term(site, self._kl(site, model)) for site, model in self._drawn()
        }

    def _kl(self, site: Any, model: Any | None) -> Tensor:
        if model is None:
            return self.log_prob(site)
        if site is model:  # drawn from its prior
            return torch.zeros_like(self.log_prob(site))
        if site["name"] in self._summed:
            # ln p(z | enumerated) is inside the evidence: only ln q is left here
            return self.log_prob(site)
        if site["name"] in self.layout.analytic_sites and _same_weighting(site, model):
            closed = _closed_kl(site["fn"], model["fn"])
            if closed is not None:
                return scale_and_mask(self.full(closed, site), 1.0, site["mask"])
        if not _same_weighting(site, model):
            # per_datum applies the guide's scale: undo it for the model's term
            ratio = model["scale"] / site["scale"]
            return self.log_prob(site) - self.log_prob(model) * ratio
        return self.log_prob(site) - self.log_prob(model)

    @cached_property
    def kl(self) -> Tensor:
        drawn = self._sum(list(self.kl_by_site.values()))
        if not self._summed:
            return drawn
        latent = [
            self._term(s)
            for n, s in self.model_sites.items()
            if n in self._summed and not s["is_observed"]
        ]
        every = [self._term(self.model_sites[n]) for n in self._summed]
        return drawn + self._sum(every) - self._evidence - self._sum(latent)

    @cached_property
    def entropy(self) -> Tensor:
        drawn = self._sum([self._term(site, self._entropy(site)) for site, _ in self._drawn()])
        return drawn - (self.log_guide - self.log_guide_drawn) if self._summed else drawn

    def _entropy(self, site: Any) -> Tensor:
        fn = site["fn"]
        if not site["is_observed"] and not is_point(site):
            try:
                return scale_and_mask(self.full(fn.entropy(), site), 1.0, site["mask"])
            except NotImplementedError:
                pass
        return -self.log_prob(site)

    @property
    def elbo_kl(self) -> Tensor:
        if self._summed:
            return self._observed_apart - self._sum(list(self.kl_by_site.values()))
        return self.log_likelihood - self.kl

    @property
    def elbo_entropy(self) -> Tensor:
        if self._summed:
            drawn = [self._term(site, self._entropy(site)) for site, _ in self._drawn()]
            return self._observed_apart + self._prior_drawn + self._sum(drawn)
        return self.log_likelihood + self.log_prior + self.entropy

    @property
    def elbo_sampled(self) -> Tensor:
        if self._enumerated_in_guide:
            return self.log_likelihood + self.log_prior - self.log_guide
        return self.log_weight

    # --------------------------------------------------------------------------- score function

    @cached_property
    def log_score(self) -> Tensor | None:
        """ln q of the draws without a pathwise derivative, unmasked and unscaled."""
        terms = []
        for site in self.guide_sites.values():
            if is_enumerated(site) or getattr(site["fn"], "has_rsample", False):
                continue
            log_prob = self.log_prob(site)
            if log_prob.dim() > self.width:
                raise ProgramError(
                    f"Guide site '{site['name']}' is drawn without a reparameterisation and "
                    "depends on an enumerated site: mark it for enumeration too, or "
                    "reparameterise it."
                )
            raw = self._log_density(site, unmasked(site["fn"]))
            terms.append(self.per_datum(raw, site, scaled=False))
        return self._sum(terms) if terms else None

    def latents_and_points(self) -> tuple[set[str], set[str]]:
        """Names of the model's latents that the guide draws, and of those that are points."""
        latents = {n for n in self.guide_sites if self._latent(n) is not None}
        return latents, {name for name in latents if is_point(self.guide_sites[name])}

    def adopted(self) -> list[str]:
        """Latents that are drawn from their prior, for want of a guide."""
        return [n for n, s in self.guide_sites.items() if self.model_sites.get(n) is s]

    def noise(self) -> list[str]:
        """Draws of the guide that are no latent of the model, and add no term."""
        return [n for n in self._noise if not self.guide_sites[n]["is_observed"]]

    def reweighted_draws(self) -> list[str]:
        """Draws whose ln q enters the terms with a scale or a mask of its own."""
        return [
            name
            for name, site in self.guide_sites.items()
            if not site["is_observed"]
            and (is_masked(site) or not is_one(site["scale"] / self.data_scale))
        ]

    # ----------------------------------------------------------------------------------- by plate

    def by_plates(self, tensor: Tensor, site: Any, event_dim: int) -> Tensor:
        """(particles, *plate sizes, *event shape): batch dimensions without a plate dropped."""
        tensor = self.full(tensor, site, event_dim)
        plates = plates_of(site)
        sizes = [plate.size for plate in plates]
        event = tensor.shape[tensor.dim() - event_dim :]
        return tensor.reshape((self.particles, *sizes, *event))

    def pointwise(self, site: Any) -> Tensor:
        """ln density of the site's values under the model, by plate; enumeration summed out."""
        model = self.model_site(site)
        if not self.depends_on_enumerated(model):
            return self.by_plates(self.log_prob(model), model, 0)
        plates = tuple(plate for plate in plates_of(model))
        latents = {
            name: (s, self._factor(s))
            for name, s in self.model_sites.items()
            if name in self._summed and is_enumerated(s)
        }
        factors = {**latents, site["name"]: (model, self.log_prob(model))}
        layout = replace(self.layout, data_plates=plates, subsampled_inside=())
        shape = (self.particles, math.prod(plate.size for plate in plates))
        summed = Enumerated(factors, layout)
        for name, (s, _) in latents.items():
            if not {p.name for p in plates} <= {p.name for p in plates_of(s)}:
                raise ProgramError(
                    f"Site '{site['name']}' has no log-probability of its own for each element of "
                    f"its plates: they share the enumerated site '{name}'."
                )
        return summed.log_evidence(shape).reshape((self.particles, *(p.size for p in plates)))


def _same_weighting(guide_site: Any, model_site: Any) -> bool:
    """Whether ln q and ln p of a site carry the same mask and the same scale."""
    if any(unmasked(site["fn"]) is not site["fn"] for site in (guide_site, model_site)):
        return False  # whose masks only a look at their values could compare
    mask = guide_site["mask"] is model_site["mask"]
    first, second = user_scale(guide_site), user_scale(model_site)
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return mask and guide_site["scale"] is model_site["scale"]
    return mask and math.isclose(first, second, rel_tol=1e-12)


def _closed_kl(q: Any, p: Any) -> Tensor | None:
    if is_point({"fn": q}):  # Pyro's rule for Delta leaves out its log-density
        return None
    try:
        if q.batch_shape != p.batch_shape:  # some of torch's rules do not broadcast
            shape = torch.broadcast_shapes(q.batch_shape, p.batch_shape)
            q, p = q.expand(shape), p.expand(shape)
        return kl_divergence(q, p)
    except NotImplementedError:
        return None
