"""Can ln P(y) be computed exactly, at what cost, or how is it to be estimated?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer import config_enumerate

from lvppl.enumerated import Enumerated
from lvppl.errors import ProgramError
from lvppl.factor_graph import NothingLarge, TooLarge, graph_of
from lvppl.layout import layout_of
from lvppl.linear_gaussian import gaussian_law
from lvppl.sweep.joint import states_of
from lvppl.tracing import is_discrete, is_enumerated, sample_sites, trace_pair, undisturbed

__all__ = ["Verdict", "verdict_on_evidence"]

Program = Callable[..., Any]


@dataclass(frozen=True)
class Verdict:
    """What can be said of P(y), the marginal of the observed sites.

    Attributes:
        kind: "exact" (a finite sum, or linear-Gaussian), "estimated" or "not computable".
        sentence: how, at what cost, or why not.
        num_terms: terms of the exact sum over the whole data set after elimination, else ``None``.
    """

    kind: str
    sentence: str
    num_terms: int | None = None


def verdict_on_evidence(
    model: Program,
    args: Any,
    kwargs: Any,
    trace: poutine.Trace,
    rows: Sequence[Any],
    *,
    has_guide: bool,
) -> Verdict:
    if not all(row.computable for row in rows):
        return Verdict("not computable", "a density above is missing.")
    latents = [site for site in sample_sites(trace) if not site["is_observed"]]
    if not latents:
        return Verdict("exact", "there is no latent: P(y) is one evaluation.", 1)
    if all(site["fn"].has_enumerate_support for site in latents):
        return _finite_sum(model, args, kwargs, latents)
    if _is_linear_gaussian(model, args, kwargs, latents):
        return Verdict(
            "exact",
            "what depends on a Gaussian latent is Normal with a mean affine in it and a fixed "
            "covariance: linear-Gaussian algebra gives ln P(y).",
        )
    if all(is_discrete(site) for site in latents):
        states = _joint_states(model, args, kwargs)
        if states is not None:
            return Verdict(
                "exact",
                f"a sum over the {states:,} joint states of each datum (log_likelihood, "
                "estimator='exact').",
            )
    factor = next((row.name for row in rows if row.role == "factor"), None)
    if factor is not None:
        return Verdict(
            "estimated",
            f"'{factor}' leaves the normaliser of P(z) unknown; annealed "
            "importance sampling estimates it.",
        )
    how = (
        "by importance sampling from the guide (log_likelihood, estimator='importance')"
        if has_guide
        else "by the naive average over the prior; with a guide, by importance sampling"
    )
    kinds = ", ".join(f"'{s['name']}'" for s in latents if not s["fn"].has_enumerate_support)
    return Verdict("estimated", f"the integral over {kinds} has no closed form known here: {how}.")


_MOST_ELEMENTS = 10**7
_MOST_SWEPT = 2**26  # as of any program; two forms are swept beyond


def _finite_sum(model: Program, args: Any, kwargs: Any, latents: list[Any]) -> Verdict:
    states = _count(sum(_log10_states(site) for site in latents))
    try:
        # what is marked for enumeration will be summed in any case
        marked = all(is_enumerated(site) for site in latents)
        with nullcontext() if marked else NothingLarge(_MOST_ELEMENTS):
            terms = _number_of_terms(model, args, kwargs)
    except Exception as error:  # the program cannot be enumerated in parallel: that is the answer
        causes = (error, error.__cause__, error.__context__)
        if any(isinstance(cause, TooLarge) for cause in causes):
            why = f"a table of more than {_MOST_ELEMENTS:,} elements would be needed"
        else:
            text = str(error).strip().splitlines()
            why = f"the program cannot be enumerated in parallel ({text[0] if text else error})"
        return Verdict("estimated", f"the latents have {states} joint states, but {why}.")
    return Verdict(
        "exact",
        f"a sum over the discrete latents, {terms:,} terms after variable elimination ({states} "
        "joint states).",
        terms,
    )


def _number_of_terms(model: Program, args: Any, kwargs: Any) -> int:
    enumerated = config_enumerate(model, "parallel")
    layout = layout_of(enumerated, None, args, kwargs)
    trace, _ = trace_pair(
        enumerated, None, args, kwargs, nesting=layout.nesting, enumerate_sites=True
    )
    factors = {}
    for site in sample_sites(trace):
        log_prob = site["fn"].log_prob(site["value"])
        if log_prob.dim() > layout.nesting:
            factors[site["name"]] = (site, log_prob)
    return Enumerated(factors, layout).cost()[0]


def _joint_states(model: Program, args: Any, kwargs: Any) -> int | None:
    """Of one datum, where every latent is finite and a sweep over them is not hopeless."""
    try:
        size = int(states_of(model, args, kwargs, layout_of(model, None, args, kwargs)).size)
    except ProgramError:
        return None
    return size if size <= _MOST_SWEPT else None


def _log10_states(site: Any) -> float:
    """log10 of the joint states of all draws of a site."""
    fn = site["fn"]
    states = int(fn.enumerate_support(expand=False).shape[0])
    return math.log10(states) * max(math.prod(fn.batch_shape), 1)


def _count(log10: float) -> str:
    return f"{round(10**log10):,}" if log10 < 9 else f"about 10^{round(log10):,}"


def _is_linear_gaussian(model: Program, args: Any, kwargs: Any, latents: Sequence[Any]) -> bool:
    """Whether the Gaussian latents are integrated, and all others summed, by elimination."""
    if not any(gaussian_law(site["fn"]) for site in latents):
        return False
    try:
        with undisturbed(), torch.no_grad():
            return bool(graph_of(model, args, kwargs).groups)
    except ProgramError:
        return False
