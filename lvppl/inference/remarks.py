"""What is to be said of the end of an EM fit: states that are alike, variances at their floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lvppl.inference.e_step import traced_sites
from lvppl.inference.m_step.entries import Parameter
from lvppl.inference.m_step.plan import MStep
from lvppl.inference.states import ByState, by_state

__all__ = ["alike_states", "at_floors", "remarks"]

_MOST_NAMED = 5


def remarks(problem: Any) -> list[str]:
    """One sentence for each thing that a fit's end should not leave unsaid.

    Runs the program once a batch.
    """
    m_step: MStep = problem.m_step
    first: list[ByState] = []
    same: dict[str, Tensor] = {}
    for batch in problem.batches:
        sites = traced_sites(problem.program, batch, problem.kwargs, problem.layout(batch))
        arguments = by_state(sites, m_step.found)
        first = first or arguments
        for latent, pairs in _same(arguments, _tolerance(problem)).items():
            same[latent] = same[latent] & pairs if latent in same else pairs
    return [*alike_states(same, first, m_step), *at_floors(m_step, first)]


def _tolerance(problem: Any) -> float:
    """How far numbers without units may differ that are the same but for rounding."""
    dtypes = {parameter.tensor.dtype for parameter in problem.parameters.values()}
    return 1e-6 if dtypes <= {torch.float64} else 1e-4


# ------------------------------------------------------------------------------------- alike states


def _telling(arguments: Sequence[ByState]) -> list[ByState]:
    """The arguments by which data tell states apart: those of observed sites.

    Where no site that a latent bears upon is observed, they are those of the latents below it.
    """
    seen = {argument.latent for argument in arguments if argument.observed}
    return [a for a in arguments if a.observed or a.latent not in seen]


def _same(arguments: Sequence[ByState], tolerance: float) -> dict[str, Tensor]:
    """By latent, which states have the same values in all arguments and come alike, (K, K).

    States come alike where proportional columns lead to them, as of a transition matrix. Else what
    comes before weighs them differently from datum to datum, and EM parts them.
    """
    found: dict[str, Tensor] = {}

    def restrict(latent: str, rows: Tensor) -> None:
        pairs = torch.stack([(rows - one).abs().amax(-1) <= tolerance for one in rows])
        known = found.get(latent)
        found[latent] = pairs if known is None else known & pairs

    for argument in arguments:
        restrict(argument.latent, argument.value)
    for argument in arguments:
        child, columns = argument.site.split(".")[0], argument.value.mT
        if not argument.observed and child in found and len(columns) == len(found[child]):
            share = columns.abs().sum(1, keepdim=True)
            restrict(child, columns / share.clamp(min=torch.finfo(share.dtype).tiny))
    return found


def alike_states(
    same: Mapping[str, Tensor], arguments: Sequence[ByState], m_step: MStep
) -> list[str]:
    """Sets of states that have parameters of their own, and the same values in them.

    EM gives such states the same responsibilities up to a factor, and so the same parameters for
    ever: a saddle of ln p(y) where they were started alike.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for latent, pairs in same.items():
        own = [a for a in _telling(arguments) if a.latent == latent and a.entries is not None]
        for states in _classes(pairs):
            names = sorted({name for a in own for name in _differing(a, states, m_step)})
            if names:
                key = (_listed([str(state) for state in states]), _listed(list(map(repr, names))))
                found.setdefault(key, []).append(latent)
    return [
        f"states {states} of {_listed(list(map(repr, latents)))} are alike in {names}: EM cannot "
        "part what is alike. Start them apart, by init='kmeans++', init='random' or other first "
        "values, or use fewer"
        for (states, names), latents in found.items()
    ]


def _classes(pairs: Tensor) -> list[list[int]]:
    """Sets of two or more states that are the same as the first of them."""
    left = list(range(len(pairs)))
    found = []
    while left:
        states = [k for k in left if k == left[0] or bool(pairs[left[0], k])]
        left = [k for k in left if k not in states]
        found.append(states)
    return [states for states in found if len(states) > 1]


def _differing(argument: ByState, states: Sequence[int], m_step: MStep) -> list[str]:
    """The parameters of which these states have entries of their own in an argument."""
    assert argument.entries is not None
    mine = argument.entries[states]
    return m_step.names_of(mine[:, (mine != mine[0]).any(0)])


# -------------------------------------------------------------------------------- at their floors


def at_floors(m_step: MStep, arguments: Sequence[ByState]) -> list[str]:
    """The components whose variance is the smallest that an M-step may find."""
    states = _by_rows(m_step, arguments)
    found = []
    for name, row, floor in m_step.at_floors():
        of_row = f"component {row} of '{name}'" if name in states else f"'{name}'[{row}]"
        found.append(f"{of_row if row is not None else repr(name)} ({floor})")
    if not found:
        return []
    return [f"at the smallest variance that floor={m_step.floor:g} allows: {_listed(found)}"]


def _by_rows(m_step: MStep, arguments: Sequence[ByState]) -> set[str]:
    """Parameters of which each state has a row."""
    found = set()
    for argument in arguments:
        if argument.entries is None:
            continue
        for name in m_step.names_of(argument.entries):
            parameter = m_step.parameters[name]
            if parameter.shape and _is_row_of_state(argument.entries, parameter):
                found.add(name)
    return found


def _is_row_of_state(entries: Tensor, parameter: Parameter) -> bool:
    place = entries - parameter.offset
    inside = (place >= 0) & (place < parameter.size)
    row = place.div(parameter.size // parameter.shape[0], rounding_mode="floor")
    return bool((~inside | (row == torch.arange(len(row))[:, None])).all())


def _listed(items: Sequence[str]) -> str:
    """All of a few, the first of many."""
    if len(items) == 1:
        return items[0]
    if len(items) <= _MOST_NAMED:
        return f"{', '.join(items[:-1])} and {items[-1]}"
    return f"{', '.join(items[: _MOST_NAMED - 1])} and {len(items) - _MOST_NAMED + 1} more"
