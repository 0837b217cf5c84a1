"""ln p(y) as Pyro's own enumeration finds it: an oracle for the evidence of models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from pyro.infer import TraceEnum_ELBO
from torch import Tensor

__all__ = ["assert_same_gradients", "assert_sums_to", "pyro_evidence"]


def pyro_evidence(
    model: Callable[..., Any], *data: Any, nesting: int = 1, particles: int | None = None
) -> Tensor:
    """ln p(y) of all data, every latent summed out by Pyro: 0-dim, differentiable.

    Args:
        nesting: how deep plates lie in each other.
        particles: so many runs at once, in an outer plate, whose mean it is.
    """
    options = {"num_particles": particles, "vectorize_particles": True} if particles else {}
    elbo = TraceEnum_ELBO(max_plate_nesting=nesting, **options)
    return -elbo.differentiable_loss(model, lambda *data: None, *data)


def assert_sums_to(
    evidence: Tensor, model: Any, *data: Any, nesting: int = 1, particles: int | None = None
) -> None:
    """A model's own evidence, (data,), is Pyro's, and so are its gradients."""
    found = pyro_evidence(model, *data, nesting=nesting, particles=particles)
    torch.testing.assert_close(found, evidence.sum(), rtol=0, atol=1e-8)
    assert_same_gradients(found, evidence.sum(), model.parameters())


def assert_same_gradients(a: Tensor, b: Tensor, parameters: Iterable[Tensor]) -> None:
    parameters = list(parameters)
    gradients = (torch.autograd.grad(value, parameters) for value in (a, b))
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-8)
