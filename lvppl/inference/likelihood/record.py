"""The record of weights that were summed batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lvppl.inference.likelihood.estimate import LikelihoodEstimate
from lvppl.inference.likelihood.job import Job
from lvppl.inference.likelihood.weights import Finished

__all__ = ["record_of"]


def record_of(
    job: Job,
    sums: Sequence[Finished],
    num_samples: int,
    notes: tuple[str, ...],
    *,
    estimator: str | None = None,
    **more: Any,
) -> LikelihoodEstimate:
    """Batches of rows side by side; ``more`` are further fields of the record."""
    discrete, continuous = (sum(part.observed[kind] for part in sums) for kind in (0, 1))
    return LikelihoodEstimate(
        log_prob=torch.cat([part.log_prob for part in sums]),
        std_error=torch.cat([part.std_error for part in sums]),
        ess=torch.cat([part.ess for part in sums]),
        khat=torch.cat([part.khat for part in sums]),
        num_samples=num_samples,
        estimator=estimator or job.proposal.name,
        seed=job.seed,
        num_discrete=discrete,
        num_continuous=continuous,
        notes=notes,
        **more,
    )
