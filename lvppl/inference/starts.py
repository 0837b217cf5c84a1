"""Where EM starts: from the program's parameters, or from an assignment of the data to states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lvppl.conjugate import Nodes
from lvppl.enumerated import num_states
from lvppl.errors import ProgramError
from lvppl.factor_graph import FactorGraph
from lvppl.inference.e_step import Expectation
from lvppl.inference.inner_latents import vectors_inside
from lvppl.inference.m_step.weighted import Weighted
from lvppl.tracing import is_discrete, plates_of

__all__ = ["INITS", "choose_centres", "start_of", "vectors_of"]

INITS = ("model", "kmeans++", "random")

_SOFTNESS = 0.1
"""Mass that a start leaves to the other states: a count of zero would stay zero for ever."""

_FAR = 1e3
"""Standard deviations of the data: at its square a variance keeps ten digits of float64."""

Centres = dict[tuple[int, int], tuple[Tensor, Tensor]]
"""Centres (K, features) and standard deviations (features,) by numbers of states and features."""


@torch.no_grad()
def start_of(init: str, problem: Any, settings: Any, seed: int) -> None:
    """Bring the parameters to a start, in place.

    Args:
        init: one of ``INITS``.
        problem, settings: of the run.
        seed: of the choice of centres.
    """
    if init == "model":
        return
    generator = torch.Generator().manual_seed(seed)
    centres: Centres = {}
    known = _largest_location(problem)
    bounded = _maximise_at(init, problem, settings, centres, generator)
    if _far(known, centres):  # moments about where the parameters were have lost the variances
        bounded = _maximise_at(init, problem, settings, centres, generator)
    if not bounded:
        raise ProgramError(
            "a start has a component whose variance is zero, so that its density has no bound: its "
            "data do not differ in a feature, or are no more than their features. EM(floor=1e-6) "
            "bounds variances; or use fewer states, or covariances that are diagonal or tied."
        )


def _maximise_at(
    init: str, problem: Any, settings: Any, centres: Centres, generator: torch.Generator
) -> bool:
    """An M-step with each datum assigned to its nearest centre; whether no variance is zero."""
    statistics = problem.m_step.statistics(problem.device)
    hard = settings.mode(0).hard
    for batch in problem.batches:
        layout = problem.layout(batch)
        graph = FactorGraph(problem.program, batch, problem.kwargs, layout)
        q = _assignments(graph, centres, init, generator, hard)
        terms = Expectation.clamped(problem.program, batch, problem.kwargs, layout, q)
        problem.gather(batch, terms, statistics)
    try:
        problem.m_step.maximise(statistics)
    except torch.linalg.LinAlgError:  # the locations were set before
        return False
    scales = {name for role in ("scale", "cholesky") for name in problem.m_step.with_role(role)}
    parameters = [problem.parameters[name] for name in scales]
    return all(bool(p.constraint.check(p.value).all()) for p in parameters)


def _largest_location(problem: Any) -> float:
    names = problem.m_step.with_role("location")
    return max((float(problem.parameters[name].value.abs().max()) for name in names), default=0.0)


def _far(location: float, centres: Centres) -> bool:
    """Whether data were so many of their widths from the locations that squares lose digits."""
    return any(
        bool((location + chosen.abs().amax(0) > _FAR * width)[width > 0].any())
        for chosen, width in centres.values()
    )


def _assignments(
    graph: FactorGraph,
    centres: Centres,
    init: str,
    generator: torch.Generator,
    hard: bool,
) -> dict[str, Tensor]:
    """For each latent that explains observed vectors, q of its states: (*plates, K)."""
    features = vectors_of(graph)
    groups: dict[tuple[int, int], list[str]] = {}
    for name, feature in features.items():
        groups.setdefault((_num_states(graph, name), feature.shape[-1]), []).append(name)
    if not groups:
        raise ProgramError(
            "init='kmeans++' and 'random' choose centres among observed vectors in the plates of a "
            "discrete latent, but no observed numeric site depends on one in the same plates "
            "(names of classes have no distance). Use init='model' and start the parameters in the "
            "program: by initial values that are drawn, pyro.param(name, lambda: torch.randn(K)), "
            "each seed of fit starts elsewhere."
        )
    q = {}
    for key, names in groups.items():
        rows = torch.cat([features[n].reshape(-1, key[1]) for n in names])
        if key not in centres:
            chosen = choose_centres(rows, key[0], init, generator)
            centres[key] = chosen, rows[rows.isfinite().all(-1)].std(0, correction=0)
        for name in names:
            like = graph.run.log_prob(graph.sites[name])  # in the precision of the program
            q[name] = _nearest(features[name], centres[key][0], hard).to(like)
    return q


def vectors_of(graph: FactorGraph) -> dict[str, Tensor]:
    """The observed vectors that latents explain, (..., features): by latent, or by the site of a
    chain that holds its states inside."""
    discrete = [n for n, site in graph.latents.items() if not isinstance(site["fn"], Nodes)]
    found = {name: _features_of(graph, name) for name in discrete}
    for name, site in graph.sites.items():
        if site["is_observed"] and name not in found and not _is_label(site):
            term = Weighted(name, site["fn"], site["value"], graph.run.log_prob(site).new_ones(()))
            found[name] = vectors_inside(term)
    return {name: vectors for name, vectors in found.items() if vectors is not None}


def _num_states(graph: FactorGraph, name: str) -> int:
    if name in graph.latents:
        return num_states(graph.latents[name])
    fn = graph.sites[name]["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return int(fn.initial_logits.shape[-1])


def _features_of(graph: FactorGraph, name: str) -> Tensor | None:
    """The vectors that a latent explains, (*plates, features)."""
    latent = graph.latents[name]
    symbol = latent["infer"]["_enumerate_dim"]
    plates = {plate.name for plate in plates_of(latent)}
    for site in graph.sites.values():
        ids = site["infer"].get("_dim_to_id", {})
        own = latent["infer"]["_dim_to_id"][symbol]
        if not site["is_observed"] or own not in ids.values() or _is_label(site):
            continue
        log_prob = graph.run.log_prob(site)
        here = {plate.name for plate in plates_of(site)}
        dims = {v: k for k, v in ids.items()}
        apart = log_prob.dim() >= -dims[own] and log_prob.shape[dims[own]] > 1
        if not plates <= here or not (apart or num_states(latent) == 1):
            continue
        value = graph.run.by_plates(site["value"], site, site["fn"].event_dim)[0].double()
        if isinstance(site["mask"], Tensor):  # what is masked explains nothing
            kept = graph.run.by_plates(site["mask"], site, 0)[0]
            kept = kept.reshape(kept.shape + (1,) * site["fn"].event_dim)
            value = torch.where(kept, value, torch.nan)
        names = [plate.name for plate in plates_of(site)]
        front = [i for i, n in enumerate(names) if n in plates]
        rest = [i for i in range(value.dim()) if i not in front]
        value = value.permute(front + rest)
        return value.reshape(*value.shape[: len(front)], -1)
    return None


def _is_label(site: Mapping[str, Any]) -> bool:
    """Whether values are names of classes, whose distance means nothing."""
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    fn = getattr(fn, "observation_dist", fn)
    return is_discrete(site) and "Categorical" in type(fn).__name__


def choose_centres(rows: Tensor, count: int, init: str, generator: torch.Generator) -> Tensor:
    """K of the data: uniformly, or one after another ∝ squared distance to the nearest so far.

    Source: Arthur and Vassilvitskii 2007, "k-means++: the advantages of careful seeding".
    """
    rows = rows[rows.isfinite().all(-1)]
    if len(rows) < count:
        raise ProgramError(
            f"a start needs at least as many data as states: {len(rows)} data came, for {count} "
            "states. Use fewer states, or init='model'."
        )
    if init == "random":
        return rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)]
    first = int(torch.randint(len(rows), (1,), generator=generator))
    chosen = [rows[first]]
    distance = (rows - chosen[0]).square().sum(-1)
    for _ in range(count - 1):
        total = distance.cumsum(0)
        if float(total[-1]) <= 0:
            raise ProgramError(
                f"a start needs {count} different data, but only {len(chosen)} of the {len(rows)} "
                "rows differ. Use fewer states, or init='model'."
            )
        point = torch.rand((), generator=generator, dtype=total.dtype).to(total.device) * total[-1]
        chosen.append(rows[int(torch.searchsorted(total, point).clamp(max=len(rows) - 1))])
        distance = torch.minimum(distance, (rows - chosen[-1]).square().sum(-1))
    return torch.stack(chosen)


def _nearest(features: Tensor, centres: Tensor, hard: bool) -> Tensor:
    """q of each datum's states: nearly all mass at the nearest centre."""
    features = features.nan_to_num(0.0)
    distance = torch.cdist(features.reshape(-1, features.shape[-1]), centres)
    index = distance.argmin(-1).reshape(features.shape[:-1])
    q = torch.nn.functional.one_hot(index, len(centres)).to(features)
    return q if hard else (1 - _SOFTNESS) * q + _SOFTNESS / len(centres)
