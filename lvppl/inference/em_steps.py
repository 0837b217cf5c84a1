"""The two half-steps of EM over all batches of a problem, at its present parameters."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lvppl.inference.e_step import Expectation, Mode, expected_log_joint
from lvppl.inference.em_problem import Batch, Problem
from lvppl.inference.gradient_step import raise_by_gradient
from lvppl.inference.m_step.averaging import AveragedStatistics
from lvppl.inference.m_step.statistics import Statistics

__all__ = ["Expected", "expectation", "maximise", "online_step"]


class Expected(NamedTuple):
    """What an E-step over all batches finds.

    Attributes:
        objective: the tracked quantity, nats.
        statistics: of the sites that have formulas.
        weights: of all sites, by batch and name, where some parameters go by gradient.
    """

    objective: float
    statistics: Statistics
    weights: list[dict[str, Tensor]]


def expectation(problem: Problem, mode: Mode) -> Expected:
    """The E-step."""
    total = torch.zeros((), dtype=torch.float64, device=problem.device)
    statistics = problem.m_step.statistics(problem.device)
    weights: list[dict[str, Tensor]] = []
    for batch in problem.batches:
        objective = problem.fast(batch, mode, statistics)
        if objective is None:
            found = Expectation.of(
                problem.program, batch, problem.kwargs, problem.layout(batch), mode
            )
            objective = found.objective
            problem.gather(batch, found.terms, statistics)
            if problem.m_step.by_gradient:
                weights.append({term.name: term.weight for term in found.terms})
        total = total + objective.to(total.device)
    return Expected(float(total + problem.latents.log_prob()), statistics, weights)


def maximise(problem: Problem, found: Expected, *, num_gradient_steps: int) -> None:
    """The M-step, in place: formulas first, then a climb in what has none."""
    problem.m_step.maximise(found.statistics)
    names = problem.m_step.by_gradient
    if not names or not found.weights:
        return

    def expected() -> Tensor:
        parts = [
            expected_log_joint(
                problem.program, batch, problem.kwargs, problem.layout(batch), weight
            )
            for batch, weight in zip(problem.batches, found.weights, strict=True)
        ]
        return torch.stack(parts).sum() + problem.latents.log_prob()

    raise_by_gradient(
        expected,
        [problem.parameters[name].tensor for name in names],
        num_steps=num_gradient_steps,
    )


def online_step(problem: Problem, batch: Batch, mode: Mode, average: AveragedStatistics) -> float:
    """Both on one batch, with what it says averaged into what the others said; its objective."""
    layout = problem.layout(batch)
    size = max(math.prod(p.size for p in layout.data_plates), 1)
    new = problem.m_step.statistics(problem.device)
    objective = problem.fast(batch, mode, new)
    if objective is None:
        found = Expectation.of(problem.program, batch, problem.kwargs, layout, mode)
        problem.gather(batch, found.terms, new)
        objective = found.objective
    problem.m_step.maximise(average.with_batch(new.scaled(problem.num_data / size)))
    return float(objective)
