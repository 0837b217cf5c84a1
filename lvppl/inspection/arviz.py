r"""A fit as ArviZ sees it: InferenceData in ArviZ 0.2x, an xarray DataTree in ArviZ 1.x.

Draws come from q and are independent, so they form one chain. Where the program has global latents
the draws are resampled by importance, with Pareto smoothed weights

.. math:: w_s \propto p(\theta_s) \prod_n p(y_n \mid \theta_s) / q(\theta_s),

after the local latents, if any, have been integrated out of each p(y_n | theta_s). Leave-one-out
cross-validation (``az.loo``) is then what it claims to be. Where every latent is local and the
parameters are points it has no meaning, and the export says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from pyro import poutine
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.inference.em_fit import EMFit
from lvppl.inference.posterior import (
    Posterior,
    complete,
    observed_values,
    sample_posterior,
)
from lvppl.inference.psis import khat_threshold, psis
from lvppl.inspection.arviz_em import em_to_arviz
from lvppl.inspection.export import HELD_OUT, Export, attributes_of, inside, plain
from lvppl.missing import with_missing
from lvppl.seeding import RandomStream
from lvppl.terms import Site, Terms, trace_terms
from lvppl.tracing import is_point, undisturbed

__all__ = ["to_arviz"]

Program = Callable[..., Any]


def to_arviz(
    fit: Any,
    *data: Any,
    num_samples: int = 500,
    num_inner: int = 64,
    prior: bool = True,
    coords: Mapping[str, Sequence[Any]] | None = None,
    batch_size: int | None = None,
    seed: int | None = 0,
    **kwargs: Any,
) -> Any:
    """Export a fit to ArviZ.

    Groups: posterior, posterior_predictive, prior, prior_predictive, log_likelihood (pointwise, in
    nats, summed over event dimensions), sample_stats (``log_p`` = ln p(y, z), ``log_q`` =
    ln q(z | y), ``log_weight`` their difference), observed_data, constant_data. Dimensions are
    (chain, draw), then the plates of the site by name, then ``<site>_dim_0`` and so on.

    The attributes of every group say method, objective, seed, status, and what ``az.loo`` means:

    * global latents: draws are resampled by importance (attributes ``importance_khat``,
      ``importance_ess``) and ``az.loo`` works; local latents are integrated out of the pointwise
      likelihood by importance sampling from the guide given each draw of the globals, exactly
      where they are enumerated.
    * only local latents, parameters as points: LOO has no meaning; ``log_likelihood`` is then
      conditional on the local draws.

    A fit by :class:`lvppl.EM` has exact draws of its latents as its posterior, and what has no
    draws without chain and draw: ``log_evidence`` is ln p(y_n) of each datum, latents summed out
    (LOO has no meaning at point estimates); group ``responsibilities`` holds the posterior
    marginals, ``<site>_responsibilities``, (plates, ``<site>_state``); ``parameters`` the point
    estimates; ``restarts`` the objective, status and parameters of each start along the dimension
    ``restart``: starts are no chains.

    Args:
        fit: a fit; its ``model``, ``guide`` and parameters are used.
        data: the arguments of model and guide: those of training, or new ones.
        num_samples: draws.
        num_inner: draws of the local latents for each draw of the globals.
        prior: whether to draw prior and prior_predictive.
        coords: labels of plates (or event dimensions), by name.
        batch_size: rows of the data held at once, where every latent is local.
        seed: of the draws.
        kwargs: keyword arguments of model and guide.

    Returns:
        ``arviz.InferenceData`` (ArviZ before 1.0) or ``xarray.DataTree``.

    Raises:
        ProgramError: model, guide and data do not fit each other.

    Source: Vehtari, Gelman & Gabry (2017), Statistics and Computing 27; Vehtari et al. (2024),
    JMLR 25:72.
    """
    if num_inner < 2:
        raise ProgramError(f"num_inner must be at least 2, not {num_inner}")
    if isinstance(fit, EMFit):
        options: dict[str, Any] = {"num_samples": num_samples, "prior": prior, "seed": seed}
        return em_to_arviz(fit, *data, coords=coords, batch_size=batch_size, **options, **kwargs)
    with inside(fit, data) as data:
        missing = getattr(fit, "settings", {}).get("missing")
        model, guide = with_missing(fit.model, fit.guide, missing)
        pair = _Pair.of(model, guide, data, kwargs)
        if not pair.is_global:
            draws, notes = _local(pair, num_samples, batch_size, seed)
        elif pair.locals:
            draws, notes = _global_and_local(pair, num_samples, num_inner, seed)
        else:
            draws, notes = _global(pair, num_samples, seed)
        export = Export(coords or {})
        _add_draws(export, draws, _point_estimates(fit))
        if prior and not pair.factors:
            export.prior(fit.model, data, kwargs, num_samples, seed)
        elif prior:
            why = f"no prior groups: pyro.factor {', '.join(pair.factors)} cannot be sampled"
            draws = replace(draws, notes=(*draws.notes, why))
        export.observed(pair.model, data, kwargs, draws.observed, draws.plates)
    attrs = {**attributes_of(fit, seed), **notes, "notes": "; ".join(draws.notes)}
    return export.convert(plain(attrs))


# ----------------------------------------------------------------------------- what kind of program


@dataclass(frozen=True)
class _Pair:
    """A model and its guide on these data, and which of their latents are global."""

    model: Program
    guide: Program | None
    data: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    plates: tuple[str, ...]
    """Plates that every observed site lies in: their elements are what LOO leaves out."""
    globals: tuple[str, ...]
    """Latents outside some of these plates, auxiliary ones included."""
    locals: tuple[str, ...]
    """Latents inside all of them, auxiliary ones included; enumerated ones left out."""
    parameters: tuple[str, ...]
    """Parameters of the model: points, not draws."""
    factors: tuple[str, ...]
    """Sites of ``pyro.factor``: they weigh the model, so that its prior cannot be sampled."""
    global_factors: tuple[str, ...]
    """Those outside some of the plates: they weigh the global latents."""
    joint: str
    """Why locals cannot be told from globals; empty where they can."""

    @property
    def is_global(self) -> bool:
        return bool(self.globals)

    @staticmethod
    def of(
        model: Program, guide: Program | None, data: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> _Pair:
        with undisturbed():
            terms = trace_terms(model, guide, data, kwargs)
            params = poutine.block(poutine.trace(model, param_only=True).get_trace)(*data, **kwargs)
        observed = list(observed_values(terms).values())
        plates: tuple[str, ...] = ()
        if observed:
            common = set.intersection(*(set(site.plates) for site in observed))
            plates = tuple(name for name in observed[0].plates if name in common)

        def is_local(site: Site) -> bool:
            return bool(plates) and set(plates) <= set(site.plates)

        inside = {name: is_local(site) for name, site in terms.latents.items()}
        factors = sorted(terms.observed.keys() - {site.name for site in observed})
        outside = tuple(name for name in factors if not is_local(terms.observed[name]))
        return _Pair(
            model,
            guide,
            data,
            kwargs,
            plates,
            globals=tuple(name for name, local in inside.items() if not local),
            locals=tuple(name for name, local in inside.items() if local),
            parameters=tuple(params.param_nodes),
            factors=tuple(factors),
            global_factors=outside,
            joint=_joint(terms, inside) or _coupled(model, data, kwargs, inside, outside),
        )

    def only_globals(self) -> _Pair:
        """The pair with local latents and observations out of sight: p(theta) and q(theta)."""
        shown = [*self.globals, *self.global_factors]
        return self._through(lambda program: poutine.block(program, expose=shown))

    def given(self, values: dict[str, Tensor]) -> _Pair:
        """The pair with its global latents held at ``values``: only the locals are in sight.

        ``values`` may be changed in place afterwards: the programs, and what is known of their
        structure, stay the same.
        """
        hidden = [*self.globals, *self.global_factors]
        return self._through(
            lambda program: poutine.block(poutine.condition(program, data=values), hide=hidden)
        )

    def _through(self, handler: Callable[[Program], Program]) -> _Pair:
        guide = None if self.guide is None else handler(self.guide)
        return replace(self, model=handler(self.model), guide=guide)


def _joint(terms: Terms, inside: Mapping[str, bool]) -> str:
    """Why ln q of a local site cannot be had by itself, if so.

    An automatic guide over all sites at once draws one auxiliary vector outside every plate and
    cuts the sites out of it as points.
    """
    for run in terms._runs:
        for name, local in inside.items():
            point = is_point(run.guide_sites[name])
            if local and point and not terms.latents[name].is_auxiliary:
                in_plate = inside.get(f"{name}_unconstrained", False)
                is_drawn = name in run.model_sites and not is_point(run.model_sites[name])
                if is_drawn and not in_plate:
                    return f"the guide draws the local latent '{name}' outside its plate"
    return ""


def _coupled(
    model: Program,
    data: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    inside: Mapping[str, bool],
    factors: Sequence[str],
) -> str:
    """Which factor outside the plates weighs local latents, if one does: it is seen to move."""
    if not factors or not any(inside.values()):
        return ""
    with undisturbed(), poutine.block():
        first = poutine.trace(model).get_trace(*data, **kwargs)
        drawn: Any = {
            n: first.nodes[n]["value"]
            for n, local in inside.items()
            if n in first.nodes and not local
        }
        again = poutine.trace(poutine.condition(model, data=drawn)).get_trace(*data, **kwargs)
    for name in factors:
        before, after = (cast(Any, trace.nodes[name]["fn"]) for trace in (first, again))
        if not torch.equal(before.log_factor, after.log_factor):
            return f"pyro.factor '{name}' weighs local latents outside their plate"
    return ""


# --------------------------------------------------------------------------------------- the draws


@dataclass(frozen=True)
class _Draws:
    """What an export needs, draws first: arrays by site with their plates."""

    samples: dict[str, Tensor]
    predictive: dict[str, Tensor]
    log_likelihood: dict[str, Tensor]
    stats: dict[str, Tensor]
    observed: dict[str, Tensor]
    plates: dict[str, tuple[str, ...]]
    stat_plates: tuple[str, ...]
    likelihood_note: str
    joint_plates: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def resampled(self, index: Tensor) -> _Draws:
        def pick(group: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: value[index.to(value.device)] for name, value in group.items()}

        return replace(
            self,
            samples=pick(self.samples),
            predictive=pick(self.predictive),
            log_likelihood=pick(self.log_likelihood),
            stats=pick(self.stats),
        )


def _of_posterior(posterior: Posterior, note: str) -> _Draws:
    shape = (posterior.num_samples, *posterior.data_shape)
    return _Draws(
        samples=posterior.samples,
        predictive=posterior.predictive,
        log_likelihood=posterior.pointwise,
        stats={
            "log_p": (posterior.log_weight + posterior.log_guide).reshape(shape),
            "log_q": posterior.log_guide.reshape(shape),
            "log_weight": posterior.log_weight.reshape(shape),
        },
        observed=posterior.observed,
        plates=posterior.plates,
        stat_plates=posterior.data_plates,
        likelihood_note=note,
        notes=posterior.notes,
    )


def _local(
    pair: _Pair, num_samples: int, batch_size: int | None, seed: int | None
) -> tuple[_Draws, dict[str, Any]]:
    """Every latent is local: draws from q as they are, and no LOO."""
    posterior = sample_posterior(
        pair.model,
        pair.guide,
        *pair.data,
        num_samples=num_samples,
        batch_size=batch_size,
        seed=seed,
        **pair.kwargs,
    )
    if pair.locals:
        note = "ln p(y | z) at z ~ q(z | y): conditional on local latents, not a marginal; no LOO"
    else:
        note = "ln p(y), with enumerated latents summed out, at point parameters; no LOO"
    return _of_posterior(posterior, note), {"loo": _no_loo(pair)}


def _no_loo(pair: _Pair) -> str:
    why = "there are no draws of global parameters"
    if pair.parameters:
        why = f"the parameters are point estimates ({', '.join(pair.parameters)[:300]})"
    return f"no meaning: {why} and every latent is local to its datum; {HELD_OUT}"


def _global(pair: _Pair, num_samples: int, seed: int | None) -> tuple[_Draws, dict[str, Any]]:
    """Every continuous latent is global: the pointwise likelihood is direct."""
    posterior = sample_posterior(
        pair.model, pair.guide, *pair.data, num_samples=num_samples, seed=seed, **pair.kwargs
    )
    draws = _of_posterior(posterior, "ln p(y_n | global latents), enumerated latents summed out")
    return _reweighted(pair, draws, posterior.log_weight.sum(-1), seed)


def _global_and_local(
    pair: _Pair, num_samples: int, num_inner: int, seed: int | None
) -> tuple[_Draws, dict[str, Any]]:
    """Global latents from q, and for each draw the locals integrated out from q given it."""
    if pair.joint or not pair.plates:
        posterior = sample_posterior(
            pair.model, pair.guide, *pair.data, num_samples=num_samples, seed=seed, **pair.kwargs
        )
        why = pair.joint or "no plate holds all observed sites"
        draws = _of_posterior(posterior, "")
        notes = {
            "loo": f"not available: local latents cannot be integrated out, because {why}; "
            f"log_likelihood is left out and the draws are those of the guide; {HELD_OUT}"
        }
        return replace(draws, log_likelihood={}), notes
    outer = pair.only_globals()
    held: dict[str, Tensor] = {}
    given = pair.given(held)
    with RandomStream(seed), torch.no_grad():
        terms = trace_terms(
            outer.model, outer.guide, pair.data, pair.kwargs, num_particles=num_samples
        )
        sites = {n: s for n, s in terms.latents.items() if not s.is_auxiliary}
        values = {name: site.value for name, site in sites.items()}
        log_ratio = terms.log_weight.sum(-1)
        log_guide = terms.log_guide.sum(-1)
        inner = []
        for i in range(num_samples):
            held.update({name: value[i] for name, value in values.items()})
            inner.append(_integrated(given, num_inner))
    pointwise = torch.stack([one.log_marginal for one in inner])
    log_weight = log_ratio + pointwise.flatten(1).sum(-1)
    first = inner[0]
    name = next(iter(first.observed)) if len(first.observed) == 1 else "all_observed"
    draws = _Draws(
        samples={**values, **_stacked([one.samples for one in inner])},
        predictive=_stacked([one.predictive for one in inner]),
        log_likelihood={name: pointwise},
        stats={"log_p": log_weight + log_guide, "log_q": log_guide, "log_weight": log_weight},
        observed=first.observed,
        plates={**{n: s.plates for n, s in sites.items()}, **first.plates},
        stat_plates=(),
        likelihood_note=(
            "ln p(y_n | global latents): local latents integrated out by importance sampling from "
            f"the guide, {num_inner} draws each, for each element of ({', '.join(pair.plates)})"
        ),
        joint_plates=pair.plates,
        notes=first.notes,
    )
    return _reweighted(pair, draws, log_weight, seed)


@dataclass(frozen=True)
class _Inner:
    """One draw of the globals: ln p(y_n | theta), and one draw of the locals for each datum."""

    log_marginal: Tensor
    samples: dict[str, Tensor]
    predictive: dict[str, Tensor]
    observed: dict[str, Tensor]
    plates: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]


def _integrated(given: _Pair, num_inner: int) -> _Inner:
    """ln p(y_n | theta) = ln mean_k w_nk; each datum keeps one of the k draws, by weight."""
    terms = trace_terms(
        given.model,
        given.guide,
        given.data,
        given.kwargs,
        num_particles=num_inner,
        data_plate=given.plates,
    )
    sizes = tuple(plate.size for plate in terms.layout.data_plates)
    log_weight = terms.log_weight.reshape(num_inner, *sizes)
    log_marginal = log_weight.logsumexp(0) - math.log(num_inner)
    noise = -torch.empty_like(log_weight).exponential_().log()
    chosen = (log_weight + noise).argmax(0)  # Gumbel: index k with probability w_k / sum w
    plates = {n: s.plates for n, s in {**terms.latents, **terms.observed}.items()}
    samples = {n: s.value for n, s in terms.latents.items() if not s.is_auxiliary}
    drawn = complete(terms, given.model, given.data, given.kwargs)
    samples, plates = {**samples, **drawn.enumerated}, {**plates, **drawn.plates}

    def pick(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: _chosen(value, chosen, terms.data_plates, plates[name])
            for name, value in group.items()
        }

    return _Inner(
        log_marginal=log_marginal,
        samples=pick(samples),
        predictive=pick(drawn.predictive),
        observed={name: site.observed[0] for name, site in observed_values(terms).items()},
        plates=plates,
        notes=terms.notes,
    )


def _chosen(
    value: Tensor, index: Tensor, data_plates: tuple[str, ...], plates: tuple[str, ...]
) -> Tensor:
    """value[index[n], ..., n, ...]: one particle for each element of the data plates."""
    order = [plates.index(name) for name in data_plates]
    rest = [dim for dim in range(value.dim() - 1) if dim not in order]
    moved = value.permute(0, *(1 + dim for dim in order + rest))
    shaped = index.reshape(1, *index.shape, *(1 for _ in rest)).expand(1, *moved.shape[1:])
    picked = moved.gather(0, shaped)[0]
    back = sorted(range(len(order + rest)), key=lambda i: (order + rest)[i])
    return picked.permute(back)


def _stacked(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


# ------------------------------------------------------------------------------------- reweighting


def _reweighted(
    pair: _Pair, draws: _Draws, log_weight: Tensor, seed: int | None
) -> tuple[_Draws, dict[str, Any]]:
    """Importance resampling of the draws of q towards the posterior of the globals."""
    points = [name for name in pair.globals if _is_constant(draws.samples.get(name))]
    if points:
        return draws, {
            "loo": f"no meaning: the global latents {', '.join(points)} are point estimates; "
            f"{HELD_OUT}"
        }
    smoothed, khat = psis(log_weight.detach().double())
    weights = smoothed.exp() / smoothed.exp().sum()
    ess = 1.0 / float((weights**2).sum())
    with RandomStream(seed):
        # Systematic resampling: equal weights keep every draw once. Copies stay side by side, so
        # that the effective sample size that ArviZ reports counts them as one.
        offset = torch.rand((), dtype=torch.float64, device="cpu")
    steps = (torch.arange(len(weights), dtype=torch.float64, device="cpu") + offset) / len(weights)
    index = torch.searchsorted(weights.cumsum(0).cpu(), steps).clamp(max=len(weights) - 1)
    limit = khat_threshold(len(weights))
    notes: dict[str, Any] = {
        "draws": "from the guide, resampled by Pareto smoothed importance weights p / q",
        "importance_khat": float(khat),
        "importance_khat_threshold": limit,
        "importance_ess": ess,
        "loo": "az.loo estimates the leave-one-out predictive density of the elements of "
        f"({', '.join(pair.plates)})",
    }
    if pair.parameters:
        notes["loo"] += f", given the point-estimated parameters {', '.join(pair.parameters)[:300]}"
    if float(khat) > limit:
        notes["loo"] = (
            f"unreliable: the importance weights of the guide have khat {float(khat):.2f}, above "
            f"{limit:.2f}; take a richer guide or more draws. {notes['loo']}"
        )
    if not pair.plates:
        notes["loo"] = f"no meaning: no plate holds all observed sites; {HELD_OUT}"
    if not draws.log_likelihood:
        notes["loo"] = "not available: see notes"
    return draws.resampled(index), notes


def _is_constant(value: Tensor | None) -> bool:
    return value is not None and value.is_floating_point() and bool((value == value[:1]).all())


# ------------------------------------------------------------------------------------- converting


def _add_draws(export: Export, draws: _Draws, point_estimates: Mapping[str, Tensor]) -> None:
    samples = draws.samples
    if not samples:
        # ArviZ's functions need a posterior; that of a program without latents is a point.
        count = len(draws.stats["log_p"])
        samples = {n: v.expand(count, *v.shape) for n, v in point_estimates.items()}
        note = "no latent sites: point estimates of the parameters, repeated"
        export.describe("posterior", posterior=note)
    export.drawn("posterior", samples, draws.plates)
    export.drawn("posterior_predictive", draws.predictive, draws.plates)
    plates = {n: draws.joint_plates or draws.plates[n] for n in draws.log_likelihood}
    export.drawn("log_likelihood", draws.log_likelihood, plates)
    export.describe("log_likelihood", log_likelihood=draws.likelihood_note, units="nats")
    export.drawn("sample_stats", draws.stats, dict.fromkeys(draws.stats, draws.stat_plates))


def _point_estimates(fit: Any) -> dict[str, Tensor]:
    params = getattr(fit, "params", None) or {}
    return {name: torch.as_tensor(value).detach() for name, value in params.items()}
