"""Does a program keep its meaning when all particles run in one batch?

A particle dimension may break a program (``torch.cat([z, x])``), or silently change it (a sum over
dimension 0, batch statistics). So two particles are run in one batch, and each alone at the same
values: every log-probability must agree.
"""

from __future__ import annotations

from textwrap import shorten
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from lvppl.tracing import Program, is_point, sample_sites, trace_pair

__all__ = ["why_looped"]


def why_looped(model: Program, guide: Program | None, args: Any, kwargs: Any, nesting: int) -> str:
    """Run two particles in one batch and each alone at the same values; why they differ, or ""."""
    try:
        batch = trace_pair(model, guide, args, kwargs, nesting=nesting, num_particles=2)
        together = [_log_probs(trace) for trace in batch]  # now: flows forget all but the last draw
        for particle in range(2):
            alone = _replay_alone(model, guide, args, kwargs, batch, particle, nesting)
            for trace, found in zip(alone, together, strict=True):
                reason = _difference(found, _log_probs(trace), particle, nesting)
                if reason:
                    return reason
    except Exception as error:  # whatever it cannot bear, it then runs particle by particle
        return f"the program fails with a particle dimension ({_first_line(error)})"
    return ""


def _replay_alone(
    model: Program,
    guide: Program | None,
    args: Any,
    kwargs: Any,
    batch: tuple[poutine.Trace, poutine.Trace],
    particle: int,
    nesting: int,
) -> tuple[poutine.Trace, poutine.Trace]:
    values = poutine.Trace()
    for trace in batch:
        nodes: dict[str, Any] = dict(trace.nodes)
        for name, site in nodes.items():
            if site["type"] == "sample" and not site["is_observed"]:
                value = _slice(site["value"], particle, nesting, site["fn"])
                values.nodes[name] = {**site, "value": value}
    alone = [
        poutine.trace(poutine.replay(program, trace=values)).get_trace(*args, **kwargs)
        if program is not None
        else poutine.Trace()
        for program in (model, guide)
    ]
    return alone[0], alone[1]


def _slice(value: Tensor, particle: int, nesting: int, fn: Any) -> Tensor:
    if type(fn).__name__ == "_Subsample":
        return value
    dim = -1 - nesting - fn.event_dim
    return value.select(dim, particle) if value.dim() >= -dim else value


def _log_probs(trace: poutine.Trace) -> dict[str, Tensor | None]:
    """Each site's log-probability; of a point, its location: it has no density around it.

    ``None`` where a flow without an inverse knows ln q at its own draws only.
    """
    found: dict[str, Tensor | None] = {}
    for site in sample_sites(trace):
        try:
            fn = site["fn"]
            found[site["name"]] = fn.mean if is_point(site) else fn.log_prob(site["value"])
        except (KeyError, NotImplementedError):
            found[site["name"]] = None
    return found


def _difference(
    together: dict[str, Tensor | None],
    alone: dict[str, Tensor | None],
    particle: int,
    nesting: int,
) -> str:
    if together.keys() != alone.keys():
        return "the program has other sites with a particle dimension"
    for name, want in alone.items():
        have = together[name]
        if want is None or have is None:
            continue
        if have.numel() == 2 * want.numel() and have.dim() > nesting:
            # the particle dimension is the leftmost of those in use
            have = have.reshape((2, *want.shape))[particle]
        if have.numel() != want.numel():
            return (
                f"site '{name}' has shape {tuple(have.shape)} with two particles and "
                f"{tuple(want.shape)} alone"
            )
        tolerance = 1e-8 if want.dtype == torch.float64 else 1e-3
        size = float(1.0 + want[want.isfinite()].abs().sum() / max(want.numel(), 1))
        same = torch.isclose(
            have.reshape(want.shape), want, rtol=tolerance, atol=size * tolerance, equal_nan=True
        )
        if not bool(same.all()):
            return f"site '{name}' has another log-probability with a particle dimension"
    return ""


def _first_line(error: BaseException) -> str:
    error = error.__cause__ or error
    text = str(error).strip().splitlines()
    name = type(error).__name__
    return shorten(f"{name}: {text[0]}", 120, placeholder=" …") if text else name
